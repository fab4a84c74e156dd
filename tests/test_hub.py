"""hf://org/repo: the same pack as from a directory, through every fault of a network, in the disk space of two shards.

Against a server of our own that speaks the hub's protocol, through the real huggingface_hub client.
"""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from convert_command import SMALL, files_of, finish, problems_of, run_convert, start_convert
from golden_packs import moe_inspect
from hub_server import Fault, TinyHub
from moepack.convert import hub as hub_module
from moepack.convert import hub_transfer
from moepack.convert.hub_transfer import MAX_FAILURES, Repository
from moepack.layout.errors import CheckpointError
from tiny_checkpoint import TinyModel, write_checkpoint
from tiny_releases import write_fp8, write_gptq, write_mlx

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install 'moepack[hub]'")
GROUP = ("--group-size", 32)
ADDRESS = "hf://org/tiny"
MODEL = replace(SMALL, layers=3, full_attention_interval=1, experts=4, mtp=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pauses between attempts, no token and no server but those of the test."""
    monkeypatch.setattr(hub_transfer, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(hub_transfer, "LONGEST_WAIT_S", 0.002)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")


@pytest.fixture
def hub(monkeypatch):
    with TinyHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """More shards than layers: each layer lies in two or three."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", MODEL, shards=7)


@pytest.fixture(scope="module")
def local(source, tmp_path_factory):
    """The weights of a pack made from the directory."""
    out = tmp_path_factory.mktemp("local") / "pack"
    assert run_convert(source, out, *GROUP).code == 0
    return weights_of(out)


def weights_of(pack: Path) -> dict[str, str]:
    """All but the manifest, which tells where the source was."""
    return {name: digest for name, digest in files_of(pack).items() if name != "manifest.json"}


def settings_of(pack: Path) -> dict:
    return json.loads((pack / "manifest.json").read_text())["provenance"]["settings"]


def assert_one_line(result, *parts, code=1):
    assert (result.code, result.out, len(result.errors)) == (code, "", 1), result.err
    assert [part for part in parts if part not in result.errors[0]] == [], result.errors


def asked_first(hub: TinyHub, shard: str) -> int:
    """How many requests for a shard come before it is downloaded: its header, and what its fingerprint is of."""
    hub.sent.clear()
    with hub_module.Mirror.open(ADDRESS, None):
        return sum(sent.where == "store" and sent.name.endswith(shard) for sent in hub.sent)


def test_the_same_pack_as_from_a_directory(hub, source, local, tmp_path):
    commit = hub.publish("org/tiny", source)
    out = tmp_path / "pack"
    result = run_convert(ADDRESS, out, *GROUP)
    assert result.code == 0, result.err
    assert weights_of(out) == local
    assert problems_of(out) == []
    facts = settings_of(out)["hub"]
    assert (facts["repository"], facts["asked"], facts["commit"]) == ("org/tiny", "main", commit)
    assert facts["sha256"] == {n: d for n, d in files_of(source).items() if n.endswith(".safetensors")}
    assert json.loads((out / "manifest.json").read_text())["provenance"]["source"] == "org--tiny"


def test_fingerprints_are_those_of_the_directory_and_tell_a_fine_tune(hub, source, tmp_path):
    """So a calibration fits wherever the checkpoint is read from, and never another model of the same shapes."""
    packs = {"directory": source, "hub": ADDRESS, "tuned": "hf://org/tuned"}
    hub.publish("org/tiny", source)
    hub.publish("org/tuned", write_checkpoint(tmp_path / "other", replace(MODEL, seed=1), shards=7))
    found = {}
    for name, address in packs.items():
        assert run_convert(address, tmp_path / name, *GROUP).code == 0
        shards = settings_of(tmp_path / name)["source"]
        found[name] = {file: facts for file, facts in shards.items() if file.endswith(".safetensors")}
    assert found["directory"] == found["hub"]
    assert found["hub"].keys() == found["tuned"].keys()
    assert found["hub"] != found["tuned"]


