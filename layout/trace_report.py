"""What a trace tells beside hits: who is popular, how soon experts come back, how good guesses are, where time went.

Decode alone is looked at: a prompt asks for nearly everything. A token's time is taken apart twice: what the disk, and
what memory and cores, would have needed at their limits; what they needed beyond that; and the rest, in which they had
nothing to do. The limits are what `moe-inspect plan` measured and kept beside the pack, where a recording finds them.

    facts = describe_trace(read_trace(Path("run.trace")))
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from moepack.layout.machine import Limits
from moepack.layout.timeline import cut_spans, merge_spans
from moepack.layout.trace import Guess, ReadTime, Request, Trace

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)
PERCENTILES = (10, 50, 90)


def describe_trace(trace: Trace, limits: Limits = Limits()) -> dict[str, Any]:
    """All facts, JSON-ready; None where the trace has nothing to say.

    limits   of the machine that it was recorded on; what they leave open is taken from the trace
    """
    decode = [request for request in trace.requests if not request.is_prefill]
    return {
        "popularity": measure_popularity(trace, decode),
        "reuse_distance": measure_reuse(decode),
        "recall": measure_recall(trace),
        "time": measure_time(trace, limits),
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
    """Share of a layer's experts that were guessed one layer before, and that the token before used; and the share of
    what was read ahead that the layer then asked for."""
    events: list[tuple[float, Guess | Request | ReadTime]] = [
        *((guess.at_s, guess) for guess in trace.guesses),
        *((request.at_s, request) for request in trace.requests if not request.is_prefill),
        *((read.start_s, read) for read in trace.reads if read.is_ahead),
    ]
    guessed: dict[int, set[int]] = {}
    read_ahead: dict[int, set[int]] = {}
    before: dict[int, set[int]] = {}
    found: dict[str, list[float]] = {"next_layer_guess": [], "token_before": [], "read_ahead": []}
    for _, event in sorted(events, key=lambda one: one[0]):
        if isinstance(event, Guess):
            guessed[event.layer] = set(event.expert_ids)
        elif isinstance(event, ReadTime):
            read_ahead.setdefault(event.layer, set()).update(event.expert_ids)
        else:
            asked = set(event.expert_ids)
            for name, known in (
                ("next_layer_guess", guessed.pop(event.layer, None)),
                ("token_before", before.get(event.layer)),
            ):
                if known is not None:
                    found[name].append(len(asked & known) / len(asked))
            found["read_ahead"] += [float(expert in asked) for expert in read_ahead.pop(event.layer, ())]
            before[event.layer] = asked
    return {name: float(np.mean(values)) if values else None for name, values in found.items()}


def measure_time(trace: Trace, limits: Limits = Limits()) -> dict[str, Any] | None:
    """Where a decoded token's time went, in ms, on average; None where fewer than two tokens were decoded.

    From the first decoded token's first layer to the last one's: embedding, head and choice of a token in between are
    computing, too.
    """
    starts = [request.at_s for request in trace.requests if not request.is_prefill and request.layer == 0]
    if len(starts) < 2 or starts[-1] <= starts[0]:
        return None
    tokens, start, end = len(starts) - 1, starts[0], starts[-1]
    waited = sum(last - first for first, last in cut_spans(((w.start_s, w.end_s) for w in trace.waits), start, end))
    reads = [read for read in trace.reads if start <= read.end_s <= end]
    spans = merge_spans((read.start_s, read.end_s) for read in trace.reads)
    busy = sum(last - first for first, last in cut_spans(spans, start, end))
    size_bytes = sum(read.size_bytes for read in reads)
    ahead = sum(read.size_bytes for read in reads if read.is_ahead)
    total = end - start
    times = {
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
    return times | {"limits": _compare_with_limits(times, limits.or_else(Limits.of_facts(trace.facts)), trace)}


def _compare_with_limits(times: dict[str, Any], limits: Limits, trace: Trace) -> dict[str, Any]:
    """What a token takes at the machine's limits, and how what it took is made up; None where no limit is known."""
    facts: dict[str, Any] = {"disk": None, "memory": None, "least_ms": None, "share": None}
    token_bytes = trace.facts.get("token_bytes")
    if limits.disk_gb_s:
        least = times["read_bytes"] / limits.disk_gb_s / 1e6
        idle = times["token_ms"] - times["disk_busy_ms"]
        facts["disk"] = _split(limits.disk_gb_s, times["read_bytes"], least, times["disk_busy_ms"] - least, idle)
    if limits.memory_gb_s and type(token_bytes) is int:
        least = token_bytes / limits.memory_gb_s / 1e6
        facts["memory"] = _split(
            limits.memory_gb_s, token_bytes, least, times["computing_ms"] - least, times["waiting_ms"]
        )
    known = [facts[name]["at_limit_ms"] for name in ("disk", "memory") if facts[name]]
    if known:
        facts |= {"least_ms": max(known), "share": max(known) / times["token_ms"]}
    return facts


def _split(gb_s: float, size_bytes: float, at_limit_ms: float, beyond_ms: float, idle_ms: float) -> dict[str, float]:
    """A token's time in three parts that add up to it."""
    times = {"at_limit_ms": at_limit_ms, "beyond_ms": beyond_ms, "idle_ms": idle_ms}
    return {"gb_s": gb_s, "bytes": size_bytes, **times}
