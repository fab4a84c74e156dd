"""The safetensors container: what is written can be read by anyone, what is wrong is refused with a reason."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moepack.layout.spec import DTYPE_BYTES, MAX_DIMENSION, MAX_JSON_DEPTH, MAX_TENSOR_NAME
from moepack.layout.tensor_file import layout_tensors, parse_json_object, read_tensor_header

PEAK_PER_BYTE = 40  # JSON of empty objects takes 27 times its length as Python objects, and the check some more
DUPLICATES_SECONDS = 2.0  # for 100,000 keys; comparing each with each would take minutes
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, an object or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_f21_reads_what_safetensors_writes(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(7, dtype=np.int64),
        "ü": np.zeros((0, 4)),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_tensor_header(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert (header.size_bytes, header.metadata, set(header.tensors)) == (len(raw), {"format": "pt"}, set(arrays))
    for name, array in arrays.items():
        spec = header.tensors[name]
        assert spec.shape == array.shape
        assert raw[spec.offset_bytes : spec.offset_bytes + spec.size_bytes] == array.tobytes()


names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=12).filter(str.isprintable)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
declared = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), shapes), max_size=8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(declared, st.randoms(use_true_random=False))
def test_f23_layout_is_dense_aligned_and_the_same_in_any_order(tmp_path_factory, arrays, random) -> None:
    listed = [(name, dtype, shape) for name, (dtype, shape) in arrays.items() if name != "__metadata__"]
    header, specs = layout_tensors(listed)
    random.shuffle(listed)
    assert layout_tensors(listed) == (header, specs)
    assert len(header) % 64 == 0
    assert [spec.size_bytes for spec in specs] == [math.prod(spec.shape) * DTYPE_BYTES[spec.dtype] for spec in specs]
    assert all(spec.offset_bytes % DTYPE_BYTES[spec.dtype] == 0 for spec in specs)
    path = tmp_path_factory.getbasetemp() / "dense.safetensors"
    path.write_bytes(header + bytes(sum(spec.size_bytes for spec in specs)))
    assert list(read_tensor_header(path).tensors.values()) == specs


def test_f23_safetensors_reads_our_layout(tmp_path: Path) -> None:
    arrays = {"z": np.arange(3, dtype=np.int16), "a": np.eye(2, dtype=np.float32), "m": np.array([True, False])}
    dtypes = {"z": "I16", "a": "F32", "m": "BOOL"}
    header, specs = layout_tensors((name, dtypes[name], array.shape) for name, array in arrays.items())
    assert [spec.name for spec in specs] == ["a", "z", "m"]
    (tmp_path / "x.safetensors").write_bytes(header + b"".join(arrays[spec.name].tobytes() for spec in specs))
    loaded = load_file(tmp_path / "x.safetensors")
    assert {name: array.tolist() for name, array in loaded.items()} == {n: a.tolist() for n, a in arrays.items()}


def entry(**changes: Any) -> dict[str, Any]:
    return {"t": {**ONE, **changes}}


def nested(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


REFUSED: dict[str, tuple[Any, bytes, str]] = {
    "lacks_keys": ({"t": {"dtype": "F32"}}, b"", "tensor t lacks dtype, shape or data_offsets"),
    "not_an_object": ({"t": 5}, b"", "tensor t lacks dtype, shape or data_offsets"),
    "unknown_dtype": (entry(dtype="F33"), b"1234", "tensor t has the unknown dtype 'F33'"),
    "dtype_no_text": (entry(dtype=[[]]), b"1234", r"tensor t has the unknown dtype \[\[\]\]"),
    "negative_size": (entry(shape=[-1]), b"1234", r"tensor t has the impossible shape \[-1\]"),
    "true_as_size": (entry(shape=[True]), b"1234", r"tensor t has the impossible shape \[True\]"),
    "float_as_size": (entry(shape=[1.0]), b"1234", "tensor t has the impossible shape"),
    "huge_size": (entry(shape=[MAX_DIMENSION + 1]), b"1234", "tensor t has the impossible shape"),
    "nine_dimensions": (entry(shape=[1] * 9), b"1234", "tensor t has the impossible shape"),
    "one_offset": (entry(data_offsets=[0]), b"1234", r"tensor t has the impossible data_offsets \[0\]"),
    "offsets_backwards": (entry(data_offsets=[4, 0]), b"1234", "tensor t has the impossible data_offsets"),
    "huge_offset": (entry(data_offsets=[0, 2**63]), b"1234", "tensor t has the impossible data_offsets"),
    "size_and_shape": (entry(shape=[2]), b"1234", r"tensor t holds 4 bytes, F32 \[2\] needs 8"),
    "hole": (entry(data_offsets=[1, 5]), b"12345", "tensor t starts at byte .*: it leaves a hole before it"),
    "overlap": ({"t": ONE, "u": ONE}, b"1234", "tensor u starts at byte .*: it overlaps the tensor before it"),
    "truncated": (entry(), b"123", "its header needs .*: the file is truncated"),
    "trailing": (entry(), b"12345", "its header needs .*: bytes follow the last tensor"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ is not an object of strings"),
    "duplicate_key": (b'{"t":1,"t":2}', b"", "key 't' stands twice"),
    "long_duplicate_key": (b'{"%s":1,"%s":2}' % (b"k" * 9999, b"k" * 9999), b"", "key 'kkkk.*' stands twice"),
    "duplicate_inner_key": (b'{"t":{"dtype":1,"dtype":1}}', b"", "key 'dtype' stands twice"),
    "nan": (b'{"t":NaN}', b"", "NaN is not a JSON number"),
    "beyond_floats": (b'{"t":-1e999}', b"", "-1e999 is not a JSON number"),
    "infinity": (b'{"t":-Infinity}', b"", "-Infinity is not a JSON number"),
    "list": (b"[]", b"", "expected a JSON object, found list"),
    "not_utf8": (b'{"\xff":1}', b"", "not UTF-8 text: byte 2 of 7"),
    "bom": (b"\xef\xbb\xbf{}", b"", "BOM"),
    "no_json": (b"{", b"", "line 1 column"),
    "empty_header": (b"", b"", "line 1 column"),
    "second_value": (b"{} {}", b"", "Extra data"),
    "deep": (nested(MAX_JSON_DEPTH + 1), b"", f"nested deeper than {MAX_JSON_DEPTH} levels"),
    "very_deep": (nested(100_000), b"", f"nested deeper than {MAX_JSON_DEPTH} levels"),
    "number_without_end": (b'{"t":' + b"9" * 10_000 + b"}", b"", "."),
    "line_feed_in_name": ({"t\nu": ONE}, b"1234", r"tensor name 't\\nu' is not 1 to 512 printable characters"),
    "escape_in_name": ({"\x1b[31m": ONE}, b"1234", r"tensor name '\\x1b\[31m' is not 1 to 512 printable"),
    "surrogate_in_name": (b'{"\\ud800":{}}', b"", "holds half of a surrogate pair, which is no text"),
    "empty_name": ({"": ONE}, b"1234", "tensor name '' is not 1 to 512 printable"),
    "long_name": ({"t" * (MAX_TENSOR_NAME + 1): ONE}, b"1234", "is not 1 to 512 printable"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_f21_refuses(case: str, tmp_path: Path) -> None:
    header, data, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason) as caught:
        read_tensor_header(write_file(tmp_path / "x.safetensors", header, data))
    assert str(caught.value).isprintable(), "one line"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "is 0 bytes long, too short for a safetensors header"),
        (b"1234567", "is 7 bytes long, too short for a safetensors header"),
        (struct.pack("<Q", 3) + b"{}", "header length 3 does not fit in a file of 10 bytes"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "header length 18446744073709551615 does not fit in a file of 10 bytes"),
    ],
)
def test_f21_refuses_a_header_length_beyond_the_file(raw: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=reason):
        read_tensor_header(path)


def test_f21_refuses_a_header_above_the_limit_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    with open(path, "r+b") as file:
        file.truncate(200_000_000)  # sparse: takes no space
    with pytest.raises(ValueError, match="header length 100000001 does not fit"):
        read_tensor_header(path)


def test_f4_many_keys_and_a_late_duplicate_take_no_time() -> None:
    keys = ",".join(f'"k{index}":1' for index in range(100_000))
    started = time.perf_counter()
    with pytest.raises(ValueError, match="key 'k99999' stands twice"):
        parse_json_object(f'{{{keys},"k99999":2}}'.encode())
    assert time.perf_counter() - started < DUPLICATES_SECONDS


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":"' + b"\\n" * 100_000 + b'"}',
        b'{"a":"' + b"\\n" * 100_000,
        b'{"a":"' + b"x" * 200_000 + b'"}',
        b'{"a":' + b'"",' * 60_000,
        b'{"a":[' + b"{}," * 60_000 + b"{}]}",
        b'"\\\n' * 60_000,
    ],
    ids=["escapes", "open_escapes", "long_text", "texts", "objects", "broken_texts"],
)
def test_f4_texts_of_any_kind_are_cheap(raw: bytes) -> None:
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            parse_json_object(raw)
        assert tracemalloc.get_traced_memory()[1] < PEAK_PER_BYTE * len(raw)
    finally:
        tracemalloc.stop()


def test_f4_nesting_up_to_the_limit_is_read() -> None:
    assert parse_json_object(nested(MAX_JSON_DEPTH))
    lists = b'{"a":' + b"[" * (MAX_JSON_DEPTH - 1) + b"]" * (MAX_JSON_DEPTH - 1) + b"}"
    assert parse_json_object(lists)


def test_blanks_after_the_header_and_unknown_keys_are_allowed(tmp_path: Path) -> None:
    raw = json.dumps({"t": {**ONE, "more": 1}}).encode() + b"   "
    assert read_tensor_header(write_file(tmp_path / "x.safetensors", raw, b"1234")).tensors["t"].shape == (1,)
