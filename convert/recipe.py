"""What a conversion will write: the scheme of every matrix, and from that every size, before any work.

Routed experts get `bits`, or mixed ones (allocation.py); the other large matrices `resident_bits`, or the source's own
integers where it has them and they are no wider: rounding again would only cost. What is small and steers the model
(norms, router, gates, convolution, decay) stays as it is: it is below a thousandth of the bytes, and rounding it costs
far more.

    recipe = Recipe(bits=4, group_size=64, resident_bits=8)
    forecast = Forecast.of(recipe, source, shape, [LayerSchemes.uniform(recipe.expert_schemes, 512)] * 60)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moepack.convert.names import SourceMap
from moepack.convert.sources import Weight
from moepack.layout.errors import UsageError
from moepack.layout.geometry import LayerGeometry, MatrixGeometry, Scheme, uniform_schemes
from moepack.layout.manifest import BlockSchemes, ModelShape, block_geometry
from moepack.layout.spec import DTYPE_BYTES, UNQUANTIZED_BITS
from moepack.layout.tensor_file import layout_tensors

AUTO_GROUP_SIZE, DEFAULT_GROUP_SIZE = 0, 64
MIXED, MIXED_BITS = "mixed", 0  # bits of a recipe: chosen for each projection of each expert (allocation.py)
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

    bits              or MIXED_BITS, with one of the targets
    group_size        AUTO_GROUP_SIZE for the source's own groups of its experts, else DEFAULT_GROUP_SIZE; with mixed
                      bits for groups of any size
    bits_per_weight   target of mixed bits: payload of the routed experts
    target_bytes      target of mixed bits: the whole pack
    """

    bits: int
    group_size: int
    resident_bits: int
    quantizer: str
    bits_per_weight: float | None = None
    target_bytes: int | None = None

    @property
    def arguments(self) -> dict[str, int | float | str]:
        """What was given, by name; what was not is left out."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return given | ({"bits": MIXED} if self.bits == MIXED_BITS else {})

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any]) -> Recipe:
        """The inverse of `arguments`. Raises TypeError if they are not those of a recipe."""
        return cls(**{**arguments, **({"bits": MIXED_BITS} if arguments.get("bits") == MIXED else {})})

    def with_groups_of(self, source: SourceMap) -> Recipe:
        """The same recipe with its group size settled."""
        if self.group_size != AUTO_GROUP_SIZE or self.bits == MIXED_BITS:
            return self
        schemes = [place.weight.scheme for layer in source.experts for place in layer[0].values()]
        own = {scheme.group_size for scheme in schemes if scheme and scheme.bits == self.bits}
        return replace(self, group_size=min((size for size in own if size), default=DEFAULT_GROUP_SIZE))

    @property
    def expert_schemes(self) -> BlockSchemes:
        """Scheme of each projection of a routed expert, where all are alike."""
        return uniform_schemes(self.bits, self.group_size)

    def resident_scheme(self, matrix: str, weight: Weight) -> Scheme | None:
        """Scheme of a resident matrix by its name without ".weight"; None where it is stored as floats."""
        if not QUANTIZABLE.fullmatch(matrix):
            return None
        if weight.scheme and weight.scheme.bits <= self.resident_bits:
            return weight.scheme
        if self.resident_bits == UNQUANTIZED_BITS:
            return None
        return Scheme.of(self.resident_bits, self.group_size or DEFAULT_GROUP_SIZE)


@dataclass(frozen=True)
class LayerSchemes:
    """The schemes of a layer's experts: the kinds of block in it, and which one each expert has."""

    tiers: tuple[BlockSchemes, ...]
    expert_tiers: tuple[int, ...]

    @classmethod
    def of(cls, experts: Iterable[BlockSchemes]) -> LayerSchemes:
        """From the schemes of each expert; tiers in the order in which they are met."""
        tiers: list[BlockSchemes] = []
        places = []
        for schemes in experts:
            if schemes not in tiers:
                tiers.append(schemes)
            places.append(tiers.index(schemes))
        return cls(tuple(tiers), tuple(places))

    @classmethod
    def uniform(cls, schemes: BlockSchemes, num_experts: int) -> LayerSchemes:
        """All experts alike."""
        return cls((schemes,), (0,) * num_experts)

    def __getitem__(self, expert: int) -> BlockSchemes:
        return self.tiers[self.expert_tiers[expert]]

    def geometry(self, shape: ModelShape) -> LayerGeometry:
        """Where the layer's blocks lie. Raises ValueError if a group does not divide a row."""
        return LayerGeometry([block_geometry(shape, tier) for tier in self.tiers], self.expert_tiers)


@dataclass(frozen=True)
class Forecast:
    """Everything a conversion will write, by size.

    expert_file_bytes   of each layer file
    resident_arrays     (name, dtype, shape) of every array of resident.safetensors
    quantized           resident matrix -> scheme
    """

    expert_file_bytes: tuple[int, ...]
    resident_bytes: int
    num_weights: int
    payload_bytes: int
    experts_bits_per_weight: float
    resident_arrays: tuple[tuple[str, str, tuple[int, ...]], ...]
    quantized: dict[str, Scheme]

    @classmethod
    def of(cls, recipe: Recipe, source: SourceMap, shape: ModelShape, experts: Sequence[LayerSchemes]) -> Forecast:
        """Compute all sizes, with the given schemes of each layer's experts.

        Raises UsageError where a group size does not divide a row, naming it and its length.
        """
        try:
            layers = [layer.geometry(shape) for layer in experts]
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
        blocks = [layer.block(expert) for layer in layers for expert in range(layer.num_experts)]
        experts_bytes = sum(block.payload_bytes for block in blocks)
        experts_weights = sum(block.num_weights for block in blocks)
        return cls(
            expert_file_bytes=tuple(layer.size_bytes for layer in layers),
            resident_bytes=len(header) + sum(spec.size_bytes for spec in specs),
            num_weights=weights + experts_weights,
            payload_bytes=payload + experts_bytes,
            experts_bits_per_weight=8 * experts_bytes / experts_weights,
            resident_arrays=tuple(arrays),
            quantized=quantized,
        )

    @property
    def total_bytes(self) -> int:
        return sum(self.expert_file_bytes) + self.resident_bytes

    @property
    def spilled_bytes(self) -> int:
        """Scales and biases of resident matrices: they wait in a file while the weights are written."""
        arrays = layout_tensors(self.resident_arrays)[1]
        return sum(spec.size_bytes for spec in arrays if spec.name.rpartition(".")[2] in ("scales", "biases"))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.payload_bytes / self.num_weights
