"""What differs between two packs, by their manifests: every byte of a pack has a digest there, so no file is read.

Equal digests mean equal bytes; of bytes that differ it is told where they are, not by how much (that is what
`moe-inspect verify --source` and `moe-run eval --reference` measure). What cannot be compared, such as experts of two
shapes of model, is told once and not block by block.

    for difference in compare_packs(first, second): print(difference.text)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moepack.layout.manifest import BlockSchemes, ExpertFile, Manifest, ResidentFile
from moepack.layout.spec import PROJECTIONS

MAX_NAMED = 8  # of experts or tensors in one line; the rest is counted
MAX_VALUE = 60  # characters of a value in one line


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same. `text` is a line for people, the rest is for programs.

    part      settings, model, experts, resident tensors or copied files
    name      what it is: a key, a tensor, a file
    first     the value in the first pack, None where it has none
    second    the same for the second
    layer     the layer, where experts differ
    experts   those of the layer whose bytes or schemes differ
    """

    part: str
    text: str
    name: str
    first: Any = None
    second: Any = None
    layer: int | None = None
    experts: tuple[int, ...] = field(default=())


def compare_packs(first: Manifest, second: Manifest) -> list[Difference]:
    """All differences: settings, model, experts, resident tensors, copied files, in this order."""
    return [
        *_compare_values("settings", _flatten(first.provenance), _flatten(second.provenance)),
        *_compare_values("model", _flatten(first.model), _flatten(second.model)),
        *_compare_experts(first, second),
        *_compare_resident(first.resident, second.resident),
        *_compare_files(first, second),
    ]


def _flatten(values: Mapping[str, Any], stem: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{stem}{key}.")
        else:
            flat[f"{stem}{key}"] = value
    return flat


def _compare_values(part: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    for key in dict.fromkeys((*first, *second)):
        values = first.get(key), second.get(key)
        if values[0] != values[1] or (key in first) != (key in second):
            shown = [_show(values[n]) if key in side else "nothing" for n, side in enumerate((first, second))]
            yield Difference(part, f"{key}: {shown[0]} and {shown[1]}", key, *values)


def _compare_experts(first: Manifest, second: Manifest) -> Iterator[Difference]:
    layers = len(first.expert_files), len(second.expert_files)
    if layers[0] != layers[1]:
        yield Difference("experts", f"files: {layers[0]} and {layers[1]}", "files", *layers)
    if first.shape != second.shape:
        text = f"shapes: {vars(first.shape)} and {vars(second.shape)}: blocks are not compared"
        yield Difference("experts", text, "shapes", vars(first.shape), vars(second.shape))
        return
    for one, other in zip(first.expert_files, second.expert_files):
        yield from _compare_layer(one, other)


def _compare_layer(one: ExpertFile, other: ExpertFile) -> Iterator[Difference]:
    experts = range(len(one.expert_tiers))
    schemes = [[entry.tiers[tier] for tier in entry.expert_tiers] for entry in (one, other)]
    retiered = tuple(expert for expert in experts if schemes[0][expert] != schemes[1][expert])
    if retiered:
        kinds = [_describe_tiers(entry) for entry in (one, other)]
        text = (
            f"layer {one.layer}: {len(retiered)} of {len(experts)} experts stored otherwise: {kinds[0]} and {kinds[1]}"
        )
        yield Difference("experts", text, "tiers", kinds[0], kinds[1], one.layer, retiered)
    same_kind = set(experts) - set(retiered)
    changed = tuple(expert for expert in sorted(same_kind) if one.block_sha256[expert] != other.block_sha256[expert])
    if changed:
        text = f"layer {one.layer}: {len(changed)} of {len(experts)} experts have other bytes: {_list(changed)}"
        yield Difference("experts", text, "blocks", layer=one.layer, experts=changed)


def _describe_tiers(entry: ExpertFile) -> str:
    counts = Counter(_describe_schemes(entry.tiers[tier]) for tier in entry.expert_tiers)
    return ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())


def _describe_schemes(schemes: BlockSchemes) -> str:
    bits = "/".join(str(schemes[name].bits) for name in PROJECTIONS)
    groups = "/".join(str(schemes[name].group_size or "-") for name in PROJECTIONS)
    return f"bits {bits} group {groups}"


def _compare_resident(first: ResidentFile, second: ResidentFile) -> Iterator[Difference]:
    part = "resident tensors"
    facts = [
        {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape), **_scheme_of(resident, name)}
            for name, tensor in resident.tensors.items()
        }
        for resident in (first, second)
    ]
    yield from _compare_values(part, *facts)
    changed = [
        name
        for name in facts[0].keys() & facts[1].keys()
        if facts[0][name] == facts[1][name] and first.tensors[name].sha256 != second.tensors[name].sha256
    ]
    for name in sorted(changed):
        digests = first.tensors[name].sha256, second.tensors[name].sha256
        yield Difference(part, f"{name}: other bytes", name, *digests)


def _scheme_of(resident: ResidentFile, name: str) -> dict[str, Any]:
    scheme = resident.quantized.get(name.rpartition(".")[0])
    return {"bits": scheme.bits, "group_size": scheme.group_size} if scheme else {}


def _compare_files(first: Manifest, second: Manifest) -> Iterator[Difference]:
    files = [{entry.file: entry for entry in manifest.copied_files} for manifest in (first, second)]
    for name in dict.fromkeys((*files[0], *files[1])):
        one, other = files[0].get(name), files[1].get(name)
        if one is None or other is None:
            where = "first" if one else "second"
            digests = [entry and entry.sha256 for entry in (one, other)]
            yield Difference("copied files", f"{name}: only in the {where}", name, digests[0], digests[1])
        elif one.sha256 != other.sha256:
            text = f"{name}: other bytes ({one.size_bytes:,} and {other.size_bytes:,})"
            yield Difference("copied files", text, name, one.sha256, other.sha256)


def _list(items: Iterable[object]) -> str:
    names = [str(item) for item in items]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"
