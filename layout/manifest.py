"""The manifest: what a pack holds, in one JSON file that is written last and carries its own checksum.

The checksum is the sha256 of the file's bytes with its own 64 digits replaced by zeros, so that any changed byte
is found, blanks included. Reading validates every number before anyone allocates by it; keys that this version does
not know are ignored (FORMAT.md rule F9: optional facts are new keys, a changed meaning is a new version).

    manifest = Manifest.read(Path("model.moepack"))
    manifest.layer_geometry(layer=3).offsets[17]
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moepack.layout.errors import DamagedPack, UnsupportedVersion
from moepack.layout.geometry import BlockGeometry, LayerGeometry, MatrixGeometry, Scheme
from moepack.layout.spec import (
    DTYPE_BYTES,
    EXPERTS_FOLDER,
    FORMAT_VERSION,
    MAGIC,
    MANIFEST_NAME,
    MAX_DIMENSION,
    MAX_EXPERTS,
    MAX_FILE_BYTES,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    MAX_TENSOR_DIMENSIONS,
    PAGE_SIZE,
    PROJECTIONS,
    RESIDENT_NAME,
    expert_file_name,
)
from moepack.layout.tensor_file import check_tensor_name, parse_json_object

BlockSchemes = Mapping[str, Scheme]  # one Scheme for each projection
ZERO_DIGEST = "0" * 64
SHA256 = re.compile(r"[0-9a-f]{64}")
COPIED_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of the model that decide the geometry, as the architecture config names them."""

    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    num_hidden_layers: int


@dataclass(frozen=True)
class ExpertFile:
    """One layer's experts. `tiers` are the kinds of block in it, `expert_tiers` picks one for each expert."""

    file: str
    layer: int
    size_bytes: int
    sha256: str
    tiers: tuple[BlockSchemes, ...]
    expert_tiers: tuple[int, ...]
    block_sha256: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "tiers": [{name: vars(tier[name]) for name in PROJECTIONS} for tier in self.tiers]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], shape: ModelShape) -> ExpertFile:
        """Raises ValueError naming what is wrong."""
        return _expert_file(_Fields(values, "expert_file"), shape)


