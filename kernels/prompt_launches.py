"""The calls of a prompt's products on NVIDIA's GPUs: cuda/'s kernels for packed weights, as halves (cuda/halves.h).

Rows of x are split once, and then meet any number of matrices; what is_fit refuses goes by launches.py.

    parts = Parts.of(device, *x.shape)
    device.run(split_rows(x, parts))
    device.run(matmul(memory, forms, matrices, parts, out))      # forms by tile_forms
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moepack.kernels import launches
from moepack.kernels.forms import count_segments, forms_side_by_side
from moepack.kernels.launches import UNIT, Launch
from moepack.kernels.matrix import Expert, Matrix
from moepack.kernels.msl import pack_struct

TILE_TOKENS, TILE_ROWS, THREADS = 64, 256, 128  # cuda/halves.h
SUMMED, SUMS = 1024, 56  # the same
PAIR_ROWS = 128  # cuda/experts_halves.cu
SPLIT_THREADS = 256  # cuda/split_rows.cu


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
    return forms_side_by_side(matrices, base, TILE_ROWS)


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
    grid = (sum(-(-matrix.out_features // TILE_ROWS) for matrix in matrices), -(-rows // TILE_TOKENS), 1)
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
