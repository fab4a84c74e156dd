"""Routing traces: the format, the policies, the replay against the store and against the best that is possible."""

from __future__ import annotations

import io
import json
import random
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golden_packs import moe_inspect
from moepack.layout.errors import UsageError
from moepack.layout.eviction import POLICIES, DecayedFrequency, EvictionPolicy, Key, LeastRecentlyUsed
from moepack.layout.reader import Pack
from moepack.layout.trace import (
    OPTIMAL,
    FarthestNextUse,
    Request,
    Trace,
    TraceWriter,
    compare_policies,
    read_trace,
    replay,
)
from moepack.runtime.expert_io import ReadOptions
from moepack.runtime.expert_store import ExpertStore

CONFIG = {"num_hidden_layers": 2, "num_experts": 6, "num_experts_per_tok": 2, "hidden_size": 96}
HEADER = '{"trace":"moepack routing","version":1,"num_hidden_layers":2,"num_experts":6,"num_experts_per_tok":2}\n'


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


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    with path.open("w") as file:
        writer = TraceWriter(file, CONFIG)
        writer.record(0, [0, 1, 2, 4], True)
        writer.record(0, (5, 1))
        writer.record(1, iter([3, 0]))
    assert path.read_text() == HEADER + '{"prefill":[0,0,1,2,4]}\n[0,5,1]\n[1,3,0]\n'
    trace = read_trace(path)
    assert trace == Trace(
        2, 6, 2, [Request(0, (0, 1, 2, 4), True), Request(0, (5, 1), False), Request(1, (3, 0), False)]
    )
    assert (trace.num_blocks, trace.num_tokens) == (12, 1)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "line 1: not JSON: ''"),
        ("[0,1]\n", 'line 1: expected a header with "trace": "moepack routing"'),
        ('{"trace":"other"}\n', "line 1: expected a header"),
        (HEADER.replace('"version":1', '"version":2'), "trace version 2, but this moepack reads 1"),
        (HEADER.replace('"num_experts":6', '"num_experts":0'), "line 1: expected positive integers, found {"),
        (HEADER.replace('"num_experts":6,', ""), "line 1: expected positive integers, found {"),
        (HEADER + "[0,1,2]\n[0,1", r"line 3: not JSON: '\[0,1'"),
        (HEADER + "[0]\n", r"line 2: expected \[layer, expert, ...\], found '\[0\]'"),
        (HEADER + "[0,true]\n", r"line 2: expected \[layer, expert, ...\]"),
        (HEADER + '{"decode":[0,1]}\n', r"line 2: expected \[layer, expert, ...\]"),
        (HEADER + "[2,1]\n", r"line 2: expected a layer below 2 and different experts below 6, found '\[2,1\]'"),
        (HEADER + "[1,6]\n", "line 2: expected a layer below 2 and different experts below 6"),
        (HEADER + "[1,-1]\n", "line 2: expected a layer below 2 and different experts below 6"),
        (HEADER + "[1,3,3]\n", "line 2: expected a layer below 2 and different experts below 6"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "routing.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"routing.jsonl: {error}"):
        read_trace(path)


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
        file = io.StringIO()
        store.on_fetch = TraceWriter(file, pack.manifest.model["text_config"]).record
        for layer, ids in steps:
            list(store.fetch(layer, ids))
        store.close()
    requests = [Request(layer, tuple(ids), False) for layer, *ids in map(json.loads, file.getvalue().splitlines()[1:])]
    assert len(requests) == len(steps)
    found = replay(Trace(4, 6, 2, requests), POLICIES[name](), num_slots)
    assert (found.hits, found.misses) == (store.counts.hits, store.counts.misses)


def test_a_store_tells_what_it_is_asked_for(tiny_pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    with Pack.open(tiny_pack) as pack, path.open("w") as file:
        store = ExpertStore(pack, 8)
        store.on_fetch = TraceWriter(file, pack.manifest.model["text_config"]).record
        list(store.fetch(0, [0, 1, 5], in_order=True))
        list(store.fetch(0, [3, 1]))
        store.close()
    assert read_trace(path).requests == [Request(0, (0, 1, 5), True), Request(0, (3, 1), False)]


# The command


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "routing.jsonl"
    trace = skewed_trace(tokens=50)
    with path.open("w") as file:
        writer = TraceWriter(file, vars(trace))
        for request in trace.requests:
            writer.record(request.layer, request.expert_ids, request.is_prefill)
    return path


def test_the_command_prints_a_table(trace_file: Path) -> None:
    shown = moe_inspect("trace", trace_file, "--slots", "16, 50%")
    assert (shown.returncode, shown.stderr) == (0, "")
    title, _, heading, *rows = shown.stdout.splitlines()
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
