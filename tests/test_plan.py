"""moe-inspect plan: the arithmetic of predictions, what is measured, refusals, and settings that moe-run takes over."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from golden_packs import moe_inspect
from moepack.kernels.backend import choose_backend
from moepack.layout import machine
from moepack.layout.cli import _open_model
from moepack.layout.disk_speed import DiskSpeed, list_blocks, measure_reads, stand_in_file
from moepack.layout.errors import UsageError
from moepack.layout.machine import ReadSettings, known_machine, load_settings, save_settings, settings_path
from moepack.layout.plan import Arithmetic, Disk, ModelSizes, predict, uniform_hit_rate
from moepack.layout.reader import Pack
from moepack.layout.storage import DataFile
from moepack.runtime import Engine
from moepack.runtime.engine import read_architecture
from moepack.runtime.forecast import Candidate, Row, recommend
from moepack.runtime.machine_costs import Advice, choose_reads, compare_advice, measure_start, measure_while_busy
from moepack.runtime.rehearsal import pack_schemes, rehearse
from moepack.runtime.resident import ResidentWeights

MODEL = ModelSizes(num_layers=10, num_experts=100, num_experts_per_tok=4, block_bytes=10**6)
COSTS = Arithmetic(0.020, 0.010, 0.0005, 0.0005, 0.002, 100, 0.1, 0.05)
DISK = Disk({1: 1e9, 4: 2e9}, 4e9, queue_depth=4)
AT = {"num_slots": 400, "prefill_chunk": 100, "prompt_tokens": 200}


@pytest.fixture(autouse=True)
def small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """No speed is tested here: what is measured may come from caches."""
    for name, value in (("POOL_BYTES", 2**20), ("FLUSH_BYTES", 2**20), ("HEAD_BYTES", 2**16), ("ROUNDS", 2)):
        monkeypatch.setattr(f"moepack.runtime.rehearsal.{name}", value)
    monkeypatch.setattr("moepack.runtime.machine_costs.STREAM_BYTES", 2**22)
    monkeypatch.setattr("moepack.layout.disk_speed.MEMORY_BYTES", 2**20)


def test_everything_in_memory_waits_for_nothing() -> None:
    found = predict(MODEL, COSTS, DISK, hit_rate=0.3, **{**AT, "num_slots": 1000})
    assert found.decode_tok_s == pytest.approx(1 / 0.022)
    assert (found.bytes_per_token, found.disk_share, found.compute_share) == (0, 0, 1)


def test_without_hits_the_disk_decides() -> None:
    """Four blocks at 2 GB/s are 2 ms a layer; they come together, and are computed then."""
    found = predict(MODEL, COSTS, DISK, hit_rate=0.0, **AT)
    assert 1 / found.decode_tok_s == pytest.approx(0.010 + 0.002 + 10 * (0.002 + 4 * 0.0005))
    assert found.bytes_per_token == pytest.approx(40e6)
    assert found.disk_share == pytest.approx(0.020 / 0.052)


def test_hits_are_averaged_over_layers_that_miss_little_and_much() -> None:
    """Half of four: the binomial of 0 to 4 misses, not two misses everywhere."""
    found = predict(MODEL, COSTS, DISK, hit_rate=0.5, **AT)
    speeds = (1e9, 4e9 / 3, 5e9 / 3, 2e9)  # by reads in flight
    hits = [(4 - misses) * 0.0005 for misses in range(1, 5)]
    layers = [max(hits[m - 1], m * 1e6 / speeds[m - 1]) + m * 0.0005 for m in range(1, 5)]
    likely = [math.comb(4, misses) / 16 for misses in range(5)]
    expected = 0.012 + 10 * (likely[0] * 0.002 + sum(p * s for p, s in zip(likely[1:], layers)))
    assert 1 / found.decode_tok_s == pytest.approx(expected)


def test_more_of_anything_is_never_slower() -> None:
    rates = [predict(MODEL, COSTS, DISK, hit_rate=rate, **AT).decode_tok_s for rate in (0, 0.2, 0.5, 0.9, 0.99)]
    assert rates == sorted(rates)
    ahead = predict(MODEL, COSTS, replace(DISK, max_hints=4), hit_rate=0.5, **AT)
    assert ahead.decode_tok_s > rates[2]
    assert ahead.bytes_per_token > predict(MODEL, COSTS, DISK, hit_rate=0.5, **AT).bytes_per_token
    faster = Disk({1: 2e9, 4: 4e9}, 8e9, 4)
    assert predict(MODEL, COSTS, faster, hit_rate=0.5, **AT).decode_tok_s > rates[2]


def test_reads_are_slower_while_something_is_computed() -> None:
    busy = replace(DISK, busy_bytes_s={1: 0.5e9, 4: 1e9})
    assert busy.read_s(4e6, 4) == DISK.read_s(4e6, 4) == pytest.approx(0.002)
    assert busy.read_s(4e6, 4, computing_s=0.001) == pytest.approx(0.001 + 3e6 / 2e9)
    assert busy.read_s(1e6, 1, computing_s=1.0) == pytest.approx(0.002)
    late = replace(DISK, start_s=0.0002)
    rates = [predict(MODEL, COSTS, disk, hit_rate=0.5, **AT).decode_tok_s for disk in (DISK, late, busy)]
    assert rates[0] > rates[1] > rates[2]


def test_what_is_computed_while_reads_run_does_not_delay_them() -> None:
    costs = replace(COSTS, meanwhile_s=0.0004)  # of the 1 ms that a layer's mixer takes
    found = predict(MODEL, costs, DISK, hit_rate=0.0, **AT)
    assert 1 / found.decode_tok_s == pytest.approx(0.006 + 0.002 + 10 * (0.002 + 4 * 0.0005))
    fast = predict(MODEL, costs, Disk({1: 1e12}, 1e12, 4), hit_rate=0.0, **AT)
    assert 1 / fast.decode_tok_s == pytest.approx(0.012 + 10 * 4 * 0.0005, rel=1e-3)


def test_what_is_read_ahead_is_asked_for_no_more_but_ends_first() -> None:
    """All four miss. The disk is free for 3 ms, and reads three and a half; the rest of the last one is read first."""
    disk = replace(DISK, max_hints=4)
    found = predict(MODEL, COSTS, disk, hit_rate=0.0, recall=0.8, **AT)
    demanded = 4 - 0.8 * 3.5
    read_s = (demanded + 0.5) * 1e6 / (1e9 + (demanded - 1) / 3 * 1e9)
    assert 1 / found.decode_tok_s == pytest.approx(0.010 + 0.002 + 10 * (max(0.0014, read_s) + demanded * 0.0005))
    assert found.bytes_per_token == pytest.approx(10 * (demanded + 3.5) * 1e6)


def test_a_prompt_reads_nearly_all_experts_once_a_chunk() -> None:
    disk = Disk({1: 1e9}, 1e8, queue_depth=1)  # slow: reads decide
    asked = 100 * (1 - 0.96**100)
    first = 10 * asked * 1e6 / 1e8
    found = predict(MODEL, COSTS, disk, hit_rate=0.5, **{**AT, "prompt_tokens": 100})
    assert found.ttft_s == pytest.approx(first + 0.1 + 0.002 + 10 * 0.05 / asked)
    assert found.prefill_tok_s == pytest.approx(100 / found.ttft_s)
    second = predict(MODEL, COSTS, disk, hit_rate=0.5, **AT).ttft_s - found.ttft_s
    assert second == pytest.approx(0.6 * first + 0.1 + 10 * 0.05 / asked)  # 400 of 1000 are in memory by then
    fast = predict(MODEL, COSTS, Disk({1: 1e12}, 1e12, 1), hit_rate=0.5, **{**AT, "prompt_tokens": 100})
    assert fast.ttft_s == pytest.approx(0.1 + 0.002 + 10 * 0.05, rel=1e-3)


def test_even_routing_hits_what_is_there() -> None:
    assert [uniform_hit_rate(MODEL, slots) for slots in (0, 250, 1000, 2000)] == [0, 0.25, 1, 1]


def test_the_shortest_queue_that_is_as_fast_is_chosen_moe_runs_own_before_others() -> None:
    def speeds(**gb_s: float) -> list[DiskSpeed]:
        keys = {name: (name[0] == "d", int(name[1:])) for name in gb_s}
        return [
            DiskSpeed("direct" if keys[name][0] else "buffered", keys[name][1], False, value, 1.0)
            for name, value in gb_s.items()
        ]

    disk, settings = choose_reads(speeds(d1=2.9, d2=3.0, d4=2.95, b4=1.0))
    assert settings == ReadSettings(True, 4, True)
    assert disk.random_bytes_s == {1: 2.9e9, 2: 3.0e9, 4: 2.95e9}
    assert choose_reads(speeds(d1=2.95, d2=3.0, d4=2.0))[1].queue_depth == 1
    assert choose_reads(speeds(d1=1.0, b1=2.0, b8=3.0))[1] == ReadSettings(False, 8, True)


def test_blocks_are_read_as_the_pack_has_them(tiny_pack: Path) -> None:
    with Pack.open(tiny_pack) as pack:
        blocks = list_blocks(pack)
        assert len(blocks) == sum(pack.geometry(layer).num_experts for layer in range(5))
        for method in ("direct", "buffered"):
            found = measure_reads(blocks, method, 2, False, 0.05)
            if found is not None:
                assert (found.method, found.queue_depth, found.in_order) == (method, 2, False)
                assert found.gb_s > 0


def test_advice_is_compared_by_blocks_that_are_read_once(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system listens: on Linux to reads through its cache. It then knows of all blocks but the first."""
    told: list[tuple[int, int]] = []
    read: list[int] = []
    read_into = DataFile.read_into
    monkeypatch.setattr(DataFile, "advise", lambda file, offset, size: told.append((offset, size)))
    monkeypatch.setattr(DataFile, "read_into", lambda f, b, offset: (read.append(offset), read_into(f, b, offset)))
    with Pack.open(tiny_pack) as pack:
        blocks = list_blocks(pack)[:24]
        assert measure_reads(blocks, "buffered", 1, False, 60, advises=False)
        assert (len(read), told) == (24, [])
        assert measure_reads(blocks, "buffered", 1, False, 60, advises=True)
    assert len(read) == 48
    assert [offset for offset, _ in told] == read[25:]
    assert {size for _, size in told} == {size for _, _, size in blocks}


