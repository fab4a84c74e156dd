"""What a model will do on a machine, before it is run or even converted: predictions for bits and budgets.

machine_costs.py measures; here are the sums, over sizes (memory.py) and over a token's way (layout/plan.py).

    candidate = Candidate.of_pack(pack)
    rows = forecast(architecture, [candidate], [8 * 2**30], machine, Workload())
    print(recommend(rows))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moepack.layout.architecture import Architecture, resident_shapes
from moepack.layout.errors import MemoryBudgetError, UsageError
from moepack.layout.eviction import LeastRecentlyUsed
from moepack.layout.geometry import BlockGeometry, MatrixGeometry, Scheme, align_up
from moepack.layout.machine import ReadSettings
from moepack.layout.plan import LOOKAHEAD_RECALL, Arithmetic, Disk, ModelSizes, Prediction, predict, uniform_hit_rate
from moepack.layout.reader import Pack
from moepack.layout.spec import SECTION_ALIGNMENT, UNQUANTIZED_BITS
from moepack.layout.trace import Trace, replay
from moepack.layout.trace_report import measure_recall
from moepack.runtime.expert_io import HINTS_AT_ONCE
from moepack.runtime.expert_store import MAX_HINTS
from moepack.runtime.memory import MemoryPlan, is_rounded, split_budget
from moepack.runtime.rehearsal import SchemeOf, pack_schemes
from moepack.runtime.resident import ResidentWeights

READABLE_TOK_S = 5.0  # about the pace of reading: below it, fewer bits are worth their loss


@dataclass(frozen=True)
class Candidate:
    """A way to store a model.

    title           for people: "4 bits"
    block           how an expert is stored, the most frequent kind
    slot_bytes      of the largest block; block_bytes of the average one
    resident_bytes  memory of everything that is not a routed expert
    is_rounded      whether any weight is quantized
    """

    title: str
    block: BlockGeometry
    slot_bytes: int
    block_bytes: int
    resident_bytes: int
    scheme_of: SchemeOf
    is_rounded: bool

    @classmethod
    def of_pack(cls, pack: Pack) -> Candidate:
        """As a pack stores it."""
        layers = range(pack.manifest.shape.num_hidden_layers)
        geometries = [pack.geometry(layer) for layer in layers]
        blocks = [geometry.block(expert) for geometry in geometries for expert in range(geometry.num_experts)]
        kinds = {block: blocks.count(block) for block in dict.fromkeys(blocks)}
        usual = max(kinds, key=lambda block: kinds[block])
        bits = sorted({matrix.scheme.bits for block in kinds for _, matrix in block.matrices}, reverse=True)
        return cls(
            title=f"{'/'.join(map(str, bits))} bits",
            block=usual,
            slot_bytes=max(block.block_stride for block in kinds),
            block_bytes=sum(block.block_stride * count for block, count in kinds.items()) // len(blocks),
            resident_bytes=ResidentWeights.size_bytes(pack),
            scheme_of=pack_schemes(pack),
            is_rounded=is_rounded(pack),
        )

    @classmethod
    def of_schemes(cls, title: str, a: Architecture, block: BlockGeometry, scheme_of: SchemeOf) -> Candidate:
        """As it would be stored."""
        resident, schemes = 0, [matrix.scheme for _, matrix in block.matrices]
        for name, shape in resident_shapes(a, mtp_layers=0).items():
            scheme = scheme_of(name.removesuffix(".weight")) if name.endswith(".weight") and len(shape) == 2 else None
            rows, columns = (1, *shape)[-2:] if len(shape) < 3 else (shape[0] * shape[1], shape[2])
            schemes.append(scheme or Scheme(UNQUANTIZED_BITS, None))
            matrix = MatrixGeometry(rows, columns, schemes[-1])
            resident += align_up(matrix.payload_bytes, SECTION_ALIGNMENT)
        rounded = any(scheme.is_quantized for scheme in schemes)
        return cls(title, block, block.block_stride, block.block_stride, resident, scheme_of, rounded)

    def cache_dtype(self, usual: torch.dtype) -> torch.dtype:
        """Of keys and values, where they are usually of some type: what is not rounded anywhere is run exactly."""
        return usual if self.is_rounded else torch.float32


@dataclass(frozen=True)
class Machine:
    """What of a machine decides.

    memory_gb_s     reading memory with all threads
    arithmetic      candidate's title -> its costs here
    disk            of the chosen method and queue depth, without reading ahead
    settings        how to read
    process_bytes   memory of the process before anything is loaded
    cache_dtype     of keys and values, where weights are rounded
    """

    memory_gb_s: float
    arithmetic: dict[str, Arithmetic]
    disk: Disk
    settings: ReadSettings
    process_bytes: int
    cache_dtype: torch.dtype


@dataclass(frozen=True)
class Workload:
    """What is asked of it.

    context    positions to hold memory for
    hit_rate   stated; None takes the trace, or the least that a cache can do
    """

    prompt_tokens: int = 512
    context: int = 4096
    hit_rate: float | None = None
    trace: Trace | None = None


@dataclass(frozen=True)
class Row:
    """One candidate in one budget; refusal says why it does not fit, and then there is no prediction."""

    title: str
    budget_bytes: int
    memory: MemoryPlan | None = None
    prediction: Prediction | None = None
    num_blocks: int = 0
    reads_ahead: bool = False
    refusal: str | None = None


def forecast(
    a: Architecture, candidates: Sequence[Candidate], budgets: Iterable[int], machine: Machine, work: Workload
) -> list[Row]:
    """A row for each candidate and budget, in this order. Raises UsageError if the trace is of another model."""
    if work.trace and (work.trace.num_hidden_layers, work.trace.num_experts) != (a.num_hidden_layers, a.num_experts):
        found = f"{work.trace.num_hidden_layers} layers of {work.trace.num_experts} experts"
        raise UsageError(f"the trace is of {found}, the model has {a.num_hidden_layers} of {a.num_experts}")
    budgets = list(budgets)
    return [_forecast_one(a, candidate, budget, machine, work) for candidate in candidates for budget in budgets]


def check_budgets(
    a: Architecture,
    candidates: Sequence[Candidate],
    budgets: Sequence[int],
    process_bytes: int,
    context: int,
    cache_dtype: torch.dtype,
) -> None:
    """Raise MemoryBudgetError with the numbers if no candidate fits any budget: known before anything is measured."""
    least = min(candidates, key=lambda one: (one.slot_bytes, one.resident_bytes))
    try:
        _split(a, least, max(budgets), context, process_bytes, cache_dtype)
    except MemoryBudgetError as error:
        raise MemoryBudgetError(f"{least.title}: {error}") from None


def _forecast_one(a: Architecture, candidate: Candidate, budget: int, machine: Machine, work: Workload) -> Row:
    try:
        memory = _split(a, candidate, budget, work.context, machine.process_bytes, machine.cache_dtype)
    except MemoryBudgetError as error:
        return Row(candidate.title, budget, refusal=str(error))
    model = ModelSizes(a.num_hidden_layers, a.num_experts, a.num_experts_per_tok, candidate.block_bytes)
    hit_rate = _hit_rate(model, memory.num_slots, work)
    predictions = {
        hints: predict(
            model,
            machine.arithmetic[candidate.title],
            replace(machine.disk, max_hints=hints, hints_at_once=HINTS_AT_ONCE),
            hit_rate=hit_rate,
            num_slots=memory.num_slots,
            prefill_chunk=memory.prefill_chunk,
            prompt_tokens=work.prompt_tokens,
            recall=_recall(work),
        )
        for hints in (0, MAX_HINTS)
    }
    best = max(predictions, key=lambda hints: predictions[hints].decode_tok_s)  # of equals the first: none
    return Row(candidate.title, budget, memory, predictions[best], model.num_blocks, reads_ahead=best > 0)


def _split(
    a: Architecture, one: Candidate, budget: int, context: int, process_bytes: int, cache_dtype: torch.dtype
) -> MemoryPlan:
    sizes = (process_bytes, one.resident_bytes, one.slot_bytes)
    return split_budget(a, budget, context, *sizes, cache_dtype=one.cache_dtype(cache_dtype))


def _hit_rate(model: ModelSizes, num_slots: int, work: Workload) -> float:
    if work.hit_rate is not None:
        return work.hit_rate if num_slots < model.num_blocks else 1.0
    if work.trace and num_slots < model.num_blocks:
        # Of its second half: in the first, memory fills, and experts are met that have not been used before.
        found = replay(work.trace, LeastRecentlyUsed(), num_slots, work.trace.num_tokens // 2).hit_rate
        if found is not None:
            return found
    return uniform_hit_rate(model, num_slots)


def _recall(work: Workload) -> float:
    """Share of what is read ahead that is then asked for: the trace's own, else that of its guesses, else the usual."""
    found = measure_recall(work.trace) if work.trace else {}
    return found.get("read_ahead") or found.get("next_layer_guess") or LOOKAHEAD_RECALL