def test_each_shard_is_downloaded_once_and_space_is_bounded(hub, source, tmp_path, monkeypatch):
    """Beside that, headers and the resident weights are asked for by range."""
    hub.publish("org/tiny", source)
    sizes = {path.name: path.stat().st_size for path in source.glob("*.safetensors")}
    most, add = [0], hub_module.HubReader._probe

    def watched(reader, shard):
        held = sum(path.stat().st_size for path in reader.folder.iterdir() if path.suffix != ".json")
        most[0] = max(most[0], held)
        assert held <= reader.scratch_bytes
        return add(reader, shard)

    monkeypatch.setattr(hub_module.HubReader, "_probe", watched)
    result = run_convert(ADDRESS, tmp_path / "pack", *GROUP, "--json")
    assert result.code == 0, result.err
    whole = [sent.name for sent in hub.sent if sent.where == "store" and sent.size == sizes.get(sent.name)]
    assert sorted(whole) == sorted(sizes)
    assert 0 < most[0] < sum(sizes.values())
    facts = json.loads(result.out)
    assert facts["source"].startswith(f"{ADDRESS}@")


def test_a_block_is_mended_and_compared_by_ranges(hub, source, local, tmp_path):
    """No shard is downloaded: what one block, and a sample of them, are made from is asked for by range."""
    hub.publish("org/tiny", source)
    out = tmp_path / "pack"
    assert run_convert(ADDRESS, out, *GROUP).code == 0
    hub.publish("org/tiny", source)  # another commit on main: the pack's own is gone back to
    with open(out / "experts" / "layer_01.bin", "r+b") as file:
        file.write(b"damage")
    sizes = {path.name: path.stat().st_size for path in source.glob("*.safetensors")}
    hub.sent.clear()
    result = run_convert(ADDRESS, out, "--redo", "1:0")
    assert result.code == 0, result.err
    assert weights_of(out) == local
    assert problems_of(out) == []
    compared = moe_inspect("verify", out, "--source", ADDRESS, "--sample", "25%", "--json")
    assert compared.returncode == 0, compared.stderr
    facts = json.loads(compared.stdout)["source"]
    assert facts["experts"] == 3
    assert all(0.01 < part["worst"]["error"] < 0.2 for part in facts["projections"].values())
    assert not [sent for sent in hub.sent if sent.size == sizes.get(sent.name)]


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_fp8, write_gptq, write_mlx])
def test_other_releases(hub, tmp_path, write):
    source = write(tmp_path / "source", SMALL)
    hub.publish("org/tiny", source)
    assert run_convert(source, tmp_path / "local", *GROUP).code == 0
    result = run_convert(ADDRESS, tmp_path / "pack", *GROUP)
    assert result.code == 0, result.err
    assert weights_of(tmp_path / "pack") == weights_of(tmp_path / "local")
    local_notes = json.loads((tmp_path / "local" / "manifest.json").read_text())["provenance"]["notes"]
    assert sorted(result.notes) == sorted(local_notes)


def test_one_file_without_an_index(hub, tmp_path):
    hub.publish("org/tiny", write_checkpoint(tmp_path / "source", SMALL, single_file=True))
    assert run_convert(ADDRESS, tmp_path / "pack", *GROUP).code == 0


FAULTS = {
    "reset": Fault("store", reset_after=5000, times=6),
    "reset before a byte": Fault("store", reset_after=0, times=3),
    "short": Fault("store", short_after=3000, times=5),
    "429": Fault("hub", status=429, headers=(("Retry-After", "0"),), times=3),
    "503": Fault("store", status=503, times=MAX_FAILURES - 1),
    "500 of the info": Fault("info", status=500, times=2),
    "expired link": Fault("store", status=403, skip=9, times=3),
    "range ignored": Fault("store", ignore_range=True, skip=3, times=3),
    "wrong range": Fault("store", headers=(("Content-Range", "bytes 7-9/10"),), times=2),
    "wrong length": Fault("store", headers=(("Content-Length", "5"),), ignore_range=True, times=2),
    "small file reset": Fault("hub", "config.json", reset_after=10),
    "a flipped bit": Fault("store", "-00002-of-00007.safetensors", flip_byte=9000, skip=2),
    "a flipped bit in a small file": Fault("hub", "config.json", flip_byte=9),
    "a flipped bit in the tokenizer": Fault("store", "tokenizer.json", flip_byte=9),
}


EVERY_TIME = ("reset", "short", "429", "expired link", "range ignored", "a flipped bit")


