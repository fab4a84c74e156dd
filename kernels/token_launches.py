"""The calls of a token's products on NVIDIA's GPUs: cuda/'s kernels for packed weights, and for a few plain rows.

Packed weights are multiplied as bytes (cuda/bytes.h, cuda/vector.h). Same names, arguments and results as in
launches.py, within the kernels' tolerances. Linears that cannot be taken here, or gain nothing, go there by themselves;
of experts takes_experts says it, since `hidden` is not the same (Device.expert_launches).

    launch = token_launches.linears(memory, forms, matrices, x, out)          # forms by token_launches.matrix_forms
    launch = token_launches.experts_gate_up(banks, forms, places, x, hidden)  # hidden [ranks, hidden_width(width)]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from moepack.kernels import launches
from moepack.kernels.forms import count_groups, count_places, forms_side_by_side
from moepack.kernels.launches import LANES, UNIT, Launch
from moepack.kernels.matrix import Matrix
from moepack.kernels.msl import pack_struct

TILE_ROWS = 16  # cuda/bytes.h and cuda/vector.h
STRIP, MAX_STRIPS = 512, 8  # cuda/bytes.h
MAX_SIMDGROUPS = 8  # cuda/linears_bytes.cu
PLAIN_SIMDGROUPS, KEEPERS, PLAIN_COLUMNS = 4, 4, 4096  # cuda/linears_plain.cu
PLAIN_ROWS = 2048  # in all: more would be bound by bytes
GROUPS, WANTED = 128, 1024  # threadgroups, and simdgroups in all, that fill a large GPU
STRIP_UNITS, DIGITS_WORDS = 16, 30  # cuda/vector.h; words of a unit's digits, with what is known of them
GATE_UP_THREADS, DOWN_SIMDGROUPS, FEW_PLACES = 128, 11, 10  # cuda/experts_vector.cu
MAX_COLUMNS, MAX_WIDTH = 4096, 1024  # the same
# Weights of a projection of an expert from which on the calls here pay, by bits: 397B's has 2^22, 35B's 2^20.
LEAST_WEIGHTS = {2: 2**20, 3: 2**21, 4: 2**20, 8: 2**20, 16: 2**21}


def matrix_forms(matrices: Sequence[Matrix], base: torch.Tensor) -> bytes:
    """The MatrixForms of matrices that share an input, for linears."""
    if _are_few(matrices):
        return forms_side_by_side(matrices, base, count_groups(matrices, PLAIN_SIMDGROUPS))
    if not _is_fit(matrices):
        return launches.matrix_forms(matrices, base)
    return forms_side_by_side(matrices, base, _count_byte_groups(matrices, *_divide(matrices)))


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
    """launches.linears. Raises ValueError if rows of x, which follow each other, would not start on 16 bytes."""
    rest = (weights, forms, matrices, x, out, norm, normed, accumulate, eps)
    if _are_few(matrices):
        if len(x) > 1 and x.shape[-1] % 4:
            raise ValueError(f"rows of x start on 16 bytes, got {x.shape[-1]} columns")
        groups, keepers = sum(count_groups(matrices, PLAIN_SIMDGROUPS)), 0 if normed is None else KEEPERS
        sizes = {"columns": matrices[0].in_features, "groups": groups}
        return launches.linears_by("linears_plain", sizes, groups + keepers, PLAIN_SIMDGROUPS, *rest)
    if not _is_fit(matrices):
        return launches.linears(*rest)
    tiles, parts = _divide(matrices)
    sizes = {"columns": matrices[0].in_features, "tiles": tiles, "parts": parts}
    groups = sum(_count_byte_groups(matrices, tiles, parts))
    return launches.linears_by("linears_bytes", sizes, groups, tiles * parts, *rest)


def _are_few(matrices: Sequence[Matrix]) -> bool:
    """Whether the matrices are a few rows of bfloat16, as a router's, which latency bounds and not bytes."""
    columns, rows = matrices[0].in_features, sum(matrix.out_features for matrix in matrices)
    is_plain = all(matrix.data.dtype == torch.bfloat16 for matrix in matrices)
    return is_plain and rows <= PLAIN_ROWS and columns <= PLAIN_COLUMNS and columns % 8 == 0


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