@dataclass(frozen=True)
class ResidentTensor:
    """One array of resident.safetensors."""

    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ResidentFile:
    """The weights that are not routed experts.

    tensors    name -> array. A quantized matrix NAME has three: NAME.weight (U32), NAME.scales, NAME.biases
    quantized  NAME -> scheme, for the quantized ones; all others are NAME.weight (or a bare name) as in the source
    """

    size_bytes: int
    sha256: str
    header_sha256: str
    tensors: Mapping[str, ResidentTensor]
    quantized: Mapping[str, Scheme]

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a weight by its full name, in weights and not in words; None if there is none."""
        tensor, scheme = self.tensors.get(name), self.quantized.get(name.removesuffix(".weight"))
        if tensor is None:
            return None
        if scheme is None:
            return tensor.shape
        return tensor.shape[0], tensor.shape[1] * 32 // scheme.bits

    def as_json(self) -> dict[str, Any]:
        return {
            "file": RESIDENT_NAME,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "header_sha256": self.header_sha256,
            "quantized": {name: vars(scheme) for name, scheme in sorted(self.quantized.items())},
            "tensors": {name: vars(tensor) for name, tensor in self.tensors.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ResidentFile:
        """Raises ValueError naming what is wrong."""
        return _resident_file(_Fields(values, "resident"))


@dataclass(frozen=True)
class CopiedFile:
    """A file taken over from the source byte for byte: tokenizer, chat template, configs."""

    file: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All facts about a pack. Equal manifests give equal bytes.

    model       architecture ("qwen3_5_moe") and text_config, the source's own
    provenance  source files with hashes, tool version, arguments
    """

    model: Mapping[str, Any]
    expert_files: tuple[ExpertFile, ...]
    resident: ResidentFile
    copied_files: tuple[CopiedFile, ...]
    provenance: Mapping[str, Any]
    shape: ModelShape = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _model_shape(_Fields(self.model, "model")))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and validate the manifest of a pack directory.

        Raises DamagedPack (exit code 3; also for a directory without one) or UnsupportedVersion (4).
        """
        path = directory / MANIFEST_NAME
        try:
            if path.is_symlink() or (path.exists() and not path.is_file()):  # a pipe would never end
                raise OSError(errno.EINVAL, "no plain file")
            with open(path, "rb") as file:  # read() reserves what it is asked for: not more than there is
                raw = file.read(min(os.fstat(file.fileno()).st_size, MAX_MANIFEST_BYTES) + 1)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DamagedPack(
                path, f"cannot be read ({reason}): not a pack, or a conversion that has not finished; "
                "run moe-convert to the end"
            ) from None  # fmt: skip
        return cls.from_bytes(raw, path)

    @classmethod
    def from_bytes(cls, raw: bytes, path: Path | str = MANIFEST_NAME) -> Manifest:
        """Parse manifest bytes; `path` is for messages. Raises DamagedPack or UnsupportedVersion."""
        if len(raw) > MAX_MANIFEST_BYTES:
            raise DamagedPack(path, f"is longer than the {MAX_MANIFEST_BYTES} bytes a manifest may have")
        try:
            root = _Fields(parse_json_object(raw), "")
            root.constant("magic", MAGIC)
            version = root.integer("format_version", 1, 2**31)
            if version != FORMAT_VERSION:
                raise UnsupportedVersion(path, version, FORMAT_VERSION)
            _check_own_digest(raw, root.sha256("manifest_sha256"))
            return cls._from_fields(root)
        except ValueError as error:
            raise DamagedPack(path, f"{error}; the manifest is damaged: restore it or convert again") from None

    @classmethod
    def _from_fields(cls, root: _Fields) -> Manifest:
        root.constant("page_size", PAGE_SIZE)
        model = root.object("model")
        shape = _model_shape(model)
        expert_files = tuple(_expert_file(entry, shape) for entry in root.objects("expert_files"))
        for layer, entry in enumerate(expert_files):
            if entry.layer != layer:
                raise ValueError(f"expert_files: layer {layer} expected, found {entry.layer}")
        if len(expert_files) < shape.num_hidden_layers:
            raise ValueError(f"expert_files: {len(expert_files)} layers of {shape.num_hidden_layers}")
        copied = tuple(_copied_file(entry) for entry in root.objects("copied_files"))
        names = [entry.file.lower() for entry in copied]
        if len(set(names)) != len(names) or {MANIFEST_NAME, RESIDENT_NAME, EXPERTS_FOLDER} & set(names):
            raise ValueError("copied_files: a name stands twice")
        return cls(
            model=model.values,
            expert_files=expert_files,
            resident=_resident_file(root.object("resident")),
            copied_files=copied,
            provenance=root.object("provenance").values,
        )

    def to_bytes(self) -> bytes:
        """The manifest's bytes, own checksum included."""
        text = json.dumps(self._as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        return text.replace(f'"manifest_sha256": "{ZERO_DIGEST}"', f'"manifest_sha256": "{digest}"', 1).encode()

    def layer_geometry(self, layer: int) -> LayerGeometry:
        """Where the blocks of one layer lie."""
        entry = self.expert_files[layer]
        return LayerGeometry([block_geometry(self.shape, tier) for tier in entry.tiers], entry.expert_tiers)

    def list_files(self) -> dict[str, int]:
        """Every file of the pack but the manifest: path in the pack -> size in bytes."""
        experts = {entry.file: entry.size_bytes for entry in self.expert_files}
        copied = {entry.file: entry.size_bytes for entry in self.copied_files}
        return {**copied, RESIDENT_NAME: self.resident.size_bytes, **experts}

    def _as_json(self) -> dict[str, Any]:
        return {
            "magic": MAGIC,
            "format_version": FORMAT_VERSION,
            "manifest_sha256": ZERO_DIGEST,
            "page_size": PAGE_SIZE,
            "model": dict(self.model),
            "provenance": dict(self.provenance),
            "copied_files": [vars(entry) for entry in self.copied_files],
            "resident": self.resident.as_json(),
            "expert_files": [entry.as_json() for entry in self.expert_files],
        }


def block_geometry(shape: ModelShape, tier: BlockSchemes) -> BlockGeometry:
    """The geometry of a block of this model stored by these schemes. Raises ValueError if a group does not divide."""
    return BlockGeometry.of(shape.hidden_size, shape.moe_intermediate_size, tier)


class _Fields:
    """A JSON object whose values are taken out with their type and range checked; errors name the path."""

    def __init__(self, values: Mapping[str, Any], path: str):
        self.values, self.path = values, path

    def _take(self, key: str, kind: type) -> Any:
        value = self.values.get(key)
        if type(value) is not kind:  # bool is not an int here
            found = "nothing" if key not in self.values else json.dumps(value)[:60]
            raise ValueError(f"{self._at(key)}: expected {kind.__name__}, found {found}")
        return value

    def _at(self, key: str) -> str:
        key = key if key.isprintable() else ascii(key)  # one line, whatever the key
        return f"{self.path}.{key}" if self.path else key

    def constant(self, key: str, expected: str | int) -> None:
        if self._take(key, type(expected)) != expected:
            raise ValueError(f"{self._at(key)}: expected {expected!r}, found {self.values[key]!r}"[:200])

    def integer(self, key: str, low: int, high: int) -> int:
        value = self._take(key, int)
        if not low <= value <= high:
            raise ValueError(f"{self._at(key)}: expected {low} to {high}, found {str(value)[:40]}")
        return value

    def string(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self._take(key, str)
        if not pattern.fullmatch(value):
            raise ValueError(f"{self._at(key)}: {value[:80]!r} is not of the form {pattern.pattern}")
        return value

    def sha256(self, key: str) -> str:
        return self.string(key, SHA256)

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        values = self._take(key, list)
        if not all(type(value) is int and low <= value <= high for value in values):
            raise ValueError(f"{self._at(key)}: expected integers from {low} to {high}")
        return tuple(values)

    def object(self, key: str) -> _Fields:
        return _Fields(self._take(key, dict), self._at(key))

    def objects(self, key: str) -> list[_Fields]:
        entries = self._take(key, list)
        fields = [_Fields({str(index): entry}, self._at(key)) for index, entry in enumerate(entries)]
        return [field.object(str(index)) for index, field in enumerate(fields)]


def _check_own_digest(raw: bytes, stated: str) -> None:
    if (times := raw.count(stated.encode())) != 1:
        raise ValueError(f"the digits of manifest_sha256: expected once in the file, found {times} times")
    found = hashlib.sha256(raw.replace(stated.encode(), ZERO_DIGEST.encode())).hexdigest()
    if found != stated:
        raise ValueError(f"sha256 of the manifest is {found[:12]}…, it says {stated[:12]}…")


def _model_shape(model: _Fields) -> ModelShape:
    config = model.object("text_config")
    return ModelShape(
        hidden_size=config.integer("hidden_size", 1, MAX_DIMENSION),
        moe_intermediate_size=config.integer("moe_intermediate_size", 1, MAX_DIMENSION),
        num_experts=config.integer("num_experts", 1, MAX_EXPERTS),
        num_hidden_layers=config.integer("num_hidden_layers", 1, MAX_LAYERS),
    )


def _scheme(fields: _Fields) -> Scheme:
    bits = fields.integer("bits", 1, 64)
    group_size = None if fields.values.get("group_size") is None else fields.integer("group_size", 1, MAX_DIMENSION)
    try:
        return Scheme(bits, group_size)
    except ValueError as error:
        raise ValueError(f"{fields.path}: {error}") from None


def _expert_file(fields: _Fields, shape: ModelShape) -> ExpertFile:
    layer = fields.integer("layer", 0, 2 * MAX_LAYERS)
    fields.constant("file", expert_file_name(layer, shape.num_hidden_layers))
    tiers = tuple({name: _scheme(entry.object(name)) for name in PROJECTIONS} for entry in fields.objects("tiers"))
    if not tiers:
        raise ValueError(f"{fields.path}.tiers: expected at least one, found none")
    expert_tiers = fields.integers("expert_tiers", 0, len(tiers) - 1)
    digests = fields._take("block_sha256", list)
    if not all(isinstance(digest, str) and SHA256.fullmatch(digest) for digest in digests):
        raise ValueError(f"{fields.path}.block_sha256: expected 64 lower-case hexadecimal digits each")
    if not len(expert_tiers) == len(digests) == shape.num_experts:
        raise ValueError(
            f"{fields.path}: expected {shape.num_experts} experts, found {len(expert_tiers)} expert_tiers and "
            f"{len(digests)} block_sha256"
        )
    size_bytes = fields.integer("size_bytes", 1, MAX_FILE_BYTES)
    try:
        needed = LayerGeometry([block_geometry(shape, tier) for tier in tiers], expert_tiers).size_bytes
    except ValueError as error:
        raise ValueError(f"{fields.path}: {error}") from None
    if size_bytes != needed:
        raise ValueError(f"{fields.path}.size_bytes: the blocks need {needed}, found {size_bytes}")
    return ExpertFile(
        fields.values["file"], layer, size_bytes, fields.sha256("sha256"), tiers, expert_tiers, tuple(digests)
    )


def _resident_file(fields: _Fields) -> ResidentFile:
    fields.constant("file", RESIDENT_NAME)
    entries, schemes = fields.object("tensors"), fields.object("quantized")
    tensors = {name: _resident_tensor(name, entries.object(name)) for name in entries.values}
    quantized = {name: _scheme(schemes.object(name)) for name in schemes.values}
    size_bytes = fields.integer("size_bytes", 1, MAX_FILE_BYTES)
    spans = sorted((tensor.offset_bytes, tensor.size_bytes) for tensor in tensors.values())
    end = spans[0][0] if spans else size_bytes
    for offset, size in spans:
        if offset != end:
            raise ValueError(f"{fields.path}.tensors: one starts at byte {offset}, expected {end}")
        end += size
    if end != size_bytes:
        raise ValueError(f"{fields.path}.size_bytes: the tensors end at {end}, found {size_bytes}")
    for name, scheme in quantized.items():
        arrays = [tensors.get(f"{name}.{suffix}") for suffix in ("weight", "scales", "biases")]
        if not _is_quantized_matrix(scheme, arrays):
            raise ValueError(f"{schemes._at(name)}: its arrays do not make a matrix at {scheme}")
    return ResidentFile(
        size_bytes,
        fields.sha256("sha256"),
        fields.sha256("header_sha256"),
        tensors,
        quantized,
    )


def _is_quantized_matrix(scheme: Scheme, arrays: list[ResidentTensor | None]) -> bool:
    weight = arrays[0]
    if scheme.group_size is None or weight is None or len(weight.shape) != 2:
        return False
    rows, words = weight.shape
    try:
        matrix = MatrixGeometry(rows, words * 32 // scheme.bits, scheme)
    except ValueError:
        return False
    expected = [(dtype, shape) for _, dtype, shape in matrix.arrays]
    return expected == [(array.dtype, array.shape) if array else None for array in arrays]


def _resident_tensor(name: str, fields: _Fields) -> ResidentTensor:
    check_tensor_name(name)
    dtype = fields.string("dtype", re.compile("|".join(DTYPE_BYTES)))
    shape = fields.integers("shape", 0, MAX_DIMENSION)
    offset, size = (fields.integer(key, 0, MAX_FILE_BYTES) for key in ("offset_bytes", "size_bytes"))
    if len(shape) > MAX_TENSOR_DIMENSIONS or math.prod(shape) * DTYPE_BYTES[dtype] != size:
        raise ValueError(f"{fields.path}: {dtype} {list(shape)[:9]} is not {size} bytes")
    return ResidentTensor(dtype, shape, offset, size, fields.sha256("sha256"))


def _copied_file(fields: _Fields) -> CopiedFile:
    name = fields.string("file", COPIED_NAME)
    return CopiedFile(name, fields.integer("size_bytes", 0, MAX_FILE_BYTES), fields.sha256("sha256"))
