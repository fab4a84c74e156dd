"""The threads that read: they end with their store, allocate nothing, and tell the one who waits what went wrong."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from moepack.layout.reader import Pack
from moepack.runtime.expert_io import Read, ReadOptions, ReadQueue
from moepack.runtime.expert_store import ExpertStore


def reading_threads() -> int:
    return sum(thread.name.startswith("expert-read") for thread in threading.enumerate())


def test_threads_end_with_the_store(tiny_pack: Path) -> None:
    pack = Pack.open(tiny_pack)
    gc.collect()  # other tests' forgotten stores
    before = reading_threads()
    store = ExpertStore(pack, 4, io=ReadOptions(queue_depth=3))
    assert reading_threads() == before + 3
    store.fetch(0, range(6))
    store.close()
    store.close()
    assert reading_threads() == before
    with pytest.raises(RuntimeError, match="this store is closed"):
        store.fetch(1, [0])
    forgotten = ExpertStore(pack, 4)
    assert sum(map(len, forgotten.fetch(0, range(6)))) == 6
    del forgotten
    gc.collect()
    assert reading_threads() == before


def test_a_failure_in_a_reading_thread_reaches_the_one_who_waits() -> None:
    def fail(read: Read) -> None:
        raise MemoryError

    queue = ReadQueue(fail, depth=1)
    queue.submit(Read(0, (0,), ()))
    done = queue.next_done()
    assert done is not None
    assert isinstance(done.error, MemoryError)
    queue.close()


def test_a_read_allocates_no_memory(demo_pack: Callable[[int], Path]) -> None:
    with Pack.open(demo_pack(16)) as pack:
        store = ExpertStore(pack, 8)
        assert store.slot_bytes >= 2**16  # so that a copy of a block would stand out
        for layer in range(8):
            list(store.fetch(layer, range(8)))
        before = store.counts.misses
        tracemalloc.start()
        for step in range(40):
            list(store.fetch(step % 8, range(8), in_order=step % 2 == 0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        store.close()
    assert store.counts.misses - before >= 40 * 4
    assert peak < store.slot_bytes / 2, f"{peak} bytes at once"


def test_guesses_add_nothing_to_the_hints_of_a_scan(tiny_pack: Path) -> None:
    with Pack.open(tiny_pack) as pack:
        store = ExpertStore(pack, 48)
        for layer, is_scan in ((1, True), (2, True), (3, False)):
            store.prefetch(layer, range(6), is_scan)
        layers = [read.layer for _ in range(12) if (read := store._queue.next_done())]
        assert sorted(layers) == [1] * 6 + [2] * 6
        assert store._queue.cancel() == []
        store.close()
        assert store._queue.next_done(wait=False) is None


def test_the_system_is_told_of_each_read_that_waits_once_and_before_its_turn() -> None:
    log: list[tuple[str, int]] = []
    begun, go = threading.Event(), threading.Event()

    def execute(read: Read) -> None:
        if read.layer == 0:
            begun.set()
            assert go.wait(60)
        log.append(("read", read.layer))

    queue = ReadQueue(execute, depth=1, advise=lambda read: log.append(("told", read.layer)))
    queue.submit(Read(0, (0,), ()))
    assert begun.wait(60)
    for layer in (1, 2):
        queue.submit(Read(layer, (0,), ()))
    queue.submit(Read(3, (0,), (), is_hint=True))
    go.set()
    for _ in range(4):
        queue.next_done()
    queue.close()
    assert log == [("read", 0), ("told", 2), ("read", 1), ("told", 3), ("read", 2), ("read", 3)]
