"""The native core compiled in another way than for use: with setup.py's own flags and some more."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "kernels" / "native"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or "c++"


def read_setup() -> dict[str, Any]:
    """What setup.py tells setuptools, without building it."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def compile_core(folder: Path, flags: Sequence[str], native: Path = NATIVE, only: Sequence[str] = ()) -> None:
    """Compile the sources in `native` to objects in a folder, two at a time. only: these files, not all."""
    setup = read_setup()
    common = [*setup["ext_modules"][0].extra_compile_args, "-fPIC", *flags]

    def compile_file(source: Path) -> None:
        own = setup["cmdclass"]["build_ext"].flags_of(source.name)
        command = [COMPILER, *common, *own, "-c", source, "-o", folder / f"{source.stem}.o"]
        subprocess.run(command, check=True, capture_output=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_file, [path for path in native.glob("*.cpp") if not only or path.name in only]))
