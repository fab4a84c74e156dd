"""The calls of linears on NVIDIA's GPUs: cuda/'s kernel for packed weights, as bytes (cuda/bytes.h).

Same names, arguments and results as in launches.py, within the kernels' tolerances; what cannot be taken here, or gains
nothing, goes there. A device says by Device.launches which of the two modules it takes.

    launch = byte_launches.linears(memory, forms, matrices, x, out)      # forms by byte_launches.matrix_forms
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moepack.kernels import launches
from moepack.kernels.forms import forms_side_by_side
from moepack.kernels.launches import Launch
from moepack.kernels.matrix import Matrix

TILE_ROWS, STRIP, MAX_STRIPS = 16, 512, 8  # cuda/bytes.h
MAX_SIMDGROUPS = 8  # cuda/linears_bytes.cu
GROUPS, WANTED = 128, 1024  # threadgroups, and simdgroups in all, that fill a large GPU


def matrix_forms(matrices: Sequence[Matrix], base: torch.Tensor) -> bytes:
    """The MatrixForms of matrices that share an input, for linears."""
    if not _is_fit(matrices):
        return launches.matrix_forms(matrices, base)
    return forms_side_by_side(matrices, base, TILE_ROWS * _divide(matrices)[0])


def linears(
    weights: torch.Tensor,
    forms: torch.Tensor,
    matrices: Sequence[Matrix],
    x: torch.Tensor,
    out: torch.Tensor,
    norm: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
    accumulate: bool = False,
    eps: float = 0.0,
) -> Launch:
    """launches.linears."""
    rest = (weights, forms, matrices, x, out, norm, normed, accumulate, eps)
    if not _is_fit(matrices):
        return launches.linears(*rest)
    tiles, parts = _divide(matrices)
    sizes = {"columns": matrices[0].in_features, "tiles": tiles, "parts": parts}
    return launches.linears_by("linears_bytes", sizes, TILE_ROWS * tiles, tiles * parts, *rest)


def _is_fit(matrices: Sequence[Matrix]) -> bool:
    """Whether the kernel can take the columns, and pays: most of the weights are packed."""
    packed = sum(matrix.out_features for matrix in matrices if matrix.scales is not None)
    return matrices[0].in_features <= MAX_STRIPS * STRIP and 2 * packed > sum(m.out_features for m in matrices)


def _divide(matrices: Sequence[Matrix]) -> tuple[int, int]:
    """(tiles of a threadgroup, simdgroups of a tile): WANTED simdgroups in all, if there are strips enough."""
    num_tiles = sum(-(-matrix.out_features // TILE_ROWS) for matrix in matrices)
    parts = 1
    while num_tiles * parts < WANTED and 2 * parts <= min(MAX_SIMDGROUPS, -(-matrices[0].in_features // STRIP)):
        parts *= 2
    return max(1, min(MAX_SIMDGROUPS // parts, -(-num_tiles // GROUPS))), parts