def _count_byte_groups(matrices: Sequence[Matrix], tiles: int, parts: int) -> list[int]:
    """The threadgroups of each matrix: packed ones by `tiles` tiles, plain ones by a row for each simdgroup."""
    return [
        -(-matrix.out_features // (tiles * parts if matrix.scales is None else tiles * TILE_ROWS))
        for matrix in matrices
    ]


def takes_experts(columns: int, width: int, bits: Collection[int]) -> bool:
    """Whether threadgroup memory can hold the vectors of such experts, and the calls here pay.

    Ten of 397B's gain 27, 37, 18 and 14 % of the time at 4, 2, 8 and 3 bits, eleven at 3 hardly anything
    (benchmarks/README.md); at 16 they were not timed. Nine of 35B's gain 11, 5 and 7 % at 4, 2 and 8 bits and lose 22
    at 3 (runtime/EXPERIMENTS.md).
    """
    is_held = columns <= MAX_COLUMNS and width <= MAX_WIDTH
    return is_held and columns * width >= max(LEAST_WEIGHTS[some] for some in bits)


def hidden_width(width: int) -> int:
    """launches.hidden_width: numbers spread over whole strips, and the same as digits."""
    return -(-width // (STRIP_UNITS * UNIT)) * STRIP_UNITS * (UNIT + DIGITS_WORDS)


def experts_gate_up(
    banks: Sequence[torch.Tensor], forms: torch.Tensor, places: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor
) -> Launch:
    """launches.experts_gate_up."""
    launches.check_spread(x)
    shape = _experts_shape(places, x, hidden)
    grid = (_hidden_units(hidden) * UNIT // TILE_ROWS, count_places(places), 1)
    arguments: tuple[torch.Tensor | bytes, ...] = (*banks, forms, places, x, hidden, shape)
    kernel = _variant("experts_gate_up", places)
    return Launch("experts_vector", kernel, arguments, grid, (GATE_UP_THREADS, 1, 1))


def experts_down(
    banks: Sequence[torch.Tensor],
    forms: torch.Tensor,
    places: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    x: torch.Tensor,
) -> Launch:
    """launches.experts_down."""
    shape = _experts_shape(places, x, hidden)
    simdgroups = min(count_places(places), DOWN_SIMDGROUPS)
    grid = (-(-x.shape[-1] // TILE_ROWS), 1, 1)
    arguments: tuple[torch.Tensor | bytes, ...] = (*banks, forms, places, hidden, weights, x, shape)
    kernel = _variant("experts_down", places)
    return Launch("experts_vector", kernel, arguments, grid, (simdgroups * LANES, 1, 1))


def _variant(kernel: str, places: torch.Tensor) -> str:
    """The form of a kernel for so many places: few leave registers for more of the work of each."""
    return f"{kernel}_few" if count_places(places) <= FEW_PLACES else kernel


def _experts_shape(places: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor) -> bytes:
    """Raises ValueError for a `hidden` that is not of hidden_width, and for more than threadgroup memory can hold."""
    columns, units = x.shape[-1], _hidden_units(hidden)
    if hidden.shape[-1] != hidden_width(units * UNIT):
        raise ValueError(f"hidden has rows of {hidden_width(1)} numbers, or a multiple, got {hidden.shape[-1]}")
    if columns > MAX_COLUMNS or units * UNIT > MAX_WIDTH:
        raise ValueError(f"at most {MAX_COLUMNS} columns and {MAX_WIDTH} rows, got {columns} and {units * UNIT}")
    sizes = {"places": count_places(places), "x_units": -(-columns // UNIT), "units": units}
    return pack_struct("experts_vector", "ExpertsShape", **sizes, hidden_stride=hidden.shape[-1], rows=columns)


def _hidden_units(hidden: torch.Tensor) -> int:
    """Over how many units the rows of hidden are spread."""
    return hidden.shape[-1] // (UNIT + DIGITS_WORDS)