@pytest.mark.parametrize("name", [
    name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS
])  # fmt: skip
def test_what_a_network_does_is_survived(hub, source, local, tmp_path, name):
    hub.publish("org/tiny", source)
    fault = replace(FAULTS[name])
    hub.faults.append(fault)
    result = run_convert(ADDRESS, tmp_path / "pack", *GROUP)
    assert (result.code, result.errors) == (0, [])
    assert weights_of(tmp_path / "pack") == local
    assert hub.faults == [], "the fault never happened"


def test_a_flipped_bit_in_a_resident_range_is_found(hub, source, local, tmp_path):
    """The last requests are those for resident weights; what comes is held against the file's checked download."""
    hub.publish("org/tiny", source)
    assert run_convert(ADDRESS, tmp_path / "first", *GROUP).code == 0
    ranges = [sent for sent in hub.sent if sent.where == "store" and sent.name.endswith("-00001-of-00007.safetensors")]
    hub.faults.append(Fault("store", "-00001-of-00007.safetensors", flip_byte=0, skip=len(ranges) - 1))
    assert run_convert(ADDRESS, tmp_path / "pack", *GROUP).code == 0
    assert weights_of(tmp_path / "pack") == local
    hub.faults.append(Fault("store", "-00001-of-00007.safetensors", flip_byte=0, skip=len(ranges) - 1, times=2))
    assert_one_line(run_convert(ADDRESS, tmp_path / "other", *GROUP), "differs from the file's first download, twice")
    assert not (tmp_path / "other" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, 3])
def test_a_shard_with_a_wrong_hash_is_fetched_again_and_then_refused(hub, source, tmp_path, times):
    hub.publish("org/tiny", source)
    shard = "model.safetensors-00002-of-00007.safetensors"
    hub.faults.append(Fault("store", shard, flip_byte=9000, skip=asked_first(hub, shard), times=times))
    result = run_convert(ADDRESS, tmp_path / "pack", *GROUP)
    assert_one_line(result, shard, "sha256", "twice")
    assert not (tmp_path / "pack" / ".convert" / "shards" / shard).exists()


def test_a_server_that_stays_down_is_an_error_and_the_same_command_goes_on(hub, source, local, tmp_path):
    """What is packed is not fetched again."""
    commit = hub.publish("org/tiny", source)
    out = tmp_path / "pack"
    last = "model.safetensors-00004-of-00007.safetensors"
    hub.faults.append(Fault("store", last, status=503, skip=asked_first(hub, last), times=10**6))
    result = run_convert(ADDRESS, out, *GROUP)
    assert_one_line(result, last, "503", f"{MAX_FAILURES} times in a row", "same command again")
    done = {path.name for path in (out / "experts").glob("*.bin")}
    assert done
    hub.faults.clear()
    hub.sent.clear()
    kept = {name: (out / "experts" / name).stat().st_mtime_ns for name in done}
    assert run_convert(ADDRESS, out, *GROUP).code == 0
    assert {name: (out / "experts" / name).stat().st_mtime_ns for name in done} == kept
    assert weights_of(out) == local
    assert settings_of(out)["hub"]["commit"] == commit
    sizes = {path.name: path.stat().st_size for path in source.glob("*.safetensors")}
    again = [sent.name for sent in hub.sent if sent.size == sizes.get(sent.name)]
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    packed = {shard for tensor, shard in weight_map.items() if ".layers.0.mlp.experts" in tensor}
    needed = {shard for tensor, shard in weight_map.items() if ".layers.2.mlp.experts" in tensor or "lm_head" in tensor}
    assert "layer_00.bin" in done
    assert packed - needed
    assert not (packed - needed - {last}) & set(again)


@pytest.mark.slow
def test_a_branch_that_moves_midway_does_not_mix_in(hub, source, local, tmp_path):
    commit = hub.publish("org/tiny", source)
    out = tmp_path / "pack"
    shard = "-00004-of-00007.safetensors"
    hub.faults.append(Fault("store", shard, status=503, skip=asked_first(hub, shard), times=10**6))
    assert run_convert(ADDRESS, out, *GROUP).code == 1
    hub.faults.clear()
    other = write_checkpoint(tmp_path / "other", replace(MODEL, seed=1), shards=7)
    moved = hub.publish("org/tiny", other)
    assert moved != commit
    assert run_convert(ADDRESS, out, *GROUP).code == 0
    assert weights_of(out) == local
    assert settings_of(out)["hub"]["commit"] == commit
    assert "nothing to do" in run_convert(ADDRESS, out, *GROUP).err
    fresh = run_convert(ADDRESS, out, *GROUP, "--overwrite")
    assert fresh.code == 0
    assert settings_of(out)["hub"]["commit"] == moved
    assert weights_of(out) != local


