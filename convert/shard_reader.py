"""Byte ranges of shards, past the page cache where the file system lets us, into memory that is used again and again.

A checkpoint is read once: cached, it would push out everything else that the machine has cached. Huge pages make a
direct read two to three times as fast, and keeping them saves zeroing them for each read. What will be asked for can be
read ahead, by threads that do nothing else: one that computes is put aside by the system when its read is done, and the
disk waits for it. What a thread reads can be recorded: time, and a digest of every range, from which a tensor's hash is
made without a second pass over the source. Ranges are hashed when all of a piece of work have been read, two at a time.

    reader = ShardReader()
    reader.prefetch(path, offset, size)
    with reader.recording() as record:
        raw = reader.read(path, offset, size)
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

from moepack.kernels.native_hash import sha256_each
from moepack.layout.geometry import align_up
from moepack.layout.pages import Pages
from moepack.layout.storage import DIRECT_ALIGNMENT, DataFile

READERS = 2  # reads ahead in flight


@dataclass
class Record:
    """What one piece of work took.

    digests   (tensor, sha256) of each range read, in order
    seconds   stage -> time
    """

    digests: list[tuple[str, bytes]] = field(default_factory=list)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _ranges: list[tuple[str, np.ndarray]] = field(default_factory=list)  # read, not hashed yet

    def note(self, tensor: str, raw: np.ndarray) -> None:
        """A range was read. It stays in memory until the next call of hash."""
        self._ranges.append((tensor, raw))

    def hash(self, *others: bytearray) -> list[str]:
        """Make the digests of what was read, and those of others (hexadecimal) beside them."""
        ranges, self._ranges = self._ranges, []
        with self.timed("hash"):
            digests = sha256_each([*(raw for _, raw in ranges), *others])
        self.digests += [(tensor, digest) for (tensor, _), digest in zip(ranges, digests)]
        return [digest.hex() for digest in digests[len(ranges) :]]

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += perf_counter() - started


class ShardReader:
    """Safe to use from several threads; their number bounds the memory.

    scratch_bytes   disk that it takes beside the output while it works
    reads_ahead     whether prefetch does anything
    """

    scratch_bytes: int = 0
    reads_ahead = True

    def __init__(self) -> None:
        self._files: dict[Path, DataFile] = {}
        self._free: defaultdict[int, list[Pages]] = defaultdict(list)
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._coming: dict[tuple[Path, int, int], Future[tuple[Pages, int]]] = {}
        self._readers: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[type[ShardReader], tuple[()]]:
        return ShardReader, ()  # sent to another process it opens files of its own

    def read(self, path: Path, offset: int, size: int, tensor: str) -> np.ndarray:
        """uint8 [size], read-only; its memory is used again when nothing refers to it any more. Raises OSError."""
        record: Record | None = getattr(self._thread, "record", None)
        with (record or Record()).timed("read"):
            coming = self._coming.pop((path, offset, size), None)
            pages, start = coming.result() if coming else self._fill(path, offset, size)
        raw = np.frombuffer(pages.buffer, np.uint8, size, offset - start)
        raw.flags.writeable = False
        weakref.finalize(raw, self._give_back, pages)
        return self._note(tensor, raw)

    def prefetch(self, path: Path, offset: int, size: int) -> None:
        """Read a range ahead; `read` gives it, and what else is wrong with it. Its memory waits until then."""
        if self._readers is None:
            self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="shard-read")
        self._coming[path, offset, size] = self._readers.submit(self._fill, path, offset, size)

    def _fill(self, path: Path, offset: int, size: int) -> tuple[Pages, int]:
        """Memory with the range, and the place in the file where it starts."""
        start = offset // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
        span = align_up(offset + size, DIRECT_ALIGNMENT) - start
        pages = self._take(span)
        self._open(path).read_into([pages.buffer[:span]], start, offset + size - start)
        return pages, start

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Record what this thread reads until the end of the block."""
        record = self._thread.record = Record()
        try:
            yield record
            record.hash()
        finally:
            del self._thread.record

    def begin(self, needs: dict[str, set[str]]) -> None:
        """Told before the work: file of the pack -> shards that it is made from, for those still to be written."""

    def finished(self, file: str) -> None:
        """Told when a file of the pack is written."""

    def stop(self) -> None:
        """Told when the work ends, well or not: nothing may wait any longer."""

    def forget(self, path: Path) -> None:
        """Close a file that will not be read again."""
        with self._lock:
            file = self._files.pop(path, None)
        if file is not None:
            file.close()

    def close(self) -> None:
        """Close the files; reading opens them again. What was read ahead and not asked for is forgotten."""
        readers, self._readers = self._readers, None
        if readers:
            readers.shutdown(cancel_futures=True)
        self._coming.clear()
        with self._lock:
            files, self._files = self._files, {}
        for file in files.values():
            file.close()

    def _note(self, tensor: str, raw: np.ndarray) -> np.ndarray:
        record: Record | None = getattr(self._thread, "record", None)
        if record is not None:
            record.note(tensor, raw)
        return raw

    def _open(self, path: Path) -> DataFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = DataFile(path, direct=True)
            return self._files[path]

    def _take(self, size_bytes: int) -> Pages:
        """Memory of at least a size: kept by size, as a checkpoint's matrices have few."""
        with self._lock:
            free = self._free[Pages.round_up(size_bytes)]
            if free:
                return free.pop()
        return Pages(size_bytes)

    def _give_back(self, pages: Pages) -> None:
        self._free[pages.size_bytes].append(pages)  # without the lock: a finalizer may run while this thread holds it
