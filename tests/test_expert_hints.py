"""Reads that nobody waits for yet: what they bring, what they may cost, and what is left of those called off."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from expert_stores import EXPERTS, LAYERS, Gate, assert_is_block, fetch_all, ids_of
from moepack.layout.errors import DamagedPack
from moepack.layout.eviction import POLICIES
from moepack.layout.reader import Pack
from moepack.runtime.expert_io import HINTS_AT_ONCE, ReadOptions
from moepack.runtime.expert_store import ExpertStore


def test_a_prefetched_expert_is_a_hit(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(24)
    fetch_all(store, 0, [0])
    store.prefetch(1, [2, 3])
    finish_hints(store, 2)
    assert sorted(fetch_all(store, 1, [2, 3, 4])) == [2, 3, 4]
    counts = store.counts
    assert (counts.prefetched, counts.prefetch_used, counts.misses) == (2, 2, 2)
    assert counts.bytes_read == 4 * store.slot_bytes


def finish_hints(store: ExpertStore, number: int) -> None:
    """Wait until so many hints have been read, without a fetch, which would call them off."""
    while store.counts.prefetched < number:
        read = store._queue.next_done()
        assert read is not None
        store._finish(read)


def test_hints_that_have_not_started_give_way_to_a_fetch(make_store: Callable[..., ExpertStore], gate: Gate) -> None:
    store = make_store(24, io=ReadOptions(queue_depth=HINTS_AT_ONCE + 1))
    gate.close()
    store.prefetch(1, list(EXPERTS))
    gate.wait_for_reads(HINTS_AT_ONCE)  # although one more could run
    batches = store.fetch(2, [0])
    gate.wait_for_reads(1)
    gate.open()
    assert ids_of(batches) == [0]
    assert ids_of(store.fetch(1, [0])) == [0]
    assert len(gate.reads) == HINTS_AT_ONCE + 1
    assert store.counts.prefetch_used == 1


def test_hints_wait_until_no_fetch_reads(make_store: Callable[..., ExpertStore], gate: Gate) -> None:
    store = make_store(24, io=ReadOptions(queue_depth=HINTS_AT_ONCE))
    gate.close()
    batches = store.fetch(0, [0, 1, 2])
    store.prefetch(1, [5, 4, 3])
    gate.open()
    ids_of(batches)
    finish_hints(store, 3)
    experts = [offset // store.slot_bytes for offset, _ in gate.reads]
    assert sorted(experts[:2]) == [0, 1]
    assert sorted(experts) == [0, 1, 2, 3, 4, 5]
    assert experts[-1] == 3 or experts[-2] == 3  # begun last, and ended beside at most one other


def test_hints_take_no_slot_that_is_in_use(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(2)
    for batch in store.fetch(0, [0, 1]):
        store.prefetch(1, [0, 1, 2])
        for expert_id, expert in batch:
            assert_is_block(store.pack, 0, expert_id, expert)


def test_a_hint_that_cannot_be_read_is_an_error_only_when_it_is_fetched(
    make_store: Callable[..., ExpertStore], tiny_copy: Path
) -> None:
    with Pack.open(tiny_copy) as pack:
        store = make_store(24, pack=pack)
        os.truncate(tiny_copy / "experts" / "layer_01.bin", 10)
        store.prefetch(1, [3])
        assert sorted(fetch_all(store, 0, EXPERTS)) == list(EXPERTS)
        with pytest.raises(DamagedPack, match="layer 1 expert 3"):
            fetch_all(store, 1, [3])


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("reads_ahead", [False, True])
def test_a_scan_keeps_what_it_will_come_round_to(
    make_store: Callable[..., ExpertStore], policy: str, reads_ahead: bool
) -> None:
    """Rounds over all experts, as chunks of a prompt make them: a layer's slots are for passing, the rest is kept."""
    store = make_store(16, policy=POLICIES[policy]())
    passing, rounds = len(EXPERTS), []
    for _ in range(6):
        before = store.counts.bytes_read
        for layer in LAYERS:
            assert fetch_all(store, layer, EXPERTS, in_order=True) == list(EXPERTS)
            if reads_ahead and layer + 1 in LAYERS:
                store.prefetch(layer + 1, EXPERTS, is_scan=True)
                while store._hints:
                    finish_hints(store, store.counts.prefetched + 1)
        rounds.append((store.counts.bytes_read - before) // store.slot_bytes)
    assert rounds[0] == 24
    assert max(rounds[1:]) <= 24 - 16 + passing
    assert store.counts.prefetch_used == store.counts.prefetched
    assert bool(store.counts.prefetched) == reads_ahead


def test_reads_that_have_not_begun_leave_what_lies_in_their_slots(
    make_store: Callable[..., ExpertStore], gate: Gate
) -> None:
    store = make_store(6, io=ReadOptions(queue_depth=HINTS_AT_ONCE + 1))
    ids_of(store.fetch(0, EXPERTS))
    gate.close()
    store.prefetch(1, EXPERTS)  # in the slots of all
    gate.wait_for_reads(6 + HINTS_AT_ONCE)
    kept = EXPERTS[HINTS_AT_ONCE:]
    batches = store.fetch(0, kept)
    gate.open()
    assert ids_of(batches) == list(kept)
    finish_hints(store, HINTS_AT_ONCE)
    assert len(gate.reads) == 6 + HINTS_AT_ONCE
    assert sorted(fetch_all(store, 0, kept)) == list(kept)
    assert sorted(fetch_all(store, 1, EXPERTS[:HINTS_AT_ONCE])) == list(EXPERTS[:HINTS_AT_ONCE])
    assert store.counts.misses == 6


def test_a_fetch_that_is_broken_off_leaves_what_it_has_not_replaced(
    make_store: Callable[..., ExpertStore], gate: Gate
) -> None:
    store = make_store(6, io=ReadOptions(queue_depth=1))
    ids_of(store.fetch(0, EXPERTS))
    gate.close()
    store.fetch(1, EXPERTS)
    gate.wait_for_reads(6 + 1)
    batches = store.fetch(0, EXPERTS[1:])
    gate.open()
    assert ids_of(batches) == list(EXPERTS[1:])
    assert sorted(fetch_all(store, 0, EXPERTS[1:])) == list(EXPERTS[1:])
    assert store.places[1].tolist()[1:] == [0] * 5


def test_hits_of_a_scan_stay_for_the_decode_that_follows(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(8)
    fetch_all(store, 0, [0, 1, 2])
    fetch_all(store, 0, EXPERTS, in_order=True)  # 3, 4 and 5 are cold
    fetch_all(store, 1, [0, 1])
    fetch_all(store, 1, [2, 3, 4, 5])
    assert [bool(place) for place in store.places[0]] == [False, True, True, False, False, False]


def test_what_a_scan_that_fits_reads_ahead_is_as_recent_as_the_rest(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(8)
    fetch_all(store, 0, EXPERTS)
    store.prefetch(1, [0, 1], is_scan=True)
    finish_hints(store, 2)
    fetch_all(store, 1, [0, 1], in_order=True)
    fetch_all(store, 2, [0, 1])
    assert store.places[0].tolist()[:2] == [0, 0]
    assert store.places[1][:2].all()


def test_what_nobody_wanted_goes_first(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(8)
    fetch_all(store, 0, EXPERTS)
    store.prefetch(1, [0, 1], is_scan=True)
    finish_hints(store, 2)
    fetch_all(store, 2, [0, 1])
    assert store.places[0].all()
    assert not store.places[1].any()


def test_who_is_back_is_the_next_to_go(make_store: Callable[..., ExpertStore], gate: Gate) -> None:
    store = make_store(6, io=ReadOptions(queue_depth=HINTS_AT_ONCE))
    ids_of(store.fetch(0, EXPERTS))
    gate.close()
    store.prefetch(1, EXPERTS[:4])
    gate.wait_for_reads(6 + HINTS_AT_ONCE)
    batches = store.fetch(0, [4, 5])
    assert store.places[0].tolist()[:2] == [0, 0]
    assert store.places[0][2:].all()  # 2 and 3 had left
    gate.open()
    ids_of(batches)
    finish_hints(store, HINTS_AT_ONCE)
    fetch_all(store, 2, [0])
    assert [bool(place) for place in store.places[0]] == [False, False, False, True, True, True]
    assert all(held.room.left is None for held in store._held.values())
