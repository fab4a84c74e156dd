"""moe-inspect diff: every kind of difference is named, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from conftest import make_pack
from golden_packs import GOLDEN, copy_pack, edit_manifest, moe_inspect, moe_inspect_process
from moepack.layout.difference import Difference, compare_packs
from moepack.layout.manifest import Manifest


def compare(first: Path, second: Path) -> list[Difference]:
    return compare_packs(Manifest.read(first), Manifest.read(second))


def test_a_pack_is_the_same_as_its_copy(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path)
    assert compare(GOLDEN / "mixed", pack) == []
    shown = moe_inspect_process("diff", GOLDEN / "mixed", pack)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, f"{GOLDEN / 'mixed'} and {pack}: the same\n", "")
    assert json.loads(moe_inspect("diff", GOLDEN / "mixed", pack, "--json").stdout) == {
        "same": True,
        "differences": [],
    }


def test_every_kind_of_difference_is_named(tmp_path: Path) -> None:
    pack = copy_pack("mixed", tmp_path)

    def change(manifest: dict) -> None:
        manifest["provenance"]["settings"] = {"arguments": {"bits": 3}}
        manifest["model"]["text_config"]["vocab_size"] = 7
        manifest["expert_files"][1]["block_sha256"][0] = "0" * 63 + "1"
        manifest["expert_files"][2]["tiers"].append(manifest["expert_files"][2]["tiers"][0])  # alike
        manifest["expert_files"][2]["expert_tiers"][1] = 1
        manifest["resident"]["tensors"]["mtp.norm.weight"]["sha256"] = "0" * 63 + "2"
        del manifest["copied_files"][0]
        manifest["copied_files"][0]["sha256"] = "0" * 63 + "3"

    edit_manifest(pack, change)
    found = compare(GOLDEN / "mixed", pack)
    assert [(one.part, one.name, one.layer, one.experts) for one in found] == [
        ("settings", "settings.arguments.bits", None, ()),
        ("model", "text_config.vocab_size", None, ()),
        ("experts", "blocks", 1, (0,)),
        ("resident tensors", "mtp.norm.weight", None, ()),
        ("copied files", "config.json", None, ()),
        ("copied files", "chat_template.jinja", None, ()),
    ]
    assert found[0].text == "settings.arguments.bits: nothing and 3"
    assert found[2].text == "layer 1: 1 of 2 experts have other bytes: 0"
    assert found[4].text == "config.json: only in the first"
    assert compare(pack, GOLDEN / "mixed")[-1].text == "config.json: only in the second"


def test_packs_of_two_widths(tiny_source: Path, tiny_pack: Path, tmp_path: Path) -> None:
    other = make_pack(tiny_source, tmp_path / "pack", bits=2)
    shown = moe_inspect("diff", tiny_pack, other)
    assert shown.returncode == 1
    lines = shown.stdout.splitlines()
    assert lines[:3] == ["settings:", "  settings.arguments.bits: 4 and 2", "experts:"]
    assert lines[3].startswith(
        "  layer 0: 6 of 6 experts stored otherwise: 6 x bits 4/4/4 group 32/32/32 and 6 x bits 2"
    )
    assert not any(line.startswith(("resident", "model", "copied")) for line in lines)
    facts = json.loads(moe_inspect("diff", tiny_pack, other, "--json").stdout)
    assert facts["same"] is False
    assert facts["differences"][1]["experts"] == list(range(6))


def test_other_shapes_are_told_once() -> None:
    found = [one for one in compare(GOLDEN / "minimal", GOLDEN / "mixed") if one.part == "experts"]
    assert [one.name for one in found] == ["files", "shapes"]


def test_what_is_no_pack_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "mixed", tmp_path / "pack")
    (tmp_path / "pack" / "manifest.json").unlink()
    refused = moe_inspect("diff", GOLDEN / "mixed", tmp_path / "pack")
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "not a pack" in refused.stderr
