"""The safetensors container, read and written by its header alone, so that no tensor is ever in memory as a whole.

A file is: 8 bytes little-endian header length, a JSON header naming each tensor's dtype, shape and byte range, then
the bytes. A pack's resident weights are such a file, and so are the shards of a source checkpoint. Only the header is
handled here; whoever wants data reads the byte range it names. Stricter than the format asks: ranges must cover the
data without hole, overlap or rest.

    for spec in read_tensor_header(Path("resident.safetensors")).tensors.values(): print(spec.name, spec.shape)
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepack.layout.geometry import align_up
from moepack.layout.spec import (
    DTYPE_BYTES,
    MAX_DIMENSION,
    MAX_FILE_BYTES,
    MAX_JSON_DEPTH,
    MAX_TENSOR_DIMENSIONS,
    MAX_TENSOR_HEADER_BYTES,
    MAX_TENSOR_NAME,
    SECTION_ALIGNMENT,
)

LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorSpec:
    """One tensor in a file: offset_bytes counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class TensorHeader:
    """The validated header of one file. header_bytes includes the length field: the data starts there."""

    header_bytes: int
    size_bytes: int
    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]


def read_tensor_header(path: Path) -> TensorHeader:
    """Read and validate a safetensors header against the file's size.

    Raises ValueError saying what is wrong with the file (without its name); OSError passes through.
    """
    with open(path, "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes < LENGTH_BYTES:
            raise ValueError(f"is {size_bytes} bytes long, too short for a safetensors header")
        (json_bytes,) = struct.unpack("<Q", file.read(LENGTH_BYTES))
        if json_bytes > min(size_bytes - LENGTH_BYTES, MAX_TENSOR_HEADER_BYTES):
            raise ValueError(f"header length {json_bytes} does not fit in a file of {size_bytes} bytes")
        raw = file.read(json_bytes)
    header_bytes = LENGTH_BYTES + json_bytes
    header = parse_json_object(raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    tensors = {name: _tensor_spec(name, entry, header_bytes) for name, entry in header.items()}
    end = header_bytes
    for spec in sorted(tensors.values(), key=lambda spec: (spec.offset_bytes, spec.size_bytes)):
        if spec.offset_bytes != end:
            kind = "overlaps the tensor before it" if spec.offset_bytes < end else "leaves a hole before it"
            raise ValueError(f"tensor {spec.name} starts at byte {spec.offset_bytes}, expected {end}: it {kind}")
        end += spec.size_bytes
    if end != size_bytes:
        what = "the file is truncated" if size_bytes < end else "bytes follow the last tensor"
        raise ValueError(f"is {size_bytes} bytes long, its header needs {end}: {what}")
    return TensorHeader(header_bytes, size_bytes, tensors, metadata)


def layout_tensors(
    arrays: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, list[TensorSpec]]:
    """Place arrays (name, dtype, shape) in a file: the header's bytes, and the specs in the order of the data.

    Wide elements first, then by name, so that every tensor is aligned to its elements; the data starts on a
    multiple of 64 bytes. The same arrays give the same bytes, in whatever order they come.
    """
    ordered = sorted(arrays, key=lambda array: (-DTYPE_BYTES[array[1]], array[0]))
    entries, end = {}, 0
    for name, dtype, shape in ordered:
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    note = {"__metadata__": metadata} if metadata else {}
    text = json.dumps(note | entries, separators=(",", ":")).encode()
    header_bytes = align_up(LENGTH_BYTES + len(text), SECTION_ALIGNMENT)
    header = struct.pack("<Q", header_bytes - LENGTH_BYTES) + text.ljust(header_bytes - LENGTH_BYTES)
    return header, [_tensor_spec(name, entry, header_bytes) for name, entry in entries.items()]


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, at most MAX_JSON_DEPTH levels.

    Raises ValueError for anything else.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"key {repeated[:80]!r} stands twice")
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else refuse(text)

    try:
        text = raw.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
        if "\\ud" in text or "\\uD" in text:  # escapes that may leave half a character
            json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no text") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: byte {error.start} of {len(raw)}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"expected a JSON object, found {type(parsed).__name__}")
    _check_depth(parsed)
    return parsed


def check_tensor_name(name: str) -> None:
    """Raise ValueError for a name that would break a line or a terminal."""
    if not name.isprintable() or not 0 < len(name) <= MAX_TENSOR_NAME:
        raise ValueError(f"tensor name {name[:80]!r} is not 1 to {MAX_TENSOR_NAME} printable characters")


def _check_depth(root: dict[str, Any]) -> None:
    level: list[Any] = [root]
    for _ in range(MAX_JSON_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")


def _tensor_spec(name: str, entry: object, data_start: int) -> TensorSpec:
    check_tensor_name(name)
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError(f"tensor {name} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name} has the unknown dtype {repr(dtype)[:80]}")
    if not _are_sizes(shape, MAX_DIMENSION) or len(shape) > MAX_TENSOR_DIMENSIONS:
        raise ValueError(f"tensor {name} has the impossible shape {repr(shape)[:80]}")
    if not _are_sizes(offsets, MAX_FILE_BYTES) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name} has the impossible data_offsets {repr(offsets)[:80]}")
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"tensor {name} holds {offsets[1] - offsets[0]} bytes, {dtype} {shape} needs {size}")
    return TensorSpec(name, dtype, tuple(shape), data_start + offsets[0], size)


def _are_sizes(values: object, limit: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= limit for value in values)