def test_advice_is_followed_where_it_pays_in_every_round(tiny_pack: Path) -> None:
    assert Advice((2.0, 2.1, 2.0), (2.2, 2.2, 2.3)).pays
    assert not Advice((2.0, 2.1, 2.0), (2.2, 2.0, 2.3)).pays
    assert not Advice((2.0, 2.0, 2.0), (2.05, 2.05, 2.05)).pays, "no more than noise"
    assert str(Advice((2.0,), (1.5,))) == "told of the next block the system brings 1.50 GB/s, else 2.00: not used"
    worked: list[int] = []
    with Pack.open(tiny_pack) as pack:
        blocks = list_blocks(pack)
        found = compare_advice(blocks, ReadSettings(False, 2, True), 0.02, lambda: worked.append(1))
        assert found is not None
        assert min(found.told + found.without) > 0
        assert worked
        if not DataFile(blocks[0][0], direct=True).takes_advice:
            assert compare_advice(blocks, ReadSettings(True, 2, True), 0.02, lambda: None) is None


def test_a_stand_in_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moepack.layout.disk_speed.STAND_IN_BYTES", 10 * 16384)
    with stand_in_file(tmp_path, 16384) as blocks:
        path = blocks[0][0]
        assert path.stat().st_size == 10 * 16384 == sum(size for _, _, size in blocks)
        assert path.parent == tmp_path
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_times_the_parts_of_a_token(tiny_pack: Path) -> None:
    ops, _ = choose_backend("auto", threads=1)
    with Pack.open(tiny_pack) as pack:
        schemes, block = pack_schemes(pack), pack.geometry(0).block(0)
        costs, work = rehearse(read_architecture(pack), ops, schemes, block, chunk_tokens=16)
        busy = measure_while_busy(list_blocks(pack), ReadSettings(True, 2, True), 0.05, work)
    assert sorted(busy) == [1, 2]
    assert min(busy.values()) > 0
    assert 0 < measure_start(work, 2) < 1
    times = {name: value for name, value in vars(costs).items() if name.endswith("_s")}
    assert all(value >= 0 for value in times.values())
    assert min(costs.resident_s, costs.mixers_s, costs.head_s, costs.chunk_mixers_s, costs.chunk_experts_s) > 0
    assert costs.miss_s >= costs.hit_s
    assert 0 <= costs.meanwhile_s <= costs.mixers_s
    assert costs.scale(2).resident_s == 2 * costs.resident_s
    assert costs.scale(2).chunk_tokens == 16


