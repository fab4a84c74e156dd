"""The calls of a prompt's products on NVIDIA's GPUs: cuda/'s kernels for packed weights, as halves (cuda/halves.h).

Rows of x are split once, and then meet any number of matrices; what is_fit refuses goes by launches.py.

    parts = Parts.of(device, *x.shape)
    device.run(split_rows(x, parts))
    device.run(matmul(memory, forms, matrices, parts, out))      # forms by tile_forms

Which tokens an expert has is found by the processor (cut_segments), or by the GPU (order_pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moepack.kernels import launches
from moepack.kernels.forms import count_groups, count_segments, forms_side_by_side, segment_bytes
from moepack.kernels.launches import UNIT, Launch
from moepack.kernels.matrix import Expert, Matrix
from moepack.kernels.msl import pack_struct

TILE_TOKENS, TILE_ROWS, THREADS = 64, 256, 128  # cuda/halves.h
SUMMED, SUMS = 1024, 56  # the same
PAIR_ROWS = 128  # cuda/experts_halves.cu
SPLIT_THREADS = 256  # cuda/split_rows.cu
PAIR_THREADS = 256  # cuda/order_pairs.cu


@dataclass(frozen=True)
class Parts:
    """Rows of x as pairs of halves: what split_rows writes and the products read.

    halves    int32 [T, K]: 32 columns after the other, the high halves and the low ones of each
    sums      float32 [T, sums of a row]
    factors   float32 [T]
    """

    halves: torch.Tensor
    sums: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def of(cls, device: Any, rows: int, columns: int) -> Parts:
        """Parts of so many rows and columns, to be written. Raises ValueError if columns are not whole units."""
        if columns % UNIT:
            raise ValueError(f"rows have whole units of {UNIT} columns, got {columns}")
        sums = -(-columns // SUMMED) * SUMS
        halves = device.empty(rows, columns, dtype=torch.int32)
        return cls(halves, device.empty(rows, sums), device.empty(rows))

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.halves, self.sums, self.factors


@dataclass(frozen=True)
class Pairs:
    """All pairs of a prompt's tokens and their experts, the shared one first: what order_pairs writes.

    Pairs are computed in parts, so many at a time; a part's segments are those of cut_segments, and empty ones.

    part       pairs of a part; the last one may have fewer
    tokens     int32 [pairs]: whose they are
    weights    float32 [pairs]
    order      int32 [T, K + 1]: the pairs of each token, ascending
    segments   uint8 [parts, bytes of a part's segments]: count pairs from the part's first
    """

    part: int
    tokens: torch.Tensor
    weights: torch.Tensor
    order: torch.Tensor
    segments: torch.Tensor

    @classmethod
    def of(cls, device: Any, tokens: int, chosen: int, experts: int, most: int) -> Pairs:
        """Pairs of so many tokens that choose among so many experts, to be written.

        most   pairs of a part, a multiple of four, so that parts start on 16 bytes
        """
        count = tokens * (chosen + 1)
        parts = -(-count // most)
        part = -(-count // (4 * parts)) * 4
        slots = part // TILE_TOKENS + experts + 1
        of_tokens, order = (device.empty(*shape, dtype=torch.int32) for shape in ((count,), (tokens, chosen + 1)))
        segments = device.empty(parts, slots * segment_bytes(), dtype=torch.uint8)
        return cls(part, of_tokens, device.empty(count), order, segments)


def is_fit(matrix: Matrix) -> bool:
    """Whether the kernels take a matrix: packed, as every quantized one is."""
    return matrix.scales is not None


def is_fit_expert(expert: Expert) -> bool:
    """Whether they take an expert: all packed, gate and up in the same way."""
    gate, up, down = expert.gate_proj, expert.up_proj, expert.down_proj
    if gate.scales is None or up.scales is None or down.scales is None:
        return False
    return gate.bits == up.bits and gate.scales.shape == up.scales.shape


def split_rows(x: torch.Tensor, parts: Parts) -> Launch:
    """The parts [T, K] of x [T, at least K], whose further columns are not read.

    Raises ValueError if rows of x, which follow each other, would not start on 16 bytes.
    """
    rows, columns = parts.halves.shape
    if x.shape[-1] % 4:
        raise ValueError(f"rows of x start on 16 bytes, got {x.shape[-1]} columns")
    shape = pack_struct("split_rows", "SplitShape", columns=columns, x_stride=x.shape[-1])
    threads = min(SPLIT_THREADS, -(-columns // 8 // launches.LANES) * launches.LANES)
    return Launch("split_rows", "split_rows", (x, *parts.buffers, shape), (rows, 1, 1), (threads, 1, 1))


def tile_forms(matrices: Sequence[Matrix], base: torch.Tensor) -> bytes:
    """The MatrixForms of matrices that share an input, for matmul."""
    return forms_side_by_side(matrices, base, count_groups(matrices, TILE_ROWS))


def matmul(
    weights: torch.Tensor, forms: torch.Tensor, matrices: Sequence[Matrix], parts: Parts, out: torch.Tensor
) -> Launch:
    """out [T, R] = x [T, K], of which the parts are, times matrices of together R rows, side by side.

    weights   the memory of the matrices, from its base
    forms     tile_forms(matrices, weights) in a tensor

    Raises ValueError unless all matrices are packed and have one number of columns.
    """
    rows, columns = parts.halves.shape
    if any(matrix.in_features != matrices[0].in_features or not is_fit(matrix) for matrix in matrices):
        raise ValueError("matrices of one dispatch are packed and have one number of columns")
    sizes = {"count": len(matrices), "tokens": rows, "blocks": columns // UNIT, "out_stride": out.shape[-1]}
    shape = pack_struct("matmul_halves", "MatmulShape", **sizes)
    grid = (sum(count_groups(matrices, TILE_ROWS)), -(-rows // TILE_TOKENS), 1)
    return Launch("matmul_halves", "matmul", (weights, forms, *parts.buffers, out, shape), grid, (THREADS, 1, 1))


def cut_segments(segments: np.ndarray) -> np.ndarray:
    """Segments int64 [n, 4] as forms.pack_segments takes them, cut so that each has at most TILE_TOKENS pairs.

    An expert's are nearly of the same size.
    """
    tiles = -(-segments[:, 3] // TILE_TOKENS)
    cut = segments.repeat(tiles, axis=0)
    number, tiles_each = np.arange(len(cut)) - (tiles.cumsum() - tiles).repeat(tiles), tiles.repeat(tiles)
    start, end = cut[:, 3] * number // tiles_each, cut[:, 3] * (number + 1) // tiles_each
    cut[:, 2] += start
    cut[:, 3] = end - start
    return cut


def count_choices(ids: torch.Tensor, counts: torch.Tensor) -> Launch:
    """counts int32 [E]: how many of the tokens of ids int32 [T, K] chose each expert."""
    shape = _pair_shape(ids, len(counts))
    return Launch("order_pairs", "count_choices", (ids, counts, shape), (len(counts), 1, 1), (PAIR_THREADS, 1, 1))


def order_pairs(
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor,
    counts: torch.Tensor,
    table: torch.Tensor,
    pairs: Pairs,
) -> Launch:
    """The pairs of tokens that chose experts by ids int32 and weights [T, K], and the shared expert by shared [T].

    counts   as count_choices leaves them
    table    forms.pack_places of the E experts and the shared one, in a tensor
    """
    shape = _pair_shape(ids, len(counts), len(pairs.segments), pairs.part, count_segments(pairs.segments[0]))
    arguments: tuple[torch.Tensor | bytes, ...]
    arguments = (ids, weights, shared, counts, table, pairs.tokens, pairs.weights, pairs.order, pairs.segments, shape)
    return Launch("order_pairs", "order_pairs", arguments, (len(counts) + 1, 1, 1), (PAIR_THREADS, 1, 1))


def _pair_shape(ids: torch.Tensor, experts: int, parts: int = 0, part: int = 0, slots: int = 0) -> bytes:
    tokens, chosen = ids.shape
    sizes = {"tokens": tokens, "chosen": chosen, "experts": experts, "parts": parts, "part": part, "slots": slots}
    return pack_struct("order_pairs", "PairShape", **sizes)


def experts_gate_up_rows(
    banks: Sequence[torch.Tensor],
    forms: torch.Tensor,
    segments: torch.Tensor,
    tokens: torch.Tensor,
    parts: Parts,
    hidden: torch.Tensor,
) -> Launch:
    """hidden [pairs, widest expert] of each segment's expert for the rows of the parts that are the pairs' tokens.

    segments   forms.pack_segments(cut_segments(...)) in a tensor
    tokens     int32 [pairs]
    """
    arguments: tuple[torch.Tensor | bytes, ...]
    arguments = (*banks, forms, segments, tokens, *parts.buffers, hidden, _shape(parts, hidden))
    grid = (-(-hidden.shape[-1] // PAIR_ROWS), count_segments(segments), 1)
    return Launch("experts_halves", "experts_gate_up_rows", arguments, grid, (THREADS, 1, 1))


def experts_down_rows(
    banks: Sequence[torch.Tensor], forms: torch.Tensor, segments: torch.Tensor, parts: Parts, rows: torch.Tensor
) -> Launch:
    """rows [pairs, D] = each segment's expert's down times hidden [pairs, widest expert], of which the parts are."""
    arguments: tuple[torch.Tensor | bytes, ...]
    arguments = (*banks, forms, segments, *parts.buffers, rows, _shape(parts, rows))
    grid = (-(-rows.shape[-1] // TILE_ROWS), count_segments(segments), 1)
    return Launch("experts_halves", "experts_down_rows", arguments, grid, (THREADS, 1, 1))


def _shape(parts: Parts, out: torch.Tensor) -> bytes:
    blocks = parts.halves.shape[1] // UNIT
    return pack_struct("experts_halves", "ExpertHalvesShape", blocks=blocks, out_stride=out.shape[-1])
