"""How fast moe-inspect verify is, as a share of what bounds it: reading the disk, or hashing on all cores.

A round measures, over the same expert files, from end to end and past the page cache: bare reads of 4 MiB (with one
thread and with two, the better counts), bare sha256 of memory on all cores, and verification with different numbers of
threads, in random order. Nothing can verify faster than the lower of the two limits of its round. Medians of rounds.

    python benchmarks/verify.py model.moepack
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from laps import Meter, others_cores
from moepack.layout.pages import Pages
from moepack.layout.reader import Pack
from moepack.layout.storage import DataFile
from moepack.layout.verify import AHEAD, PIECE_BYTES, list_regions, verify_contents

HASH_SECONDS = 1.0


def main() -> None:
    """Measure in rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8, help="expert files to read in each measurement, at most")
    parser.add_argument("--workers", type=int, nargs="+", default=[os.cpu_count() or 1])
    arguments = parser.parse_args()
    with Pack.open(arguments.pack) as pack:
        layers = min(arguments.layers, len(pack.manifest.expert_files))
        rounds = [measure_round(pack, layers, arguments.workers) for _ in range(arguments.rounds)]
    print("| what | GB/s | of the lower limit |\n| --- | --- | --- |")
    for name in rounds[0]:
        if name != "others":
            rates = [measured[name] for measured in rounds]
            shares = [measured[name] / min(measured["disk"], measured["hash"]) for measured in rounds]
            print(f"| {name} | {statistics.median(rates):.2f} | {statistics.median(shares):.0%} |")
    print(f"\nothers took {statistics.median(measured['others'] for measured in rounds):.2f} cores meanwhile")


def measure_round(pack: Pack, layers: int, workers: list[int]) -> dict[str, float]:
    """GB/s of each, and the cores that other processes took."""
    meter = Meter()
    rates = {"disk": max(read_files(pack, layers, threads) for threads in (1, 2)), "hash": hash_memory()}
    verified = dict.fromkeys(workers, 0.0)
    for count in random.sample(workers, len(workers)):
        verified[count] = verify_files(pack, layers, count)
    return {**rates, **{f"verify, {count} threads": rate for count, rate in verified.items()}} | {
        "others": others_cores([meter.lap()])
    }


def read_files(pack: Pack, layers: int, threads: int) -> float:
    """Read the files in order, a piece at a time by whichever thread is free."""
    files = [DataFile(pack.directory / entry.file, direct=True) for entry in pack.manifest.expert_files[:layers]]
    sizes = [entry.size_bytes for entry in pack.manifest.expert_files[:layers]]
    places = [(file, offset) for file, size in zip(files, sizes) for offset in range(0, size, PIECE_BYTES)]
    iterator = iter(places)  # a list's iterator hands out each item once, whoever asks

    count = (os.cpu_count() or 1) * (AHEAD + 1) // threads  # as much memory as verification reads into

    def read() -> None:
        memories = [Pages(PIECE_BYTES).buffer for _ in range(count)]
        for number, (file, offset) in enumerate(iterator):
            os.preadv(file.fileno(), [memories[number % count]], offset)

    seconds = run_threads(read, threads)
    for file in files:
        file.close()
    return sum(sizes) / seconds / 1e9


def hash_memory() -> float:
    """sha256 of pieces that a thread for each core has in memory."""
    cores, done = os.cpu_count() or 1, itertools.count()
    deadline = time.perf_counter() + HASH_SECONDS

    def digest() -> None:
        memory = os.urandom(PIECE_BYTES)
        while time.perf_counter() < deadline:
            hashlib.sha256(memory).digest()
            next(done)

    seconds = run_threads(digest, cores)
    return next(done) * PIECE_BYTES / seconds / 1e9


def verify_files(pack: Pack, layers: int, workers: int) -> float:
    """The blocks of the files through moe-inspect's own function. Raises ValueError if any is wrong."""
    regions = [region for region in list_regions(pack) if region.layer is not None and region.layer < layers]
    started = time.perf_counter()
    problems = list(verify_contents(pack, regions, workers=workers))
    seconds = time.perf_counter() - started
    if problems:
        raise ValueError(problems[0].text)
    return sum(region.size_bytes for region in regions) / seconds / 1e9


def run_threads(work: object, threads: int) -> float:
    """Seconds until all threads have done the work."""
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for job in [pool.submit(work) for _ in range(threads)]:  # type: ignore[arg-type]
            job.result()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