def test_a_config_needs_as_much_as_its_pack(tiny_source: Path, tiny_pack: Path) -> None:
    """The forecast from the config alone is that of the pack, but for the rounding to huge pages."""
    _, (candidate,), _ = _open_model(tiny_source / "config.json", "4", 32, 8)
    with Pack.open(tiny_pack) as pack:
        of_pack = Candidate.of_pack(pack)
        assert (candidate.block, candidate.slot_bytes) == (of_pack.block, of_pack.slot_bytes)
        assert abs(candidate.resident_bytes - ResidentWeights.size_bytes(pack)) <= 2 * 2**20
        assert of_pack.title == "4 bits"


def test_bits_are_given_up_only_for_readable_speed() -> None:
    def row(title: str, budget: int, tok_s: float) -> Row:
        found = predict(MODEL, COSTS, DISK, hit_rate=0.5, **AT)
        return Row(title, budget, prediction=replace(found, decode_tok_s=tok_s))

    slow, fast = [row("4 bits", 1, 3), row("4 bits", 2, 4)], [row("2 bits", 1, 6), row("2 bits", 2, 8)]
    assert recommend([*slow, *fast]) == fast[1]
    assert recommend([row("4 bits", 2, 5), *fast]).title == "4 bits"
    assert recommend([*slow, row("2 bits", 1, 3.5)]) == slow[1]
    assert recommend([Row("4 bits", 1, refusal="too small")]) is None


