"""--memory bounds a conversion whatever the size of the model: fewer workers, the same bytes; or a clear no."""

import json
from dataclasses import replace

import pytest

from convert_command import SMALL, files_of, finish, run_convert, start_convert
from moepack.convert.memory import READS_AHEAD, fit_threads, thread_bytes
from moepack.convert.plan import plan_conversion
from moepack.convert.recipe import Recipe
from moepack.layout.errors import MemoryBudgetError
from moepack.layout.process import resident_set_bytes
from tiny_checkpoint import TinyModel, write_checkpoint

GROUP = ("--group-size", 32)
MIB = 2**20


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", SMALL)


def test_a_small_budget_takes_fewer_threads(source, tmp_path):
    plan = plan_conversion(source, tmp_path / "pack", Recipe(4, 32, 8, "minmax"))
    assert fit_threads(plan, 6, 4096 * MIB) == 6 + READS_AHEAD
    spare = resident_set_bytes() + 60 * MIB
    assert fit_threads(plan, 50, spare + 3 * thread_bytes(plan)) in (3, 4)


def test_what_a_thread_needs_does_not_grow_with_the_model(source, tmp_path):
    larger = write_checkpoint(tmp_path / "larger", replace(SMALL, layers=6, experts=12))
    plans = [plan_conversion(path, tmp_path / "pack", Recipe(4, 32, 8, "minmax")) for path in (source, larger)]
    assert thread_bytes(plans[0]) == thread_bytes(plans[1])


def test_a_budget_that_holds_no_expert_is_refused_with_the_numbers(source, tmp_path):
    plan = plan_conversion(source, tmp_path / "pack", Recipe(4, 32, 8, "minmax"))
    with pytest.raises(MemoryBudgetError, match=r"20\.00 MiB is too small: .* give at least \d+\.\d+ MiB"):
        fit_threads(plan, 2, 20 * MIB)
    result = run_convert(source, tmp_path / "pack", *GROUP, "--memory", "20MiB")
    assert (result.code, result.out, len(result.errors)) == (1, "", 1)
    assert run_convert(source, tmp_path / "pack", *GROUP, "--memory", "much").code == 2
    assert run_convert(source, tmp_path / "pack", *GROUP).code == 0


def test_the_process_keeps_its_budget_and_the_bytes_are_the_same(tmp_path):
    """200 MB of source through a process of at most 200 MiB, of which interpreter and numpy take a fifth."""
    model = TinyModel(layers=2, full_attention_interval=2, hidden=512, experts=64, moe_intermediate=512, vision=False)
    source = write_checkpoint(tmp_path / "source", model, mtp_experts="fused")
    reports = []
    for memory, workers in (("200MiB", 8), ("4GiB", 2)):
        arguments = ("--memory", memory, "--workers", workers, "--json")
        result = finish(start_convert(source, tmp_path / memory, *GROUP, *arguments))
        assert (result.code, result.errors) == (0, [])
        reports.append(json.loads(result.out))
    assert reports[0]["peak_rss_bytes"] < 200 * MIB
    assert files_of(tmp_path / "200MiB") == files_of(tmp_path / "4GiB")
    for report in reports:
        assert report["bytes_read"] > 200e6
        assert {"read", "hash", "quantize"} < report["thread_seconds"].keys()
        assert 0.05 < report["rounding"]["gate_proj"]["relative_error"] < 0.15
