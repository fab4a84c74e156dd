"""One decoded token's way through the layers, from a trace: when each of them computed, waited, and had blocks read.

A layer's time begins where it asks for its experts and ends where the next layer does: its experts and the next layer's
mixer are in it, in that of the last layer also the head, the choice of a token and the first mixer. Layers that run in
one native call ask when it ends: the first of them has the time of all.

    timeline = trace_token(trace, 17)
    for layer in timeline.layers: print(layer.layer, layer.computing_ms, layer.waiting_ms)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moepack.layout.errors import UsageError
from moepack.layout.trace import ReadTime, Request, Trace

Span = tuple[float, float]  # start and end, in seconds


@dataclass(frozen=True)
class LayerTime:
    """What one layer did with its time. Times in seconds from the start of the recording.

    waits   spans within the layer's own in which it waited for reads
    reads   of this layer's blocks, for this token, some from before the layer began
    """

    layer: int
    start_s: float
    end_s: float
    waits: tuple[Span, ...]
    reads: tuple[ReadTime, ...]

    @property
    def waiting_ms(self) -> float:
        return 1e3 * sum(end - start for start, end in self.waits)

    @property
    def computing_ms(self) -> float:
        return 1e3 * (self.end_s - self.start_s) - self.waiting_ms

    @property
    def read_bytes(self) -> int:
        return sum(read.size_bytes for read in self.reads)


@dataclass(frozen=True)
class Timeline:
    """A token, the first decoded one being 1."""

    token: int
    layers: tuple[LayerTime, ...]

    @property
    def start_s(self) -> float:
        return self.layers[0].start_s

    @property
    def end_s(self) -> float:
        return self.layers[-1].end_s


def trace_token(trace: Trace, token: int | None = None) -> Timeline:
    """The time line of a token; by default of the one that took the median time of the second half.

    Raises UsageError if the trace has no such token: the last one is not whole, because none begins after it.
    """
    decode = [request for request in trace.requests if not request.is_prefill]
    starts = [place for place, request in enumerate(decode) if request.layer == 0]
    whole = len(starts) - 1
    if whole < 1:
        raise UsageError("the trace holds no whole decoded token: record one with more of them")
    if token is not None and not 1 <= token <= whole:
        raise UsageError(f"--token {token}: expected 1 to {whole}, the tokens that the trace holds whole")
    if token is None:
        later = range(whole // 2, whole)
        by_time = sorted(later, key=lambda one: decode[starts[one + 1]].at_s - decode[starts[one]].at_s)
        token = by_time[len(by_time) // 2] + 1
    return _line_up(trace, decode[starts[token - 1] : starts[token]], decode[starts[token]].at_s, token)


def list_times(timeline: Timeline) -> dict[str, Any]:
    """For JSON; times in ms since the token's first layer asked for its experts."""

    def since(seconds: float) -> float:
        return 1e3 * (seconds - timeline.start_s)

    layers = [
        {
            "layer": one.layer,
            "start_ms": since(one.start_s),
            "computing_ms": one.computing_ms,
            "waiting_ms": one.waiting_ms,
            "waits": [[since(start), since(end)] for start, end in one.waits],
            "reads": [
                {
                    "experts": read.expert_ids,
                    "bytes": read.size_bytes,
                    "start_ms": since(read.start_s),
                    "end_ms": since(read.end_s),
                    "is_ahead": read.is_ahead,
                }
                for read in one.reads
            ],
        }
        for one in timeline.layers
    ]
    return {"token": timeline.token, "token_ms": since(timeline.end_s), "layers": layers}


def _line_up(trace: Trace, requests: list[Request], end_s: float, token: int) -> Timeline:
    bounds = [*(request.at_s for request in requests), end_s]
    reads = [read for read in trace.reads if read.end_s > bounds[0] and read.start_s < end_s]
    reads.sort(key=lambda read: read.start_s)
    layers = []
    for request, start, end in zip(requests, bounds, bounds[1:]):
        waits = cut_spans(((wait.start_s, wait.end_s) for wait in trace.waits), start, end)
        own = tuple(read for read in reads if read.layer == request.layer and read.start_s < end)
        layers.append(LayerTime(request.layer, start, end, tuple(waits), own))
    return Timeline(token, tuple(layers))


def cut_spans(spans: Iterable[Span], start: float, end: float) -> list[Span]:
    """The parts of spans that lie between two times."""
    return [(max(start, first), min(end, last)) for first, last in spans if first < end and last > start]


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """Spans of time that do not overlap, covering the same time."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def subtract_spans(start: float, end: float, spans: Iterable[Span]) -> list[Span]:
    """What is left between two times without the spans."""
    left = []
    for first, last in merge_spans(cut_spans(spans, start, end)):
        if first > start:
            left.append((start, first))
        start = last
    return [*left, (start, end)] if end > start else left


def assign_lanes(spans: Iterable[Span]) -> list[int]:
    """A lane for each span, so that spans of one lane do not overlap; few lanes."""
    free_at: list[float] = []
    lanes = []
    for start, end in spans:
        lane = next((number for number, free in enumerate(free_at) if free <= start), len(free_at))
        free_at[lane : lane + 1] = [end]
        lanes.append(lane)
    return lanes
