"""Reads of expert blocks in the background: a few threads between the store and the pack's files.

A thread per read in flight, each in one preadv with Python's lock released: four of them read an SSD at its limit while
all cores compute (EXPERIMENTS.md). io_uring measured no better than threads and is left out. Reads that somebody waits
for come first; a hint begins only while none of the others waits and at most one read runs. Where `moe-inspect plan`
has found that it pays on this machine, the system is told of a read before its turn.

    queue = ReadQueue(BlockReader(pack, ReadOptions()).read, depth=4)
    queue.submit(Read(layer=3, experts=(17,), buffers=[slot]))
    done = queue.next_done()
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from time import perf_counter

from moepack.layout.errors import DamagedPack
from moepack.layout.reader import Pack
from moepack.layout.storage import DataFile

HINTS_AT_ONCE = 2  # a read takes twice as long while all cores compute: one alone leaves the disk half idle


@dataclass(frozen=True)
class ReadOptions:
    """How blocks are read.

    direct        past the system's page cache, where the file system lets us
    queue_depth   reads in flight at the same time
    huge_pages    ask for slots in pages of 2 MiB
    advise        tell the system of a read that waits when the one before it begins
    """

    direct: bool = True
    queue_depth: int = 4
    huge_pages: bool = True
    advise: bool = False


@dataclass(eq=False)
class Read:
    """Blocks of one layer that follow each other in their file, and where they go; filled in when it is done.

    is_hint   nobody waits for it
    retries   how often it had to be tried again
    error     what went wrong; the buffers then hold anything
    started_s, ended_s   when it ran, by time.perf_counter
    is_told   the system knows that it comes
    """

    layer: int
    experts: tuple[int, ...]
    buffers: Sequence[memoryview] = field(repr=False)
    is_hint: bool = False
    retries: int = 0
    error: BaseException | None = None
    started_s: float = 0.0
    ended_s: float = 0.0
    is_told: bool = False


class BlockReader:
    """Reads blocks of a pack whole, tries once more what fails, and checks digests if asked to."""

    def __init__(self, pack: Pack, direct: bool = True, verify: bool = False):
        self._pack, self._direct, self._verify = pack, direct, verify

    @property
    def method(self) -> str:
        """ "direct" or "buffered": what the file system has let us do so far."""
        return "direct" if self._file(0).is_direct else "buffered"

    def read(self, read: Read) -> None:
        """Fill the buffers of a read. Raises DamagedPack that names the block which cannot be read, twice."""
        try:
            self._read_once(read.layer, read.experts, read.buffers)
        except (OSError, DamagedPack):
            read.retries += 1
            for expert, buffer in zip(read.experts, read.buffers):  # one by one, so that an error is of one block
                self._read_again(read.layer, expert, buffer)

    def advise(self, read: Read) -> None:
        """Tell the system that a read is to come. What is wrong with it is the read's own to say."""
        with suppress(OSError, DamagedPack):
            offset = self._pack.geometry(read.layer).offsets[read.experts[0]]
            self._file(read.layer).advise(offset, sum(map(len, read.buffers)))

    def _read_again(self, layer: int, expert: int, buffer: memoryview) -> None:
        try:
            self._read_once(layer, (expert,), (buffer,))
        except OSError as error:
            text = f"read of {len(buffer)} bytes failed twice: {error.strerror}"
            raise self._pack.damaged_block(layer, expert, text) from None

    def _read_once(self, layer: int, experts: Sequence[int], buffers: Sequence[memoryview]) -> None:
        self._file(layer).read_into(buffers, self._pack.geometry(layer).offsets[experts[0]])
        if self._verify:
            for expert, buffer in zip(experts, buffers):
                self._pack.check_block(layer, expert, buffer)

    def _file(self, layer: int) -> DataFile:
        return self._pack.open_file(self._pack.manifest.expert_files[layer].file, self._direct)


class ReadQueue:
    """Threads that execute reads and hand them back in the order in which they end. One thread submits and collects.

    depth    reads that run at the same time: the number of threads
    advise   called before a read begins with the first one that waits behind it, guesses included, each once
    """

    def __init__(self, execute: Callable[[Read], None], depth: int, advise: Callable[[Read], None] | None = None):
        self._execute, self.depth, self._advise = execute, depth, advise
        self._waiting: deque[Read] = deque()
        self._hints: deque[Read] = deque()
        self._num_running = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._done: SimpleQueue[Read] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"expert-read-{n}", daemon=True) for n in range(depth)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, read: Read) -> None:
        """Queue a read; it comes back through next_done unless it is cancelled."""
        with self._changed:
            (self._hints if read.is_hint else self._waiting).append(read)
            self._changed.notify()

    def cancel(self) -> list[Read]:
        """Take back all reads that have not started."""
        with self._changed:
            cancelled = [*self._waiting, *self._hints]
            self._waiting.clear()
            self._hints.clear()
        return cancelled

    def next_done(self, wait: bool = True) -> Read | None:
        """A read that has ended, well or not; None if there is none and it is not to be waited for."""
        try:
            return self._done.get(block=wait)
        except Empty:
            return None

    def close(self) -> None:
        """Drop what has not started, wait for what has, end the threads."""
        self.cancel()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # the collector may end a forgotten store in any thread
                thread.join()

    def _work(self) -> None:
        while read := self._start_next():
            read.started_s = perf_counter()
            try:
                if self._advise and (following := self._next_untold()):
                    self._advise(following)
                self._execute(read)
            except BaseException as error:  # whatever it is, the one who waits must learn of it
                read.error = error
            read.ended_s = perf_counter()
            with self._changed:
                self._num_running -= 1
                if self._hints:
                    self._changed.notify()
            self._done.put(read)

    def _next_untold(self) -> Read | None:
        with self._changed:
            for read in (*self._waiting, *self._hints):
                if not read.is_told:
                    read.is_told = True
                    return read
        return None

    def _start_next(self) -> Read | None:
        with self._changed:
            while not self._is_closed:
                if self._waiting:
                    read = self._waiting.popleft()
                elif self._hints and self._num_running < HINTS_AT_ONCE:
                    read = self._hints.popleft()
                else:
                    self._changed.wait()
                    continue
                self._num_running += 1
                return read
        return None
