"""How far a pack's experts are from the weights they were made from: the error of each projection of each expert.

The original is read by the same reader as for converting, whatever its kind; the pack's block is dequantized by the
definition of the format. Relative RMS error is |w - original| / |original| over all weights of a matrix: 0 for equal
weights, about 0.09 at 4 bits and 0.45 at 2 bits by plain rounding, and 1.4 for the weights of another expert.

What it does not tell is how much that matters to the answers: moe-run eval does.

    source = Original.open(Path("checkpoint"), pack)
    for error in measure_errors(source, pack, [(0, 17)]): print(error.layer, error.expert, error.relative_rms)
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moepack.convert.checkpoint import Checkpoint
from moepack.convert.hub import Mirror, is_hub_address
from moepack.convert.names import SourceMap, map_tensors
from moepack.convert.shard_reader import ShardReader
from moepack.convert.sources import Quantization
from moepack.layout.architecture import Architecture
from moepack.layout.errors import CheckpointError
from moepack.layout.geometry import MatrixGeometry
from moepack.layout.quantized import bf16_to_float32, dequantize
from moepack.layout.reader import Pack

NUM_WORST = 5
UNRELATED = (
    0.9  # from here on a block holds something else: weights of 2 bits are at 0.5, those of another expert at 1.4
)


@dataclass(frozen=True)
class ExpertError:
    """What quantization cost one expert.

    relative_rms   projection -> |w - original| / |original|; infinite where the original is all zeros and w is not
    """

    layer: int
    expert: int
    relative_rms: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.relative_rms.values())


@dataclass(frozen=True)
class Original:
    """The checkpoint that a pack was made from, opened, with the place of every expert's matrices in it."""

    checkpoint: Checkpoint
    source: SourceMap

    @classmethod
    def open(cls, directory: Path, pack: Pack, reader: ShardReader | None = None) -> Original:
        """Open a checkpoint and see that it is of the pack's shape. Raises CheckpointError if not.

        reader   what reads its shards, if they are elsewhere
        """
        checkpoint = Checkpoint.open(directory)
        checkpoint.reader = reader or checkpoint.reader
        try:
            architecture = Architecture.from_config(checkpoint.config)
        except ValueError as error:
            raise CheckpointError(f"{directory}: config.json: {error}") from None
        found = {name: getattr(architecture, name) for name in vars(pack.manifest.shape)}
        if found != vars(pack.manifest.shape):
            text = f"{directory}: its experts are {found}, those of the pack {vars(pack.manifest.shape)}"
            raise CheckpointError(f"{text}: give the checkpoint that {pack.directory} was made from")
        try:
            return cls(checkpoint, map_tensors(checkpoint.tensors, architecture, Quantization.of(checkpoint.config)))
        except (CheckpointError, ValueError) as error:
            raise CheckpointError(f"{directory}: {error}") from None

    @classmethod
    @contextmanager
    def find(cls, source: str, pack: Pack) -> Iterator[Original]:
        """The same from a directory's name, or from hf://org/repo, of which only what is asked for is fetched."""
        if not is_hub_address(source):
            yield cls.open(Path(source), pack)
            return
        with Mirror.open(source, pack.directory) as mirror:
            yield cls.open(mirror.directory, pack, mirror.reader)

    def read_matrix(self, layer: int, expert: int, projection: str, rows: int) -> np.ndarray:
        """One matrix as float32. Raises CheckpointError."""
        place = self.source.experts[layer][expert][projection]
        return place.weight.read_rows(self.checkpoint, place.first_row, rows).to_float32()


def measure_errors(
    original: Original, pack: Pack, experts: Iterable[tuple[int, int]], workers: int | None = None
) -> Iterator[ExpertError]:
    """The error of each of these experts (layer, expert), in their order, computed on all cores.

    Raises CheckpointError, and DamagedPack if a block cannot be read or its checksum is wrong.
    """
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        try:
            yield from pool.map(lambda place: _measure_expert(original, pack, *place), experts)
        finally:
            pool.shutdown(cancel_futures=True)


def _measure_expert(original: Original, pack: Pack, layer: int, expert: int) -> ExpertError:
    geometry = pack.geometry(layer).block(expert)
    block = memoryview(bytearray(geometry.block_stride))
    pack.read_block(layer, expert, block)
    pack.check_block(layer, expert, block)
    sections = iter(geometry.sections)
    errors = {}
    for projection, matrix in geometry.matrices:
        places = [next(sections) for _ in matrix.arrays]
        arrays = [block[place.offset_bytes : place.offset_bytes + place.size_bytes] for place in places]
        weights = _dequantize(matrix, arrays)
        expected = original.read_matrix(layer, expert, projection, matrix.out_features)
        errors[projection] = _relative_rms(weights, expected)
    return ExpertError(layer, expert, errors)


def _dequantize(matrix: MatrixGeometry, arrays: list[memoryview]) -> np.ndarray:
    """Weights [N, K] in float32 from the bytes of a matrix's arrays."""
    typed = [
        np.frombuffer(array, dtype="<u4" if dtype == "U32" else "<u2").reshape(shape)
        for array, (_, dtype, shape) in zip(arrays, matrix.arrays)
    ]
    if matrix.scheme.group_size is None:
        return bf16_to_float32(typed[0])
    return dequantize(*typed, bits=matrix.scheme.bits, group_size=matrix.scheme.group_size)


def _relative_rms(weights: np.ndarray, expected: np.ndarray) -> float:
    size = float(np.linalg.norm(expected))
    distance = float(np.linalg.norm(weights - expected))
    if size == 0:
        return math.inf if distance else 0.0
    return distance / size


def summarize_errors(errors: Sequence[ExpertError]) -> dict[str, Any]:
    """Median, 99th percentile and worst of each projection, the worst experts, and every expert's; for JSON.

    An infinite error is None there, which JSON has no number for.
    """
    projections = errors[0].relative_rms if errors else {}
    summary = {}
    for name in projections:
        values = np.array([error.relative_rms[name] for error in errors])
        worst = errors[int(values.argmax())]
        summary[name] = {
            "median": _finite(np.median(values)),
            "p99": _finite(np.percentile(values, 99, method="higher")),
            "worst": {"layer": worst.layer, "expert": worst.expert, "error": _finite(worst.relative_rms[name])},
        }
    ranked = sorted(errors, key=lambda error: -error.worst)[:NUM_WORST]
    return {
        "experts": len(errors),
        "projections": summary,
        "worst_experts": [{"layer": one.layer, "expert": one.expert, "error": _finite(one.worst)} for one in ranked],
        "errors": [
            {"layer": one.layer, "expert": one.expert}
            | {name: _finite(value) for name, value in one.relative_rms.items()}
            for one in errors
        ],
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
