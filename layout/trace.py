"""Routing traces in memory: what a run asked for, replayed against policies and sizes of memory without the model.

A replay knows requests and slots, no time: reads that overlap or run ahead are not in it. How a trace lies in a file:
trace_file.py. What its times tell: trace_report.py.

    print(replay(read_trace(path), LeastRecentlyUsed(), num_slots=2000).hit_rate)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moepack.layout.eviction import POLICIES, EvictionPolicy, Key, RankedPolicy, is_flushing_scan

OPTIMAL = "belady"


@dataclass(frozen=True)
class Request:
    """Experts of one layer, asked for together: of one token in decode, of a chunk of the prompt in prefill.

    at_s      when, in seconds from the start of the recording
    missing   those that were not in memory nor on their way
    """

    layer: int
    expert_ids: tuple[int, ...]
    is_prefill: bool
    at_s: float = 0.0
    missing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Guess:
    """Experts that the next layer was expected to ask for, the likeliest first."""

    layer: int
    expert_ids: tuple[int, ...]
    at_s: float


@dataclass(frozen=True)
class ReadTime:
    """A read of neighbouring blocks of one layer. is_ahead: because of a guess, before anybody asked."""

    layer: int
    expert_ids: tuple[int, ...]
    size_bytes: int
    start_s: float
    end_s: float
    is_ahead: bool


@dataclass(frozen=True)
class Wait:
    """A time in which the computation waited for reads."""

    start_s: float
    end_s: float


@dataclass(frozen=True)
class Trace:
    """What a run asked for and how that went, each in the order of time. facts: how the run was set up."""

    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int
    requests: Sequence[Request]
    guesses: Sequence[Guess] = ()
    reads: Sequence[ReadTime] = ()
    waits: Sequence[Wait] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        """Experts of the whole model: slots for all of them hit whatever has been read once."""
        return self.num_hidden_layers * self.num_experts

    @property
    def num_tokens(self) -> int:
        """Tokens decoded."""
        return sum(request.layer == 0 and not request.is_prefill for request in self.requests)


@dataclass
class Replay:
    """Hits and misses in decode, and apart from them those in prefill, where a chunk asks for nearly every expert."""

    hits: int = 0
    misses: int = 0
    prefill_hits: int = 0
    prefill_misses: int = 0

    def add(self, request: Request, num_hits: int) -> None:
        """Count a request of which so many experts were in memory."""
        num_misses = len(request.expert_ids) - num_hits
        if request.is_prefill:
            self.prefill_hits += num_hits
            self.prefill_misses += num_misses
        else:
            self.hits += num_hits
            self.misses += num_misses

    @property
    def hit_rate(self) -> float | None:
        """Share of a decoded token's experts that were in memory; None if the trace decodes nothing."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None


def replay(trace: Trace, policy: EvictionPolicy, num_slots: int, uncounted_tokens: int = 0) -> Replay:
    """What a store with these slots would have hit, starting empty.

    uncounted_tokens   decoded ones in the beginning, which only fill the memory
    """
    held: set[Key] = set()
    counts, warm_up = Replay(), Replay()
    decoded = 0
    for request in trace.requests:
        decoded += request.layer == 0 and not request.is_prefill
        keys = [(request.layer, expert_id) for expert_id in request.expert_ids]
        hits = [key for key in keys if key in held]
        is_counted = request.is_prefill or max(1, decoded) > uncounted_tokens
        (counts if is_counted else warm_up).add(request, len(hits))
        for key in hits:
            policy.use(key)
        # Prefill is done with an expert before the next; in decode all experts of a layer are in memory together.
        busy = set(hits if request.is_prefill else keys)
        is_cold = request.is_prefill and is_flushing_scan(len(keys), trace.num_hidden_layers, num_slots)
        for key in keys:
            if key not in held:
                _let_in(key, held, policy, num_slots, busy, is_cold)
    return counts


def _let_in(key: Key, held: set[Key], policy: EvictionPolicy, num_slots: int, busy: set[Key], is_cold: bool) -> None:
    if len(held) == num_slots:
        victim = policy.evict(busy.__contains__)
        if victim is None:  # read, used and not kept
            policy.use(key, is_cold)
            policy.forget(key)
            return
        held.remove(victim)
    policy.use(key, is_cold)
    held.add(key)


class FarthestNextUse(RankedPolicy):
    """Belady's policy: evicts what will not be needed for longest. It knows the whole trace.

    In decode none hits more. In a prompt another may, a little: what is hit is not evicted while its request lasts.
    """

    name = OPTIMAL

    def __init__(self, trace: Trace):
        super().__init__()
        self._coming: dict[Key, deque[int]] = {}
        keys = ((request.layer, expert_id) for request in trace.requests for expert_id in request.expert_ids)
        for place, key in enumerate(keys):
            self._coming.setdefault(key, deque()).append(place)

    def use(self, key: Key, cold: bool = False) -> None:
        super().use(key)

    def next_rank(self, key: Key, rank: float | None) -> float:
        coming = self._coming[key]
        coming.popleft()
        return -coming[0] if coming else -math.inf


def compare_policies(trace: Trace, num_slots: int) -> dict[str, Replay]:
    """A replay of the trace for each online policy, by its name, and for the optimal one."""
    results = {name: replay(trace, make(), num_slots) for name, make in POLICIES.items()}
    return {**results, OPTIMAL: replay(trace, FarthestNextUse(trace), num_slots)}
