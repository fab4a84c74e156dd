"""Which expert makes room for the next: policies that decide online, behind one interface.

A policy knows the keys that are held and the order of their uses, nothing of memory or files. The runtime's store and
the replay of a trace (trace.py) drive the same objects, so what a replay shows is what a run does.

    policy = LeastRecentlyUsed()
    policy.use((layer, expert))
    victim = policy.evict(is_busy=lambda key: key in pinned)
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from itertools import count

Key = tuple[int, int]  # layer and expert


def is_flushing_scan(num_experts: int, num_layers: int, num_slots: int) -> bool:
    """Whether prefill, with so many experts in each layer, would push everything out before it comes round again.

    Its experts are then let in cold: most of what is held stays, and is hit in the next round.
    """
    return num_experts * num_layers > num_slots


class EvictionPolicy(ABC):
    """Order of the keys that may be evicted, by what that would cost."""

    name: str

    @abstractmethod
    def use(self, key: Key, cold: bool = False) -> None:
        """A key is asked for, or may be evicted from now on.

        cold   it will not be needed soon: evict it before all others, the latest such key first. For scans that are
               larger than the cache (of a cycle, the key used last is the one needed last) and for guesses.
        """

    @abstractmethod
    def evict(self, is_busy: Callable[[Key], bool]) -> Key | None:
        """Choose a key that is not busy and forget it; None if all are busy."""

    @abstractmethod
    def forget(self, key: Key) -> None:
        """A key is not to be evicted any more: it is gone, without the policy having chosen it."""


class LeastRecentlyUsed(EvictionPolicy):
    """Evicts what has not been used for longest."""

    name = "lru"

    def __init__(self) -> None:
        self._held: OrderedDict[Key, None] = OrderedDict()  # the next to go first

    def use(self, key: Key, cold: bool = False) -> None:
        self._held[key] = None
        self._held.move_to_end(key, last=not cold)

    def evict(self, is_busy: Callable[[Key], bool]) -> Key | None:
        victim = next((key for key in self._held if not is_busy(key)), None)
        if victim is not None:
            del self._held[victim]
        return victim

    def forget(self, key: Key) -> None:
        del self._held[key]


class RankedPolicy(EvictionPolicy):
    """Evicts the key of the lowest rank, of equal ones the least recently used. The rank moves with each use alone.

    Ranks outlive eviction: a key that comes back has its history.
    """

    def __init__(self) -> None:
        self._ranks: dict[Key, float] = {}
        self._clock = count(1)
        self._held: dict[Key, tuple[float, int, Key]] = {}
        self._heap: list[tuple[float, int, Key]] = []  # lowest first; entries that _held does not have are stale

    @abstractmethod
    def next_rank(self, key: Key, rank: float | None) -> float:
        """The rank of a key after a use; the rank before it is None if that was the first."""

    def use(self, key: Key, cold: bool = False) -> None:
        now = next(self._clock)
        if cold:
            entry = (-math.inf, -now, key)
        else:
            self._ranks[key] = self.next_rank(key, self._ranks.get(key))
            entry = (self._ranks[key], now, key)
        self._held[key] = entry
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 64 + 4 * len(self._held):
            self._heap = sorted(self._held.values())

    def evict(self, is_busy: Callable[[Key], bool]) -> Key | None:
        busy, victim = [], None
        while self._heap and victim is None:
            entry = heapq.heappop(self._heap)
            key = entry[2]
            if self._held.get(key) is not entry:
                continue
            if is_busy(key):
                busy.append(entry)
            else:
                victim = key
                del self._held[key]
        for entry in busy:
            heapq.heappush(self._heap, entry)
        return victim

    def forget(self, key: Key) -> None:
        del self._held[key]


class LeastFrequentlyUsed(RankedPolicy):
    """Evicts what has been used least often since the start. Never adapts to a change of subject."""

    name = "lfu"

    def next_rank(self, key: Key, rank: float | None) -> float:
        return 1 + (rank or 0)


class DecayedFrequency(RankedPolicy):
    """Evicts what has been used least often lately (LRFU): between the other two, and for long runs safer than either.

    half_life_turns   a use counts half when so many times the number of held keys have been used since

    A rank is the logarithm of the decayed count as it would be at time 0. Counts all decay at one pace, so ranks keep
    their order, and nothing has to be updated while a key is not used.
    """

    name = "lrfu"

    def __init__(self, half_life_turns: float = 2.0):
        super().__init__()
        self._half_life_turns = half_life_turns
        self._half_lives = 0.0  # that have passed

    def next_rank(self, key: Key, rank: float | None) -> float:
        self._half_lives += 1 / (self._half_life_turns * max(1, len(self._held)))
        if rank is None:
            return self._half_lives
        return max(self._half_lives, rank) + math.log2(1 + 2 ** -abs(self._half_lives - rank))


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    policy.name: policy for policy in (LeastRecentlyUsed, LeastFrequentlyUsed, DecayedFrequency)
}
