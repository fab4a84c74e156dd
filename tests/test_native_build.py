"""The native core compiles where it cannot run here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parent.parent / "kernels" / "native"
FLAGS = ("-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi", "-Werror")


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(path.name for path in NATIVE.glob("*.cpp")))
def test_every_file_compiles_for_arm64(source: str) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("needs a compiler for arm64: Debian's g++-aarch64-linux-gnu")
    target = ["-march=armv8.2-a+dotprod"] if source == "isa_neon.cpp" else []
    ignored = ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]  # as setup.py
    subprocess.run([compiler, *FLAGS, *ignored, *target, "-O1", "-c", NATIVE / source, "-o", os.devnull], check=True)
