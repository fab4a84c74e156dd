"""Which tensor of a checkpoint is which: from the names of the releases to the names in a pack.

A pack uses one spelling (`model.layers.3.self_attn.q_proj.weight`, `lm_head.weight`, `mtp.fc.weight`). Checkpoints
differ: the prefix is `model.language_model.` or `model.`; experts are fused over a layer or stored one by one, and
the MTP layer may do it the other way round than the trunk. Every tensor is used, skipped for a stated reason, or
reported; a checkpoint that lacks or misshapes one is refused before any work.

    source = map_tensors(checkpoint.tensors, architecture)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from moepack.convert.checkpoint import FLOAT_DTYPES
from moepack.layout.architecture import Architecture, resident_shapes
from moepack.layout.errors import CheckpointError
from moepack.layout.spec import PROJECTIONS
from moepack.layout.tensor_file import TensorSpec

PREFIXES = ("model.language_model.", "model.")
VISION_PREFIXES = ("model.visual.", "visual.")
MAX_NAMED = 4  # names of each kind in an error line; the rest is counted


@dataclass(frozen=True)
class MatrixPlace:
    """Where one matrix of one expert lies: rows first_row .. of a source tensor seen as a matrix."""

    name: str
    first_row: int


@dataclass
class SourceMap:
    """The source's tensors by their role.

    residents   name in the pack -> name in the checkpoint
    experts     layer -> expert -> projection -> place; MTP layers follow the trunk's
    skipped     reason -> number of tensors
    """

    residents: dict[str, str] = field(default_factory=dict)
    experts: list[list[dict[str, MatrixPlace]]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def num_mtp_layers(self, architecture: Architecture) -> int:
        return len(self.experts) - architecture.num_hidden_layers


def map_tensors(tensors: Mapping[str, TensorSpec], architecture: Architecture) -> SourceMap:
    """Assign every tensor of a checkpoint its role.

    Raises CheckpointError listing what is missing, misshapen and unexpected.
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
    has_mtp = any(name.startswith("mtp.") for name in found)
    mtp_layers = architecture.mtp_num_hidden_layers if has_mtp else 0
    expected = resident_shapes(architecture, mtp_layers)
    wanted = {name: shape for name, shape in expected.items() if name in found}
    missing = [name for name in expected if name not in found]
    stems = [f"model.layers.{layer}.mlp.experts" for layer in range(architecture.num_hidden_layers)]
    stems += [f"mtp.layers.{layer}.mlp.experts" for layer in range(mtp_layers)]
    for stem in stems:
        shapes = _expert_shapes(stem, found, architecture)
        wanted |= {name: shape for name, shape in shapes.items() if name in found}
        missing += [name for name in shapes if name not in found]
        source.experts.append(_places(stem, found, architecture) if not missing else [])
    misshapen = [
        f"{found[name]} is {list(tensors[found[name]].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if tensors[found[name]].shape != shape
    ]
    unexpected = [original for name, original in found.items() if name not in wanted]
    mistyped = [
        f"{found[name]} is {tensors[found[name]].dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
        for name in wanted
        if tensors[found[name]].dtype not in FLOAT_DTYPES
    ]
    kinds = (
        *(("missing", missing), ("misshapen", misshapen)),
        *(("unexpected", unexpected), ("of another type", mistyped)),
    )
    if any(names for _, names in kinds):
        parts = [f"{len(names)} {kind}: {_shorten(names)}" for kind, names in kinds if names]
        raise CheckpointError(f"the tensors do not fit config.json: {'; '.join(parts)}")
    source.residents = {name: found[name] for name in expected}
    return source


def _canonical(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name


def _is_fused(stem: str, found: Mapping[str, str]) -> bool:
    return f"{stem}.gate_up_proj" in found or f"{stem}.down_proj" in found


def _expert_shapes(stem: str, found: Mapping[str, str], a: Architecture) -> dict[str, tuple[int, ...]]:
    hidden, inner, experts = a.hidden_size, a.moe_intermediate_size, a.num_experts
    if _is_fused(stem, found):
        return {
            f"{stem}.gate_up_proj": (experts, 2 * inner, hidden),
            f"{stem}.down_proj": (experts, hidden, inner),
        }
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"{stem}.{e}.{name}.weight": shape for e in range(experts) for name, shape in shapes.items()}


def _places(stem: str, found: Mapping[str, str], a: Architecture) -> list[dict[str, MatrixPlace]]:
    hidden, inner = a.hidden_size, a.moe_intermediate_size
    if _is_fused(stem, found):
        gate_up, down = found[f"{stem}.gate_up_proj"], found[f"{stem}.down_proj"]
        return [
            {
                "gate_proj": MatrixPlace(gate_up, 2 * inner * expert),
                "up_proj": MatrixPlace(gate_up, 2 * inner * expert + inner),
                "down_proj": MatrixPlace(down, hidden * expert),
            }
            for expert in range(a.num_experts)
        ]
    return [
        {name: MatrixPlace(found[f"{stem}.{expert}.{name}.weight"], 0) for name in PROJECTIONS}
        for expert in range(a.num_experts)
    ]


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
