"""Stores of the tiny pack, a gate that reads wait at, and what fetches bring: for the tests of the store."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from moepack.kernels.matrix import Expert
from moepack.layout.reader import Pack
from moepack.runtime.expert_store import Batch, ExpertStore

EXPERTS = range(6)  # of the tiny model, in each of 4 layers; its blocks all have the same size
LAYERS = range(4)
WAIT_S = 30  # for what other threads do at once: only a hang takes this long


@pytest.fixture
def pack(tiny_pack: Path) -> Iterator[Pack]:
    with Pack.open(tiny_pack) as opened:
        yield opened


@pytest.fixture
def make_store(pack: Pack) -> Iterator[Callable[..., ExpertStore]]:
    """Stores of the tiny pack, closed when the test ends."""
    stores = []

    def make(num_slots: int, **options: object) -> ExpertStore:
        stores.append(ExpertStore(options.pop("pack", pack), num_slots, **options))  # type: ignore[arg-type]
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(os, "preadv", gate)
    yield gate
    gate.open()


class Gate:
    """os.preadv behind a gate, which a test can close; keeps the (offset, bytes) of reads that have passed."""

    def __init__(self) -> None:
        self._preadv, self._opened = os.preadv, threading.Event()
        self.arrived = threading.Semaphore(0)
        self.reads: list[tuple[int, int]] = []
        self.open()

    def open(self) -> None:
        self._opened.set()

    def close(self) -> None:
        self._opened.clear()

    def wait_for_reads(self, number: int) -> None:
        """Until so many more reads have come to the gate."""
        for _ in range(number):
            assert self.arrived.acquire(timeout=WAIT_S)

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.arrived.release()
        assert self._opened.wait(WAIT_S)
        self.reads.append((offset, sum(map(len, buffers))))
        return self._preadv(descriptor, buffers, offset)


def ids_of(batches: Iterable[Batch]) -> list[int]:
    """Run a fetch to its end; the ids in the order in which they came."""
    return [expert_id for batch in batches for expert_id, _ in batch]


def fetch_all(store: ExpertStore, layer: int, ids: Sequence[int], in_order: bool = False) -> list[int]:
    """Fetch and check every expert against the file; the ids in the order in which they came."""
    order = []
    for batch in store.fetch(layer, ids, in_order):
        for expert_id, expert in batch:
            assert_is_block(store.pack, layer, expert_id, expert)
            order.append(expert_id)
    return order


def assert_is_block(pack: Pack, layer: int, expert_id: int, expert: Expert) -> None:
    geometry = pack.geometry(layer).block(expert_id)
    block = bytearray(geometry.block_stride)
    pack.read_block(layer, expert_id, memoryview(block))
    expected = Expert.from_block(geometry, torch.frombuffer(block, dtype=torch.uint8))
    for name in ("gate_proj", "up_proj", "down_proj"):
        found, wanted = getattr(expert, name), getattr(expected, name)
        for part in ("data", "scales", "biases"):
            assert torch.equal(getattr(found, part), getattr(wanted, part)), (layer, expert_id, name, part)


def held_by(store: ExpertStore, layer: int) -> set[int]:
    """What a fetch of everything finds in memory: its first batch, if there are hits at all."""
    hits = store.counts.hits
    first = ids_of([next(store.fetch(layer, list(EXPERTS)))])
    return set(first) if store.counts.hits > hits else set()
