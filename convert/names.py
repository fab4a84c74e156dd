"""Which tensor of a checkpoint is which: from the names of the releases to the names in a pack.

A pack uses one spelling (`model.layers.3.self_attn.q_proj.weight`, `lm_head.weight`, `mtp.fc.weight`). Checkpoints
differ: the prefix is `model.language_model.`, `model.` or MLX's `language_model.model.`; experts are fused over a
layer, stacked by projection or stored one by one, and the MTP layer may do it another way than the trunk. Every
tensor is used, skipped for a stated reason, or reported; a checkpoint that lacks or misshapes one is refused before
any work.

    source = map_tensors(checkpoint.tensors, architecture, Quantization.of(checkpoint.config))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from moepack.convert.checkpoint import FLOAT_DTYPES
from moepack.convert.sources import FloatWeight, Quantization, Weight, assemble_weights
from moepack.layout.architecture import Architecture, resident_shapes
from moepack.layout.errors import CheckpointError
from moepack.layout.spec import PROJECTIONS
from moepack.layout.tensor_file import TensorSpec

PREFIXES = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.lm_head.": "lm_head."}
VISION_PREFIXES = ("model.visual.", "visual.", "vision_tower.")
MAX_NAMED = 4  # names of each kind in an error line; the rest is counted


@dataclass(frozen=True)
class MatrixPlace:
    """Where one matrix of one expert lies: rows first_row .. of a source weight seen as a matrix."""

    weight: Weight
    first_row: int


@dataclass
class SourceMap:
    """The source's weights by their role.

    residents   name in the pack -> weight
    experts     layer -> expert -> projection -> place; MTP layers follow the trunk's
    skipped     reason -> number of tensors
    """

    residents: dict[str, Weight] = field(default_factory=dict)
    experts: list[list[dict[str, MatrixPlace]]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def num_mtp_layers(self, architecture: Architecture) -> int:
        return len(self.experts) - architecture.num_hidden_layers


def map_tensors(tensors: Mapping[str, TensorSpec], architecture: Architecture, quantization: Quantization) -> SourceMap:
    """Assign every tensor of a checkpoint its role.

    Raises CheckpointError listing what is missing, misshapen and unexpected; ValueError as assemble_weights does.
    """
    source = SourceMap()
    found: dict[str, str] = {}  # pack's spelling -> checkpoint's
    for name in tensors:
        if name.startswith(VISION_PREFIXES):
            source.skipped["vision tower: moepack runs the text model"] += 1
        elif name.startswith("mtp.") and not architecture.mtp_num_hidden_layers:
            source.skipped["MTP head: the config says mtp_num_hidden_layers 0"] += 1
        else:
            canonical = _canonical(name)
            if canonical in found:
                raise CheckpointError(f"{name} and {found[canonical]} are the same tensor: keep one of them")
            found[canonical] = name
    assembly = assemble_weights(found, tensors, quantization)
    weights = assembly.weights
    has_mtp = any(name.startswith("mtp.") for name in found)
    mtp_layers = architecture.mtp_num_hidden_layers if has_mtp else 0
    expected = resident_shapes(architecture, mtp_layers)
    wanted = {name: shape for name, shape in expected.items() if name in weights}
    absent = [name for name in expected if name not in weights]
    mixed: list[str] = []
    for stem in _expert_stems(architecture, mtp_layers):
        shapes = _expert_shapes(stem, weights, architecture)
        wanted |= {name: shape for name, shape in shapes.items() if name in weights}
        absent += [name for name in shapes if name not in weights]
        places = _places(stem, weights, architecture) if not absent else []
        source.experts.append(places)
        mixed += _mixed_kinds(places)
    misshapen = [
        f"{weights[name].name} is {list(weights[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if weights[name].shape != shape
    ]
    mistyped = [
        f"{weight.name} is {weight.kind}, expected one of {', '.join(FLOAT_DTYPES)}"
        for weight in (weights[name] for name in wanted)
        if isinstance(weight, FloatWeight) and weight.kind not in FLOAT_DTYPES
    ]
    unexpected = [weight.name for name, weight in weights.items() if name not in wanted]
    kinds = {
        "missing": absent + assembly.missing,
        "misshapen": misshapen + assembly.misshapen,
        "unexpected": unexpected + assembly.unexpected,
        "of another type": mistyped + mixed,
    }
    if any(kinds.values()):
        parts = [f"{len(names)} {kind}: {_shorten(names)}" for kind, names in kinds.items() if names]
        raise CheckpointError(f"the tensors do not fit config.json: {'; '.join(parts)}")
    source.residents = {name: weights[name] for name in expected}
    return source


def _canonical(name: str) -> str:
    for prefix, ours in PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name


def _expert_stems(architecture: Architecture, mtp_layers: int) -> list[str]:
    stems = [f"model.layers.{layer}.mlp.experts" for layer in range(architecture.num_hidden_layers)]
    return stems + [f"mtp.layers.{layer}.mlp.experts" for layer in range(mtp_layers)]


def _is_fused(stem: str, weights: Mapping[str, Weight]) -> bool:
    return f"{stem}.gate_up_proj" in weights or f"{stem}.down_proj" in weights


def _stacked_names(stem: str) -> dict[str, str]:
    """Projection -> name of the weight that stacks it over the experts of a layer, as MLX does."""
    layer = stem.removesuffix("experts")
    return {projection: f"{layer}switch_mlp.{projection}.weight" for projection in PROJECTIONS}


def _expert_shapes(stem: str, weights: Mapping[str, Weight], a: Architecture) -> dict[str, tuple[int, ...]]:
    hidden, inner, experts = a.hidden_size, a.moe_intermediate_size, a.num_experts
    if _is_fused(stem, weights):
        return {
            f"{stem}.gate_up_proj": (experts, 2 * inner, hidden),
            f"{stem}.down_proj": (experts, hidden, inner),
        }
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    stacked = _stacked_names(stem)
    if any(name in weights for name in stacked.values()):
        return {stacked[name]: (experts, *shape) for name, shape in shapes.items()}
    return {f"{stem}.{e}.{name}.weight": shape for e in range(experts) for name, shape in shapes.items()}


def _places(stem: str, weights: Mapping[str, Weight], a: Architecture) -> list[dict[str, MatrixPlace]]:
    hidden, inner = a.hidden_size, a.moe_intermediate_size
    rows = {"gate_proj": inner, "up_proj": inner, "down_proj": hidden}
    stacked = _stacked_names(stem)
    if _is_fused(stem, weights):
        gate_up, down = weights[f"{stem}.gate_up_proj"], weights[f"{stem}.down_proj"]
        return [
            {
                "gate_proj": MatrixPlace(gate_up, 2 * inner * expert),
                "up_proj": MatrixPlace(gate_up, 2 * inner * expert + inner),
                "down_proj": MatrixPlace(down, hidden * expert),
            }
            for expert in range(a.num_experts)
        ]
    if stacked["gate_proj"] in weights:
        return [
            {name: MatrixPlace(weights[stacked[name]], rows[name] * expert) for name in PROJECTIONS}
            for expert in range(a.num_experts)
        ]
    return [
        {name: MatrixPlace(weights[f"{stem}.{expert}.{name}.weight"], 0) for name in PROJECTIONS}
        for expert in range(a.num_experts)
    ]


def _mixed_kinds(places: list[dict[str, MatrixPlace]]) -> list[str]:
    """Experts that are stored otherwise than the first one of their layer, as where files of two releases meet."""
    return [
        f"{place.weight.name} is {place.weight.kind}, that of expert 0 {places[0][projection].weight.kind}"
        for expert in places
        for projection, place in expert.items()
        if place.weight.kind != places[0][projection].weight.kind
    ]


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
