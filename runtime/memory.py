"""The memory budget: what must be in memory, what is left for experts, and whether that is enough.

A budget covers the whole process: interpreter and libraries (measured), resident weights, the sequences' states,
scratch of the operations (bounded from the sizes), and the slots that hold experts. It is split once, before
anything large is allocated; nothing allocated later grows beyond its share. Pages of files that the system
caches for us come on top and are given back under pressure.

    plan = plan_memory(pack, architecture, budget_bytes=8 * 2**30, max_positions=4096)
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moepack.kernels import reference
from moepack.kernels.backend import device_memory
from moepack.kernels.batch import BatchSizes
from moepack.layout.architecture import LINEAR, Architecture
from moepack.layout.errors import MemoryBudgetError
from moepack.layout.process import resident_set_bytes
from moepack.layout.reader import Pack
from moepack.runtime.expert_store import largest_block
from moepack.runtime.resident import ResidentWeights
from moepack.runtime.state import FLOAT_BYTES, SequenceState

PREFILL_CHUNKS = (16384, 8192, 4096, 2048, 1024, 512, 256, 128, 64)  # prompt tokens run together: multiples of the last
RESIDENT_CHUNKS = (4096, 2048, 1024, 512)  # where experts are read once, and longer chunks would only be harder to stop
SCRATCH_SHARE = 8  # a chunk may take one part in so many of the memory to spare: a longer one reads experts less often
BATCH = reference.batch  # of the processor; a GPU computes more at a time
BATCH_SHARES = (1, 2, 4)  # a batch may be divided by, for a longer chunk: that saves more than a GPU then lacks in work
SLOT_VIEW_BYTES = 8 * 2**10  # Python's views of the expert in a slot
LOGIT_ELEMENTS = 2**22  # scores that exist at the same time where every position is scored
LOGIT_ROWS = 64  # divides every chunk, so that pieces of scores do not depend on the budget
ALLOCATOR_BYTES = 50 * 2**20  # arenas, thread stacks, fragmentation, Python's tables, the last huge page of the slots
SNAPSHOT_SHARE = 10  # one part in so many of the budget: a state of 16,384 positions of the 35B model fits 8 GiB
VARIATION_BYTES = 2 * 2**20  # of the process from one run to the next, with room: 0.3 MiB in eight starts of a server
PROCESS, CONTROL_GROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")
# Limit, use, and in memory.stat the pages of files that are given back when needed: by version of control groups.
GROUP_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
GROUP_FILES_2 = ("memory.max", "memory.current", "inactive_file")
DEFAULT_SHARE = 0.9  # of what is available, so that a default run never makes the machine swap


@dataclass(frozen=True)
class MemoryPlan:
    """The split of a budget; all in bytes but the last three.

    prefill_chunk   prompt tokens run together, layer by layer
    batch           of them computed at a time
    """

    budget_bytes: int
    process_bytes: int
    resident_bytes: int
    state_bytes: int
    snapshot_bytes: int
    scratch_bytes: int
    slot_bytes: int
    num_slots: int
    prefill_chunk: int
    batch: BatchSizes

    @property
    def total_bytes(self) -> int:
        """What is spoken for, at most the budget."""
        fixed = self.process_bytes + self.resident_bytes + self.state_bytes + self.snapshot_bytes + self.scratch_bytes
        return fixed + self.num_slots * self.slot_bytes


def plan_memory(
    pack: Pack,
    architecture: Architecture,
    budget_bytes: int,
    max_positions: int,
    process_bytes: int | None = None,
    snapshot_bytes: int | None = 0,
    sequences: int = 1,
    cache_dtype: torch.dtype = torch.float32,
    batch: BatchSizes = BATCH,
) -> MemoryPlan:
    """Split a budget. Slots are as many as fit, at most one for every expert.

    process_bytes   what the process takes without this engine; measured if not given
    snapshot_bytes  to set aside for states of earlier prompts; None is a share of the budget
    sequences       states of max_positions at the same time
    cache_dtype     of keys and values
    batch           what the backend computes together, at most

    Raises MemoryBudgetError with the numbers if one token's experts do not fit: with fewer slots than a token
    uses, each expert would be read again for every token.
    """
    process_bytes = resident_set_bytes() if process_bytes is None else process_bytes
    resident, block = ResidentWeights.size_bytes(pack), largest_block(pack)
    kept = (snapshot_bytes, sequences, cache_dtype, batch)
    return split_budget(architecture, budget_bytes, max_positions, process_bytes, resident, block, *kept)


def split_budget(
    architecture: Architecture,
    budget_bytes: int,
    max_positions: int,
    process_bytes: int,
    resident_bytes: int,
    block_bytes: int,
    snapshot_bytes: int | None = 0,
    sequences: int = 1,
    cache_dtype: torch.dtype = torch.float32,
    batch: BatchSizes = BATCH,
) -> MemoryPlan:
    """The same from sizes, for a pack that need not exist: of the resident weights, and of the largest block."""
    resident, slot = resident_bytes, block_bytes + SLOT_VIEW_BYTES
    state = sequences * SequenceState.size_bytes(architecture, max_positions, cache_dtype)
    all_experts = architecture.num_hidden_layers * architecture.num_experts
    one_token = min(all_experts, architecture.num_hidden_layers * architecture.num_experts_per_tok)
    snapshots = budget_bytes // SNAPSHOT_SHARE if snapshot_bytes is None else snapshot_bytes
    kept = state + snapshots
    smallest = scratch_bytes(architecture, PREFILL_CHUNKS[-1], batch)
    least = process_bytes + resident + kept + smallest + one_token * slot
    others = (all_experts - one_token) * slot
    chunk, batch = _choose_chunk(architecture, budget_bytes - least, others, max_positions, batch)
    scratch = scratch_bytes(architecture, chunk, batch)
    fixed = (process_bytes, resident, state, snapshots, scratch)
    num_slots = min(all_experts, (budget_bytes - sum(fixed)) // slot)
    if num_slots < one_token:
        states = "state" if sequences == 1 else f"{sequences} states (--parallel)"
        parts = {
            "process": process_bytes,
            "resident weights": resident,
            f"{states} for {max_positions} positions": state,
            "scratch": scratch,
            f"the {one_token} experts of one token": one_token * slot,
        }
        raise MemoryBudgetError(_describe_refusal(budget_bytes, parts, snapshot_bytes, sequences))
    return MemoryPlan(budget_bytes, *fixed, slot, num_slots, chunk, batch)


def _describe_refusal(budget_bytes: int, parts: dict[str, int], snapshot_bytes: int | None, sequences: int) -> str:
    """Why a budget is too small, and one that is enough: the same command with it is not refused again.

    parts   what is needed beside snapshots
    """
    needed, share, lower = sum(parts.values()) + VARIATION_BYTES, "", ["--parallel"] if sequences > 1 else []
    remedies = ["raise --memory", "shorten the context", "or convert to fewer bits"]
    if snapshot_bytes is None:  # grows with the budget, so it is that of the budget that is named
        snapshot_bytes, share = -(-needed // (SNAPSHOT_SHARE - 1)), f" (1/{SNAPSHOT_SHARE} of --memory)"
    needed += snapshot_bytes
    found = f"{budget_bytes // 2**20:,} MiB"
    if budget_bytes < 2**20:  # seldom meant
        found = f"{budget_bytes:,} bytes (--memory takes a unit, as in 8GiB)"
    listed = [f"{name} {size / 2**20:,.0f}" for name, size in parts.items()]
    if snapshot_bytes:
        listed.append(f"snapshots {snapshot_bytes / 2**20:,.0f}{share}")
        lower.insert(0, "--snapshot-memory")
    if lower:
        remedies.insert(1, f"lower {' or '.join(lower)}")
    return (
        f"memory budget of {found} is too small: {-(-needed // 2**20):,} MiB are needed ({', '.join(listed)}): "
        + ", ".join(remedies)
    )


def is_rounded(pack: Pack) -> bool:
    """Whether any weight of a pack is quantized."""
    tiers = [tier for layer in range(len(pack.manifest.expert_files)) for tier in pack.geometry(layer).tiers]
    is_quantized = any(matrix.scheme.is_quantized for tier in tiers for _, matrix in tier.matrices)
    return is_quantized or bool(pack.manifest.resident.quantized)


def _choose_chunk(
    a: Architecture, spare_bytes: int, other_experts_bytes: int, max_positions: int, batch: BatchSizes
) -> tuple[int, BatchSizes]:
    """The longest chunk that takes little of what is to spare, and the largest batches that fit beside it.

    Where all experts fit beside one of RESIDENT_CHUNKS, it is the longest such chunk with the largest batches: nothing
    is read again then. What a token computes does not depend on either.

    spare_bytes           beyond the least scratch and the experts of one token
    other_experts_bytes   of all the others
    """
    shortest = PREFILL_CHUNKS[-1]
    least = chunk_bytes(a, shortest, batch) + expert_bytes(a, shortest, batch)
    whole = -(-max_positions // shortest) * shortest  # no prompt is longer
    parts = [batch.divided(share) for share in BATCH_SHARES]

    def fits(chunk: int, part: BatchSizes, experts: int = 0) -> bool:
        more = chunk_bytes(a, chunk, part) + expert_bytes(a, chunk, part) - least
        return more <= spare_bytes // SCRATCH_SHARE and more + experts <= spare_bytes

    resident = ((min(chunk, whole), part) for part in parts for chunk in RESIDENT_CHUNKS)
    streamed = ((min(chunk, whole), part) for chunk in PREFILL_CHUNKS for part in parts)
    for chunk, part in resident:
        if fits(chunk, part, other_experts_bytes):
            return chunk, part
    return next(((chunk, part) for chunk, part in streamed if fits(chunk, part)), (shortest, batch))


def scratch_bytes(a: Architecture, chunk: int, batch: BatchSizes = BATCH) -> int:
    """Upper bound of what the operations hold at once beside weights and state, for a chunk of prefill."""
    logits = FLOAT_BYTES * 3 * logit_rows(a) * a.vocab_size
    return chunk_bytes(a, chunk + 1, batch) + expert_bytes(a, chunk, batch) + logits + ALLOCATOR_BYTES


def expert_bytes(a: Architecture, chunk: int, batch: BatchSizes) -> int:
    """What is held for the tokens of experts that are computed together: no more than a chunk has, and one token.

    The shared expert may be among them.
    """
    width = max(a.moe_intermediate_size, a.shared_expert_intermediate_size)
    tokens = min(batch.experts, (chunk + 1) * (a.num_experts_per_tok + 1))
    return FLOAT_BYTES * tokens * (2 * a.hidden_size + 4 * width)


def chunk_bytes(a: Architecture, tokens: int, batch: BatchSizes) -> int:
    """What so many tokens need that are run together, where the most is alive: around the experts or inside a mixer.

    Of the hidden size there are six, and one to spare: the chunk before, which its consumer still has, the embedding,
    the stream, its norm, what the experts give, and the sum.
    """
    mixing = min(tokens, batch.mixer + 1) * _mixer_floats(a)
    choosing = tokens * _choice_floats(a)
    return FLOAT_BYTES * (tokens * 7 * a.hidden_size + max(mixing, choosing))


def _mixer_floats(a: Architecture) -> int:
    delta = 2 * a.conv_dim + 5 * a.linear_value_dim
    attention = 8 * a.num_attention_heads * a.head_dim
    return max(delta if LINEAR in a.layer_types else 0, attention)


def _choice_floats(a: Architecture) -> int:
    return 2 * a.num_experts + 8 * a.num_experts_per_tok


def logit_rows(a: Architecture) -> int:
    """Positions whose scores are computed together: a power of two, so that chunks end where these do."""
    fitting = max(1, min(LOGIT_ROWS, LOGIT_ELEMENTS // a.vocab_size))
    return 1 << fitting.bit_length() - 1


def default_budget_bytes(device: str = "cpu") -> int:
    """What this process may take without making the machine swap: its own pages and most of what is available.

    With a GPU that has memory of its own, all budgets are of that.
    """
    own = device_memory(device)
    return taken_bytes(device) + int(DEFAULT_SHARE * (own[1] if own else available_bytes()))


def taken_bytes(device: str = "cpu", host_bytes: int = 0) -> int:
    """What this process has taken so far of the memory that a budget is of.

    host_bytes   what it will take beside: of the machine's memory, so not counted where a GPU has its own
    """
    own = device_memory(device)
    return own[0] if own else resident_set_bytes() + host_bytes


def available_bytes() -> int:
    """Memory that can be had now: the system's own estimate, or the limit of a control group or process if lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = _read(Path("/proc/meminfo"))
    found = [line.split()[1] for line in meminfo.splitlines() if line.startswith("MemAvailable:")]
    available = int(found[0]) * 1024 if found else total // 2  # elsewhere: half of the memory is a safe start
    return max(0, min([available, *_left_in_control_groups(), *_left_of_limits()]))


def _left_in_control_groups() -> Iterator[int]:
    """What this process's control group and those above it leave, in either version, where the system has any."""
    for line in _read(PROCESS / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CONTROL_GROUPS / "memory" if controllers else CONTROL_GROUPS
        limit_file, used_file, given_back = GROUP_FILES if controllers else GROUP_FILES_2
        own = root / path.strip("/")
        for group in [own, *(parent for parent in own.parents if parent.is_relative_to(root))]:
            limit, used = (_read(group / name).strip() for name in (limit_file, used_file))
            if limit.isdigit() and used.isdigit():
                statistics = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                yield int(limit) - int(used) + int(statistics.get(given_back, 0))


def _left_of_limits() -> Iterator[int]:
    """What this process may still map (ulimit -v, ulimit -d)."""
    status = dict(line.split(":", 1) for line in _read(PROCESS / "status").splitlines())
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and used in status:
            yield soft - 1024 * int(status[used].split()[0])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
