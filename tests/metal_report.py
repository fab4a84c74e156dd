"""Run every Metal kernel against its reference on this Mac's GPU, then the demo model's tokens, and print a report.

    make test-metal

What Linux cannot show: that Apple's compiler takes the text, that the GPU's results are right, that torch's bindings
are what the host expects. Exits 0 if all of it holds. The report is meant to be posted as it is.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
KERNEL_TESTS = ("test_metal_matrices.py", "test_metal_token.py", "test_metal_prefill.py")
NEEDS = "make test-metal needs a Mac with Apple silicon, macOS 14 or newer, and torch 2.13 or newer"
NUM_TOKENS = 48


class Tally:
    """Counts the results of each test, and keeps the first complaint."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.complaints: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        name = report.nodeid.split("::")[1].split("[")[0]
        self.counts.setdefault(name, Counter())[report.outcome] += 1
        if report.failed:
            self.complaints.setdefault(name, str(report.longrepr).strip().splitlines()[-1])


def main() -> int:
    if sys.platform != "darwin" or platform.machine() != "arm64":
        print(f"{NEEDS}: this is {platform.system()} on {platform.machine()}.", file=sys.stderr)
        print("Here the same kernels run on the CPU executor: make test, and make test-slow.", file=sys.stderr)
        return 1
    os.environ["MOEPACK_KERNELS"] = "metal"
    print_machine()
    compiled = compile_all()
    tally = Tally()
    kernels = pytest.main(["-q", "-m", "not slow", *(str(TESTS / name) for name in KERNEL_TESTS)], plugins=[tally])
    print("\n## Kernels against the reference\n")
    for name, counts in tally.counts.items():
        print(f"{name:45} {counts['passed']:4} right {counts['failed']:4} wrong  {tally.complaints.get(name, '')}")
    tokens = compare_tokens()
    good = compiled and kernels == 0 and tokens
    print(f"\n## {'All of it holds' if good else 'Not all of it holds: please report this output'}")
    return 0 if good else 1


def print_machine() -> None:
    import torch

    chip = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    print(f"# moepack on Metal: {chip}, macOS {platform.mac_ver()[0]}, torch {torch.__version__}, {revision.strip()}\n")


def compile_all() -> bool:
    """Hand every file to Apple's compiler; print what it says, and the threads that each kernel may have."""
    import torch

    from moepack.kernels import msl

    print("## Apple's compiler\n")
    good = True
    for name in msl.list_files():
        source = msl.load(name)
        try:
            library = torch.mps.compile_shader(source.text)
        except RuntimeError as error:
            good = False
            print(f"{name}.metal does not compile:\n{error}")
            continue
        for kernel in source.kernels.values():
            most = getattr(library, kernel.name).max_threads_per_threadgroup
            note = "" if most >= kernel.max_threads else f"  fewer than the {kernel.max_threads} it was written for"
            good = good and not note
            print(f"{name}.metal: {kernel.name}: up to {most} threads{note}")
    print()
    return good


def compare_tokens() -> bool:
    """Greedy tokens of the demo model on the GPU and on the processor, both in float32, resident and streamed."""
    import tempfile

    from conftest import DEMO, make_pack
    from moepack.runtime import Engine, SamplingParams

    print("\n## Tokens of the demo model\n")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        pack = make_pack(DEMO, Path(folder) / "pack", bits=4, group_size=64)
        sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        token_ids = list(range(1, 20))
        expected = list(Engine.open(pack, device="cpu", exact=True).generate(token_ids, sampling))
        for device in ("metal", "metal-emulated"):
            found = list(Engine.open(pack, device=device, exact=True).generate(token_ids, sampling))
            same = sum(a == b for a, b in zip(found, expected))
            good = good and found == expected
            print(f"{device}: {same} of {len(expected)} tokens are those of the processor")
    return good


if __name__ == "__main__":
    sys.exit(main())
