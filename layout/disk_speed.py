"""How fast this disk brings expert blocks: at random, as decode asks for them, and in order, as prefill does.

Blocks are whole, of the size they have in the pack, read into huge pages by threads that each have one read in flight;
that is how moe-run reads. Direct reads go past the page cache; what buffered ones put there is dropped again, so that
no method is credited with what memory remembers, and where that cannot be done they are not measured. Whether it pays
to tell the system what comes next is measured apart, each block at most once. Without a pack, a temporary file of
random bytes stands in for it.

Not seen: a cache of the disk's own or of a virtual machine's host, which can make a file just written look fast.

    with stand_in_file(Path("/mnt/ssd"), 7077888) as places: print(measure_disk(places, seconds=1.0))
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from moepack.layout.errors import NotEnoughSpace
from moepack.layout.geometry import align_up
from moepack.layout.pages import Pages
from moepack.layout.reader import Pack
from moepack.layout.spec import PAGE_SIZE
from moepack.layout.storage import DataFile

QUEUE_DEPTHS = (1, 2, 4, 8)
IN_ORDER_DEPTHS = (2, 4)
NUM_STEPS = 2 * len(QUEUE_DEPTHS) + len(IN_ORDER_DEPTHS)
STAND_IN_BYTES = 2**30
RANDOM_BYTES = 8 * 2**20  # of the stand-in; repeated, because no file system or disk in view finds repeats so far apart
PLACES = 512  # blocks of a pack to choose from
PAGE_BYTES = 4096  # of the system's memory, the smallest
MEMORY_BYTES = 256 * 2**20  # to read into, of all reads in flight together
SEED = 0

Block = tuple[Path, int, int]  # file, offset, size


@dataclass(frozen=True)
class DiskSpeed:
    """One way of reading and what it brought.

    method        direct or buffered
    queue_depth   reads in flight
    in_order      neighbours one after the other, or blocks at random
    gb_s          10^9 bytes per second
    block_ms      median time of a read
    """

    method: str
    queue_depth: int
    in_order: bool
    gb_s: float
    block_ms: float


def measure_disk(
    blocks: Sequence[Block], seconds: float, on_step: Callable[[int], object] = lambda steps: None
) -> list[DiskSpeed]:
    """Every method and queue depth at random, and the best method in order; direct only if the file system allows it.

    seconds   for each of them
    on_step   called with 1 after each of NUM_STEPS

    Raises OSError.
    """
    found: list[DiskSpeed] = []
    for method in ("direct", "buffered"):
        for depth in QUEUE_DEPTHS:
            speed = measure_reads(blocks, method, depth, False, seconds)
            on_step(1)
            found += [] if speed is None else [speed]
    if not found:
        raise OSError(
            errno.ENOTSUP, "direct reads are refused here, and the cache cannot be emptied", str(blocks[0][0])
        )
    method = max(found, key=lambda speed: speed.gb_s).method
    for depth in IN_ORDER_DEPTHS:
        speed = measure_reads(blocks, method, depth, True, seconds)
        on_step(1)
        found += [] if speed is None else [speed]
    return found


def measure_reads(
    blocks: Sequence[Block],
    method: str,
    queue_depth: int,
    in_order: bool,
    seconds: float,
    advises: bool | None = None,
) -> DiskSpeed | None:
    """Read for some seconds; None where direct reads or advice are refused, or the cache cannot be kept out.

    advises   to be compared: each block at most once, and with True each reader tells the system the block after the
              one that it reads

    Raises OSError.
    """
    with ExitStack() as stack:
        files: dict[Path, DataFile] = {}
        for path, _, _ in blocks:
            if path not in files:
                files[path] = DataFile(path, direct=method == "direct")
                stack.callback(files[path].close)
        if method == "direct":
            path, offset, size = blocks[0]
            files[path].read_into([Pages(size).buffer[:size]], offset)
            if not files[path].is_direct:
                return None
        elif not hasattr(os, "posix_fadvise"):
            return None
        if advises is not None and not all(file.takes_advice for file in files.values()):
            return None
        order = list(blocks) if in_order else random.Random(SEED + queue_depth).sample(blocks, len(blocks))
        drops = method == "buffered" or advises is not None
        if drops:
            _drop_caches(files)
        try:
            return _read_for(order, files, method, queue_depth, in_order, seconds, advises)
        finally:
            if drops:  # what was told and not read, too
                _drop_caches(files)


def _drop_caches(files: dict[Path, DataFile]) -> None:
    for file in files.values():
        file.drop_cache()


def _read_for(
    order: Sequence[Block],
    files: dict[Path, DataFile],
    method: str,
    queue_depth: int,
    in_order: bool,
    seconds: float,
    advises: bool | None,
) -> DiskSpeed:
    largest = max(size for _, _, size in order)
    # As many places as a run has slots, so to speak: into one that a cache still holds, a virtual disk copies faster.
    memories = [Pages(largest * max(1, MEMORY_BYTES // largest // queue_depth)) for _ in range(queue_depth)]
    for memory in memories:
        memory.buffer[::PAGE_BYTES] = bytes(memory.size_bytes // PAGE_BYTES)  # the system backs what is written to
    # Several threads ask for the next one, which a generator could not take.
    waiting, times = itertools.cycle(order) if advises is None else iter(order), []
    started = time.perf_counter()  # after the touching: it takes as long as reading does
    deadline = started + seconds

    def read(memory: Pages) -> int:
        done = slot = 0
        block = next(waiting, None)
        while block and (not done or time.perf_counter() < deadline):
            (path, offset, size), block = block, next(waiting, None)
            if advises and block:
                files[block[0]].advise(*block[1:])
            before = time.perf_counter()
            files[path].read_into([memory.buffer[slot : slot + size]], offset)
            slot = slot + largest if slot + 2 * largest <= memory.size_bytes else 0
            times.append(time.perf_counter() - before)
            done += size
            if method == "buffered" and advises is None:
                files[path].drop_cache(*((offset, size) if in_order else ()))  # at random, what was read ahead too
        return done

    with ThreadPoolExecutor(queue_depth) as pool:
        total = sum(pool.map(read, memories))
    elapsed = time.perf_counter() - started
    median = sorted(times)[len(times) // 2]
    return DiskSpeed(method, queue_depth, in_order, total / elapsed / 1e9, median * 1e3)


def list_blocks(pack: Pack) -> list[Block]:
    """Blocks of a pack to measure with, in order: all of them, or neighbouring ones from places spread over it."""
    blocks = [
        (pack.directory / entry.file, offset, pack.geometry(entry.layer).block(expert).block_stride)
        for entry in pack.manifest.expert_files
        for expert, offset in enumerate(pack.geometry(entry.layer).offsets)
    ]
    run = PLACES // 16
    starts = range(0, len(blocks), max(run, len(blocks) // 16))
    return [block for start in starts for block in blocks[start : start + run]]


@contextmanager
def stand_in_file(directory: Path, block_stride: int) -> Iterator[list[Block]]:
    """Blocks in a temporary file on the disk to be measured, deleted in the end. Raises NotEnoughSpace or OSError."""
    count = max(8, STAND_IN_BYTES // block_stride)
    needed = count * block_stride
    stats = os.statvfs(directory)
    if stats.f_bavail * stats.f_frsize < 2 * needed:
        raise NotEnoughSpace(f"{directory}: measuring the disk takes {2 * needed:,} bytes for a while: make space")
    with tempfile.NamedTemporaryFile(dir=directory, prefix="moepack-plan-") as file:
        piece = os.urandom(align_up(RANDOM_BYTES, PAGE_SIZE))
        for done in range(0, needed, len(piece)):
            file.write(piece[: needed - done])
        file.flush()
        os.fsync(file.fileno())
        yield [(Path(file.name), number * block_stride, block_stride) for number in range(count)]
