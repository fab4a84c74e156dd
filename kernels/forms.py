"""Where weights lie, packed as the kernels read it.

A form says how a matrix or an expert lies from a base. A place says at which byte of a bank the base of an expert is,
and which form it has; a segment is a place and the tokens of a prompt that chose its expert. Banks are the memories
that experts may lie in: SLOT_BANKS, and RESIDENT_BANK for the shared experts among the resident weights.

    form = expert_form(Expert.from_block(geometry, block), block, bank=0)
    places = pack_places([(block_offset, 0, 0)])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from moepack.kernels import msl
from moepack.kernels.matrix import Expert, Matrix

SLOT_BANKS, RESIDENT_BANK = (0, 1), 2
PLAIN_STORAGES = {torch.bfloat16: 16, torch.float16: 17, torch.float32: 32}


def matrix_form(matrix: Matrix, base: torch.Tensor, first_out: int = 0, first_group: int = 0) -> bytes:
    """A MatrixForm: where a matrix, all of whose parts are views into one memory, lies from its `base`.

    first_out     where its results begin in a row of results of several matrices
    first_group   its first threadgroup in a dispatch of several

    Raises ValueError if one of its parts does not start on 16 bytes from the base.
    """
    parts = [matrix.data if part is None else part for part in (matrix.data, matrix.scales, matrix.biases)]
    data, scales, biases = (part.data_ptr() - base.data_ptr() for part in parts)
    if (data | scales | biases) % 16:
        text = "a matrix, its scales and its biases must start on multiples of 16 bytes"
        raise ValueError(f"{text}, these are at {data}, {scales} and {biases}")
    is_packed = matrix.scales is not None
    return msl.pack_struct(
        "experts",
        "MatrixForm",
        data=data,
        scales=scales,
        biases=biases,
        storage=matrix.bits if is_packed else PLAIN_STORAGES[matrix.data.dtype],
        group_size=matrix.in_features // matrix.scales.shape[1] if matrix.scales is not None else 0,
        rows=matrix.out_features,
        columns=matrix.in_features,
        first_out=first_out,
        first_group=first_group,
    )


def forms_side_by_side(matrices: Sequence[Matrix], base: torch.Tensor, groups: Sequence[int]) -> bytes:
    """The MatrixForms of matrices whose results follow each other, and their threadgroups, so many of each."""
    forms, first_out, first_group = [], 0, 0
    for matrix, count in zip(matrices, groups):
        forms.append(matrix_form(matrix, base, first_out, first_group))
        first_out += matrix.out_features
        first_group += count
    return b"".join(forms)


def count_groups(matrices: Sequence[Matrix], rows: int) -> list[int]:
    """How many threadgroups of so many rows each matrix has."""
    return [-(-matrix.out_features // rows) for matrix in matrices]


def expert_form(expert: Expert, base: torch.Tensor, bank: int) -> bytes:
    """The ExpertForm of an expert, wherever its matrices lie in a bank from `base`: the byte that its Place names."""
    gate, up, down = (matrix_form(matrix, base) for matrix in (expert.gate_proj, expert.up_proj, expert.down_proj))
    return msl.pack_struct("experts", "ExpertForm", gate=gate, up=up, down=down, bank=bank)


def struct_bytes(name: str) -> int:
    """Size of a struct of metal/matrix.h: MatrixForm, ExpertForm, Place."""
    return msl.load("experts").structs[name].size_bytes


def pack_places(places: Iterable[tuple[int, int, int]]) -> bytes:
    """Places from (offset in the bank, index of the form, rank)."""
    return msl.load("experts").structs["Place"].pack_rows(places)


def count_places(places: torch.Tensor) -> int:
    """How many places a tensor of them holds."""
    return places.nbytes // struct_bytes("Place")


def pack_segments(segments: np.ndarray) -> bytes:
    """Segments from int64 [n, 4]: offset in the bank, index of the form, first pair, number of pairs."""
    ranks = np.zeros((len(segments), 1), np.int64)  # of no meaning here
    return _segment().pack_array(np.hstack([segments[:, :2], ranks, segments[:, 2:]]))


def count_segments(segments: torch.Tensor) -> int:
    """How many segments a tensor of them holds."""
    return segments.nbytes // segment_bytes()


def segment_bytes() -> int:
    """Size of a Segment."""
    return _segment().size_bytes


def _segment() -> msl.Struct:
    return msl.load("experts").structs["Segment"]
