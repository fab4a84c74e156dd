"""What a pack holds, in numbers: sizes, bits per weight by class of tensor, blocks and their padding, provenance.

Bits per weight count the payload (integers, scales, biases); padding is given apart. Computed from the manifest alone.

    summarize(Pack.open("model.moepack"))["experts"]["bits_per_weight"]
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from moepack.layout.reader import Pack
from moepack.layout.spec import FORMAT_VERSION, PROJECTIONS

# The first match names the class of a resident tensor.
RESIDENT_CLASSES = (
    ("mtp head", ("mtp.",)),
    ("embedding and head", ("embed_tokens", "lm_head")),
    ("shared experts", ("shared_expert.",)),
    ("routers and gates", ("mlp.gate.", "shared_expert_gate")),
    ("attention", ("self_attn.",)),
    ("deltanet", ("linear_attn.",)),
    ("norms", ("norm",)),
)


def summarize(pack: Pack) -> dict[str, Any]:
    """All figures as one JSON-ready object; `moe-inspect show --json` prints it."""
    manifest, shape = pack.manifest, pack.manifest.shape
    sizes = manifest.list_files()
    trunk = [_expert_layer(pack, layer) for layer in range(shape.num_hidden_layers)]
    mtp = [_expert_layer(pack, layer) for layer in range(shape.num_hidden_layers, len(manifest.expert_files))]
    return {
        "pack": str(pack.directory),
        "format_version": FORMAT_VERSION,
        "architecture": manifest.model.get("architecture"),
        "num_hidden_layers": shape.num_hidden_layers,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": manifest.model["text_config"].get("num_experts_per_tok"),
        "hidden_size": shape.hidden_size,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "size_bytes": sum(sizes.values()),
        "num_files": len(sizes) + 1,
        "experts": _total(trunk),
        "mtp_experts": _total(mtp) if mtp else None,
        "resident": _resident(pack),
        "copied_files": [entry.file for entry in manifest.copied_files],
        "provenance": dict(manifest.provenance),
    }


def _expert_layer(pack: Pack, layer: int) -> Counter[str]:
    """Additive figures of one layer file; a tier is named by its schemes and stride."""
    geometry, entry = pack.geometry(layer), pack.manifest.expert_files[layer]
    figures: Counter[str] = Counter(size_bytes=geometry.size_bytes)
    for tier_index in entry.expert_tiers:
        block, schemes = geometry.tiers[tier_index], entry.tiers[tier_index]
        figures["blocks"] += 1
        figures["weights"] += block.num_weights
        figures["payload_bytes"] += block.payload_bytes
        label = "/".join(f"{schemes[name].bits}" for name in PROJECTIONS)
        groups = "/".join(f"{schemes[name].group_size or '-'}" for name in PROJECTIONS)
        figures[f"tier:bits {label} group {groups} stride {block.block_stride}"] += 1
    return figures


def _total(layers: list[Counter[str]]) -> dict[str, Any]:
    total: Counter[str] = sum(layers, Counter())
    padding = total["size_bytes"] - total["payload_bytes"]
    return {
        "layers": len(layers),
        "blocks": total["blocks"],
        "weights": total["weights"],
        "size_bytes": total["size_bytes"],
        "payload_bytes": total["payload_bytes"],
        "padding_bytes": padding,
        "bits_per_weight": 8 * total["payload_bytes"] / total["weights"],
        "tiers": {key.removeprefix("tier:"): count for key, count in total.items() if key.startswith("tier:")},
    }


def _resident(pack: Pack) -> dict[str, Any]:
    resident = pack.manifest.resident
    weights: Counter[str] = Counter()
    size_bytes: Counter[str] = Counter()
    for name, tensor in resident.tensors.items():
        kind = next((kind for kind, parts in RESIDENT_CLASSES if any(part in name for part in parts)), "other")
        matrix, _, suffix = name.rpartition(".")
        size_bytes[kind] += tensor.size_bytes
        if matrix not in resident.quantized:
            weights[kind] += math.prod(tensor.shape)
        elif suffix == "weight":
            weights[kind] += math.prod(tensor.shape) * 32 // resident.quantized[matrix].bits
    return {
        "size_bytes": resident.size_bytes,
        "tensors": len(resident.tensors),
        "weights": sum(weights.values()),
        "bits_per_weight": 8 * sum(size_bytes.values()) / max(1, sum(weights.values())),
        "classes": {
            kind: {
                "weights": weights[kind],
                "size_bytes": size_bytes[kind],
                "bits_per_weight": 8 * size_bytes[kind] / max(1, weights[kind]),
            }
            for kind in sorted(size_bytes)
        },
    }
