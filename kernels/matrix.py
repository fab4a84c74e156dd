"""A matrix as it lies in memory: quantized integers with scales and biases, or plain floats. No copy, no conversion.

Every backend takes these. The bytes are those of the pack: an expert's matrices are views into its block.

    matrix = Matrix.from_floats(torch.eye(4))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moepack.layout.geometry import BlockGeometry, MatrixGeometry


@dataclass(frozen=True)
class Matrix:
    """Weights [N, K] = [out_features, in_features].

    data     uint8 [N, K*bits/8] packed integers, or bf16/f16/f32 [N, K] where scales is None
    scales   bf16 [N, K/group_size]
    biases   bf16 [N, K/group_size]
    """

    out_features: int
    in_features: int
    bits: int
    data: torch.Tensor
    scales: torch.Tensor | None = None
    biases: torch.Tensor | None = None

    @classmethod
    def from_floats(cls, values: torch.Tensor) -> Matrix:
        """A matrix [N, K] that is stored as it is."""
        return cls(values.shape[0], values.shape[1], values.element_size() * 8, values)

    @classmethod
    def from_arrays(cls, geometry: MatrixGeometry, arrays: list[torch.Tensor]) -> Matrix:
        """A matrix from the bytes (uint8, flat) of its arrays, in the order of geometry.arrays."""
        rows = geometry.out_features
        if not geometry.scheme.is_quantized:
            return cls.from_floats(arrays[0].view(torch.bfloat16).view(rows, -1))
        w_q, scales, biases = arrays
        return cls(
            rows,
            geometry.in_features,
            geometry.scheme.bits,
            w_q.view(rows, -1),
            scales.view(torch.bfloat16).view(rows, -1),
            biases.view(torch.bfloat16).view(rows, -1),
        )

    def take_rows(self, rows: torch.Tensor) -> Matrix:
        """A matrix of some rows of this one, in the order given; copies them."""
        data, scales, biases = (part if part is None else part[rows] for part in (self.data, self.scales, self.biases))
        assert data is not None
        return Matrix(len(rows), self.in_features, self.bits, data, scales, biases)


@dataclass(frozen=True)
class Expert:
    """One routed or shared expert: gate_proj and up_proj [I, D], down_proj [D, I]."""

    gate_proj: Matrix
    up_proj: Matrix
    down_proj: Matrix

    @classmethod
    def from_block(cls, geometry: BlockGeometry, block: torch.Tensor) -> Expert:
        """The expert in a block (uint8, at least block_bytes long), as views into it."""
        sections = iter(geometry.sections)
        matrices = {}
        for projection, matrix in geometry.matrices:
            places = [next(sections) for _ in matrix.arrays]
            arrays = [block[place.offset_bytes : place.offset_bytes + place.size_bytes] for place in places]
            matrices[projection] = Matrix.from_arrays(matrix, arrays)
        return cls(**matrices)
