"""The store on real packs: what is handed out, in which order, what is evicted, and what happens when reads fail."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expert_stores import EXPERTS, LAYERS, Gate, assert_is_block, fetch_all, held_by, ids_of
from moepack.kernels.matrix import Expert
from moepack.layout.errors import DamagedPack
from moepack.layout.eviction import POLICIES, Key
from moepack.layout.pages import HUGE_PAGE_BYTES, Pages
from moepack.layout.reader import Pack
from moepack.runtime.expert_io import ReadOptions
from moepack.runtime.expert_store import ExpertStore, largest_block

# What is handed out


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 24])
def test_every_expert_comes_once_and_is_the_files(
    make_store: Callable[..., ExpertStore], num_slots: int, in_order: bool
) -> None:
    store = make_store(num_slots)
    for layer in (*LAYERS, *LAYERS):
        order = fetch_all(store, layer, EXPERTS, in_order)
        assert sorted(order) == list(EXPERTS)
        assert not in_order or order == list(EXPERTS)
    assert store.counts.hits + store.counts.misses == 2 * len(LAYERS) * len(EXPERTS)
    assert store.counts.bytes_read == store.counts.misses * store.slot_bytes
    assert (store.counts.hits == 24) == (num_slots == 24)


def test_blocks_of_different_sizes_share_slots(make_store: Callable[..., ExpertStore]) -> None:
    """Tiers of other widths in the same slot, after one another: each has its own views."""
    with Pack.open(Path(__file__).parent / "golden" / "v1" / "mixed") as pack:
        store = make_store(1, pack=pack)
        assert store.slot_bytes == largest_block(pack) == 49152
        for layer, expert in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 0)):
            block = bytearray(pack.geometry(layer).block(expert).block_stride)
            pack.read_block(layer, expert, memoryview(block))
            _, (found,) = store.fetch(layer, [expert])
            geometry = pack.geometry(layer).block(expert)
            expected = Expert.from_block(geometry, torch.frombuffer(block, dtype=torch.uint8))
            assert torch.equal(found[1].down_proj.data, expected.down_proj.data)
            assert found[1].down_proj.bits == expected.down_proj.bits


def test_hits_come_first_and_are_not_waited_for(make_store: Callable[..., ExpertStore], gate: Gate) -> None:
    store = make_store(24)
    fetch_all(store, 1, [4, 1])
    gate.close()
    waited = store.counts.io_wait_s
    batches = store.fetch(1, [0, 1, 2, 4])
    assert ids_of([next(batches)]) == [1, 4]
    assert store.counts.io_wait_s == waited
    gate.open()
    assert sorted(ids_of(batches)) == [0, 2]
    assert store.counts.io_wait_s > waited
    assert (store.counts.hits, store.counts.misses) == (2, 4)


def test_the_first_batch_is_empty_if_nothing_is_in_memory(make_store: Callable[..., ExpertStore], gate: Gate) -> None:
    store = make_store(24)
    gate.close()
    batches = store.fetch(0, [3, 4])
    assert next(batches) == []
    assert store.counts.io_wait_s == 0
    gate.open()
    assert sorted(ids_of(batches)) == [3, 4]


def test_reads_start_with_the_call_and_run_side_by_side(make_store: Callable[..., ExpertStore], gate: Gate) -> None:
    store = make_store(24, io=ReadOptions(queue_depth=3))
    gate.close()
    batches = store.fetch(0, list(EXPERTS))
    gate.wait_for_reads(3)  # as many as the queue is deep, before anything is asked for
    gate.open()
    assert sorted(ids_of(batches)) == list(EXPERTS)


def test_in_order_neighbours_are_read_in_one_call(make_store: Callable[..., ExpertStore], gate: Gate) -> None:
    store = make_store(24)
    size = store.slot_bytes
    fetch_all(store, 2, [3])
    gate.reads.clear()
    order = ids_of(store.fetch(2, [0, 1, 3, 4, 5], in_order=True))
    assert order == [0, 1, 3, 4, 5]
    assert sorted(gate.reads) == [(0, 2 * size), (4 * size, 2 * size)]


def test_in_order_reads_run_ahead_of_the_consumer(make_store: Callable[..., ExpertStore], gate: Gate) -> None:
    store = make_store(12, io=ReadOptions(queue_depth=1))  # reads of one block each, in three slots
    batches = store.fetch(0, list(EXPERTS), in_order=True)
    first = ids_of([next(batches)])
    gate.wait_for_reads(3)  # the consumer has the first batch, and has not asked for more
    assert len(gate.reads) == 3
    assert first + ids_of(batches) == list(EXPERTS)


def test_an_expert_stays_as_it_is_until_the_next_batch(make_store: Callable[..., ExpertStore], pack: Pack) -> None:
    """Hits to come keep their slots, too, while misses look for room."""
    store = make_store(3)
    fetch_all(store, 0, [0, 1, 2])
    for batch in store.fetch(0, [0, 5, 4, 3, 2]):
        for expert_id, expert in batch:
            assert_is_block(pack, 0, expert_id, expert)
    assert store.counts.hits == 2


def test_in_order_hits_to_come_give_way_if_nothing_else_can(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(2)
    fetch_all(store, 0, [4, 5])
    assert fetch_all(store, 0, list(EXPERTS), in_order=True) == list(EXPERTS)
    assert store.counts.hits + store.counts.misses == 2 + 6
    assert store.counts.bytes_read == store.counts.misses * store.slot_bytes


# Eviction


def test_the_least_recently_used_goes_first(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(3)
    for expert_id in (0, 1, 2, 0, 3):
        fetch_all(store, 0, [expert_id])
    assert held_by(store, 0) == {0, 2, 3}


@pytest.mark.parametrize("name", POLICIES)
def test_any_policy_gives_right_experts(make_store: Callable[..., ExpertStore], name: str) -> None:
    store = make_store(4, policy=POLICIES[name]())
    for step in range(30):
        fetch_all(store, step % 4, [step % 6, (step * 5 + 1) % 6][: 1 + (step % 6 != (step * 5 + 1) % 6)])
    assert store.describe()["policy"] == name


def test_a_scan_larger_than_the_memory_keeps_what_it_can(make_store: Callable[..., ExpertStore]) -> None:
    """Under least-recently-used alone, each round of a cycle longer than the memory would find nothing at all."""
    store = make_store(12)
    for round_ in range(3):
        for layer in LAYERS:
            fetch_all(store, layer, EXPERTS, in_order=True)
        if round_ == 0:
            assert store.counts.hits == 0
    assert store.counts.hits >= 2 * (12 - 4)  # all but a few slots that the scan goes through


def test_a_scan_that_fits_is_kept_as_recent(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(9)
    fetch_all(store, 0, [0, 1], in_order=True)  # 8 for 4 layers
    for layer in (1, 2, 3):
        fetch_all(store, layer, [0, 1])
    fetch_all(store, 1, [5, 4])
    assert held_by(store, 0) == {1}


# Failures


class Flaky:
    """os.preadv that fails, or reads too little, on the calls that a test names."""

    def __init__(self, short: Sequence[int] = (), failing: Sequence[int] = (), short_bytes: int = 8192):
        self._preadv, self.calls = os.preadv, 0
        self.short, self.failing, self.short_bytes = short, failing, short_bytes
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            call, self.calls = self.calls, self.calls + 1
        if call in self.failing:
            raise OSError(errno.EIO, "Input/output error")
        if call in self.short:
            self._preadv(descriptor, buffers, offset)
            buffers[0][self.short_bytes :] = bytes(len(buffers[0]) - self.short_bytes)
            for buffer in buffers[1:]:
                buffer[:] = bytes(len(buffer))
            return self.short_bytes
        return self._preadv(descriptor, buffers, offset)


@pytest.mark.parametrize("in_order", [False, True])
def test_a_failed_read_is_tried_once_more(
    make_store: Callable[..., ExpertStore], monkeypatch: pytest.MonkeyPatch, in_order: bool
) -> None:
    store = make_store(24)
    monkeypatch.setattr(os, "preadv", Flaky(failing=[0]))
    batches = list(store.fetch(1, [2, 3, 5], in_order))
    monkeypatch.undo()
    for expert_id, expert in chain.from_iterable(batches):
        assert_is_block(store.pack, 1, expert_id, expert)
    assert store.counts.retries == 1


@pytest.mark.parametrize("short_bytes", [4096, 8192, 5000])
def test_a_short_read_is_completed(
    make_store: Callable[..., ExpertStore], monkeypatch: pytest.MonkeyPatch, short_bytes: int
) -> None:
    store = make_store(24)
    flaky = Flaky(short=[0, 2], short_bytes=short_bytes)
    monkeypatch.setattr(os, "preadv", flaky)
    batches = list(store.fetch(1, [2, 3, 5], in_order=True))
    assert flaky.calls > 2  # what two reads take
    monkeypatch.undo()
    for expert_id, expert in chain.from_iterable(batches):
        assert_is_block(store.pack, 1, expert_id, expert)
    assert store.counts.retries == 0


def test_a_read_that_fails_twice_is_an_error_and_the_store_goes_on(
    make_store: Callable[..., ExpertStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(3, io=ReadOptions(queue_depth=1))
    fetch_all(store, 0, [0])
    monkeypatch.setattr(os, "preadv", Flaky(failing=[1, 2]))
    text = r"layer_00.bin: layer 0 expert 4 at byte \d+: read of \d+ bytes failed twice: Input/output error"
    with pytest.raises(DamagedPack, match=text) as caught:
        ids_of(store.fetch(0, [0, 3, 4, 5]))
    assert (caught.value.layer, caught.value.expert) == (0, 4)
    assert caught.value.offset_bytes == 4 * store.slot_bytes
    monkeypatch.undo()
    for layer in LAYERS:
        assert sorted(fetch_all(store, layer, EXPERTS)) == list(EXPERTS)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("left", [1, 100, 4096])
def test_a_file_truncated_under_the_store_is_named(
    make_store: Callable[..., ExpertStore], tiny_copy: Path, left: int, in_order: bool, direct: bool
) -> None:
    with Pack.open(tiny_copy) as pack:
        store = make_store(24, pack=pack, io=ReadOptions(direct=direct))
        assert fetch_all(store, 1, [0, 1], in_order=True) == [0, 1]
        os.truncate(tiny_copy / "experts" / "layer_01.bin", 2 * store.slot_bytes + left)
        text = rf"layer_01.bin: layer 1 expert 2 at byte {2 * store.slot_bytes}: read of \d+ bytes failed twice: "
        with pytest.raises(DamagedPack, match=text + f"the file ends after {left} of them"):
            ids_of(store.fetch(1, [0, 1, 2], in_order))
        assert sorted(fetch_all(store, 1, [0, 1])) == [0, 1]
        assert sorted(fetch_all(store, 2, EXPERTS)) == list(EXPERTS)


def flip_byte(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 4]))


@pytest.mark.parametrize("in_order", [False, True])
def test_verified_reads_find_a_flipped_byte(
    make_store: Callable[..., ExpertStore], tiny_copy: Path, in_order: bool
) -> None:
    with Pack.open(tiny_copy) as pack:
        stores = [make_store(24, pack=pack, verify_reads=verify) for verify in (True, False)]
        flip_byte(tiny_copy / "experts" / "layer_02.bin", 3 * stores[0].slot_bytes + 77)
        with pytest.raises(DamagedPack, match=r"layer_02.bin: layer 2 expert 3 at byte \d+: sha256 is [0-9a-f]{12}…"):
            ids_of(stores[0].fetch(2, list(EXPERTS), in_order))
        assert sorted(fetch_all(stores[0], 2, [0, 1, 2, 4, 5])) == [0, 1, 2, 4, 5]
        assert len(fetch_all(stores[1], 2, EXPERTS, in_order)) == 6


# Iterators left alone


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_an_abandoned_fetch_loses_no_slot(make_store: Callable[..., ExpertStore], batches: int, in_order: bool) -> None:
    store = make_store(4, io=ReadOptions(queue_depth=1))
    fetch_all(store, 0, [0])
    for layer in (*LAYERS, *LAYERS):
        abandoned = store.fetch(layer, list(EXPERTS), in_order)
        for _ in range(batches):
            next(abandoned, None)
    for layer in LAYERS:
        assert sorted(fetch_all(store, layer, EXPERTS)) == list(EXPERTS)
    assert sorted(fetch_all(store, 0, [0, 1, 2, 3])) == [0, 1, 2, 3]
    assert held_by(store, 0) == {0, 1, 2, 3}


def test_reads_of_an_abandoned_fetch_are_still_good(make_store: Callable[..., ExpertStore], gate: Gate) -> None:
    store = make_store(24, io=ReadOptions(queue_depth=2))
    gate.close()
    store.fetch(0, list(EXPERTS))
    gate.wait_for_reads(2)
    batches = store.fetch(0, [1, 0])  # both are on their way
    gate.open()
    assert sorted(ids_of(batches)) == [0, 1]
    assert store.counts.hits == 2
    assert len(gate.reads) == 2  # the other four were dropped


def test_an_iterator_of_an_earlier_fetch_refuses_to_go_on(make_store: Callable[..., ExpertStore]) -> None:
    store = make_store(24)
    started, untouched = store.fetch(0, list(EXPERTS)), store.fetch(0, [1])
    with pytest.raises(RuntimeError, match="another fetch has begun"):
        next(started)
    assert ids_of(untouched) == [1]


# The file system, threads, memory


def test_direct_reads_refused_by_the_file_system_become_buffered(
    make_store: Callable[..., ExpertStore], pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some refuse to open the file, some to read it; either way the bytes are right and describe() says so."""
    opened, read = os.open, os.preadv
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        pytest.skip("needs a system with O_DIRECT")

    def refuse_open(path: object, flags: int, *rest: int, **options: int) -> int:
        if flags & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse_open)
    with Pack.open(pack.directory) as other:
        store = make_store(8, pack=other)
        assert sorted(fetch_all(store, 0, EXPERTS)) == list(EXPERTS)
        assert store.describe()["method"] == "buffered"
    monkeypatch.undo()
    refused = []

    def refuse_read(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not refused:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse_read)
    with Pack.open(pack.directory) as other:
        store = make_store(8, pack=other)
        assert ids_of(store.fetch(0, [1])) == [1]
        assert refused
        assert store.describe()["method"] == "buffered"
        assert store.counts.retries == 0