def test_the_command_plans_for_a_pack_and_moe_run_follows(tiny_copy: Path) -> None:
    planned = moe_inspect("plan", tiny_copy, "--seconds", "0.05", "--prompt-tokens", "8", "--json")
    assert planned.returncode == 0
    facts = json.loads(planned.stdout)
    assert len(facts["rows"]) == 3
    best = facts["recommended"]
    assert best["slots"] == best["all_experts"] == 24
    assert settings_path(tiny_copy) == tiny_copy.with_name("pack.plan.json")
    settings, note = load_settings(tiny_copy)
    assert (settings is not None, note) == (True, None)
    save_settings(tiny_copy, ReadSettings(direct=False, queue_depth=3, prefetch=False), {})
    with Engine.open(tiny_copy, memory="2GiB") as engine:
        described = engine.describe()
        assert described["expert reads"].startswith("buffered, 3 at a time")
        assert described["read settings"] == f"of {settings_path(tiny_copy)}"
        assert engine.settings_note is None
    save_settings(tiny_copy, ReadSettings(direct=False, queue_depth=3, prefetch=True, advise=True), {})
    with Engine.open(tiny_copy, memory="2GiB") as engine:
        assert engine.describe()["expert reads"].startswith("buffered, 3 at a time, the system told of the next")
    path = settings_path(tiny_copy)
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "advise"}))
    assert load_settings(tiny_copy)[0] == ReadSettings(False, 3, True), "of a version that did not know of advice"
    assert moe_inspect("verify", tiny_copy).returncode == 0, "the pack itself holds only its own files"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"machine": {"name": "another"}}, "it is of another machine"),
        ({"version": 2}, "not of this version"),
        ({"queue_depth": 0}, "values out of range"),
        ({"queue_depth": True}, "values out of range"),
        ({"direct": None}, "values out of range"),
        ({"advise": 1}, "values out of range"),
    ],
)
def test_settings_that_do_not_fit_are_not_used(tiny_copy: Path, change: dict, why: str) -> None:
    path = save_settings(tiny_copy, ReadSettings(True, 4, True), {})
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    settings, note = load_settings(tiny_copy)
    assert settings is None
    assert str(path) in (note or "")
    assert why in (note or "")
    path.write_text("[]")
    assert load_settings(tiny_copy)[0] is None
    path.unlink()
    assert load_settings(tiny_copy) == (None, None)


