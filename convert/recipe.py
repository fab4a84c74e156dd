"""What a conversion will write: the scheme of every matrix, and from that every size, before any work.

Routed experts get `bits`; the other large matrices `resident_bits`, or the source's own integers where it has them and
they are no wider: rounding again would only cost. What is small and steers the model (norms, router,
gates, convolution, decay) stays as it is: it is below a thousandth of the bytes, and rounding it costs far more.

    recipe = Recipe(bits=4, group_size=64, resident_bits=8)
    forecast = Forecast.of(recipe, source, shape)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from moepack.convert.names import SourceMap
from moepack.convert.sources import Weight
from moepack.layout.errors import UsageError
from moepack.layout.geometry import MatrixGeometry, Scheme, uniform_schemes
from moepack.layout.manifest import BlockSchemes, ModelShape, block_geometry
from moepack.layout.spec import DTYPE_BYTES, UNQUANTIZED_BITS
from moepack.layout.tensor_file import layout_tensors

AUTO_GROUP_SIZE, DEFAULT_GROUP_SIZE = 0, 64
# Matrices outside the routed experts that may be quantized; everything else keeps the source's type and bits.
QUANTIZABLE = re.compile(
    r"model\.embed_tokens|lm_head|mtp\.fc"
    r"|.+\.linear_attn\.(in_proj_qkv|in_proj_z|out_proj)"
    r"|.+\.self_attn\.[qkvo]_proj"
    r"|.+\.mlp\.shared_expert\.(gate|up|down)_proj"
)


@dataclass(frozen=True)
class Recipe:
    """The user's choice. bits and resident_bits of 16 mean bf16 (resident: the source's type) as it is.

    group_size   AUTO_GROUP_SIZE for the source's own groups of its experts, else DEFAULT_GROUP_SIZE
    """

    bits: int
    group_size: int
    resident_bits: int
    quantizer: str

    def with_groups_of(self, source: SourceMap) -> Recipe:
        """The same recipe with its group size settled."""
        if self.group_size != AUTO_GROUP_SIZE:
            return self
        schemes = [place.weight.scheme for layer in source.experts for place in layer[0].values()]
        own = {scheme.group_size for scheme in schemes if scheme and scheme.bits == self.bits}
        return replace(self, group_size=min((size for size in own if size), default=DEFAULT_GROUP_SIZE))

    @property
    def expert_schemes(self) -> BlockSchemes:
        """Scheme of each projection of a routed expert."""
        return uniform_schemes(self.bits, self.group_size)

    def resident_scheme(self, matrix: str, weight: Weight) -> Scheme | None:
        """Scheme of a resident matrix by its name without ".weight"; None where it is stored as floats."""
        if not QUANTIZABLE.fullmatch(matrix):
            return None
        if weight.scheme and weight.scheme.bits <= self.resident_bits:
            return weight.scheme
        if self.resident_bits == UNQUANTIZED_BITS:
            return None
        return Scheme.of(self.resident_bits, self.group_size)


@dataclass(frozen=True)
class Forecast:
    """Everything a conversion will write, by size.

    resident_arrays   (name, dtype, shape) of every array of resident.safetensors
    quantized         resident matrix -> scheme
    """

    expert_file_bytes: int
    num_expert_files: int
    resident_bytes: int
    num_weights: int
    payload_bytes: int
    resident_arrays: tuple[tuple[str, str, tuple[int, ...]], ...]
    quantized: dict[str, Scheme]

    @classmethod
    def of(cls, recipe: Recipe, source: SourceMap, shape: ModelShape) -> Forecast:
        """Compute all sizes. Raises UsageError where a group size does not divide a row, naming it and its length."""
        try:
            block = block_geometry(shape, recipe.expert_schemes)
        except ValueError as error:
            raise UsageError(f"routed experts: {error}: choose another --group-size") from None
        arrays, quantized, weights, payload = [], {}, 0, 0
        for name, weight in source.residents.items():
            matrix = name.removesuffix(".weight")
            scheme = recipe.resident_scheme(matrix, weight)
            weights += math.prod(weight.shape)
            if scheme is None:
                arrays.append((name, weight.dtype, weight.shape))
                payload += math.prod(weight.shape) * DTYPE_BYTES[weight.dtype]
                continue
            try:
                geometry = MatrixGeometry(weight.shape[0], weight.shape[1], scheme)
            except ValueError as error:
                raise UsageError(f"{name}: {error}: choose another --group-size, or --resident-bits 16") from None
            quantized[matrix] = scheme
            payload += geometry.payload_bytes
            for part, dtype, part_shape in geometry.arrays:
                arrays.append((f"{matrix}.{'weight' if part == 'w_q' else part}", dtype, part_shape))
        header, specs = layout_tensors(arrays)
        blocks = shape.num_experts * len(source.experts)
        return cls(
            expert_file_bytes=block.block_stride * shape.num_experts,
            num_expert_files=len(source.experts),
            resident_bytes=len(header) + sum(spec.size_bytes for spec in specs),
            num_weights=weights + blocks * block.num_weights,
            payload_bytes=payload + blocks * block.payload_bytes,
            resident_arrays=tuple(arrays),
            quantized=quantized,
        )

    @property
    def total_bytes(self) -> int:
        return self.expert_file_bytes * self.num_expert_files + self.resident_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.payload_bytes / self.num_weights
