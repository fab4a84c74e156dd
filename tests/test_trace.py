"""Routing traces: the format, the policies, the replay against the store and against the best that is possible."""

from __future__ import annotations

import json
import random
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golden_packs import moe_inspect
from moepack.layout.errors import UsageError
from moepack.layout.eviction import POLICIES, DecayedFrequency, EvictionPolicy, Key, LeastRecentlyUsed
from moepack.layout.reader import Pack
from moepack.layout.trace import (
    OPTIMAL,
    FarthestNextUse,
    Guess,
    ReadTime,
    Request,
    Trace,
    Wait,
    compare_policies,
    replay,
)
from moepack.layout.trace_file import TraceWriter, read_trace
from moepack.layout.trace_report import measure_popularity, measure_recall, measure_reuse, measure_time
from moepack.runtime.expert_io import ReadOptions
from moepack.runtime.expert_store import ExpertStore

CONFIG = {"num_hidden_layers": 2, "num_experts": 6, "num_experts_per_tok": 2, "hidden_size": 96}
HEADER = '{"trace":"moepack routing","version":2,"num_hidden_layers":2,"num_experts":6,"num_experts_per_tok":2}\n'


def decode_of(*steps: tuple[int, ...], num_experts: int = 6) -> Trace:
    """A model of one layer that asks for these experts, step by step."""
    return Trace(1, num_experts, 2, [Request(0, step, is_prefill=False) for step in steps])


def skewed_trace(layers: int = 4, experts: int = 32, per_token: int = 4, tokens: int = 200) -> Trace:
    """Experts of unequal popularity, other ones in each layer."""
    rng = random.Random(5)
    requests = []
    order = [rng.sample(range(experts), experts) for _ in range(layers)]
    weights = [1 / (rank + 1) for rank in range(experts)]
    for _ in range(tokens):
        for layer in range(layers):
            chosen: set[int] = set()
            while len(chosen) < per_token:
                chosen.update(rng.choices(order[layer], weights))
            requests.append(Request(layer, tuple(sorted(chosen)), is_prefill=False))
    return Trace(layers, experts, per_token, requests)


# The format


def write_lines(path: Path, text: str) -> Path:
    """A trace of these lines."""
    path.write_bytes(zstandard.compress(text.encode()))
    return path


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    with TraceWriter.open(path, CONFIG, {"device": "cpu"}) as writer:
        start = writer._start_s
        writer.note_fetch(0, [0, 1, 2, 4], True, [4])
        writer.note_fetch(0, (5, 1))
        writer.note_guess(1, [3, 2])
        writer.note_read(1, (3,), 16384, start + 0.001, start + 0.002, True)
        writer.note_wait(start + 0.0015, start + 0.002)
        writer.note_fetch(1, [3, 0], False, [0])
    trace = read_trace(path)
    assert [(r.layer, r.expert_ids, r.is_prefill, r.missing) for r in trace.requests] == [
        (0, (0, 1, 2, 4), True, (4,)),
        (0, (5, 1), False, ()),
        (1, (3, 0), False, (0,)),
    ]
    assert [request.at_s for request in trace.requests] == sorted(request.at_s for request in trace.requests)
    assert [(guess.layer, guess.expert_ids) for guess in trace.guesses] == [(1, (3, 2))]
    assert trace.reads == [ReadTime(1, (3,), 16384, 0.001, 0.002, True)]
    assert trace.waits == [Wait(0.0015, 0.002)]
    assert trace.facts == {"device": "cpu"}
    assert (trace.num_blocks, trace.num_tokens) == (12, 1)


