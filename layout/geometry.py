"""The only offset arithmetic: how large a quantized matrix is, where its sections lie in a block, where blocks lie.

A matrix has three sections: integers, scales, biases (at 16 bits one: the weights). A block holds the matrices of one
expert, section after section, each on a multiple of 64 bytes; it is zero-padded to whole pages. A layer file is
its blocks back to back, expert 0 first. Everything else asks here; nobody else multiplies sizes.

    BlockGeometry.of(4096, 1024, uniform_schemes(bits=4, group_size=64)).block_stride   # 7077888
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from moepack.layout.spec import (
    DTYPE_BYTES,
    GROUP_SIZES,
    PAGE_SIZE,
    PROJECTIONS,
    QUANTIZED_BITS,
    SECTION_ALIGNMENT,
    UNQUANTIZED_BITS,
)


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


@dataclass(frozen=True)
class Scheme:
    """How one matrix is stored: bits per integer and weights per group. At 16 bits (bf16) there are no groups."""

    bits: int
    group_size: int | None

    def __post_init__(self) -> None:
        if self.bits == UNQUANTIZED_BITS:
            if self.group_size is not None:
                raise ValueError(f"16 bits means bf16 as it is, without groups, got group size {self.group_size}")
        elif self.bits not in QUANTIZED_BITS:
            raise ValueError(f"bits must be one of {(*QUANTIZED_BITS, UNQUANTIZED_BITS)}, got {self.bits}")
        elif self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size must be one of {GROUP_SIZES}, got {self.group_size}")

    @classmethod
    def of(cls, bits: int, group_size: int) -> Scheme:
        """The scheme for these bits; the group size is dropped where bf16 needs none."""
        return cls(bits, None if bits == UNQUANTIZED_BITS else group_size)

    @property
    def is_quantized(self) -> bool:
        return self.bits != UNQUANTIZED_BITS


@dataclass(frozen=True)
class Section:
    """A run of bytes in a block: what it is, where it starts, its array type and shape."""

    name: str  # "gate_proj.w_q"
    offset_bytes: int
    dtype: str  # safetensors spelling: U32 or BF16
    shape: tuple[int, int]

    @property
    def size_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class MatrixGeometry:
    """The arrays of one matrix [out_features, in_features] stored by a scheme."""

    out_features: int
    in_features: int
    scheme: Scheme

    def __post_init__(self) -> None:
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"a matrix needs rows and columns, got {self.out_features} x {self.in_features}")
        group_size = self.scheme.group_size
        if group_size is not None and self.in_features % group_size:
            raise ValueError(f"group size {group_size} does not divide the row length {self.in_features}")

    @property
    def arrays(self) -> tuple[tuple[str, str, tuple[int, int]], ...]:
        """(name, dtype, shape) of each array, in the order in which they are stored."""
        rows, columns = self.out_features, self.in_features
        if self.scheme.group_size is None:
            return (("weight", "BF16", (rows, columns)),)
        groups = columns // self.scheme.group_size
        return (
            ("w_q", "U32", (rows, columns * self.scheme.bits // 32)),
            ("scales", "BF16", (rows, groups)),
            ("biases", "BF16", (rows, groups)),
        )

    @property
    def payload_bytes(self) -> int:
        return sum(shape[0] * shape[1] * DTYPE_BYTES[dtype] for _, dtype, shape in self.arrays)

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class BlockGeometry:
    """One expert's block: its matrices, the sections with their offsets, and its size."""

    matrices: tuple[tuple[str, MatrixGeometry], ...]  # in the order of PROJECTIONS
    sections: tuple[Section, ...]
    block_bytes: int  # end of the last section
    block_stride: int  # distance to the next block: whole pages

    @classmethod
    def of(cls, hidden_size: int, intermediate_size: int, schemes: Mapping[str, Scheme]) -> BlockGeometry:
        """Lay out one expert. `schemes` names a Scheme for each projection.

        Raises ValueError if a projection is missing or unknown, or a group size does not divide its row.
        """
        if set(schemes) != set(PROJECTIONS):
            raise ValueError(f"a block needs exactly {PROJECTIONS}, got {tuple(schemes)}")
        shapes = {
            "gate_proj": (intermediate_size, hidden_size),
            "up_proj": (intermediate_size, hidden_size),
            "down_proj": (hidden_size, intermediate_size),
        }
        matrices, sections, end = [], [], 0
        for projection in PROJECTIONS:
            try:
                matrix = MatrixGeometry(*shapes[projection], schemes[projection])
            except ValueError as error:
                raise ValueError(f"{projection}: {error}") from None
            matrices.append((projection, matrix))
            for name, dtype, shape in matrix.arrays:
                section = Section(f"{projection}.{name}", align_up(end, SECTION_ALIGNMENT), dtype, shape)
                sections.append(section)
                end = section.offset_bytes + section.size_bytes
        return cls(tuple(matrices), tuple(sections), end, align_up(end, PAGE_SIZE))

    @property
    def payload_bytes(self) -> int:
        """Bytes that carry weights: without the gaps between sections and the padding at the end."""
        return sum(matrix.payload_bytes for _, matrix in self.matrices)

    @property
    def num_weights(self) -> int:
        return sum(matrix.num_weights for _, matrix in self.matrices)

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of every run of bytes that must be zero: gaps between sections and the rest of the last page."""
        ends = [section.offset_bytes + section.size_bytes for section in self.sections]
        starts = [section.offset_bytes for section in self.sections[1:]] + [self.block_stride]
        return tuple((end, start) for end, start in zip(ends, starts) if start > end)


def uniform_schemes(bits: int, group_size: int) -> dict[str, Scheme]:
    """The same scheme for all three projections."""
    return {projection: Scheme.of(bits, group_size) for projection in PROJECTIONS}


class LayerGeometry:
    """Where the blocks of one layer file lie. Blocks may differ: `tiers` are the kinds, `expert_tiers` picks one each.

    offsets      offset_bytes of each expert's block
    size_bytes   size of the file
    """

    def __init__(self, tiers: Sequence[BlockGeometry], expert_tiers: Sequence[int]):
        self.tiers, self.expert_tiers = tuple(tiers), tuple(expert_tiers)
        ends = list(accumulate(self.tiers[tier].block_stride for tier in self.expert_tiers))
        self.offsets = (0, *ends[:-1])
        self.size_bytes = ends[-1]

    @property
    def num_experts(self) -> int:
        return len(self.expert_tiers)

    def block(self, expert: int) -> BlockGeometry:
        """The geometry of one expert's block."""
        return self.tiers[self.expert_tiers[expert]]
