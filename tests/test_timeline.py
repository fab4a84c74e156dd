"""One token's way through the layers: what a trace says of it, the table, the picture, and what limits make of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from golden_packs import moe_inspect
from moepack.layout.errors import UsageError
from moepack.layout.machine import Limits, ReadSettings, load_limits, save_settings
from moepack.layout.picture import list_bars
from moepack.layout.reader import Pack
from moepack.layout.summary import count_token_bytes
from moepack.layout.timeline import assign_lanes, list_times, subtract_spans, trace_token
from moepack.layout.trace import ReadTime, Request, Trace, Wait
from moepack.layout.trace_file import TraceWriter, read_trace
from moepack.layout.trace_report import measure_time
from moepack.runtime import Engine, SamplingParams

REQUESTS = [
    Request(layer, (0,), False, at) for layer, at in ((0, 1.0), (1, 1.4), (0, 2.0), (1, 2.5), (0, 4.0), (1, 4.1))
]
READS = [ReadTime(0, (1,), 10**9, 1.0, 1.25, False), ReadTime(1, (2,), 2 * 10**9, 1.3, 1.75, True)]
TRACE = Trace(2, 4, 1, REQUESTS, (), READS, [Wait(1.1, 1.25), Wait(1.5, 2.25)], {"token_bytes": 10**9})


def test_layers_compute_wait_and_read() -> None:
    first, second = trace_token(TRACE, 1).layers
    assert (first.layer, first.start_s, first.end_s) == (0, 1.0, 1.4)
    assert (first.waiting_ms, first.computing_ms) == (pytest.approx(150), pytest.approx(250))
    assert second.waits == ((1.5, 2.0),), "what a wait has of the next token is not this one's"
    assert (first.reads, second.reads) == ((READS[0],), (READS[1],))
    assert second.reads[0].start_s < second.start_s, "read ahead"
    assert list_bars(first) == {"computing": [(1.0, 1.1), (1.25, 1.4)], "waiting": ((1.1, 1.25),)}


def test_the_token_is_chosen_and_refused() -> None:
    assert trace_token(TRACE).token == 2
    for token in (0, 3):
        with pytest.raises(UsageError, match=f"--token {token}: expected 1 to 2"):
            trace_token(TRACE, token)
    with pytest.raises(UsageError, match="no whole decoded token"):
        trace_token(Trace(2, 4, 1, REQUESTS[:2]))


def test_spans() -> None:
    assert subtract_spans(0, 10, [(8, 12), (1, 2), (1.5, 3)]) == [(0, 1), (3, 8)]
    assert subtract_spans(0, 1, [(0, 1)]) == []
    assert assign_lanes([(0, 2), (1, 3), (2, 4), (3, 5)]) == [0, 1, 0, 1]


def test_a_tokens_time_is_taken_apart_by_the_limits() -> None:
    """3 s in two tokens: 1.5 GB a token at 3 GB/s, 1 GB of weights at 10 GB/s."""
    found = measure_time(TRACE, Limits(memory_gb_s=10, disk_gb_s=3))
    assert found is not None
    limits = found["limits"]
    assert limits["disk"]["at_limit_ms"] == pytest.approx(500)
    assert limits["memory"]["at_limit_ms"] == pytest.approx(100)
    for name in ("disk", "memory"):
        parts = [limits[name][key] for key in ("at_limit_ms", "beyond_ms", "idle_ms")]
        assert sum(parts) == pytest.approx(found["token_ms"])
    assert limits["memory"]["idle_ms"] == pytest.approx(found["waiting_ms"])
    assert (limits["least_ms"], limits["share"]) == (pytest.approx(500), pytest.approx(1 / 3))
    unknown = measure_time(TRACE)
    assert unknown is not None
    assert unknown["limits"] == {"disk": None, "memory": None, "least_ms": None, "share": None}


def test_limits_come_from_the_plan_beside_the_pack(tiny_copy: Path) -> None:
    assert load_limits(tiny_copy) == Limits()
    save_settings(tiny_copy, ReadSettings(True, 4, True), {"memory_gb_s": 40.5, "disk_gb_s": 2})
    assert load_limits(tiny_copy) == Limits(40.5, 2.0)
    save_settings(tiny_copy, ReadSettings(True, 4, True), {"memory_gb_s": "fast", "disk_gb_s": -1})
    assert load_limits(tiny_copy) == Limits()
    assert Limits(1.0, None).or_else(Limits(2.0, 3.0)) == Limits(1.0, 3.0)


@pytest.fixture
def recorded(tiny_pack: Path, tmp_path: Path) -> Path:
    """A real run that misses: 8 of 24 experts in memory."""
    path = tmp_path / "run.trace"
    with Engine.open(tiny_pack, memory="2GiB", max_context=64) as engine:
        spare = 16 * engine.memory_plan.slot_bytes
        budget = engine.memory_plan.total_bytes - spare
        process_bytes = engine.memory_plan.process_bytes
    with Engine.open(tiny_pack, memory=budget, max_context=64, process_bytes=process_bytes) as engine:
        facts = {"token_bytes": count_token_bytes(engine.pack, 2)}
        with TraceWriter.open(path, engine.pack.manifest.model["text_config"], facts) as engine.store.recorder:
            list(engine.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)))
            engine.store.recorder = None
    return path


def test_a_run_of_a_model_adds_up(recorded: Path) -> None:
    trace = read_trace(recorded)
    timeline = trace_token(trace)
    assert [one.layer for one in timeline.layers] == [0, 1, 2, 3]
    total = sum(one.computing_ms + one.waiting_ms for one in timeline.layers)
    facts = list_times(timeline)
    assert total == pytest.approx(facts["token_ms"])
    assert all(one.computing_ms >= -1e-6 for one in timeline.layers)
    missed = {
        (request.layer, expert)
        for request in trace.requests
        if timeline.start_s <= request.at_s < timeline.end_s
        for expert in request.missing
    }
    read = {(one.layer, expert) for one in timeline.layers for read in one.reads for expert in read.expert_ids}
    assert missed <= read


def test_the_command_tells_and_draws_a_token(recorded: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    picture = tmp_path / "token.png"
    options = ("--token", "3", "-o", picture, "--ssd-gbps", "2", "--mem-gbps", "20")
    shown = moe_inspect("trace", recorded, *options)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "\ntoken 3: " in shown.stdout
    assert re.search(r"^disk +2\.00 GB/s", shown.stdout, re.M)
    assert re.search(r"^cores and memory +20\.00 GB/s", shown.stdout, re.M)
    assert "no token can take less than" in shown.stdout
    facts = json.loads(moe_inspect("trace", recorded, "--token", "3", "--json").stdout)
    assert [one["layer"] for one in facts["timeline"]["layers"]] == [0, 1, 2, 3]
    assert facts["time"]["limits"]["share"] is None
    assert "limits are unknown" in moe_inspect("trace", recorded).stdout
    assert moe_inspect("trace", recorded, "--token", "99").returncode == 2


def test_a_tokens_weights_are_its_experts_and_what_is_resident(tiny_pack: Path) -> None:
    with Pack.open(tiny_pack) as pack:
        resident = {name: one.size_bytes for name, one in pack.manifest.resident.tensors.items()}
        none, one = count_token_bytes(pack, 0), count_token_bytes(pack, 1)
        assert one - none == sum(pack.geometry(layer).block(0).payload_bytes for layer in range(4))
        unused = sum(size for name, size in resident.items() if name.startswith(("mtp.", "model.embed_tokens.")))
        assert none == sum(resident.values()) - unused