def test_a_trace_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "run.trace", HEADER + '["wait",1,2]\n["wait",3')
    assert len(read_trace(path).waits) == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "line 1: not JSON"),
        ("[0,1]\n", 'line 1: expected a header with "trace": "moepack routing"'),
        ('{"trace":"other"}\n', "line 1: expected a header"),
        (HEADER.replace('"version":2', '"version":1'), "trace version 1, but this moepack reads 2"),
        (HEADER.replace('"num_experts":6', '"num_experts":0'), "line 1: expected positive integers, found {"),
        (HEADER.replace('"num_experts":6,', ""), "line 1: expected positive integers, found {"),
        (HEADER + '["wait",1,2]\n[0,1\n', "line 3: not JSON"),
        (HEADER + "5\n", "line 2: no event of a trace"),
        (HEADER + '["fetch",1]\n', "line 2: no event of a trace"),
        (HEADER + '["other",1]\n', "line 2: expected fetch, prefill, guess, read or wait"),
        (HEADER + '["fetch",1,0,[],[]]\n', "line 2: expected a layer below 2"),
        (HEADER + '["fetch",1,0,[true],[]]\n', "line 2: expected a layer and a list of experts"),
        (HEADER + '["fetch",1,2,[1],[]]\n', "line 2: expected a layer below 2 and different experts below 6"),
        (HEADER + '["fetch",1,1,[6],[]]\n', "line 2: expected a layer below 2 and different experts below 6"),
        (HEADER + '["fetch",1,1,[3,3],[]]\n', "line 2: expected a layer below 2 and different experts below 6"),
        (HEADER + '["fetch",1,1,[3],[2]]\n', "line 2: expected what is missing among what is asked for"),
        (HEADER + '["fetch",-1,1,[3],[]]\n', "line 2: expected a time in whole microseconds"),
        (HEADER + '["wait",3,2]\n', "line 2: expected an end after its start"),
        (HEADER + '["read",1,2,0,[1],0,0]\n', "line 2: expected a number of bytes, and 0 or 1"),
        (HEADER + f'["wait",1,{10**400}]\n', "line 2: not JSON, or a number too large"),
        (HEADER.replace('"num_experts":6', f'"num_experts":{10**400}'), "line 1: not JSON, or a number too large"),
        (HEADER.replace("{", '{"x":NaN,', 1), "line 1: not JSON, or a number too large"),
        (HEADER.replace("{", '{"x":1e999,', 1), "line 1: not JSON, or a number too large"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path: Path, text: str, error: str) -> None:
    path = write_lines(tmp_path / "run.trace", text)
    with pytest.raises(UsageError, match=f"run.trace: {error}"):
        read_trace(path)


@pytest.mark.parametrize("place", ["manifest.json", "run.trace", "experts/layer_00.bin", "sub/../resident.safetensors"])
def test_a_trace_is_never_written_into_a_pack(tmp_path: Path, place: str) -> None:
    pack = tmp_path / "pack"
    for name in ("manifest.json", "resident.safetensors", "experts/layer_00.bin", "sub/x"):
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        (pack / name).write_text("kept")
    (tmp_path / "link").symlink_to(pack)
    for path in (pack / place, tmp_path / "link" / place):
        with pytest.raises(UsageError, match=r"lies in the pack .*: give another place"):
            TraceWriter.open(path, CONFIG)
    assert {file.read_text() for file in pack.rglob("*") if file.is_file()} == {"kept"}
    TraceWriter.open(tmp_path / "run.trace", CONFIG).close()  # beside it


def test_what_is_not_compressed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text(HEADER)
    with pytest.raises(UsageError, match="plain: not compressed with zstd"):
        read_trace(tmp_path / "plain")


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.jsonl: cannot be read: No such file"):
        read_trace(tmp_path / "nothing.jsonl")


# The policies


def evictions(policy: EvictionPolicy, uses: str) -> str:
    """What goes, one after the other, once the letters have been used in this order."""
    for letter in uses:
        policy.use((0, ord(letter)))
    return "".join(chr(victim[1]) for _ in set(uses) if (victim := policy.evict(lambda key: False)))


@pytest.mark.parametrize(("name", "order"), [("lru", "abcd"), ("lfu", "dcba")])
def test_policies_differ_in_what_goes_first(name: str, order: str) -> None:
    assert evictions(POLICIES[name](), "aaaabbbccd") == order


def test_decayed_frequency_forgets() -> None:
    """With a long memory it counts uses, with a short one only the last of them matters."""
    assert evictions(DecayedFrequency(half_life_turns=1000), "aaabbc") == "cba"
    assert evictions(DecayedFrequency(half_life_turns=0.1), "aaabbc") == "abc"


@pytest.mark.parametrize("name", POLICIES)
def test_cold_keys_go_first_the_latest_of_them_before_the_others(name: str) -> None:
    policy = POLICIES[name]()
    for expert in range(6):
        policy.use((0, expert), cold=expert in (1, 3, 4))
    order = [policy.evict(lambda key: False) for _ in range(7)]
    assert order == [(0, 4), (0, 3), (0, 1), (0, 0), (0, 2), (0, 5), None]


@pytest.mark.parametrize("name", POLICIES)
def test_busy_keys_stay_and_forgotten_ones_are_gone(name: str) -> None:
    policy = POLICIES[name]()
    for expert in range(5):
        policy.use((0, expert))
    policy.forget((0, 1))
    busy: set[Key] = {(0, 0), (0, 2)}
    assert [policy.evict(busy.__contains__) for _ in range(3)] == [(0, 3), (0, 4), None]
    assert [policy.evict(lambda key: False) for _ in range(3)] == [(0, 0), (0, 2), None]


