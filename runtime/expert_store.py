"""Experts in memory: a fixed number of slots, filled from the SSD on demand, the least recently used one reused.

The slots are one anonymous mapping, sized once from the memory budget; the system backs a slot when it is first
filled. A block is read whole into its slot and used there, without a copy. Reads are plain and one at a time: what
hides their latency comes on top of this interface.

    for expert_id, expert in store.fetch(layer, expert_ids): ...
"""

from __future__ import annotations

import mmap
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moepack.kernels.matrix import Expert
from moepack.layout.reader import Pack


@dataclass
class StoreCounts:
    """What a store has done. io_wait_s is the time in which the caller waited for reads."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    io_wait_s: float = 0.0

    def since(self, earlier: StoreCounts) -> StoreCounts:
        return StoreCounts(*(now - then for now, then in zip(vars(self).values(), vars(earlier).values())))

    def copy(self) -> StoreCounts:
        return StoreCounts(**vars(self))


class ExpertStore:
    """Experts of a pack by layer and id, at most num_slots of them in memory."""

    def __init__(self, pack: Pack, num_slots: int):
        if num_slots < 1:
            raise ValueError(f"a store needs at least one slot, got {num_slots}")
        self.pack, self.num_slots = pack, num_slots
        self.counts = StoreCounts()
        self._slot_bytes = largest_block(pack)
        self._memory = mmap.mmap(-1, num_slots * self._slot_bytes)
        self._buffer = memoryview(self._memory)
        self._slots = torch.frombuffer(self._memory, dtype=torch.uint8).view(num_slots, self._slot_bytes)
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: OrderedDict[tuple[int, int], tuple[int, Expert]] = OrderedDict()  # least recently used first

    def fetch(self, layer: int, expert_ids: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """Every expert of expert_ids once, in the order given; each is valid until the next one is asked for.

        expert_ids   distinct ids, known all at once so that reads can be planned

        Raises DamagedPack naming layer, expert and offset if a block cannot be read.
        """
        for expert_id in expert_ids:  # as far as the slots go, what is here does not make room for the rest
            if (layer, expert_id) in self._held:
                self._held.move_to_end((layer, expert_id))
        for expert_id in expert_ids:
            held = self._held.get((layer, expert_id))
            if held:
                self.counts.hits += 1
                self._held.move_to_end((layer, expert_id))
                yield expert_id, held[1]
            else:
                yield expert_id, self._load(layer, expert_id)

    def _load(self, layer: int, expert_id: int) -> Expert:
        slot = self._free.pop() if self._free else self._held.popitem(last=False)[1][0]
        started = time.perf_counter()
        try:
            first = slot * self._slot_bytes
            size = self.pack.read_block(layer, expert_id, self._buffer[first : first + self._slot_bytes])
        except BaseException:
            self._free.append(slot)
            raise
        self.counts.io_wait_s += time.perf_counter() - started
        self.counts.misses += 1
        self.counts.bytes_read += size
        expert = Expert.from_block(self.pack.geometry(layer).block(expert_id), self._slots[slot])
        self._held[layer, expert_id] = slot, expert
        return expert


def largest_block(pack: Pack) -> int:
    """Bytes that a slot needs: the largest block of any layer."""
    layers = range(len(pack.manifest.expert_files))
    return max(tier.block_stride for layer in layers for tier in pack.geometry(layer).tiers)
