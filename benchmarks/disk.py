"""How fast the expert store reads, by method, queue depth and page size, as a share of what the disk gives a bare loop.

Every round measures the bare loop (os.preadv of random blocks with O_DIRECT into huge pages, by one thread and by two)
and then each way of reading through ExpertStore, in random order: disks drift, so each way is compared with the better
loop of its own round, and the table has medians over the rounds. Fetches bring experts of one layer that are not in
memory: a few at random as decode does, or all of them in order as prefill does. The page cache is dropped before each
measurement. --load runs threads that read memory at the same time, as computing does.

    python benchmarks/disk.py model.moepack
    python benchmarks/disk.py model.moepack --load 2 --direct-only
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moepack.layout.pages import Pages
from moepack.layout.reader import Pack
from moepack.layout.storage import DataFile
from moepack.runtime.expert_io import ReadOptions
from moepack.runtime.expert_store import ExpertStore, largest_block

SLOT_BYTES_IN_ALL = 256 * 2**20  # few experts, so that nearly every fetch misses
LOAD_BYTES = 64 * 2**20  # a thread of load reads so much again and again: more than caches hold

Fetch = tuple[int, list[int]]


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    gb_s: float
    cpu_share: float  # of one core, for the whole process


def main() -> None:
    """Measure all ways in all rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--experts", type=int, default=8, help="of a fetch at random")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--load", type=int, default=0, help="threads that read memory meanwhile")
    parser.add_argument("--direct-only", action="store_true", help="leave out buffered reads and 4 KiB pages")
    arguments = parser.parse_args()
    with Pack.open(arguments.pack) as pack, memory_load(arguments.load):
        rows = measure_rounds(pack, list_ways(arguments.depths, arguments.direct_only), arguments)
    print("| method | pages | reads in flight | fetches | GB/s | of the bare loop | CPU |\n|" + " --- |" * 7)
    for row in rows:
        print(f"| {' | '.join(row)} |")


def list_ways(depths: list[int], direct_only: bool) -> list[tuple[ReadOptions, bool]]:
    """(how blocks are read, whether in order)."""
    kinds = [(True, True)] if direct_only else [(True, True), (True, False), (False, True)]
    return [
        (ReadOptions(direct, depth, huge), in_order)
        for in_order, (direct, huge), depth in itertools.product((False, True), kinds, depths)
    ]


def measure_rounds(
    pack: Pack, ways: list[tuple[ReadOptions, bool]], arguments: argparse.Namespace
) -> list[tuple[str, ...]]:
    """The table: the bare loops first, then every way."""
    loops: dict[int, list[Sample]] = {1: [], 2: []}
    samples: dict[tuple[ReadOptions, bool], list[Sample]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for threads, found in loops.items():
            found.append(measure_bare_loop(pack, threads, arguments.seconds))
        for way in random.sample(ways, len(ways)):
            samples[way].append(measure_store(pack, *way, arguments.experts, arguments.seconds))
    limits = [max(loop.gb_s for loop in loops_of_round) for loops_of_round in zip(*loops.values())]
    rows = [format_row(("bare loop", "2 MiB", str(n), "1 at random"), found, limits) for n, found in loops.items()]
    for (options, in_order), found in samples.items():
        method, pages = "direct" if options.direct else "buffered", "2 MiB" if options.huge_pages else "4 KiB"
        fetches = "in order" if in_order else f"{arguments.experts} at random"
        rows.append(format_row((method, pages, str(options.queue_depth), fetches), found, limits))
    return rows


def format_row(title: tuple[str, ...], samples: list[Sample], limits: list[float]) -> tuple[str, ...]:
    """Medians of speed, of its share of the round's limit, and of the processor's share."""
    speed = statistics.median(sample.gb_s for sample in samples)
    share = statistics.median(sample.gb_s / limit for sample, limit in zip(samples, limits))
    return *title, f"{speed:.2f}", f"{share:.0%}", f"{statistics.median(sample.cpu_share for sample in samples):.0%}"


def measure_store(pack: Pack, options: ReadOptions, in_order: bool, num_experts: int, seconds: float) -> Sample:
    """Fetch through a store of its own; what it reads first, to have touched all its memory, is not counted."""
    num_slots = max(num_experts, SLOT_BYTES_IN_ALL // largest_block(pack))
    store = ExpertStore(pack, num_slots, io=options)
    fetches = list_fetches(pack, None if in_order else num_experts)

    def fetch_next() -> int:
        layer, expert_ids = next(fetches)
        before = store.counts.bytes_read
        for _ in store.fetch(layer, expert_ids, in_order):
            pass
        return store.counts.bytes_read - before

    while store.counts.misses < num_slots:
        fetch_next()
    drop_cache(pack)
    sample = measure(fetch_next, seconds)
    store.close()
    return sample


def measure_bare_loop(pack: Pack, num_threads: int, seconds: float) -> Sample:
    """Read block after block with nothing around the system call."""
    files = [DataFile(pack.directory / entry.file, direct=True) for entry in pack.manifest.expert_files]
    readers = [bare_reader(pack, files) for _ in range(num_threads)]
    with ThreadPoolExecutor(num_threads) as pool:
        loops = [pool.submit(measure, reader, seconds) for reader in readers]
    for file in files:
        file.close()
    found = [loop.result() for loop in loops]
    return Sample(sum(sample.gb_s for sample in found), max(sample.cpu_share for sample in found))


def bare_reader(pack: Pack, files: list[DataFile]) -> Callable[[], int]:
    """Reads the next block into the next place of memory that has been touched before."""
    stride = largest_block(pack)
    pages = Pages(SLOT_BYTES_IN_ALL)
    pages.buffer[:] = bytes(pages.size_bytes)
    places = itertools.cycle(range(0, pages.size_bytes - stride, stride))
    fetches = list_fetches(pack, 1)

    def read_next() -> int:
        (layer, (expert,)), start = next(fetches), next(places)
        geometry = pack.geometry(layer)
        into = pages.buffer[start : start + geometry.block(expert).block_stride]
        return os.preadv(files[layer].fileno(), [into], geometry.offsets[expert])

    return read_next


def measure(read_next: Callable[[], int], seconds: float) -> Sample:
    """Call a function that returns bytes until the time is up."""
    started, started_cpu, size_bytes = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < started + seconds:
        size_bytes += read_next()
    elapsed = time.perf_counter() - started
    return Sample(size_bytes / elapsed / 1e9, (time.process_time() - started_cpu) / elapsed)


def list_fetches(pack: Pack, num_experts: int | None) -> Iterator[Fetch]:
    """Experts of random layers, every one of a layer once before it comes again; all in order if no number is given."""
    while True:
        fetches: list[Fetch] = []
        for layer in range(pack.manifest.shape.num_hidden_layers):
            ids = list(range(pack.geometry(layer).num_experts))
            if num_experts is not None:
                random.shuffle(ids)
            size = num_experts or len(ids)
            fetches += [(layer, ids[first : first + size]) for first in range(0, len(ids), size)]
        random.shuffle(fetches)
        yield from fetches


def drop_cache(pack: Pack) -> None:
    """Make the system forget the expert files."""
    for entry in pack.manifest.expert_files:
        pack.open_file(entry.file).drop_cache()


@contextmanager
def memory_load(num_threads: int) -> Iterator[None]:
    """Threads that read memory as fast as it goes, while the block runs."""
    is_over = threading.Event()

    def read() -> None:
        values = np.ones(LOAD_BYTES // 8)
        while not is_over.is_set():
            values.sum()

    threads = [threading.Thread(target=read) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