@pytest.mark.slow
@pytest.mark.parametrize(("header", "value"), [
    ("X-Repo-Commit", "f" * 40), ("X-Linked-Etag", '"' + "a" * 64 + '"'), ("X-Linked-Size", "77"),
])  # fmt: skip
def test_an_answer_about_another_file_ends_it_at_once(hub, source, tmp_path, header, value):
    hub.publish("org/tiny", source)
    hub.faults.append(Fault("hub", ".safetensors", headers=((header, value),), skip=16))
    result = run_convert(ADDRESS, tmp_path / "pack", *GROUP)
    assert_one_line(result, "/resolve/", ".safetensors", value.strip('"')[:12])


@pytest.mark.slow
def test_a_revision_by_name_and_by_commit(hub, source, local, tmp_path):
    commit = hub.publish("org/tiny", source, "v1")
    hub.publish("org/tiny", write_checkpoint(tmp_path / "newer", SMALL))
    for revision in ("v1", commit):
        out = tmp_path / revision
        assert run_convert(f"{ADDRESS}@{revision}", out, *GROUP).code == 0
        assert weights_of(out) == local


def test_dry_run_writes_nothing_and_tells_what_it_needs(hub, source, tmp_path):
    hub.publish("org/tiny", source)
    result = run_convert(ADDRESS, tmp_path / "pack", *GROUP, "--dry-run", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    local = json.loads(run_convert(source, tmp_path / "pack", *GROUP, "--dry-run", "--json").out)
    assert list(tmp_path.iterdir()) == []
    assert told["total_bytes"] == local["total_bytes"]
    sizes = sorted(path.stat().st_size for path in source.glob("*.safetensors"))
    assert told["needed_bytes"] - local["needed_bytes"] >= sum(sizes[-2:])
    assert hub.bytes_sent() < sum(path.stat().st_size for path in source.glob("*.safetensors")) / 2


def test_too_small_a_scratch_is_refused_with_the_numbers(hub, source, tmp_path):
    hub.publish("org/tiny", source)
    assert_one_line(run_convert(ADDRESS, tmp_path / "pack", *GROUP, "--scratch", "4KiB"), "--scratch", "bytes", code=2)
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "hf://org/nothing": (1, "401", "HF_TOKEN"), "hf://org/tiny@nowhere": (1, "404", "no such revision"),
    "hf://tiny": (2, "expected hf://org/repo"), "hf://org/tiny@": (2, "expected hf://org/repo"),
    "hf://org/tiny/sub": (2, "expected hf://org/repo"),
}  # fmt: skip


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_that_lead_nowhere(hub, source, tmp_path, address):
    hub.publish("org/tiny", source)
    code, *parts = REFUSED[address]
    assert_one_line(run_convert(address, tmp_path / "pack"), address.split("@")[0], *parts, code=code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_repository_that_is_no_whole_checkpoint(hub, source, tmp_path):
    for name in ("config.json", "model.safetensors-00002-of-00007.safetensors", "model.safetensors.index.json"):
        copy = tmp_path / name
        copy.mkdir()
        for path in source.iterdir():
            if path.name != name:
                (copy / path.name).write_bytes(path.read_bytes())
        hub.publish("org/tiny", copy)
        result = run_convert(ADDRESS, tmp_path / "pack", *GROUP)
        assert_one_line(result, "safetensors" if "safetensors" in name else name)
    assert not (tmp_path / "pack").exists()


@pytest.mark.slow
def test_gated_and_private_repositories(source, tmp_path, monkeypatch):
    for gated in (True, False):
        with TinyHub(token="hf_secret", gated=gated) as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
            hub.publish("org/tiny", source)
            monkeypatch.delenv("HF_TOKEN", raising=False)
            result = run_convert(ADDRESS, tmp_path / "pack", *GROUP)
            assert_one_line(result, "401", "licence" if gated else "no access", "HF_TOKEN")
            monkeypatch.setenv("HF_TOKEN", "hf_other")
            result = run_convert(ADDRESS, tmp_path / "pack", *GROUP)
            assert_one_line(result, "403" if gated else "401", "HF_TOKEN")
            assert "hf_other" not in result.err
            monkeypatch.setenv("HF_TOKEN", "hf_secret")
            assert run_convert(ADDRESS, tmp_path / str(gated), *GROUP).code == 0
            tokens = {(sent.where, sent.token) for sent in hub.sent}
            assert tokens == {("hub", "Bearer hf_secret"), ("store", None)}
            manifest = (tmp_path / str(gated) / "manifest.json").read_text()
            assert "hf_secret" not in manifest


def test_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = run_convert(ADDRESS, tmp_path / "pack")
    assert_one_line(result, ADDRESS, f"{MAX_FAILURES} times in a row", "check the connection")


def test_retry_after_is_waited_for(hub, source, monkeypatch, caplog):
    """What takes a second or more is not waited for without a word."""
    waits = []
    monkeypatch.setattr(hub_transfer, "_pause", lambda seconds, stopped: waits.append(seconds))
    hub.publish("org/tiny", source)
    hub.faults.append(Fault("info", status=429, headers=(("Retry-After", "7"),)))
    repository = Repository.open("org/tiny", "main")
    hub.faults.append(Fault("hub", "generation_config.json", status=503, times=2))
    assert json.loads(repository.read_small("generation_config.json"))
    assert waits == [7.0, 0.001, 0.002]
    assert [record.getMessage() for record in caplog.records if record.name.endswith("hub_transfer")] == [
        f"note: {ADDRESS}@main: the hub answers 429: again in 7 s"
    ]


def test_pauses_double_up_to_a_minute_and_progress_begins_anew(monkeypatch):
    waits = []
    monkeypatch.undo()
    monkeypatch.setattr(hub_transfer, "_pause", lambda seconds, stopped: waits.append(seconds))

    def attempt():
        error = hub_transfer._Retry("broken")
        error.progressed = len(waits) == 3
        raise error

    with pytest.raises(CheckpointError, match=f"{MAX_FAILURES} times in a row"):
        hub_transfer._persist("it", attempt)
    assert waits == [1, 2, 4, 1, 2, 4, 8, 16, 32, 60]


@pytest.mark.slow
def test_killed_and_interrupted_it_goes_on(hub, local, source, tmp_path):
    hub.publish("org/tiny", source)
    out = tmp_path / "pack"
    shard = "-00005-of-00007.safetensors"
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        blocker = Fault("store", shard, status=503, skip=asked_first(hub, shard), times=MAX_FAILURES - 1)
        hub.faults.append(blocker)
        process = start_convert(ADDRESS, out, *GROUP)
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until and blocker.times == MAX_FAILURES - 1:
            time.sleep(0.01)
        process.send_signal(number)
        assert finish(process).code == code
        assert not (out / "manifest.json").exists()
        hub.faults.clear()
    assert run_convert(ADDRESS, out, *GROUP).code == 0
    assert weights_of(out) == local


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_transfer.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert_one_line(run_convert(ADDRESS, tmp_path / "pack"), "extra hub", "pip install 'moepack[hub]'", code=2)


def test_a_layer_in_many_shards_takes_as_much_scratch_as_it_needs():
    sizes = dict.fromkeys("abcdef", 10)
    assert hub_module._live_bytes([{"a", "b"}, {"b", "c"}, {"d"}], sizes) == 20
    assert hub_module._live_bytes([{"a"}, {"b"}, {"a", "c"}], sizes) == 20
    assert hub_module._live_bytes([{"a", "b", "c"}, {"d"}], sizes) == 30


@pytest.mark.slow
def test_a_large_model_of_many_experts_plans_in_little_time(hub, tmp_path):
    """Names and shards of 64 experts in each of six layers, one by one: what grows is the number of tensors."""
    model = TinyModel(layers=6, experts=64, hidden=32, moe_intermediate=32, mtp=False, vision=False)
    hub.publish("org/tiny", write_checkpoint(tmp_path / "source", model, experts="per_expert", shards=6))
    assert run_convert(ADDRESS, tmp_path / "pack", *GROUP).code == 0