def test_another_machine_and_a_config_alone(tiny_source: Path) -> None:
    options = ["--bits", "4,2", "--group-size", "32", "--memory", "2GiB", "--prompt-tokens", "8", "--json"]
    config = tiny_source / "config.json"
    found = moe_inspect("plan", config, *options, "--ssd-gbps", "5", "--mem-gbps", "400", "--hit-rate", "50%")
    assert found.returncode == 0
    facts = json.loads(found.stdout)
    assert [row["experts"] for row in facts["rows"]] == ["4 bits", "2 bits"]
    assert facts["machine"]["disk"] == "5 GB/s, as stated"
    assert not (tiny_source.with_name("config.json.plan.json")).exists()
    shown = moe_inspect("plan", config, *options[:-1], "--machine", "m4-max")
    assert shown.returncode == 0
    assert "m4-max: memory: Apple" in shown.stderr
    assert "predicted for 546 GB/s" in shown.stdout


def test_a_budget_that_cannot_hold_the_model_is_refused_with_the_numbers(tiny_source: Path) -> None:
    options = ["--bits", "4", "--group-size", "32", "--ssd-gbps", "5", "--prompt-tokens", "8"]
    refused = moe_inspect("plan", tiny_source / "config.json", *options, "--memory", "50MiB")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "memory budget of 50 MiB is too small" in refused.stderr
    assert "MiB are needed" in refused.stderr
    assert "measure" not in refused.stderr, "refused before anything is measured"
    shown = moe_inspect("plan", tiny_source / "config.json", *options, "--memory", "50MiB,2GiB")
    assert shown.returncode == 0
    assert "too small" in shown.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--machine", "pdp-11"], "--machine pdp-11: expected one of m1-ultra"),
        (["--machine", "m4-pro"], "--machine m4-pro: no source says this of it: give --ssd-gbps"),
        (["--ssd-gbps", "0"], "--ssd-gbps 0: expected GB/s, from 1e-06"),
        (["--memory", "many"], "size 'many'"),
        (["--bits", "5"], "--bits 5 in groups of 64"),
        (["--hit-rate", "120%"], "--hit-rate 120%: expected a share"),
    ],
)
def test_impossible_questions_are_refused(tiny_source: Path, options: list[str], message: str) -> None:
    refused = moe_inspect("plan", tiny_source / "config.json", *options)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert message in refused.stderr


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, message in (("config.json", "another architecture"), ("none.json", "cannot be read")):
        refused = moe_inspect("plan", tmp_path / name)
        assert (refused.returncode, message in refused.stderr) == (2, True)
    assert moe_inspect("plan", tmp_path).returncode == 3


def test_the_table_of_machines_names_its_sources() -> None:
    table = json.loads(machine.MACHINES.read_text())["machines"]
    for name in table:
        known = known_machine(name)
        assert known.source
        assert known.memory_gb_s or known.ssd_gb_s
    with pytest.raises(UsageError, match="expected one of"):
        known_machine("unknown")
