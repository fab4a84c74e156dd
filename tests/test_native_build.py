"""The native core compiles where it cannot run here."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from native_core_build import NATIVE, read_setup


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(path.name for path in NATIVE.glob("*.cpp")))
def test_every_file_compiles_for_arm64(source: str) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("needs a compiler for arm64: Debian's g++-aarch64-linux-gnu")
    target = ["-march=armv8.2-a+dotprod"] if source == "isa_neon.cpp" else []
    flags = [*read_setup()["ext_modules"][0].extra_compile_args, "-Werror", "-O1", *target]
    subprocess.run([compiler, *flags, "-c", NATIVE / source, "-o", os.devnull], check=True)
