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

from moepack.kernels.backend import describe_backend, share_memory_load
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
ADVICE_ROUNDS = 3
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
    return disk_speed.NUM_STEPS + 3 + num_candidates * rehearsal.NUM_STEPS


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
        advice = compare_advice(blocks, settings, seconds, work) if blocks else None
        settings = replace(settings, advise=advice is not None and advice.pays)
        on_step(1)
    machine = Machine(memory_gb_s or here_gb_s, arithmetic, disk, settings, process_bytes, ops.cache_dtype)
    facts = {
        "disk": f"{ssd_gb_s:g} GB/s, as stated" if ssd_gb_s else _describe_disk(speeds, settings),
        "memory": f"{here_gb_s:.1f} GB/s read by all threads, {available_bytes() / 2**30:.1f} GiB available",
        "arithmetic": describe_backend(ops),
    }
    if advice:
        facts["read ahead"] = str(advice)
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
    found = {}
    for depth in sorted({1, HINTS_AT_ONCE, settings.queue_depth}):
        speed = _read_meanwhile(work, blocks, settings, depth, seconds)
        if speed is not None:
            found[depth] = speed.gb_s * 1e9
    return found


def _read_meanwhile(
    work: Callable[[], object],
    blocks: Sequence[Block],
    settings: ReadSettings,
    queue_depth: int,
    seconds: float,
    advises: bool | None = None,
) -> DiskSpeed | None:
    method = "direct" if settings.direct else "buffered"
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(measure_reads, blocks, method, queue_depth, False, seconds, advises)
        while not reading.done():
            work()
    return reading.result()


@dataclass(frozen=True)
class Advice:
    """What telling the system of the next block does while something is computed: GB/s of rounds, without and with."""

    without: tuple[float, ...]
    told: tuple[float, ...]

    @property
    def pays(self) -> bool:
        """Faster in every round, and by more than what counts as fast alike."""
        is_ahead = all(told > without for told, without in zip(self.told, self.without))
        return is_ahead and AS_FAST * statistics.median(self.told) > statistics.median(self.without)

    def __str__(self) -> str:
        told, without = statistics.median(self.told), statistics.median(self.without)
        verdict = "used" if self.pays else "not used"
        return f"told of the next block the system brings {told:.2f} GB/s, else {without:.2f}: {verdict}"


def compare_advice(
    blocks: Sequence[Block], settings: ReadSettings, seconds: float, work: Callable[[], object]
) -> Advice | None:
    """Whether the system is to be told of the next block; None where it does not listen.

    Under load, because that is where it was seen to hurt: what reads ahead takes memory bandwidth from a GPU that
    shares it, and a queue that is full anyway gains nothing.
    """
    load, found = share_memory_load(work), []
    for _ in range(ADVICE_ROUNDS):
        pair = [_read_meanwhile(load, blocks, settings, settings.queue_depth, seconds, told) for told in (False, True)]
        if pair[0] is None or pair[1] is None:
            return None
        found.append((pair[0].gb_s, pair[1].gb_s))
    without, told = zip(*found)
    return Advice(without, told)


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
