"""moe-convert as its tests call it: in this process where that will do, as a program of its own where it is killed.

source = write_checkpoint(tmp_path / "source", SMALL)
result = run_convert(source, out, "--bits", 2)
assert result.code == 0 and files_of(out) == files_of(other)
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import multiprocessing.process
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

from moepack.convert.cli import main
from moepack.layout.verify import list_regions, verify_contents, verify_structure
from tiny_checkpoint import TinyModel

PROGRAM = shutil.which("moe-convert", path=str(Path(sys.executable).parent))
SMALL = TinyModel(layers=2, full_attention_interval=2, experts=3)  # one layer of each kind, and the MTP layer
CALL = "from moepack.convert.cli import main; main()"


class Result(NamedTuple):
    """How a command ended; `err` holds progress and notes too."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if "error" in line.lower() or "Traceback" in line]

    @property
    def notes(self) -> list[str]:
        return [line.removeprefix("note: ") for line in self.err.splitlines() if line.startswith("note: ")]


def run_convert(*arguments: object) -> Result:
    """Run moe-convert in this process; a bug's exception comes through as it is.

    Nothing is flushed to the disk, which no test but that of the flushing can see, and which takes most of the time.
    """
    out, err = io.StringIO(), io.StringIO()
    command = patch.object(sys, "argv", ["moe-convert", *map(str, arguments)])
    unflushed = patch.object(os, "fsync", lambda descriptor: None)
    with command, unflushed, redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main()
    code = end.value.code
    return Result(int(code or 0), out.getvalue(), err.getvalue())


def start_convert(*arguments: object, prelude: str = "") -> subprocess.Popen[str]:
    """Start moe-convert as a process of its own; `prelude` is Python to run in it before anything else."""
    program = [PROGRAM] if PROGRAM and not prelude else [sys.executable, "-c", f"{prelude}\n{CALL}"]
    pipe = subprocess.PIPE
    return subprocess.Popen([*program, *map(str, arguments)], stdout=pipe, stderr=pipe, text=True)


def convert_in_fork(*arguments: object) -> multiprocessing.process.BaseProcess:
    """Start moe-convert as a process of its own without the price of its imports: forked off a server that has them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moepack.convert.cli"])
    process = context.Process(target=_run_silently, args=tuple(map(str, arguments)), daemon=True)
    process.start()
    return process


def _run_silently(*arguments: str) -> None:
    sys.argv = ["moe-convert", *arguments]
    with open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        main()


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a process to end."""
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def files_of(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory by its path in it; folders, with a slash, so that none strays."""
    return {
        str(path.relative_to(directory)) + "/" * path.is_dir(): ""
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
    }


def problems_of(pack: Path) -> list[str]:
    """What verification finds wrong with a pack, every byte read."""
    opened, problems = verify_structure(pack)
    with opened:
        return [problem.text for problem in (*problems, *verify_contents(opened, list_regions(opened), workers=1))]
