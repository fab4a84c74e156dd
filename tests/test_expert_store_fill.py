"""Where all experts have room, those that nobody has asked for yet come in beside the others' use."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moepack.layout.reader import Pack
from moepack.runtime import Engine, SamplingParams
from moepack.runtime.expert_store import ExpertStore

NUM_EXPERTS, NUM_LAYERS = 6, 4  # of the tiny model
WAIT_S = 30


@pytest.fixture
def store(tiny_pack: Path) -> Iterator[ExpertStore]:
    with Pack.open(tiny_pack) as pack:
        opened = ExpertStore(pack, NUM_EXPERTS * NUM_LAYERS)
        yield opened
        opened.close()


def fetch_all(store: ExpertStore, layer: int, expert_ids: list[int]) -> None:
    for _ in store.fetch(layer, expert_ids):
        pass


def test_a_filled_store_misses_nothing_more(store: ExpertStore) -> None:
    fetch_all(store, 2, [1])
    store.fill()
    while store._hints:
        read = store._queue.next_done()
        assert read is not None
        store._finish(read)
    assert (store.places[:NUM_LAYERS] != 0).all()
    for layer in range(NUM_LAYERS):
        fetch_all(store, layer, list(range(NUM_EXPERTS)))
    assert (store.counts.misses, store.counts.prefetched) == (1, NUM_EXPERTS * NUM_LAYERS - 1)
    store.fill()
    assert store._hints == 0


def test_what_a_fetch_has_put_off_is_filled_in_later(store: ExpertStore) -> None:
    for layer in (3, 0, 2, 1):
        store.fill()
        fetch_all(store, layer, [5, 0])  # drops what has not started
    deadline = time.monotonic() + WAIT_S
    while (store.places[:NUM_LAYERS] == 0).any():
        assert time.monotonic() < deadline
        store.fill()
        time.sleep(0.001)  # as long as a layer is computed: readers begin
        fetch_all(store, 0, [0])
    assert store.counts.misses + store.counts.prefetched == NUM_EXPERTS * NUM_LAYERS


@pytest.mark.parametrize("prefetch", [None, False])
def test_only_an_engine_that_may_read_ahead_fills_its_store(
    tiny_pack: Path, prefetch: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, calls = ExpertStore.fill, []
    monkeypatch.setattr(ExpertStore, "fill", lambda store: calls.append(fill(store)))
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with Engine.open(tiny_pack, prefetch=prefetch) as engine, Engine.open(tiny_pack, memory="1GiB") as other:
        token_ids = list(engine.generate([5], sampling))
        assert bool(calls) == (prefetch is None)
        assert token_ids == list(other.generate([5], sampling))
