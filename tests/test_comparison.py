"""moe-inspect verify --source: errors against the original are right, and a block of other weights is found."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from conftest import DEMO, make_pack
from golden_packs import edit_manifest, moe_inspect
from moepack.convert.comparison import ExpertError, Original, measure_errors, summarize_errors
from moepack.convert.quantizers import QUANTIZERS
from moepack.layout.errors import CheckpointError, DamagedPack
from moepack.layout.quantized import dequantize
from moepack.layout.reader import Pack
from tiny_checkpoint import write_checkpoint


def test_errors_are_those_of_the_quantizer(tiny_source: Path, tiny_pack: Path) -> None:
    with Pack.open(tiny_pack) as pack:
        original = Original.open(tiny_source, pack)
        places = [(0, 3), (4, 5)]  # of the trunk and of the MTP head
        errors = list(measure_errors(original, pack, places))
        assert [(error.layer, error.expert) for error in errors] == places
        for error in errors:
            for name, matrix in pack.geometry(error.layer).block(error.expert).matrices:
                weights = original.read_matrix(error.layer, error.expert, name, matrix.out_features)
                arrays = QUANTIZERS["minmax"](weights, 4, 32).arrays
                found = dequantize(arrays["w_q"], arrays["scales"], arrays["biases"], bits=4, group_size=32)
                expected = math.sqrt(((found - weights) ** 2).sum() / (weights**2).sum())
                assert error.relative_rms[name] == pytest.approx(expected, rel=1e-5)
                assert 0.01 < expected < 0.2


def test_bf16_is_the_original(tiny_source: Path, tmp_path: Path) -> None:
    pack = make_pack(tiny_source, tmp_path / "pack", bits=16, resident_bits=16)
    facts = json.loads(moe_inspect("verify", pack, "--source", tiny_source, "--json").stdout)
    assert facts["ok"]
    assert facts["source"]["experts"] == facts["blocks"] == len(facts["source"]["errors"])
    assert {part["worst"]["error"] for part in facts["source"]["projections"].values()} == {0.0}


def test_the_command_names_the_worst(tiny_source: Path, tiny_pack: Path) -> None:
    shown = moe_inspect("verify", tiny_pack, "--source", tiny_source)
    assert shown.returncode == 0
    facts = json.loads(moe_inspect("verify", tiny_pack, "--source", tiny_source, "--json").stdout)["source"]
    worst = max(facts["errors"], key=lambda one: max(one["gate_proj"], one["up_proj"], one["down_proj"]))
    assert f"worst experts: {worst['layer']}:{worst['expert']} (" in shown.stdout
    sampled = json.loads(moe_inspect("verify", tiny_pack, "--source", tiny_source, "--sample", "10%", "--json").stdout)
    assert sampled["source"]["experts"] == sampled["blocks"] == 3


def test_an_expert_of_other_weights_is_found_though_its_checksum_is_right(tiny_source: Path, tiny_copy: Path) -> None:
    """Two experts changed places when the pack was written: only the original can tell."""
    with Pack.open(tiny_copy) as pack:
        file, geometry = tiny_copy / pack.manifest.expert_files[1].file, pack.geometry(1)
        stride = geometry.block(2).block_stride
        raw = bytearray(file.read_bytes())
    first, second = geometry.offsets[2], geometry.offsets[3]
    raw[first : first + stride], raw[second : second + stride] = (
        raw[second : second + stride],
        raw[first : first + stride],
    )
    file.write_bytes(raw)

    def swap(manifest: dict) -> None:
        entry = manifest["expert_files"][1]
        digests = entry["block_sha256"]
        digests[2], digests[3] = digests[3], digests[2]
        entry["sha256"] = hashlib.sha256(raw).hexdigest()

    edit_manifest(tiny_copy, swap)
    assert moe_inspect("verify", tiny_copy).returncode == 0
    checked = moe_inspect("verify", tiny_copy, "--source", tiny_source)
    assert checked.returncode == 3
    wrong = [line for line in checked.stdout.splitlines() if "is not the source's expert" in line]
    assert [line.split(": ")[1] for line in wrong] == [
        f"layer 1 expert {expert} at byte {geometry.offsets[expert]}" for expert in (2, 3)
    ]
    assert f"moe-convert SRC {tiny_copy} --redo 1:2 --redo 1:3" in checked.stderr


def test_damaged_blocks_are_left_out_of_the_comparison(tiny_source: Path, tiny_copy: Path) -> None:
    with open(tiny_copy / "experts" / "layer_00.bin", "r+b") as file:
        file.write(b"\xff\xff\xff\xff")
    ended = moe_inspect("verify", tiny_copy, "--source", tiny_source, "--json")
    facts = json.loads(ended.stdout)
    assert (ended.returncode, len(facts["problems"])) == (3, 1)
    assert facts["source"]["experts"] == facts["blocks"] - 1
    with Pack.open(tiny_copy) as pack, pytest.raises(DamagedPack, match="layer 0 expert 0 at byte 0: sha256 is"):
        list(measure_errors(Original.open(tiny_source, pack), pack, [(0, 0)]))


def test_another_model_is_refused(tiny_pack: Path, tmp_path: Path) -> None:
    refused = moe_inspect("verify", tiny_pack, "--source", DEMO)
    assert refused.returncode == 1
    assert f"give the checkpoint that {tiny_pack} was made from" in refused.stderr
    with Pack.open(tiny_pack) as pack, pytest.raises(CheckpointError, match="no such directory"):
        Original.open(tmp_path / "none", pack)


def test_experts_one_by_one_in_the_checkpoint(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", experts="per_expert", mtp_experts="fused")
    pack = make_pack(source, tmp_path / "pack")
    facts = json.loads(moe_inspect("verify", pack, "--source", source, "--json").stdout)["source"]
    assert max(part["worst"]["error"] for part in facts["projections"].values()) < 0.2


def test_an_infinite_error_is_told() -> None:
    errors = [ExpertError(0, expert, {"gate_proj": value}) for expert, value in enumerate((0.1, math.inf, 0.2))]
    facts = summarize_errors(errors)
    assert facts["projections"]["gate_proj"]["worst"] == {"layer": 0, "expert": 1, "error": None}
    assert facts["projections"]["gate_proj"]["median"] == pytest.approx(0.2)
    assert [one["expert"] for one in facts["worst_experts"]] == [1, 2, 0]
    assert np.isfinite(json.loads(json.dumps(facts, allow_nan=False))["errors"][0]["gate_proj"])
