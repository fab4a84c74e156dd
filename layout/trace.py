"""Routing traces: which experts a run asked for, to be replayed against policies and sizes of memory without the model.

A trace is text, one JSON value per line. The first line says what was run:

    {"trace": "moepack routing", "version": 1, "num_hidden_layers": 40, "num_experts": 256, "num_experts_per_tok": 8}

Every other line is one layer of one step, the layer's number first, then the experts' ids: of one token in decode, of
all tokens of a chunk in prefill, which is marked.

    [0, 17, 203, 4, 99, 31, 250, 8, 77]
    {"prefill": [1, 0, 1, 2, 5, 8]}

A replay knows requests and slots, no time: reads that overlap or run ahead are not in it.

    print(replay(read_trace(path), LeastRecentlyUsed(), num_slots=2000).hit_rate)
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moepack.layout.errors import UsageError
from moepack.layout.eviction import POLICIES, EvictionPolicy, Key, RankedPolicy, is_flushing_scan

KIND, VERSION = "moepack routing", 1
SIZES = ("num_hidden_layers", "num_experts", "num_experts_per_tok")
OPTIMAL = "belady"


@dataclass(frozen=True)
class Request:
    """Experts of one layer, asked for together."""

    layer: int
    expert_ids: tuple[int, ...]
    is_prefill: bool


@dataclass(frozen=True)
class Trace:
    """What a run asked for, in order."""

    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int
    requests: Sequence[Request]

    @property
    def num_blocks(self) -> int:
        """Experts of the whole model: slots for all of them hit whatever has been read once."""
        return self.num_hidden_layers * self.num_experts

    @property
    def num_tokens(self) -> int:
        """Tokens decoded."""
        return sum(request.layer == 0 and not request.is_prefill for request in self.requests)


class TraceWriter:
    """Writes a trace as a run goes on.

    text_config   of the pack's manifest: num_hidden_layers, num_experts, num_experts_per_tok
    """

    def __init__(self, file: IO[str], text_config: Mapping[str, Any]):
        self._file = file
        self._write({"trace": KIND, "version": VERSION, **{name: text_config[name] for name in SIZES}})

    def record(self, layer: int, expert_ids: Iterable[int], is_prefill: bool = False) -> None:
        """Note one fetch."""
        request = [layer, *expert_ids]
        self._write({"prefill": request} if is_prefill else request)

    def _write(self, value: object) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")


def read_trace(path: Path) -> Trace:
    """Read and check a trace. Raises UsageError naming the line that is wrong."""
    with _open(path) as file:
        lines = enumerate(file, start=1)
        header = _parse(path, *next(lines, (1, "")))
        if not isinstance(header, dict) or header.get("trace") != KIND:
            raise UsageError(
                f'{path}: line 1: expected a header with "trace": "{KIND}": record one with moe-run --trace'
            )
        if header.get("version") != VERSION:
            raise UsageError(f"{path}: trace version {header.get('version')!r}, but this moepack reads {VERSION}")
        sizes = {name: header.get(name) for name in SIZES}
        if not all(type(size) is int and size > 0 for size in sizes.values()):
            raise UsageError(f"{path}: line 1: expected positive integers, found {sizes}")
        layers, experts = header["num_hidden_layers"], header["num_experts"]
        requests = [_parse_request(path, number, line, layers, experts) for number, line in lines]
    return Trace(layers, experts, header["num_experts_per_tok"], requests)


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


def replay(trace: Trace, policy: EvictionPolicy, num_slots: int) -> Replay:
    """What a store with these slots would have hit, starting empty."""
    held: set[Key] = set()
    counts = Replay()
    for request in trace.requests:
        keys = [(request.layer, expert_id) for expert_id in request.expert_ids]
        hits = [key for key in keys if key in held]
        counts.add(request, len(hits))
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
    """Belady's policy: evicts what will not be needed for longest. It knows the whole trace, and none hits more."""

    name = OPTIMAL

    def __init__(self, trace: Trace):
        super().__init__()
        self._coming: dict[Key, deque[int]] = {}
        for step, request in enumerate(trace.requests):
            for expert_id in request.expert_ids:
                self._coming.setdefault((request.layer, expert_id), deque()).append(step)

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


def _open(path: Path) -> IO[str]:
    try:
        return path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: line {number}: not JSON: {line[:60].strip()!r}") from None


def _parse_request(path: Path, number: int, line: str, layers: int, experts: int) -> Request:
    value = _parse(path, number, line)
    is_prefill = isinstance(value, dict)
    numbers = value.get("prefill") if is_prefill else value
    if not isinstance(numbers, list) or len(numbers) < 2 or not all(type(item) is int for item in numbers):
        raise UsageError(f"{path}: line {number}: expected [layer, expert, ...], found {line[:60].strip()!r}")
    layer, *ids = numbers
    if not 0 <= layer < layers or not 0 <= min(ids) <= max(ids) < experts or len(set(ids)) < len(ids):
        text = f"expected a layer below {layers} and different experts below {experts}, found {line[:60].strip()!r}"
        raise UsageError(f"{path}: line {number}: {text}")
    return Request(layer, tuple(ids), is_prefill)