def test_a_pack_in_memory_can_be_read(make_store: Callable[..., ExpertStore], tiny_pack: Path) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("needs a file system in memory at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        copy = Path(shutil.copytree(tiny_pack, Path(folder) / "pack"))
        with Pack.open(copy) as pack:
            store = make_store(6, pack=pack)
            assert sorted(fetch_all(store, 3, EXPERTS)) == list(EXPERTS)


def test_slots_are_on_pages_and_cost_what_they_say(make_store: Callable[..., ExpertStore], pack: Pack) -> None:
    store = make_store(5)
    _, (found,) = store.fetch(0, [2])
    assert found[1].gate_proj.data.data_ptr() % 16384 == 0
    pages = Pages(5 * store.slot_bytes)
    assert pages.size_bytes == len(pages.buffer) == HUGE_PAGE_BYTES
    again, *_ = [expert for batch in store.fetch(0, [2]) for _, expert in batch]
    assert again is found[1]
    with pytest.raises(ValueError, match="at least one slot"):
        ExpertStore(pack, 0)


# Against a model


class ModelOfStore:
    """Least recently used over keys, the hits of a fetch first: what the store must hit."""

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self.held: list[Key] = []  # next to go first

    def fetch(self, layer: int, ids: Sequence[int]) -> set[int]:
        keys = [(layer, expert_id) for expert_id in ids]
        hits = [key for key in keys if key in self.held]
        self.held = [key for key in self.held if key not in hits] + hits
        self.held += [key for key in keys if key not in hits]
        self.held = self.held[-self.num_slots :]
        return {expert_id for _, expert_id in hits}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_slots=st.integers(6, 24),
    depth=st.integers(1, 3),
    steps=st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 5), min_size=1, unique=True)), max_size=25),
)
def test_hits_are_those_of_a_plain_lru(
    pack: Pack, num_slots: int, depth: int, steps: list[tuple[int, list[int]]]
) -> None:
    store, model = ExpertStore(pack, num_slots, io=ReadOptions(queue_depth=depth)), ModelOfStore(num_slots)
    for layer, ids in steps:
        expected = model.fetch(layer, ids)
        hits = store.counts.hits
        assert sorted(fetch_all(store, layer, ids)) == sorted(ids)
        assert store.counts.hits - hits == len(expected)
    store.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), num_slots=st.integers(1, 9), depth=st.integers(1, 3), policy=st.sampled_from(sorted(POLICIES)))
def test_whatever_is_asked_for_in_whatever_way_is_right(
    pack: Pack, data: st.DataObject, num_slots: int, depth: int, policy: str
) -> None:
    store = ExpertStore(pack, num_slots, io=ReadOptions(queue_depth=depth), policy=POLICIES[policy]())
    for _ in range(data.draw(st.integers(1, 12))):
        layer, ids = data.draw(st.integers(0, 3)), data.draw(st.lists(st.integers(0, 5), min_size=1, unique=True))
        in_order, stop = data.draw(st.booleans()), data.draw(st.integers(1, 8))
        ids = sorted(ids) if in_order else ids
        ahead = data.draw(st.lists(st.integers(0, 5), max_size=3))
        store.prefetch(data.draw(st.integers(0, 3)), ahead, is_scan=data.draw(st.booleans()))
        order = []
        for number, batch in enumerate(store.fetch(layer, ids, in_order), start=1):
            for expert_id, expert in batch:
                assert_is_block(pack, layer, expert_id, expert)
                order.append(expert_id)
            if number == stop:
                break
        assert order == ids[: len(order)] if in_order else set(order) <= set(ids)
        assert len(order) == len(set(order))
        assert len(order) == len(ids) or number == stop
    store.close()