def recommend(rows: Sequence[Row]) -> Row | None:
    """The row to choose: the first candidate that reaches the pace of reading, in its best budget; else the fastest.

    Candidates come with the most bits first: fewer bits cost quality, and are worth it only where more are too slow.
    """
    fitting = [row for row in rows if row.prediction]
    for title in dict.fromkeys(row.title for row in fitting):
        best = _fastest(row for row in fitting if row.title == title)
        if best.prediction and best.prediction.decode_tok_s >= READABLE_TOK_S:
            return best
    return _fastest(fitting) if fitting else None


def _fastest(rows: Iterable[Row]) -> Row:
    return max(rows, key=lambda row: row.prediction.decode_tok_s if row.prediction else 0.0)


def list_facts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for JSON."""
    return [_list_row(row) for row in rows]


def _list_row(row: Row) -> dict[str, Any]:
    facts: dict[str, Any] = {"experts": row.title, "memory_bytes": row.budget_bytes, "refusal": row.refusal}
    if row.memory and row.prediction:
        facts |= {"slots": row.memory.num_slots, "all_experts": row.num_blocks, "used_bytes": row.memory.total_bytes}
        facts |= {**vars(row.prediction), "reads_ahead": row.reads_ahead, "bound_by": bound_of(row.prediction)}
    return facts


def bound_of(prediction: Prediction) -> str:
    """What a faster one of would help most."""
    return "disk" if prediction.disk_share > prediction.compute_share else "memory and cores"