# The replay


def test_a_cycle_longer_than_the_memory_never_hits_under_lru() -> None:
    trace = decode_of(*[(step % 4,) for step in range(40)])
    results = compare_policies(trace, num_slots=3)
    assert results["lru"].hits == 0
    assert results[OPTIMAL].hits > 20
    assert compare_policies(trace, num_slots=4)["lru"].hits == 36


def test_prefill_is_counted_apart() -> None:
    trace = Trace(1, 6, 2, [Request(0, (0, 1, 2), True), Request(0, (1, 4), False), Request(0, (1, 4), False)])
    found = replay(trace, LeastRecentlyUsed(), num_slots=6)
    assert (found.hits, found.misses, found.prefill_hits, found.prefill_misses) == (3, 1, 0, 3)
    assert found.hit_rate == 0.75
    assert replay(Trace(1, 6, 2, trace.requests[:1]), LeastRecentlyUsed(), 6).hit_rate is None


def test_tokens_that_fill_the_memory_may_be_left_out() -> None:
    trace = decode_of((0, 1), (0, 1), (0, 2))
    counted = [replay(trace, LeastRecentlyUsed(), 4, tokens) for tokens in (0, 1, 2)]
    assert [(one.hits, one.misses) for one in counted] == [(3, 3), (3, 1), (1, 1)]


def test_more_slots_hit_more_and_the_optimum_most() -> None:
    trace = skewed_trace()
    before = dict.fromkeys([*POLICIES, OPTIMAL], -1)
    for num_slots in (16, 32, 64, 128):
        hits = {name: found.hits for name, found in compare_policies(trace, num_slots).items()}
        assert hits[OPTIMAL] == max(hits.values())
        assert all(hits[name] > before[name] for name in hits)
        before = hits


def fewest_misses(trace: Trace, num_slots: int) -> int:
    """By trying everything: after each request, its experts and any choice of what was held before."""

    @cache
    def search(step: int, held: frozenset[int]) -> int:
        if step == len(trace.requests):
            return 0
        needed = frozenset(trace.requests[step].expert_ids)
        others, room = held - needed, num_slots - len(needed)
        choices = combinations(sorted(others), min(room, len(others)))
        return len(needed - held) + min(search(step + 1, needed | frozenset(kept)) for kept in choices)

    return search(0, frozenset())


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True).map(tuple), max_size=12),
    num_slots=st.integers(2, 5),
)
def test_no_choice_of_victims_beats_belady(steps: list[tuple[int, ...]], num_slots: int) -> None:
    trace = decode_of(*steps)
    assert replay(trace, FarthestNextUse(trace), num_slots).misses == fewest_misses(trace, num_slots)


def test_belady_knows_what_comes_first_of_the_same_request() -> None:
    requests = [Request(0, expert_ids, True) for expert_ids in ((0, 1, 3), (0, 1, 2, 3), (0, 2, 3))]
    found = compare_policies(Trace(1, 4, 1, requests), 2)
    assert {name: result.prefill_hits for name, result in found.items()} == dict.fromkeys([*POLICIES, OPTIMAL], 4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(POLICIES)),
    num_slots=st.integers(4, 24),
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True)), max_size=30
    ),
)
def test_a_replay_hits_what_the_store_hit(
    tiny_pack: Path, name: str, num_slots: int, steps: list[tuple[int, list[int]]]
) -> None:
    with Pack.open(tiny_pack) as pack:
        store = ExpertStore(pack, num_slots, io=ReadOptions(queue_depth=2), policy=POLICIES[name]())
        requests: list[Request] = []
        store.on_fetch = lambda layer, ids, in_order: requests.append(Request(layer, tuple(ids), in_order))
        for layer, ids in steps:
            list(store.fetch(layer, ids))
        store.close()
    assert len(requests) == len(steps)
    found = replay(Trace(4, 6, 2, requests), POLICIES[name](), num_slots)
    assert (found.hits, found.misses) == (store.counts.hits, store.counts.misses)


