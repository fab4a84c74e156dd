"""The golden packs: read for ever, verified whole, and written by this version byte for byte as they are."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import make_golden
from golden_packs import GOLDEN, NAMES, copy_pack, find_problems, moe_inspect, read_everything, read_manifest
from moepack.layout.manifest import Manifest
from moepack.layout.reader import Pack

SIZE_LIMIT_BYTES = 200 * 1024
FROZEN_SHA256 = {  # of the manifests, and through them of every byte of the packs
    "minimal": "8b98cbc512663f63cbfbe76627fe11307877017c8f5033a854b1a2df2d1bb359",
    "mixed": "13c567008a088b512d52711b1ec889ea99ae602c11d63290af889b912cad3a1c",
}


@pytest.mark.parametrize("name", NAMES)
def test_f34_golden_packs_are_as_they_were(name: str) -> None:
    assert hashlib.sha256((GOLDEN / name / "manifest.json").read_bytes()).hexdigest() == FROZEN_SHA256[name]


@pytest.mark.parametrize("name", NAMES)
def test_f34_golden_packs_read_and_verify(name: str) -> None:
    read_everything(GOLDEN / name)
    assert find_problems(GOLDEN / name) == []


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_expected_ones(name: str) -> None:
    expected = json.loads((GOLDEN / make_golden.EXPECTED_NAME).read_text())[name]
    assert {label: list(sums) for label, sums in make_golden.measure(GOLDEN / name).items()} == expected


def test_f32_writer_reproduces_golden_packs(tmp_path: Path) -> None:
    make_golden.write_all(tmp_path / "again")
    assert make_golden.find_differences(GOLDEN, tmp_path / "again") == []


@pytest.mark.parametrize("name", NAMES)
def test_f32_manifest_is_written_as_it_was_read(name: str) -> None:
    assert Manifest.read(GOLDEN / name).to_bytes() == (GOLDEN / name / "manifest.json").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_whole_files_answer_to_sha256sum(name: str) -> None:
    manifest = read_manifest(GOLDEN / name)
    entries = [manifest["resident"], *manifest["expert_files"], *manifest["copied_files"]]
    for entry in entries:
        assert hashlib.sha256((GOLDEN / name / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


def test_golden_packs_have_what_is_easily_got_wrong() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < SIZE_LIMIT_BYTES
    with Pack.open(GOLDEN / "mixed") as pack:
        blocks = [
            pack.geometry(layer).block(expert)
            for layer in range(len(pack.manifest.expert_files))
            for expert in range(pack.geometry(layer).num_experts)
        ]
        resident = pack.manifest.resident
    schemes = [{matrix.scheme for _, matrix in block.matrices} for block in blocks]
    assert {scheme.bits for used in schemes for scheme in used} == {2, 3, 4, 8, 16}
    assert any(len({scheme.bits for scheme in used}) == 3 for used in schemes)
    assert {block.block_stride for block in blocks} == {16384, 32768, 49152}
    assert all(block.block_bytes % 16384 for block in blocks)
    assert len({section.shape[1] for section in blocks[0].sections if section.name.endswith("scales")}) == 2
    assert {(scheme.bits, scheme.group_size) for scheme in resident.quantized.values()} == {(8, 32), (4, 64), (4, 128)}
    with Pack.open(GOLDEN / "minimal") as pack:
        assert len(pack.geometry(0).block(0).padding) == 7


def test_make_golden_compares_and_never_overwrites(tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, make_golden.__file__, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert run("--check", GOLDEN).returncode == 0
    refused = run(GOLDEN)
    assert (refused.returncode, refused.stderr) == (1, f"{GOLDEN}: exists already, and golden packs are frozen\n")
    for name in NAMES:
        copy_pack(name, tmp_path)
    different = run("--check", tmp_path)
    assert different.returncode == 1
    assert different.stdout == f"{tmp_path / 'expected.json'}: differs from what the writer makes now\n"


def test_show_prints_a_golden_pack() -> None:
    shown = moe_inspect("show", GOLDEN / "mixed")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "2 layers, 2 experts of 64 x 96, 1 per token" in shown.stdout
    rows = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert "experts 2 4/3/2 32/32/64 16.00 KiB 7.38 KiB 46.1%" in rows
    assert "mtp experts 2 2/2/2 32/32/32 16.00 KiB 9.25 KiB 57.8%" in rows
    facts = json.loads(moe_inspect("show", GOLDEN / "mixed", "--json").stdout)
    assert facts["experts"]["size_bytes"] == 7 * 16384
    assert facts["experts"]["padding_bytes"] + facts["experts"]["payload_bytes"] == 7 * 16384
    assert [tier["blocks"] for tier in facts["experts"]["tiers"]] == [2, 1, 1]
    assert (
        sum(tier["blocks"] * tier["padding_bytes"] for tier in facts["experts"]["tiers"])
        == (facts["experts"]["padding_bytes"])
    )
    by_class = facts["experts"]["classes"]
    assert [by_class[name]["bits_per_weight"] for name in ("gate_proj", "up_proj", "down_proj")] == [8.75, 8.25, 7.375]
    assert facts["mtp_experts"]["bits_per_weight"] == 3.0  # 2 bits and a scale and a bias of 16 per group of 32
