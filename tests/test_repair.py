"""moe-convert --redo LAYER:EXPERT: one block as it was, and nothing else; refused where that cannot be."""

import json
import shutil
from dataclasses import replace

import pytest

from convert_command import SMALL, files_of, problems_of, run_convert
from moepack.layout.reader import Pack
from tiny_checkpoint import write_checkpoint

GROUP = ("--group-size", 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", SMALL)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "pack"
    assert run_convert(source, out, *GROUP, "--bits", 3).code == 0
    return out


@pytest.fixture
def pack(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "pack")


def damage(pack, layer, expert):
    with Pack.open(pack) as opened:
        path, offset = pack / opened.manifest.expert_files[layer].file, opened.geometry(layer).offsets[expert]
    content = bytearray(path.read_bytes())
    content[offset + 77] ^= 4
    path.write_bytes(content)


def assert_one_line(result, *parts, code):
    assert (result.code, result.out, len(result.errors)) == (code, "", 1), result.err
    assert [part for part in map(str, parts) if part not in result.errors[0]] == [], result.errors


def test_damaged_blocks_become_what_they_were(source, whole, pack):
    """By the pack's own settings, whatever the command's defaults are; the MTP layer too."""
    for layer, expert in ((0, 2), (2, 1)):
        damage(pack, layer, expert)
    assert len(problems_of(pack)) == 2
    result = run_convert(source, pack, "--redo", "0:2", "--redo", "2:1")
    assert (result.code, result.errors) == (0, [])
    assert "2 blocks" in result.out
    assert files_of(pack) == files_of(whole)


@pytest.mark.parametrize("option", [
    ("--dry-run",), ("--bits", 4), ("--group-size", 64), ("--quantizer", "minmax"), ("--resident-bits", 4),
    ("--bpw", 3.0), ("--target-size", "1GB"), ("--workers", 1), ("--memory", "4GiB"), ("--engine", "ray"),
    ("--overwrite",),
])  # fmt: skip
def test_what_does_not_go_with_a_block_as_it_was(source, pack, option):
    damage(pack, 0, 2)
    before = files_of(pack)
    assert_one_line(run_convert(source, pack, "--redo", "0:2", *option), option[0], "does not go with --redo", code=2)
    assert files_of(pack) == before


def test_the_packs_own_settings_may_be_repeated(source, whole, pack):
    damage(pack, 0, 2)
    settings = (*GROUP, "--bits", 3, "--quantizer", "mse", "--resident-bits", 8)
    assert run_convert(source, pack, *settings, "--redo", "0:2").code == 0
    assert files_of(pack) == files_of(whole)
    assert run_convert(source, pack, "--quantizer", "auto", "--redo", "0:2").code == 0


def test_json_tells_which_blocks(source, whole, pack):
    damage(pack, 0, 2)
    result = run_convert(source, pack, "--redo", "0:2", "--json", "--resume")
    assert (result.code, result.errors) == (0, [])
    told = json.loads(result.out)
    assert told == {"source": str(source), "pack": str(pack), "blocks": [{"layer": 0, "expert": 2}]}
    assert files_of(pack) == files_of(whole)


@pytest.mark.parametrize("place", ["3:0", "0:3", "99999999999999999999:0"])
def test_a_block_that_is_not_there(source, pack, place):
    assert_one_line(run_convert(source, pack, "--redo", place), f"--redo {place}", "layers 0 to 2", code=2)


@pytest.mark.parametrize("place", ["3", "a:b", "1:", "-1:2", "1:2:3", "٣:1"])
def test_what_is_no_place(source, pack, place):
    assert_one_line(run_convert(source, pack, f"--redo={place}"), "LAYER:EXPERT", code=2)


def test_another_source_is_refused_and_changes_nothing(pack, tmp_path):
    damage(pack, 0, 1)
    before = files_of(pack)
    other = write_checkpoint(tmp_path / "other", replace(SMALL, seed=1))
    assert_one_line(run_convert(other, pack, "--redo", "0:1"), pack, "another source", code=2)
    assert files_of(pack) == before


def test_a_source_whose_bytes_changed_unseen_writes_nothing(source, pack, tmp_path):
    """A weight between the samples that tell one source from another."""
    changed = shutil.copytree(source, tmp_path / "changed")
    damage(pack, 0, 1)
    before = files_of(pack)
    from moepack.convert.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(changed)
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    spec, path = checkpoint.tensors[name], changed / checkpoint.shard_of(name)
    content = bytearray(path.read_bytes())
    settings = run_convert(source, pack, "--redo", "0:0").code
    assert settings == 0
    for start in range(spec.offset_bytes + 96 * 64 * 2, spec.offset_bytes + 2 * 96 * 64 * 2, 512):
        trial = bytearray(content)
        trial[start] ^= 0x40
        path.write_bytes(trial)
        result = run_convert(changed, pack, "--redo", "0:1")
        if result.code == 1:  # at last a byte that is in no sample
            assert_one_line(result, "expert 1 becomes a block", "nothing is written", code=1)
            break
        assert result.code == 2
    else:
        pytest.skip("needs a checkpoint whose samples do not cover an expert")
    assert files_of(pack) == before


def test_no_pack_and_a_truncated_file(source, pack, tmp_path):
    assert run_convert(source, tmp_path / "nothing", "--redo", "0:1").code == 3
    victim = pack / "experts" / "layer_00.bin"
    victim.write_bytes(victim.read_bytes()[:-1])
    assert_one_line(run_convert(source, pack, "--redo", "0:1"), victim, "convert again", code=2)
