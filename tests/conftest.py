"""Packs that many tests read: made once a session, by the real commands' own code."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

from expert_stores import gate, make_store, pack  # noqa: F401
from kernel_devices import CHOSEN, Runner, default_runner
from moepack.convert.pipeline import convert
from moepack.convert.plan import plan_conversion
from moepack.convert.recipe import Recipe
from moepack.kernels import native_library
from moepack.kernels.simt import Executor, WatchedExecutor
from tiny_checkpoint import write_checkpoint

if TYPE_CHECKING:
    from moepack.runtime.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo" / "checkpoint"

INSTRUCTION_SETS = [name for name in ("amx", "avx512", "avx2", "neon", "portable") if native_library.set_isa(name)]
native_library.set_isa(INSTRUCTION_SETS[0])

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, where what tests start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the suite runs in several processes
# A machine may be busy, and what a run finds the next one must find, too; `make fuzz` is where luck has its place.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


def make_pack(source: Path, out: Path, bits: int = 4, group_size: int = 32, resident_bits: int = 8) -> Path:
    """Convert a checkpoint as moe-convert does."""
    convert(plan_conversion(source, out, Recipe(bits, group_size, resident_bits, "minmax")), 2, lambda count: None)
    return out


def budget_of(engine: Engine, slots: int) -> dict[str, int]:
    """Options that give another engine of the same pack so many slots."""
    plan = engine.memory_plan
    memory = plan.total_bytes - (plan.num_slots - slots) * plan.slot_bytes
    return {"memory": memory, "process_bytes": plan.process_bytes, "max_context": engine.max_context}


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default tiny checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "source")


@pytest.fixture(scope="session")
def tiny_pack(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit pack of it, its blocks no whole number of pages. Not to be changed."""
    return make_pack(tiny_source, tmp_path_factory.mktemp("tiny_pack") / "pack")


@pytest.fixture(scope="session")
def demo_pack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Packs of the demo model by bits; 16 is bf16 throughout, the others have 8-bit resident weights."""
    folder = tmp_path_factory.mktemp("demo")

    def pack_of(bits: int) -> Path:
        out = folder / f"demo{bits}"
        return out if out.exists() else make_pack(DEMO, out, bits, 64, 16 if bits == 16 else 8)

    return pack_of


@pytest.fixture
def tiny_copy(tiny_pack: Path, tmp_path: Path) -> Path:
    """A tiny pack of the test's own, to be damaged."""
    return Path(shutil.copytree(tiny_pack, tmp_path / "pack"))


RUNNERS = [
    pytest.param((Executor, 0), id="ascending"),
    pytest.param((Executor, 1), id="descending"),
    pytest.param((Executor, 7), id="shuffled"),
    pytest.param((WatchedExecutor, "address"), id="address", marks=pytest.mark.slow),
    pytest.param((WatchedExecutor, "thread"), id="thread", marks=pytest.mark.slow),
    pytest.param((WatchedExecutor, "thread", 7), id="thread-shuffled", marks=pytest.mark.slow),  # some copies early
]


@pytest.fixture(params=[pytest.param(None, id=CHOSEN)] if CHOSEN else RUNNERS)
def executor(request: pytest.FixtureRequest) -> Runner:
    """What runs a Metal kernel: lanes in three orders, and two sanitizers; or the GPU that was chosen."""
    if request.param is None:
        return default_runner()
    kind, *arguments = request.param
    return kind(*arguments)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the native core that this processor has, one after the other."""
    assert native_library.set_isa(request.param)
    yield request.param
    native_library.set_isa(INSTRUCTION_SETS[0])


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Numbers of threads of the native core."""
    before = native_library.count_threads()
    native_library.set_threads(request.param)
    yield request.param
    native_library.set_threads(before)
