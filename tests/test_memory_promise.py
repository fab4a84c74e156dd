"""What a run takes when nobody says: no more than control groups of either version, and ulimit, leave.

And what the refusal of too small a budget says: what is needed, and for what.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import DEMO
from moepack.kernels.batch import BatchSizes
from moepack.layout.architecture import Architecture
from moepack.layout.errors import MemoryBudgetError
from moepack.runtime import memory

MODEL = Architecture.from_config(json.loads((DEMO / "config.json").read_text())["text_config"])


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc/self and a /sys/fs/cgroup of the test's own."""
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "proc")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "groups")
    (tmp_path / "proc").mkdir()
    return tmp_path


def write_group(folder: Path, values: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name).write_text(value + "\n")


def test_a_limit_of_control_groups_version_1_counts(system: Path) -> None:
    (system / "proc" / "cgroup").write_text("5:cpu,cpuacct:/a\n4:memory:/a/b\n0::/\n")
    unlimited = {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "1000"}
    write_group(system / "groups" / "memory" / "a" / "b", unlimited)
    write_group(system / "groups" / "memory" / "a", {
        "memory.limit_in_bytes": "50000000", "memory.usage_in_bytes": "30000000",
        "memory.stat": "cache 9\ninactive_file 1\ntotal_inactive_file 4000000",
    })  # fmt: skip
    assert memory.available_bytes() == 24_000_000


def test_a_limit_of_control_groups_version_2_counts(system: Path) -> None:
    (system / "proc" / "cgroup").write_text("0::/a/b\n")
    write_group(system / "groups" / "a" / "b", {"memory.max": "max", "memory.current": "5"})
    write_group(system / "groups" / "a", {
        "memory.max": "50000000", "memory.current": "30000000", "memory.stat": "inactive_file 4000000",
    })  # fmt: skip
    assert memory.available_bytes() == 24_000_000


def test_a_limit_of_the_process_counts(system: Path) -> None:
    (system / "proc" / "status").write_text("Name:\tx\nVmSize:\t   2000 kB\nVmData:\t   1000 kB\n")
    script = f"""
import resource
from pathlib import Path
from moepack.runtime import memory
memory.PROCESS = Path({str(system / "proc")!r})
resource.setrlimit(resource.RLIMIT_DATA, (600 * 2**20, -1))
print(memory.available_bytes())
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(found.stdout) == 600 * 2**20 - 1000 * 1024


@pytest.mark.parametrize("snapshots", [None, 0, 5 * 2**20])
@pytest.mark.parametrize("process_bytes", [358 * 2**20, 358 * 2**20 + 1, 2**29 - 1])
def test_a_refusal_names_a_budget_that_is_enough(snapshots: int | None, process_bytes: int) -> None:
    """In whole MiB, with the snapshots' share of that very budget; the next process may take a little more."""
    sizes = (10 * 2**20, 4096, snapshots)
    with pytest.raises(MemoryBudgetError) as refused:
        memory.split_budget(MODEL, 300 * 2**20, 2048, process_bytes, *sizes)
    needed = re.search(r"([\d,]+) MiB are needed", str(refused.value))
    assert needed
    budget = int(needed[1].replace(",", "")) * 2**20
    plan = memory.split_budget(MODEL, budget, 2048, process_bytes + 2**20, *sizes)
    assert plan.total_bytes <= budget
    assert plan.snapshot_bytes == (budget // 10 if snapshots is None else snapshots)
    with pytest.raises(MemoryBudgetError):
        memory.split_budget(MODEL, budget - 4 * 2**20, 2048, process_bytes, *sizes)


def test_a_refusal_names_the_options_that_take_the_memory() -> None:
    common = (MODEL, 2**30, 2048, 2**28, 2**20, 4096)
    with pytest.raises(MemoryBudgetError, match=r"state for 2048 .* snapshots 5,120\): .* lower --snapshot-memory, sh"):
        memory.split_budget(*common, snapshot_bytes=5 * 2**30)
    with pytest.raises(MemoryBudgetError, match=r"4096 states \(--parallel\) for 2048 .*, lower --parallel, shorten"):
        memory.split_budget(*common, sequences=4096)
    with pytest.raises(MemoryBudgetError) as refused:
        memory.split_budget(MODEL, 2**28, 2048, 2**28, 2**20, 4096)
    assert "--snapshot" not in str(refused.value)
    assert "--parallel" not in str(refused.value)


def test_what_there_is_not_limits_nothing(system: Path) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.available_bytes() <= total


def test_a_longer_chunk_never_costs_a_place_in_memory_for_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they fit beside one of 512 tokens: then nothing is read twice."""

    def plan(budget_mib: int) -> memory.MemoryPlan:
        return memory.split_budget(MODEL, budget_mib * 2**20, 8192, 2**28, 10 * 2**20, 4 * 2**20)

    budgets, most = range(1700, 2500, 4), MODEL.num_hidden_layers * MODEL.num_experts
    with monkeypatch.context() as patch:
        patch.setattr(memory, "PREFILL_CHUNKS", (512, 64))
        patch.setattr(memory, "RESIDENT_CHUNKS", (512,))
        fitting = {budget for budget in budgets if plan(budget).num_slots == most and plan(budget).prefill_chunk == 512}
    assert 0 < len(fitting) < len(budgets)
    assert fitting == {budget for budget in budgets if plan(budget).num_slots == most}
    assert {4096} < {plan(budget).prefill_chunk for budget in fitting} <= set(memory.RESIDENT_CHUNKS)


def test_no_chunk_is_longer_than_a_prompt_can_be() -> None:
    for context in (1, 64, 65, 1000, 2056):
        plan = memory.split_budget(MODEL, 2**34, context, 2**28, 10 * 2**20, 4096)
        assert plan.prefill_chunk == -(-context // 64) * 64
        assert plan.scratch_bytes == memory.scratch_bytes(MODEL, plan.prefill_chunk)


def test_a_longer_chunk_is_worth_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU, whose batches are large: half or a quarter of them where a budget is tight, never less."""
    whole = BatchSizes(8192, 2048)

    def plan(budget_mib: int, shares: tuple[int, ...]) -> memory.MemoryPlan:
        monkeypatch.setattr(memory, "BATCH_SHARES", shares)
        sizes = (10 * 2**20, 4 * 2**20, 0)
        return memory.split_budget(MODEL, budget_mib * 2**20, 8192, 2**28, *sizes, batch=whole)

    pairs = [(plan(budget, (1,)), plan(budget, (1, 2, 4))) for budget in range(600, 4000, 10)]
    assert {fixed.batch for fixed, _ in pairs} == {whole}
    assert {fitted.batch for _, fitted in pairs} == {whole, (4096, 1024), (2048, 512)}
    for fixed, fitted in pairs:
        assert fitted.total_bytes <= fitted.budget_bytes
        assert fitted.scratch_bytes == memory.scratch_bytes(MODEL, fitted.prefill_chunk, fitted.batch)
        assert fitted.prefill_chunk >= fixed.prefill_chunk
        if fitted.prefill_chunk == fixed.prefill_chunk:
            assert fitted.batch == whole
        if fixed.num_slots == MODEL.num_hidden_layers * MODEL.num_experts:
            assert fitted == fixed
    assert BatchSizes(512, 256).divided(4) == (512, 256)
