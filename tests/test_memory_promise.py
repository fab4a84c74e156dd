"""--memory as a promise that the system enforces: a long prompt under a control group's limit and under ulimit -d.

And what a run takes when nobody says: no more than such limits leave.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, make_pack
from moepack.runtime import memory
from tiny_checkpoint import TinyModel, write_checkpoint

LONG_PROMPT = 32_768
MIB = 2**20
MOE_RUN = Path(sys.executable).with_name("moe-run")
# More experts than the smallest budget holds, and attention over all of the prompt.
MODEL = TinyModel(hidden=256, experts=64, experts_per_tok=4, moe_intermediate=256, max_positions=LONG_PROMPT + 64)


@pytest.fixture(scope="module")
def long_context_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    return make_pack(write_checkpoint(folder / "source", MODEL), folder / "pack", bits=8)


@pytest.fixture(scope="module")
def long_prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompt") / "ids.json"
    chance = random.Random(0)
    path.write_text(json.dumps([chance.randrange(256) for _ in range(LONG_PROMPT)]))
    return path


def generate(pack: Path, prompt: Path, budget: str, prefix: Sequence[str] = (), **options: Any) -> Any:
    command = [*prefix, str(MOE_RUN), "generate", str(pack), "--token-ids", str(prompt), "--temperature", "0"]
    command += ["--max-tokens", "8", "--ignore-eos", "--memory", budget, "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def smallest_budget_mib(pack: Path, prompt: Path) -> int:
    needed = re.search(r"([\d,]+) MiB are needed", generate(pack, prompt, "1MiB").stderr)
    assert needed
    return int(needed[1].replace(",", "")) + 8  # the process's own size differs a little from run to run


@pytest.mark.slow
def test_a_prompt_of_32k_tokens_stays_within_the_budget(
    long_context_pack: Path, long_prompt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits kill a process, or refuse it memory, that takes more than it was told."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    memory_cap = importlib.import_module("memory_cap")
    mib = smallest_budget_mib(long_context_pack, long_prompt)
    limited = generate(
        long_context_pack, long_prompt, f"{mib}MiB",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (mib * MIB, mib * MIB)),
    )  # fmt: skip
    assert limited.returncode == 0, limited.stderr
    answer = json.loads(limited.stdout)
    stats = answer["stats"]
    assert stats["prompt_tokens"] == LONG_PROMPT
    assert stats["peak_rss_bytes"] <= mib * MIB
    assert stats["expert_misses"] > MODEL.layers * MODEL.experts  # not all of them fit
    try:
        with memory_cap.MemoryCap(mib * MIB) as cap:
            capped = generate(long_context_pack, long_prompt, f"{mib}MiB", cap.command([]))
    except memory_cap.CannotCap as reason:
        pytest.skip(f"the control group's part needs one with a memory limit: {reason}")
    assert capped.returncode == 0, capped.stderr
    assert json.loads(capped.stdout)["token_ids"] == answer["token_ids"]


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


def test_what_there_is_not_limits_nothing(system: Path) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.available_bytes() <= total
