"""A checkpoint directory: its config, its shards, and any run of rows of any tensor by byte range.

A fused expert tensor of a large model is many gigabytes, one expert of it a few megabytes: rows are read where
they lie, and nothing is mapped or held. Every shard's header is read and validated on opening, so that a truncated
or placeholder file is found before any work.

    checkpoint = Checkpoint.open(Path("Qwen3.5-397B-A17B"))
    checkpoint.read_rows("lm_head.weight", 0, 128)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moepack.convert.shard_reader import ShardReader
from moepack.layout.errors import CheckpointError
from moepack.layout.quantized import bf16_to_float32, float32_to_bf16
from moepack.layout.reader import NUMPY_DTYPES
from moepack.layout.spec import DTYPE_BYTES
from moepack.layout.tensor_file import TensorSpec, parse_json_object, read_tensor_header

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
LFS_PREFIX = b"version https://git-lfs"
MAX_JSON_BYTES = 256 * 2**20
FLOAT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Rows:
    """Rows of a float tensor as they lie in the source: `values` are uint16 bit patterns for BF16, else floats."""

    dtype: str
    values: np.ndarray

    def to_float32(self) -> np.ndarray:
        """Exact in float32 for every source type."""
        return bf16_to_float32(self.values) if self.dtype == "BF16" else self.values.astype(np.float32)

    def to_bf16(self) -> np.ndarray:
        """bf16 bit patterns; F16 and F32 are rounded to the nearest."""
        return self.values if self.dtype == "BF16" else float32_to_bf16(self.to_float32())

    def as_dtype(self, dtype: str) -> np.ndarray:
        """The values to be stored in a type: as they are where it is theirs, else bf16."""
        return self.values if dtype == self.dtype else self.to_bf16()


class Checkpoint:
    """An opened checkpoint directory. Reading is safe from several threads.

    config    config.json as it is
    tensors   name -> spec, over all shards
    shards    the files that hold them, sorted by name
    reader    what reads them
    """

    def __init__(self, directory: Path, config: dict[str, Any], files: dict[str, dict[str, TensorSpec]]):
        self.directory, self.config, self.reader = directory, config, ShardReader()
        self.shards = sorted(files)
        self.tensors = {name: spec for specs in files.values() for name, spec in specs.items()}
        self._shard_of = {name: shard for shard, specs in files.items() for name in specs}
        self._stamps = {shard: _stamp(directory / shard) for shard in files}

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read config, index and every shard's header. Raises CheckpointError naming the file and what to do."""
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory: give the directory of a downloaded checkpoint")
        config = read_json(directory / CONFIG_NAME)
        weight_map = read_weight_map(directory)
        files = {shard: _read_shard_header(directory / shard) for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            if name not in files[shard]:
                raise CheckpointError(
                    f"{directory / shard}: lacks {name}, which {INDEX_NAME} promises: download it again"
                )
        for shard, specs in files.items():
            for name in specs:
                if weight_map.get(name) != shard:
                    where = weight_map.get(name, "no file")
                    raise CheckpointError(f"{directory / shard}: holds {name}, which {INDEX_NAME} places in {where}")
        return cls(directory, config, files)

    def read_rows(self, name: str, first: int, count: int) -> Rows:
        """Rows first .. first+count-1 of a tensor seen as a matrix: [count, K], K its last dimension.

        Row r of expert e of a fused tensor [E, N, K] is row e*N + r. A vector is one row.
        Raises CheckpointError if the tensor is not of a float type or the file cannot be read.
        """
        spec = self.tensors[name]
        if spec.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self._path(name)}: {name} is {spec.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
            )
        return Rows(spec.dtype, self.read_raw(name, first, count))

    def read_raw(self, name: str, first: int, count: int) -> np.ndarray:
        """Rows of a tensor of any type, as read_rows counts them: [count, K] in layout.reader's numpy types."""
        spec = self.tensors[name]
        raw = self._read(name, *self._range(spec, first, count))
        return raw.view(NUMPY_DTYPES[spec.dtype]).reshape(count, spec.shape[-1])

    def prefetch(self, name: str, first: int, count: int) -> None:
        """Rows that read_rows or read_raw will be asked for soon."""
        self.reader.prefetch(self._path(name), *self._range(self.tensors[name], first, count))

    def _range(self, spec: TensorSpec, first: int, count: int) -> tuple[int, int]:
        """Offset in the file and size of some rows."""
        row_bytes = spec.shape[-1] * DTYPE_BYTES[spec.dtype]
        return spec.offset_bytes + first * row_bytes, count * row_bytes

    def shard_of(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._shard_of[name]

    def check_unchanged(self, shards: Iterable[str]) -> None:
        """Raise CheckpointError naming a file that was replaced, resized or written to since it was opened."""
        for shard in sorted(shards):
            for what, before, now in zip(
                ("size", "time of change", "file"), self._stamps[shard], self._stamp_now(shard)
            ):
                if before != now:
                    raise CheckpointError(
                        f"{self.directory / shard}: changed while it was read (another {what}): what was packed of it "
                        "is not kept; restore it and run the same command again, or start over with --overwrite"
                    )

    def _stamp_now(self, shard: str) -> tuple[int, int, int]:
        try:
            return _stamp(self.directory / shard)
        except OSError as error:
            raise CheckpointError(f"{self.directory / shard}: vanished while it was read: {error.strerror}") from None

    def _path(self, name: str) -> Path:
        return self.directory / self._shard_of[name]

    def _read(self, name: str, offset: int, size: int) -> np.ndarray:
        path = self._path(name)
        try:
            return self.reader.read(path, offset, size, name)
        except OSError as error:
            raise CheckpointError(
                f"{path}: {name} at byte {offset} cannot be read: {error.strerror}: check the disk, "
                "then run the same command again to go on from here"
            ) from None


def _stamp(path: Path) -> tuple[int, int, int]:
    """Size, time of change and identity of a file."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the source. Raises CheckpointError naming the file."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): is the download complete?") from None
    if raw.startswith(LFS_PREFIX):
        raise CheckpointError(f"{path}: is a Git LFS placeholder, not the file itself: fetch it with git lfs pull")
    try:
        return parse_json_object(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: is no valid JSON: {error}") from None


def read_weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> shard, from the index; a single model.safetensors needs none."""
    if (directory / INDEX_NAME).exists():
        weight_map = read_json(directory / INDEX_NAME).get("weight_map")
        plain = isinstance(weight_map, dict) and all(
            isinstance(shard, str) and Path(shard).name == shard and shard not in ("", ".", "..")
            for shard in weight_map.values()
        )
        if not weight_map or not plain:
            raise CheckpointError(f"{directory / INDEX_NAME}: weight_map is missing or does not name plain files")
        return weight_map
    if (directory / SINGLE_NAME).exists():
        return dict.fromkeys(_read_shard_header(directory / SINGLE_NAME), SINGLE_NAME)
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    found = f"{len(shards)} safetensors files" if shards else "no safetensors file"
    raise CheckpointError(
        f"{directory}: {found} but no {INDEX_NAME}: download the index file of the checkpoint as well"
    )


def _read_shard_header(path: Path) -> dict[str, TensorSpec]:
    try:
        with open(path, "rb") as file:
            if file.read(len(LFS_PREFIX)) == LFS_PREFIX:
                raise CheckpointError(f"{path}: is a Git LFS placeholder, not the weights: fetch it with git lfs pull")
        return read_tensor_header(path).tensors
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): is the download complete?") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}: download it again") from None
