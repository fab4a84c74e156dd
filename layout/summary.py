"""What a pack holds, in numbers: sizes, bits per weight by class of tensor, blocks and their padding, provenance.

Bits per weight count the payload (integers, scales, biases); padding is given apart. Computed from the manifest alone.

    summarize(Pack.open("model.moepack"))["experts"]["bits_per_weight"]
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from moepack.layout.geometry import BlockGeometry
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


@dataclass
class _ExpertFigures:
    """Additive figures of one layer file: blocks of each kind, weights and payload of each projection."""

    tiers: Counter[BlockGeometry] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)
    payload_bytes: Counter[str] = field(default_factory=Counter)


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


def count_token_bytes(pack: Pack, experts_per_token: int) -> int:
    """Bytes of the weights that one decoded token is computed with: its experts, and the resident ones but for the
    embedding, of which it takes a row, and the MTP head."""
    resident = pack.manifest.resident
    is_tied = not any(name.startswith("lm_head.") for name in resident.tensors)
    unused = ("mtp.",) if is_tied else ("mtp.", "model.embed_tokens.")
    layers = [_expert_layer(pack, layer) for layer in range(pack.manifest.shape.num_hidden_layers)]
    experts = sum(layer.payload_bytes.total() for layer in layers) / pack.manifest.shape.num_experts
    kept = sum(tensor.size_bytes for name, tensor in resident.tensors.items() if not name.startswith(unused))
    return kept + round(experts * experts_per_token)


def _expert_layer(pack: Pack, layer: int) -> _ExpertFigures:
    geometry, entry = pack.geometry(layer), pack.manifest.expert_files[layer]
    figures = _ExpertFigures()
    for tier_index, blocks in Counter(entry.expert_tiers).items():
        block = geometry.tiers[tier_index]
        figures.tiers[block] += blocks
        for projection, matrix in block.matrices:
            figures.weights[projection] += blocks * matrix.num_weights
            figures.payload_bytes[projection] += blocks * matrix.payload_bytes
    return figures


def _total(layers: list[_ExpertFigures]) -> dict[str, Any]:
    tiers = sum((layer.tiers for layer in layers), Counter())
    weights = sum((layer.weights for layer in layers), Counter())
    payload = sum((layer.payload_bytes for layer in layers), Counter())
    size_bytes = sum(block.block_stride * blocks for block, blocks in tiers.items())
    return {
        "layers": len(layers),
        "blocks": sum(tiers.values()),
        "weights": sum(weights.values()),
        "size_bytes": size_bytes,
        "payload_bytes": sum(payload.values()),
        "padding_bytes": size_bytes - sum(payload.values()),
        "bits_per_weight": 8 * sum(payload.values()) / sum(weights.values()),
        "classes": {
            name: {
                "weights": weights[name],
                "payload_bytes": payload[name],
                "bits_per_weight": 8 * payload[name] / weights[name],
            }
            for name in PROJECTIONS
        },
        "tiers": [_tier(block, blocks) for block, blocks in sorted(tiers.items(), key=lambda tier: -tier[1])],
    }


def _tier(block: BlockGeometry, blocks: int) -> dict[str, Any]:
    """One kind of block; bits and group sizes in the order of the projections."""
    schemes = [matrix.scheme for _, matrix in block.matrices]
    return {
        "blocks": blocks,
        "bits": [scheme.bits for scheme in schemes],
        "group_sizes": [scheme.group_size for scheme in schemes],
        "block_stride": block.block_stride,
        "payload_bytes": block.payload_bytes,
        "padding_bytes": block.block_stride - block.payload_bytes,
        "bits_per_weight": 8 * block.payload_bytes / block.num_weights,
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
        "payload_bytes": sum(size_bytes.values()),
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
