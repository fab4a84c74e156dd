"""What things cost on this machine, measured now: the model's arithmetic, reading memory, reading the disk.

Another machine can be asked about by the speed of its disk and its memory. The arithmetic measured here is then scaled
by the speed of memory, which decides decode; that a prompt's arithmetic scales the same way is an assumption.

    measured = measure_machine(architecture, [Candidate.of_pack(pack)], pack, ops, seconds=0.7, chunk_tokens=512)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moepack.kernels.backend import describe_backend
from moepack.kernels.native_ops import read_stream
from moepack.layout import disk_speed
from moepack.layout.architecture import Architecture
from moepack.layout.disk_speed import Block, DiskSpeed, list_blocks, measure_disk, measure_reads, stand_in_file
from moepack.layout.machine import ReadSettings
from moepack.layout.plan import Disk
from moepack.layout.process import resident_set_bytes
from moepack.layout.reader import Pack
from moepack.runtime import rehearsal
from moepack.runtime.expert_io import HINTS_AT_ONCE, Read, ReadOptions, ReadQueue
from moepack.runtime.forecast import Candidate, Machine
from moepack.runtime.memory import available_bytes
from moepack.runtime.rehearsal import rehearse

STREAM_BYTES = 2**29
STREAM_ROUNDS = 5
STARTS = 25
AS_FAST = 0.97  # a queue this close to the fastest is as good, and a shorter one leaves more for others


@dataclass(frozen=True)
class Measured:
    """A machine, and how it was found; `facts` are lines for people by their names.

    busy   the disk while something is computed: GB/s by reads in flight, and how late a read begins
    """

    machine: Machine
    speeds: list[DiskSpeed]
    facts: dict[str, str]
    busy: dict[str, Any]


def count_steps(num_candidates: int) -> int:
    """Steps of a measurement, for a progress bar."""
    return disk_speed.NUM_STEPS + 2 + num_candidates * rehearsal.NUM_STEPS


def measure_machine(
    a: Architecture,
    candidates: Sequence[Candidate],
    where: Pack | Path,
    ops: Any,
    *,
    seconds: float,
    chunk_tokens: int,
    ssd_gb_s: float | None = None,
    memory_gb_s: float | None = None,
    on_step: Callable[[int], object] = lambda steps: None,
) -> Measured:
    """Measure what is not stated.

    where         the pack to read from, or a directory on the disk that a pack would be on
    seconds       of each way of reading the disk
    ssd_gb_s      of another disk; this one is then not measured
    memory_gb_s   of another machine's memory

    Raises OSError and NotEnoughSpace where the disk cannot be measured.
    """
    process_bytes = resident_set_bytes()  # before anything is allocated: what moe-run has when it starts
    with ExitStack() as stack:
        speeds: list[DiskSpeed] = []
        blocks: Sequence[Block] = ()
        if not ssd_gb_s:
            blocks = _blocks_to_read(candidates, where, stack)
            speeds = measure_disk(blocks, seconds, on_step)
        disk, settings = stated_disk(ssd_gb_s) if ssd_gb_s else choose_reads(speeds)
        here_gb_s = measure_memory(ops)
        on_step(1)
        factor = here_gb_s / memory_gb_s if memory_gb_s else 1.0
        arithmetic = {}
        for one in candidates:
            stored = (one.scheme_of, one.block)
            costs, work = rehearse(a, ops, *stored, chunk_tokens, on_step, one.cache_dtype(ops.cache_dtype))
            arithmetic[one.title] = costs.scale(factor)
        if blocks:
            disk = replace(disk, busy_bytes_s=measure_while_busy(blocks, settings, seconds, work))
        disk = replace(disk, start_s=measure_start(work, settings.queue_depth))
        on_step(1)
    machine = Machine(memory_gb_s or here_gb_s, arithmetic, disk, settings, process_bytes, ops.cache_dtype)
    facts = {
        "disk": f"{ssd_gb_s:g} GB/s, as stated" if ssd_gb_s else _describe_disk(speeds, settings),
        "memory": f"{here_gb_s:.1f} GB/s read by all threads, {available_bytes() / 2**30:.1f} GiB available",
        "arithmetic": describe_backend(ops),
    }
    if memory_gb_s:
        facts["memory"] += f"; predicted for {memory_gb_s:g} GB/s"
    busy = {str(depth): bytes_s / 1e9 for depth, bytes_s in disk.busy_bytes_s.items()}
    return Measured(machine, speeds, facts, {"gb_s": busy, "start_ms": 1e3 * disk.start_s})


def _blocks_to_read(candidates: Sequence[Candidate], where: Pack | Path, stack: ExitStack) -> Sequence[Block]:
    """Of the pack, or of a file that stands in for one until the stack is closed."""
    if isinstance(where, Pack):
        return list_blocks(where)
    return stack.enter_context(stand_in_file(where, candidates[0].slot_bytes))


def measure_while_busy(
    blocks: Sequence[Block], settings: ReadSettings, seconds: float, work: Callable[[], object]
) -> dict[int, float]:
    """Bytes per second at random by reads in flight, as many as are used, while something is computed."""
    method = "direct" if settings.direct else "buffered"
    found = {}
    for depth in sorted({1, HINTS_AT_ONCE, settings.queue_depth}):
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(measure_reads, blocks, method, depth, False, seconds)
            while not reading.done():
                work()
        speed = reading.result()
        if speed is not None:
            found[depth] = speed.gb_s * 1e9
    return found


def measure_start(work: Callable[[], object], queue_depth: int) -> float:
    """Median seconds from asking for a block until a thread begins to read it, while the caller goes on to compute."""
    queue, times = ReadQueue(lambda read: None, queue_depth), []
    for _ in range(STARTS):
        asked = time.perf_counter()
        queue.submit(Read(0, (), ()))
        work()
        done = queue.next_done()
        assert done is not None
        times.append(done.started_s - asked)
    queue.close()
    return statistics.median(times)


def _describe_disk(speeds: Sequence[DiskSpeed], settings: ReadSettings) -> str:
    method = "direct" if settings.direct else "buffered"
    at_random = next(
        s for s in speeds if not s.in_order and (s.method, s.queue_depth) == (method, settings.queue_depth)
    )
    in_order = max((s.gb_s for s in speeds if s.in_order), default=0.0)
    return (
        f"blocks at random {at_random.gb_s:.2f} GB/s ({method}, {settings.queue_depth} in flight, "
        f"{at_random.block_ms:.2f} ms each), in order {in_order:.2f} GB/s"
    )


def choose_reads(speeds: Sequence[DiskSpeed]) -> tuple[Disk, ReadSettings]:
    """The method and queue depth to read with, and the disk as it is with them: moe-run's own, or faster ones."""
    at_random = [speed for speed in speeds if not speed.in_order]
    most = max(speed.gb_s for speed in at_random)
    usual = ReadOptions().queue_depth
    as_fast = [speed for speed in at_random if speed.gb_s >= AS_FAST * most]
    chosen = min(as_fast, key=lambda speed: (speed.queue_depth != usual, speed.queue_depth))
    by_depth = {speed.queue_depth: speed.gb_s * 1e9 for speed in at_random if speed.method == chosen.method}
    in_order = max((speed.gb_s for speed in speeds if speed.in_order), default=most)
    settings = ReadSettings(chosen.method == "direct", chosen.queue_depth, prefetch=True)
    return Disk(by_depth, in_order * 1e9, chosen.queue_depth), settings


def stated_disk(gb_s: float) -> tuple[Disk, ReadSettings]:
    """A disk of which only a speed is known."""
    usual = ReadOptions()
    disk = Disk({1: gb_s * 1e9}, gb_s * 1e9, usual.queue_depth)
    return disk, ReadSettings(usual.direct, usual.queue_depth, prefetch=True)


def measure_memory(ops: Any) -> float:
    """GB/s at which all threads read memory that no cache holds: the best of a few rounds."""
    memory = ops.view_pages(ops.new_pages(STREAM_BYTES))
    memory.fill_(1)
    times = []
    for _ in range(STREAM_ROUNDS):
        started = time.perf_counter()
        read_stream(memory)
        times.append(time.perf_counter() - started)
    return STREAM_BYTES / min(times) / 1e9
