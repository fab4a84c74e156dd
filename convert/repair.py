"""Put single blocks of a finished pack right again from its source: the same bytes, or nothing.

moe-inspect verify names the blocks that are damaged. Each is made anew from the source by the pack's own settings and
written in its place if its checksum is the one that the manifest has; the rest of the pack is not touched, and the
result is the pack as it was converted. A file that is missing or of another size is a case for converting again.

    repair_blocks(plan, parse_places(["7:31"]))
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moepack.convert.journal import locked
from moepack.convert.pipeline import encode_expert
from moepack.convert.plan import ConversionPlan
from moepack.convert.recipe import Recipe
from moepack.layout.errors import CheckpointError, UsageError
from moepack.layout.manifest import Manifest
from moepack.layout.writer import naming_failures


def parse_places(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(layer, expert) of each LAYER:EXPERT. Raises UsageError."""
    places = []
    for text in texts:
        layer, _, expert = text.partition(":")
        if not (layer.isascii() and layer.isdigit() and expert.isascii() and expert.isdigit()):
            raise UsageError(f"--redo {text}: expected LAYER:EXPERT, two numbers as moe-inspect verify prints them")
        places.append((int(layer), int(expert)))
    return places


def recipe_of(pack: Path) -> Recipe:
    """The settings that a pack was converted with. Raises DamagedPack, UnsupportedVersion, UsageError."""
    arguments = Manifest.read(pack).provenance.get("settings", {}).get("arguments")
    try:
        return Recipe.of_arguments(arguments)
    except (AttributeError, TypeError):
        raise UsageError(f"{pack}: was converted by another moepack, which cannot be repeated: convert again") from None


def repair_blocks(plan: ConversionPlan, places: Sequence[tuple[int, int]]) -> None:
    """Write these blocks (layer, expert) of the pack at the plan's output again.

    Raises UsageError if the pack has no such block, was made from another source or with other settings, or its file
    is not of its size; CheckpointError if the source no longer gives the block that the manifest describes; WriteError.
    """
    out = plan.out
    with locked(out):
        manifest = Manifest.read(out)
        if not plan.describes(manifest):
            raise UsageError(f"{out}: was made from another source or by another moepack: --redo needs the very same")
        for layer, expert in places:
            if layer >= len(manifest.expert_files) or expert >= manifest.shape.num_experts:
                raise UsageError(
                    f"--redo {layer}:{expert}: {out} has layers 0 to {len(manifest.expert_files) - 1} and experts 0 "
                    f"to {manifest.shape.num_experts - 1}"
                )
            entry = manifest.expert_files[layer]
            path = out / entry.file
            if not path.is_file() or path.stat().st_size != entry.size_bytes:
                raise UsageError(
                    f"{path}: is missing or not of its {entry.size_bytes} bytes: --redo mends blocks only, convert "
                    "again with --overwrite"
                )
            encoded = encode_expert(plan, layer, expert)
            if encoded.sha256 != entry.block_sha256[expert]:
                raise CheckpointError(
                    f"{plan.source_name}: layer {layer} expert {expert} becomes a block with sha256 "
                    f"{encoded.sha256[:12]}…, the manifest says {entry.block_sha256[expert][:12]}…: nothing is written"
                )
            with naming_failures(path), open(path, "r+b") as file:
                file.seek(manifest.layer_geometry(layer).offsets[expert])
                file.write(encoded.arrays["block"])
                file.flush()
                os.fsync(file.fileno())