def test_a_store_tells_what_it_is_asked_for_and_how_that_went(tiny_pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    with Pack.open(tiny_pack) as pack, TraceWriter.open(path, pack.manifest.model["text_config"]) as recorder:
        store = ExpertStore(pack, 8)
        store.recorder = recorder
        list(store.fetch(0, [0, 1, 5], in_order=True))
        list(store.fetch(0, [3, 1]))
        store.close()
        size_bytes = store.counts.bytes_read
    trace = read_trace(path)
    asked = [(request.expert_ids, request.is_prefill, request.missing) for request in trace.requests]
    assert asked == [((0, 1, 5), True, (0, 1, 5)), ((3, 1), False, (3,))]
    assert sum(read.size_bytes for read in trace.reads) == size_bytes
    assert sorted(one for read in trace.reads for one in read.expert_ids) == [0, 1, 3, 5]
    assert all(0 <= read.start_s <= read.end_s for read in trace.reads)


# What a trace tells


def test_reuse_distance_is_the_hits_of_an_lru_of_that_size() -> None:
    decode = list(decode_of(*[(step % 4,) for step in range(40)]).requests)
    assert measure_reuse(decode) == {"first_uses": 0.1, "p10": 3, "p50": 3, "p90": 3}
    assert measure_reuse([])["p50"] is None


def test_popularity_and_recall() -> None:
    requests, guesses = [Request(0, (0, 1), False, 1.0), Request(0, (0, 2), False, 3.0)], [Guess(0, (2, 3), 2.0)]
    reads = [ReadTime(0, (expert,), 10, 2.1, 2.5, is_ahead) for expert, is_ahead in ((2, True), (3, True), (0, False))]
    trace = Trace(1, 4, 2, requests, guesses, reads)
    assert measure_popularity(trace, list(trace.requests))["25%"] == 0.5
    assert measure_recall(trace) == {"next_layer_guess": 0.5, "token_before": 0.5, "read_ahead": 0.5}


def test_a_tokens_time_is_computing_and_waiting() -> None:
    requests = [Request(0, (0,), False, at) for at in (1.0, 2.0, 3.0)]
    reads = [ReadTime(0, (0,), 10**9, 1.0, 1.5, False), ReadTime(0, (1,), 10**9, 1.25, 1.75, True)]
    found = measure_time(Trace(1, 4, 1, requests, (), reads, [Wait(1.5, 1.75), Wait(2.9, 3.5)]))
    assert found is not None
    assert found["token_ms"] == pytest.approx(1000)
    assert found["waiting_ms"] == pytest.approx(175)
    assert found["computing_ms"] == pytest.approx(825)
    assert found["disk_busy_ms"] == pytest.approx(375)
    assert found["disk_gb_s"] == pytest.approx(2 / 0.75)
    assert found["read_ahead_share"] == 0.5
    assert found["least_ms"] == pytest.approx(825)
    assert measure_time(Trace(1, 4, 1, requests[:1])) is None


# The command


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.trace"
    trace = skewed_trace(tokens=50)
    with TraceWriter.open(path, vars(trace)) as writer:
        for request in trace.requests:
            writer.note_fetch(request.layer, request.expert_ids, request.is_prefill)
    return path


def test_the_command_prints_a_table(trace_file: Path) -> None:
    shown = moe_inspect("trace", trace_file, "--slots", "16, 50%")
    assert (shown.returncode, shown.stderr) == (0, "")
    title, _, heading, *rows = shown.stdout.partition("\n\nuses that fall")[0].splitlines()
    assert "recall of guesses one layer before: -; of the token before: " in shown.stdout
    assert title == f"{trace_file}: 50 tokens decoded; hits in decode:"
    assert heading.split() == ["slots", "of", "all", "lru", "lfu", "lrfu", "belady"]
    expected = replay(skewed_trace(tokens=50), LeastRecentlyUsed(), 64).hit_rate
    assert [row.split()[:2] for row in rows] == [["16", "12%"], ["64", "50%"]]
    assert rows[1].split()[2] == f"{expected:.1%}"


def test_the_command_prints_json(trace_file: Path) -> None:
    facts = json.loads(moe_inspect("trace", trace_file, "--slots", "64", "--json").stdout)
    assert (facts["num_experts"], facts["decoded_tokens"]) == (32, 50)
    (row,) = facts["replays"]
    found = replay(skewed_trace(tokens=50), LeastRecentlyUsed(), 64)
    assert row["slots"] == 64
    assert row["lru"] == {**vars(found), "hit_rate": found.hit_rate}
    assert set(row) == {"slots", *POLICIES, OPTIMAL}


@pytest.mark.parametrize("slots", ["0", "129", "101%", "many", "", "nan%"])
def test_slots_that_do_not_exist_are_refused(trace_file: Path, slots: str) -> None:
    ended = moe_inspect("trace", trace_file, "--slots", slots)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"--slots {slots}: expected 1 to 128, or a share such as 40%" in ended.stderr
