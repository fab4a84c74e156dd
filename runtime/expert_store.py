"""Experts in memory: a fixed number of slots, filled from the SSD in the background while the caller computes.

The slots are one run of huge pages, sized once from the memory budget; the system backs a slot when it is first filled.
A block is read whole into its slot and used there, without a copy. All misses of a fetch are queued at once, and the
hits are handed out before anything is waited for:

    for batch in store.fetch(layer, expert_ids):                    # decode: what is here first
        for expert_id, expert in batch: ...
    for batch in store.fetch(layer, expert_ids, in_order=True):     # prefill: a scan, read ahead of its consumer

One fetch at a time, from one thread. Reads start with the call, before the first batch is asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from moepack.kernels.matrix import Expert
from moepack.kernels.slots import HostSlots
from moepack.layout.eviction import EvictionPolicy, Key, LeastRecentlyUsed, is_flushing_scan
from moepack.layout.geometry import BlockGeometry
from moepack.layout.reader import Pack
from moepack.layout.trace_file import TraceWriter
from moepack.runtime.expert_io import BlockReader, Read, ReadOptions, ReadQueue

JOINED_BYTES = 4 * 2**20  # neighbours read in one call, in order: small blocks come twice as fast
READ_AHEAD_BYTES = 32 * 2**20  # how far reads run ahead of the consumer, in order
MAX_HINTS = 8  # reads that nobody has asked for yet
FILL_HINTS = 32  # the same, where all experts have room and come in for the first time

Batch = list[tuple[int, Expert]]


@dataclass
class StoreCounts:
    """What a store has done since it was made.

    hits, misses    experts fetched that were in memory (or on their way), and that had to be read
    bytes_read      of all reads, hints included
    io_wait_s       time in which the caller waited for reads
    prefetched      experts read because of a hint; prefetch_used: those of them that were then fetched
    retries         reads that failed and were tried once more
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    io_wait_s: float = 0.0
    prefetched: int = 0
    prefetch_used: int = 0
    retries: int = 0

    def since(self, earlier: StoreCounts) -> StoreCounts:
        return StoreCounts(*(now - then for now, then in zip(vars(self).values(), vars(earlier).values())))

    def __add__(self, other: StoreCounts) -> StoreCounts:
        return StoreCounts(*(one + another for one, another in zip(vars(self).values(), vars(other).values())))

    def share(self, place: int, of: int) -> StoreCounts:
        """The part of one of several who spent this together: numbers are divided, and all have waited."""
        mine = {name: value * (place + 1) // of - value * place // of for name, value in vars(self).items()}
        mine["misses"] = (self.hits + self.misses) // of - mine["hits"]
        return StoreCounts(**{**mine, "io_wait_s": self.io_wait_s})

    def copy(self) -> StoreCounts:
        return StoreCounts(**vars(self))


class _Held:
    """An expert that has a slot. While it loads or is pinned, the slot is not given away.

    room        its slot, and until its read has ended who was there before
    is_hinted   read because of a hint, not fetched yet
    """

    __slots__ = ("is_hinted", "is_loading", "is_pinned", "room")

    def __init__(self, room: _Room, is_hinted: bool):
        self.room, self.is_loading, self.is_pinned, self.is_hinted = room, True, not is_hinted, is_hinted

    @property
    def slot(self) -> int:
        return self.room.slot

    @property
    def is_busy(self) -> bool:
        return self.is_loading or self.is_pinned


class _Room(NamedTuple):
    """A slot to be filled, and who has left it for that, if anybody: still there until the read begins."""

    slot: int
    left: tuple[Key, _Held] | None = None


class _Fetch:
    """One fetch under way.

    is_cold   what it reads will not be needed soon
    planned   ids before this position are held, or their reads are queued
    left      ids that the caller has not done with, in the order given
    missed    those of them that had to be read and have a slot
    """

    def __init__(self, layer: int, expert_ids: Sequence[int], in_order: bool, is_cold: bool):
        self.layer, self.expert_ids, self.in_order, self.is_cold = layer, list(expert_ids), in_order, is_cold
        self.planned = 0
        self.left = dict.fromkeys(self.expert_ids)
        self.missed: set[int] = set()

    @property
    def is_planned(self) -> bool:
        return self.planned == len(self.expert_ids)


class ExpertStore:
    """Experts of a pack by layer and id, at most num_slots of them in memory. Close it when done.

    io             how blocks are read
    policy         which expert makes room; least recently used by default
    verify_reads   compare each block that is read with its checksum
    new_slots      makes the memory that experts lie in: the backend's own
    counts         what it has done so far
    on_fetch       called with the arguments of every fetch; None at first
    recorder       is told of every fetch, guess, read and wait, with their times; None at first
    places         int64 [layers, E]: addresses of the experts that are in memory, for native code; 0 for others
    """

    def __init__(
        self,
        pack: Pack,
        num_slots: int,
        *,
        io: ReadOptions = ReadOptions(),
        policy: EvictionPolicy | None = None,
        verify_reads: bool = False,
        new_slots: Callable[[int, int, bool], HostSlots] = HostSlots,
    ):
        if num_slots < 1:
            raise ValueError(f"a store needs at least one slot, got {num_slots}")
        self.pack, self.num_slots, self.slot_bytes = pack, num_slots, largest_block(pack)
        self.counts = StoreCounts()
        self.recorder: TraceWriter | None = None
        self.on_fetch: Callable[[int, Sequence[int], bool], object] | None = None
        self._slots = new_slots(num_slots, self.slot_bytes, io.huge_pages)
        self._views = SlotViews(pack, self._slots)
        shape = pack.manifest.shape
        self.places = torch.zeros(len(pack.manifest.expert_files), shape.num_experts, dtype=torch.int64)
        self._places = self.places.numpy()  # the same memory: torch takes ten times as long to set a value
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: dict[Key, _Held] = {}
        self._num_layers = shape.num_hidden_layers
        self._policy = policy or LeastRecentlyUsed()
        self._fetch: _Fetch | None = None
        self._reads, self._hints = 0, 0  # under way, of all and of hints
        self._due: set[Key] = set()  # read ahead for the next fetch of a scan: the policy does not know them yet
        self._reader = BlockReader(pack, io.direct, verify_reads)
        execute, advise = self._slots.reads_into(self._reader.read), self._reader.advise if io.advise else None
        self._queue, self._advises = ReadQueue(execute, io.queue_depth, advise), io.advise
        self._close = weakref.finalize(self, self._queue.close)
        # In order: neighbours that one read brings, and slots that are computed from or read ahead into.
        self._joined = max(1, min(JOINED_BYTES // self.slot_bytes, num_slots // 8))
        self._ahead = max(2 * self._joined, min(READ_AHEAD_BYTES // self.slot_bytes, num_slots // 4))

    def fetch(self, layer: int, expert_ids: Sequence[int], in_order: bool = False) -> Iterator[Batch]:
        """Every expert of expert_ids once, in batches; those of a batch are valid until the next one is asked for.

        expert_ids   distinct ids, more than there are slots if need be
        in_order     hand them out in the order given, which should be that of the file. Otherwise the first batch is
                     what is in memory, be it nothing, and the others follow as they come off the disk.

        A caller may stop early; the next fetch takes back what the iterator held. The iterator raises DamagedPack
        naming layer, expert and offset if a block cannot be read.
        """
        if not self._close.alive:
            raise RuntimeError("this store is closed")
        if self._slots.are_read_to_the_end and not in_order and len(expert_ids) > self.num_slots:
            raise ValueError(f"{len(expert_ids)} experts at once need as many slots, there are {self.num_slots}")
        if self.on_fetch:
            self.on_fetch(layer, expert_ids, in_order)
        self._take_back()
        while read := self._queue.next_done(wait=False):
            self._finish(read)
        is_cold = in_order and is_flushing_scan(len(expert_ids), self._num_layers, self.num_slots)
        fetch = self._fetch = _Fetch(layer, expert_ids, in_order, is_cold)
        if self.recorder:
            missing = [expert_id for expert_id in expert_ids if (layer, expert_id) not in self._held]
            self.recorder.note_fetch(layer, expert_ids, in_order, missing)
        for expert_id in expert_ids:
            held = self._held.get((layer, expert_id))
            if held:
                self.counts.hits += 1
                self.counts.prefetch_used += held.is_hinted
                held.is_hinted, held.is_pinned = False, True
                # What was read ahead is needed again no sooner than what this fetch reads.
                self._policy.use((layer, expert_id), cold=is_cold and (layer, expert_id) in self._due)
                self._due.discard((layer, expert_id))
        for key in self._due:  # nobody wanted it
            self._policy.use(key, cold=True)
        self._due.clear()
        self._plan(fetch)
        return self._hand_out(fetch)

    @property
    def has_room_for_all(self) -> bool:
        """Whether no expert ever has to make room for another."""
        return self.num_slots >= self._num_layers * self.places.shape[1]

    @property
    def holds_everything(self) -> bool:
        """Whether nothing has to make room and nobody records: which experts are used is then of no interest."""
        return self.has_room_for_all and not (self.on_fetch or self.recorder)

    def load_all(self) -> None:
        """Read every expert, where there are slots for all."""
        for layer in range(self._num_layers):
            for _ in self.fetch(layer, range(self.places.shape[1]), in_order=True):
                pass
        self.counts.misses = 0  # nobody has asked for them yet

    def keeps(self, layer: int) -> bool:
        """Whether all experts of a layer are in memory until the store is closed."""
        return self._close.alive and self.has_room_for_all and bool(self._places[layer].all())

    def expert_bits(self, layer: int) -> set[int]:
        """The bits of all matrices of a layer's experts."""
        return {matrix.scheme.bits for tier in self.pack.geometry(layer).tiers for _, matrix in tier.matrices}

    def note_use(self, layer: int, expert_ids: Sequence[int], in_order: bool = False) -> None:
        """Count as fetched what was found in `places` and used from there, before the next call."""
        if self.on_fetch:
            self.on_fetch(layer, expert_ids, in_order)
        if self.recorder:
            self.recorder.note_fetch(layer, expert_ids, in_order)
        self.counts.hits += len(expert_ids)
        if self.holds_everything:
            return
        for expert_id in expert_ids:
            held = self._held[layer, expert_id]
            self.counts.prefetch_used += held.is_hinted
            held.is_hinted = False
            self._policy.use((layer, expert_id))
            self._due.discard((layer, expert_id))

    def prefetch(self, layer: int, expert_ids: Sequence[int], is_scan: bool = False) -> None:
        """Hint that these experts may be fetched next, the likeliest first.

        A few of them are read while no fetch waits for the disk. What has not begun when the next fetch comes is called
        off, and costs nothing: who made room for it is back.

        is_scan   all of them will be needed by the next fetch, in this order, and make room for nobody before it: as
                  many are read as a quarter of the slots holds
        """
        if self.recorder and not is_scan:
            self.recorder.note_guess(layer, expert_ids)
        if self._fetch and not self._fetch.is_planned:
            return  # it needs every slot itself
        most = max(MAX_HINTS, self.num_slots // 4) if is_scan else MAX_HINTS
        for expert_id in expert_ids:
            if self._hints >= most:  # more than that, if a scan's are still under way
                return
            if (layer, expert_id) not in self._held:
                room = self._take_room(may_wait=False)
                if room is None:
                    return
                self._start(layer, (expert_id,), (room,), is_hint=True, is_due=is_scan)

    def fill(self) -> None:
        """Hint that all experts will be fetched sooner or later, where there is room for all of them."""
        missing = np.argwhere(self._places[: self._num_layers] == 0)
        for layer, expert_id in missing[: 2 * FILL_HINTS].tolist():  # some of them are on their way
            if self._hints >= FILL_HINTS:
                return
            if (layer, expert_id) not in self._held:
                self._start(layer, (expert_id,), (_Room(self._free.pop()),), is_hint=True)

    def describe(self) -> dict[str, str | int | bool]:
        """How this store reads and keeps, for people."""
        return {
            "method": self._reader.method,
            "queue_depth": self._queue.depth,
            "advises": self._advises,
            "huge_pages": self._slots.is_huge,
            "policy": self._policy.name,
            "num_slots": self.num_slots,
            "slot_bytes": self.slot_bytes,
        }

    def close(self) -> None:
        """End the reading threads. The experts handed out stay valid; nothing can be fetched any more."""
        self._take_back()
        self._close()

    # A fetch, step by step

    def _hand_out(self, fetch: _Fetch) -> Iterator[Batch]:
        batch: list[int] = []
        if not fetch.in_order:  # what is in memory is handed out before anything is waited for, be it nothing
            self._check_current(fetch)
            batch = self._list_ready(fetch)
            yield self._view(fetch, batch)
        while True:
            self._check_current(fetch)
            self._release(fetch, batch)
            if not fetch.left:
                self._unpin(fetch.layer, fetch.expert_ids)
                self._fetch = None
                return
            try:
                batch = self._wait_for_batch(fetch)
            except BaseException:
                self._take_back()
                raise
            yield self._view(fetch, batch)

    def _check_current(self, fetch: _Fetch) -> None:
        if self._fetch is not fetch:
            raise RuntimeError("another fetch has begun: its experts may lie where those of this one did")

    def _view(self, fetch: _Fetch, batch: list[int]) -> Batch:
        return [(id_, self._views.get(self._held[fetch.layer, id_].slot, fetch.layer, id_)) for id_ in batch]

    def _plan(self, fetch: _Fetch) -> None:
        """Queue reads for misses, as far as slots go, and in order not too far ahead."""
        while not fetch.is_planned:
            if (fetch.layer, fetch.expert_ids[fetch.planned]) in self._held:
                fetch.planned += 1
                continue
            run = self._next_run(fetch)
            if fetch.in_order and fetch.missed and len(fetch.missed) + len(run) > self._ahead:
                return
            rooms: list[_Room] = []
            while len(rooms) < len(run) and (room := self._take_room()) is not None:
                rooms.append(room)
            if not rooms:
                return
            self._start(fetch.layer, run[: len(rooms)], rooms, is_cold=fetch.is_cold)
            fetch.missed.update(run[: len(rooms)])
            fetch.planned += len(rooms)
            self.counts.misses += len(rooms)

    def _next_run(self, fetch: _Fetch) -> list[int]:
        """The ids from the planned position on that one read can bring, of which the first is not held."""
        geometry = self.pack.geometry(fetch.layer)
        run: list[int] = []
        end = 0
        for expert_id in fetch.expert_ids[fetch.planned : fetch.planned + (self._joined if fetch.in_order else 1)]:
            is_neighbour = not run or geometry.offsets[expert_id] == end
            if (fetch.layer, expert_id) in self._held or not is_neighbour:
                break
            run.append(expert_id)
            end = geometry.offsets[expert_id] + geometry.block(expert_id).block_stride
        return run

    def _wait_for_batch(self, fetch: _Fetch) -> list[int]:
        """The ids that can be handed out next, at least one."""
        while True:
            while read := self._queue.next_done(wait=False):
                self._finish(read)
            if batch := self._list_ready(fetch):
                return batch
            if self._reads:
                self._slots.submit()
                started = perf_counter()
                read = self._queue.next_done()
                ended = perf_counter()
                self.counts.io_wait_s += ended - started
                if self.recorder:
                    self.recorder.note_wait(started, ended)
                assert read is not None
                self._finish(read)
            else:
                self._give_up_a_hit(fetch)
            self._plan(fetch)

    def _list_ready(self, fetch: _Fetch) -> list[int]:
        """What is left and in memory; in order, as far as there is no gap, and so few that reads go on, if any."""
        ready: list[int] = []
        is_missing = any((fetch.layer, expert_id) not in self._held for expert_id in fetch.left)
        for expert_id in fetch.left:
            held = self._held.get((fetch.layer, expert_id))
            if held and not held.is_loading:
                ready.append(expert_id)
            elif fetch.in_order:
                break
            if fetch.in_order and is_missing and len(ready) == self._ahead // 2:
                break
        return ready

    def _give_up_a_hit(self, fetch: _Fetch) -> None:
        """Drop the hit that comes last, because hits to come fill all slots and an earlier expert needs one."""
        last = next(id_ for id_ in reversed(fetch.expert_ids) if (fetch.layer, id_) in self._held)
        self._drop((fetch.layer, last))
        self.counts.hits -= 1

    def _release(self, fetch: _Fetch, expert_ids: list[int]) -> None:
        for expert_id in expert_ids:
            del fetch.left[expert_id]
            fetch.missed.discard(expert_id)
        if fetch.in_order or not self._slots.are_read_to_the_end:
            self._unpin(fetch.layer, expert_ids)
        self._plan(fetch)

    def _unpin(self, layer: int, expert_ids: Iterable[int]) -> None:
        """The caller has handed over all that it has to do with these experts."""
        held = [self._held[layer, expert_id] for expert_id in expert_ids if (layer, expert_id) in self._held]
        self._slots.mark_used([expert.slot for expert in held if expert.is_pinned])
        for expert in held:
            expert.is_pinned = False

    def _take_back(self) -> None:
        """End the fetch under way and call off the reads that have not begun; others run to their end."""
        for read in reversed(self._queue.cancel()):
            self._reads -= 1
            self._hints -= read.is_hint
            for expert_id in reversed(read.experts):
                self._call_off((read.layer, expert_id))
        if self._fetch:
            self._unpin(self._fetch.layer, self._fetch.expert_ids)
        self._fetch = None

    # Slots

    def _take_room(self, may_wait: bool = True) -> _Room | None:
        """A slot that nobody needs now; None if there is none.

        may_wait   take one that a GPU still reads, if there is no other: filling it then waits
        """
        if self._free:
            return _Room(self._free.pop())
        victim = self._policy.evict(lambda key: self._held[key].is_busy or self._slots.is_in_use(self._held[key].slot))
        if victim is None and may_wait:
            victim = self._policy.evict(lambda key: self._held[key].is_busy)
        if victim is None:
            return None
        held = self._leave(victim)
        return _Room(held.slot, (victim, held))

    def _drop(self, key: Key) -> None:
        self._free.append(self._forget(key).slot)

    def _call_off(self, key: Key) -> None:
        """Forget an expert whose read has not begun: who has left the slot for it is back, the next to leave it."""
        slot, left = self._forget(key).room
        if left is None:
            self._free.append(slot)
            return
        last, held = left
        assert last not in self._held  # reads begin in turn: if it had been asked for again, this one would have begun
        self._held[last] = held
        self._places[last] = self._slots.describe(self._views.get(slot, *last))
        self._policy.use(last, cold=True)

    def _forget(self, key: Key) -> _Held:
        if key in self._due:
            self._due.remove(key)
        else:
            self._policy.forget(key)
        return self._leave(key)

    def _leave(self, key: Key) -> _Held:
        """Take a key out of its slot."""
        self._places[key] = 0
        return self._held.pop(key)

    def _start(
        self,
        layer: int,
        expert_ids: Sequence[int],
        rooms: Sequence[_Room],
        is_hint: bool = False,
        is_cold: bool = False,
        is_due: bool = False,
    ) -> None:
        buffers = []
        for expert_id, room in zip(expert_ids, rooms):
            self._held[layer, expert_id] = _Held(room, is_hint)
            if is_due:
                self._due.add((layer, expert_id))
            else:
                self._policy.use((layer, expert_id), cold=is_cold or is_hint)
            self._slots.wait_until_free(room.slot)  # nearly always it is: see _take_room
            buffers.append(self._slots.buffer(room.slot, self.pack.geometry(layer).block(expert_id).block_stride))
        self._reads += 1
        self._hints += is_hint
        self._queue.submit(Read(layer, tuple(expert_ids), buffers, is_hint))

    def _finish(self, read: Read) -> None:
        """Take note of a read that has ended. Raises its error if the fetch under way wants what it was to bring."""
        self._reads -= 1
        self._hints -= read.is_hint
        self.counts.retries += read.retries
        keys = [(read.layer, expert_id) for expert_id in read.experts]
        if read.error is None:
            self._slots.admit(read.buffers)
            size_bytes = sum(map(len, read.buffers))
            self.counts.bytes_read += size_bytes
            if self.recorder:
                times = (read.started_s, read.ended_s)
                self.recorder.note_read(read.layer, read.experts, size_bytes, *times, read.is_hint)
            self.counts.prefetched += read.is_hint
            for key in keys:
                held = self._held[key]
                held.room, held.is_loading = _Room(held.slot), False  # who was there is gone
                self._places[key] = self._slots.describe(self._views.get(held.slot, *key))
            return
        is_wanted = any(self._held[key].is_pinned for key in keys)
        for key in keys:
            self._drop(key)
        if is_wanted:
            raise read.error


class SlotViews:
    """The Expert in a slot, as views into it, made once for each slot and kind of block.

    Making one takes 25 us and more with Python's lock held, at every miss. It is kept: about 8 KiB a slot.
    """

    def __init__(self, pack: Pack, slots: HostSlots):
        self._slots = slots
        kinds: dict[BlockGeometry, int] = {}
        self._pack = pack
        self._kinds = [
            [kinds.setdefault(tier, len(kinds)) for tier in pack.geometry(layer).tiers]
            for layer in range(len(pack.manifest.expert_files))
        ]
        self._views: dict[tuple[int, int], Expert] = {}

    def get(self, slot: int, layer: int, expert_id: int) -> Expert:
        geometry = self._pack.geometry(layer)
        kind = self._kinds[layer][geometry.expert_tiers[expert_id]]
        view = self._views.get((slot, kind))
        if view is None:
            block = self._slots.block(slot)
            view = self._views[slot, kind] = Expert.from_block(geometry.block(expert_id), block)
        return view


def largest_block(pack: Pack) -> int:
    """Bytes that a slot needs: the largest block of any layer."""
    layers = range(len(pack.manifest.expert_files))
    return max(tier.block_stride for layer in layers for tier in pack.geometry(layer).tiers)
