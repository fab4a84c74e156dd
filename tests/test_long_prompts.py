"""Prompts of 32,768 tokens hold the memory budget: by peak RSS, in a control group, and under a limit of the process.

The model is the smallest in which everything that grows with the prompt is there: keys and values, many chunks, experts
that are larger than what is left for them.
"""

from __future__ import annotations

import json
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest

from conftest import ROOT, make_pack
from tiny_checkpoint import TinyModel, write_checkpoint

MIB = 2**20
TOKENS = 32_768
SPARE_MIB = 32  # above the smallest budget: a chunk of prefill that is longer, and some more of the experts
MODEL = TinyModel(hidden=256, experts=64, experts_per_tok=2, moe_intermediate=256, max_positions=TOKENS + 64)

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def generate(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """moe-run generate on the prompt; before(): in the process, first."""
    folder = tmp_path_factory.mktemp("long")
    pack = make_pack(write_checkpoint(folder / "source", MODEL), folder / "pack", bits=8)
    chance = random.Random(1)
    (folder / "ids.json").write_text(json.dumps([chance.randrange(256) for _ in range(TOKENS)]))
    arguments = ["generate", pack, "--token-ids", folder / "ids.json", "--max-tokens", 8, "--temperature", 0]
    program = [sys.executable, "-c", "from moepack.runtime.cli import main; main()"]
    common = [*program, *map(str, arguments), "--ignore-eos", "--json", "--threads", "2"]

    def run(*options: object, wrap: Callable[[list[str]], list[str]] = list, before: Callable[[], None] | None = None):  # type: ignore[no-untyped-def]
        command = wrap([*common, *map(str, options)])
        return subprocess.run(command, capture_output=True, text=True, timeout=600, preexec_fn=before)

    return run


@pytest.fixture(scope="module")
def least_mib(generate: Run) -> int:
    """The smallest budget, as the refusal of a smaller one names it; a process's own part varies a little."""
    refused = generate("--memory", "1MiB")
    assert refused.returncode == 1
    needed = re.search(rf"([\d,]+) MiB are needed .* state for {TOKENS + 8} positions", refused.stderr)
    assert needed, refused.stderr
    return int(needed[1].replace(",", "")) + 4


@pytest.fixture(scope="module")
def answer(generate: Run) -> list[int]:
    """What is answered with memory for everything."""
    return json.loads(generate("--memory", "4GiB").stdout)["token_ids"]


def check(ended: subprocess.CompletedProcess[str], answer: list[int]) -> dict:
    """The statistics of a run that gave the answer within its budget."""
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    assert found["token_ids"] == answer
    stats = found["stats"]
    assert stats["prompt_tokens"] == TOKENS
    assert stats["peak_rss_bytes"] <= stats["memory_budget_bytes"]
    return stats


def test_the_budget_is_held_and_nothing_less_is_tried(generate: Run, least_mib: int, answer: list[int]) -> None:
    stats = check(generate("--memory", f"{least_mib + SPARE_MIB}MiB"), answer)
    assert stats["memory_budget_bytes"] == (least_mib + SPARE_MIB) * MIB
    assert stats["bytes_read"] > 64 * 4 * 3 * MODEL.hidden * MODEL.moe_intermediate * 2  # more than once each
    refused = generate("--memory", f"{least_mib - 16}MiB")
    assert refused.returncode == 1
    assert f"memory budget of {least_mib - 16} MiB is too small" in refused.stderr
    assert refused.stdout == ""


def test_the_budget_is_enough_as_a_control_group(generate: Run, least_mib: int, answer: list[int]) -> None:
    """The system itself ends what takes more. Pages of files count there, and are given back."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from memory_cap import CannotCap, MemoryCap

    budget = (least_mib + SPARE_MIB) * MIB
    try:
        with MemoryCap(budget) as cap:
            check(generate("--memory", budget, wrap=cap.command), answer)
            assert 0 < cap.peak_bytes() <= budget
    except CannotCap as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_a_run_without_a_budget_fits_a_limit_of_the_process(generate: Run, answer: list[int], kind: str) -> None:
    limit = {"RLIMIT_DATA": 700 * MIB, "RLIMIT_AS": 3000 * MIB}[kind]
    stats = check(generate(before=lambda: resource.setrlimit(getattr(resource, kind), (limit, limit))), answer)
    assert stats["memory_budget_bytes"] < limit
