"""What a trace tells beside hits: who is popular, how soon experts come back, how good guesses are, where time went.

Decode alone is looked at: a prompt asks for nearly everything. Reading at the speed that the disk reached while it was
busy, with all computing beside it, is the least that a token could have taken; what it took more is lost to waiting.

    facts = describe_trace(read_trace(Path("run.trace")))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from moepack.layout.trace import Guess, Request, Trace

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)
PERCENTILES = (10, 50, 90)


def describe_trace(trace: Trace) -> dict[str, Any]:
    """All facts, JSON-ready; None where the trace has nothing to say."""
    decode = [request for request in trace.requests if not request.is_prefill]
    return {
        "popularity": measure_popularity(trace, decode),
        "reuse_distance": measure_reuse(decode),
        "recall": measure_recall(trace),
        "time": measure_time(trace),
    }


def measure_popularity(trace: Trace, decode: list[Request]) -> dict[str, float]:
    """Share of the uses that falls on the most used share of all experts, by that share."""
    uses = Counter((request.layer, expert) for request in decode for expert in request.expert_ids)
    ranked, total = sorted(uses.values(), reverse=True), sum(uses.values())
    return {f"{share:.0%}": sum(ranked[: max(1, round(share * trace.num_blocks))]) / max(1, total) for share in SHARES}


def measure_reuse(decode: list[Request]) -> dict[str, float | None]:
    """Other experts used between two uses of one: with so many slots and one more, least recently used would hit."""
    order: dict[tuple[int, int], int] = {}  # key -> number of its last use
    sums = _PrefixSums(sum(len(request.expert_ids) for request in decode))
    distances, first_uses, now = [], 0, 0
    for request in decode:
        for expert in request.expert_ids:
            key = (request.layer, expert)
            last = order.get(key)
            if last is None:
                first_uses += 1
            else:
                distances.append(len(order) - sums.up_to(last))
                sums.add(last, -1)
            order[key] = now
            sums.add(now, 1)
            now += 1
    found = np.percentile(distances, PERCENTILES) if distances else [None] * len(PERCENTILES)
    shares = {"first_uses": first_uses / now if now else None}
    return {**shares, **{f"p{p}": None if v is None else float(v) for p, v in zip(PERCENTILES, found)}}


class _PrefixSums:
    """Sums of the first elements of a list of numbers that change (a Fenwick tree)."""

    def __init__(self, size: int):
        self._tree = [0] * (size + 1)

    def add(self, place: int, value: int) -> None:
        place += 1
        while place < len(self._tree):
            self._tree[place] += value
            place += place & -place

    def up_to(self, place: int) -> int:
        """Sum of elements 0 to place."""
        total, place = 0, place + 1
        while place:
            total += self._tree[place]
            place -= place & -place
        return total


def measure_recall(trace: Trace) -> dict[str, float | None]:
    """Share of a layer's experts that were guessed one layer before, and that the token before used."""
    events: list[Guess | Request] = sorted(
        [*trace.guesses, *(request for request in trace.requests if not request.is_prefill)],
        key=lambda event: event.at_s,
    )
    guessed: dict[int, set[int]] = {}
    before: dict[int, set[int]] = {}
    found: dict[str, list[float]] = {"next_layer_guess": [], "token_before": []}
    for event in events:
        if not isinstance(event, Request):
            guessed[event.layer] = set(event.expert_ids)
            continue
        asked = set(event.expert_ids)
        for name, known in (
            ("next_layer_guess", guessed.pop(event.layer, None)),
            ("token_before", before.get(event.layer)),
        ):
            if known is not None:
                found[name].append(len(asked & known) / len(asked))
        before[event.layer] = asked
    return {name: float(np.mean(values)) if values else None for name, values in found.items()}


def measure_time(trace: Trace) -> dict[str, float | int | None] | None:
    """Where a decoded token's time went, in ms, on average; None where fewer than two tokens were decoded.

    From the first decoded token's first layer to the last one's: embedding, head and choice of a token in between are
    computing, too.
    """
    starts = [request.at_s for request in trace.requests if not request.is_prefill and request.layer == 0]
    if len(starts) < 2 or starts[-1] <= starts[0]:
        return None
    tokens, start, end = len(starts) - 1, starts[0], starts[-1]
    waited = sum(_overlap([(wait.start_s, wait.end_s) for wait in trace.waits], start, end))
    reads = [read for read in trace.reads if start <= read.end_s <= end]
    busy = sum(_overlap(_merge((read.start_s, read.end_s) for read in trace.reads), start, end))
    size_bytes = sum(read.size_bytes for read in reads)
    ahead = sum(read.size_bytes for read in reads if read.is_ahead)
    total = end - start
    return {
        "tokens": tokens,
        "token_ms": total / tokens * 1e3,
        "computing_ms": (total - waited) / tokens * 1e3,
        "waiting_ms": waited / tokens * 1e3,
        "disk_busy_ms": busy / tokens * 1e3,
        "read_bytes": size_bytes / tokens,
        "read_ahead_share": ahead / size_bytes if size_bytes else None,
        "disk_gb_s": size_bytes / busy / 1e9 if busy else None,
        "least_ms": max(total - waited, busy) / tokens * 1e3,
    }


def _merge(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans of time that do not overlap, covering the same time."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _overlap(spans: Iterable[tuple[float, float]], start: float, end: float) -> list[float]:
    """How much of each span lies between two times."""
    return [max(0.0, min(end, last) - max(start, first)) for first, last in spans]
