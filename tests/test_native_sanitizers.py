"""The native core under sanitizers, built with the flags that it always has.

AddressSanitizer and UndefinedBehaviorSanitizer watch the tests of the operations: every instruction set here, odd
sizes, buffers that end where a matrix ends. ThreadSanitizer watches native_threads.cpp: every operation that shares
work, on 1 to 4 threads, bit for bit. Each has faults that it must notice, or it proves nothing.

    .venv/bin/pytest -m slow tests/test_native_sanitizers.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import INSTRUCTION_SETS
from native_core_build import COMPILER, NATIVE, compile_core

TESTS = Path(__file__).resolve().parent
WATCHED = ("test_native_matrices.py", "test_native_floats.py", "test_native_quantize.py", "test_native_hash.py")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1 die_after_fork=0",  # a child of threads starts threads: that is what is tested
}
USE_LIBRARY = (
    "from pathlib import Path; from moepack.kernels import native_library as n; n.LIBRARY = Path({library!r});"
)
# A matrix that claims a row more than it has, and one whose description is at an odd address.
ROW_TOO_MANY = """
import dataclasses, torch
from moepack.kernels.matrix import Matrix
from moepack.kernels.native_ops import NativeOps
matrix = dataclasses.replace(Matrix.from_floats(torch.zeros(33, 512)), out_features=34)
NativeOps().linear(torch.zeros(1, 512), matrix)
"""
ODD_ADDRESS = """
import ctypes, torch
from moepack.kernels.native_matrix import _Matrix
memory = ctypes.create_string_buffer(ctypes.sizeof(_Matrix) + 1)
place = ctypes.addressof(memory) | 1
n.declare("embed", n.ADDRESS, n.ADDRESS, n.ADDRESS, n.INT)(0, place, torch.zeros(1, dtype=torch.int64).data_ptr(), 1)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or "g++" not in COMPILER, reason="needs Linux and g++'s sanitizers"),
]


# Memory and undefined behaviour


@pytest.fixture(scope="module")
def run_watched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run Python on the library under AddressSanitizer and UndefinedBehaviorSanitizer."""
    folder = tmp_path_factory.mktemp("address")
    library, watch = folder / "native_core.so", "-fsanitize=address,undefined"
    compile_core(folder, ["-g1", "-w", watch, "-fno-sanitize-recover=all"])
    subprocess.run([COMPILER, "-shared", "-pthread", watch, *folder.glob("*.o"), "-o", library], check=True)
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": ":".join(one.stdout.strip() for one in found)}

    def run(script: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", USE_LIBRARY.format(library=str(library)) + script]
        return subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)

    return run


def test_no_operation_leaves_its_memory(run_watched: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    arguments = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-m", "not slow", *WATCHED]  # -s: the report is on stderr
    ended = run_watched(f"import pytest, sys; sys.exit(pytest.main({arguments!r}))")
    assert ended.returncode == 0, ended.stdout[-500:] + ended.stderr[:5000]
    assert " passed" in ended.stdout


@pytest.mark.parametrize(
    ("fault", "complaint"), [(ROW_TOO_MANY, "heap-buffer-overflow"), (ODD_ADDRESS, "misaligned address")]
)
def test_memory_faults_are_noticed(
    run_watched: Callable[[str], subprocess.CompletedProcess[str]], fault: str, complaint: str
) -> None:
    ended = run_watched(fault)
    assert ended.returncode != 0
    assert complaint in ended.stderr


# Threads


WATCH = "-fsanitize=thread"
# The instruction sets differ in what a part computes, not in how parts are shared; the portable one takes minutes here.
FAST_SETS = [name for name in INSTRUCTION_SETS if name != "portable"] or INSTRUCTION_SETS


@pytest.fixture(scope="module")
def watched_objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core and native_threads.cpp, compiled for ThreadSanitizer."""
    folder = tmp_path_factory.mktemp("thread")
    compile_core(folder, ["-g1", "-w", WATCH])
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-g1",
        WATCH,
        "-pthread",
        "-I",
        NATIVE,
        "-c",
        TESTS / "native_threads.cpp",
    ]
    subprocess.run([*command, "-o", folder / "native_threads.o"], check=True)
    return folder


def run_threads(objects: Path, isa: str) -> subprocess.CompletedProcess[str]:
    """Link the driver and run it with an instruction set."""
    program = objects / "threads"
    subprocess.run([COMPILER, WATCH, "-pthread", *objects.glob("*.o"), "-o", program], check=True)
    environment = {**os.environ, **OPTIONS}
    return subprocess.run([program, isa], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("isa_name", FAST_SETS)
def test_threads_share_work_without_a_race(watched_objects: Path, isa_name: str) -> None:
    ended = run_threads(watched_objects, isa_name)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-6000:]
    assert " results" in ended.stdout


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        # What a worker has written is not released to the caller; the work is not released to a worker.
        ("pool.cpp", "gate_.fetch_sub(1);", "gate_.fetch_sub(1, std::memory_order_relaxed);"),
        ("pool.cpp", "gate_.fetch_add(ROUND | OPEN);", "gate_.fetch_add(ROUND | OPEN, std::memory_order_relaxed);"),
        # A worker may look whether the pool ends while another thread says so.
        ("pool.h", "std::atomic<bool> stopping_{false};", "bool stopping_ = false;"),
        # A row too many; down begins before gate and up have ended.
        ("pool.h", "body(begin, end);\n", "body(begin, std::min(end + 1, count));\n"),
        ("matrix_ops.cpp", "return p.unfinished.load() == READY;", "return p.unfinished.load() <= 1;"),
    ],
    ids=["results", "work", "end", "row", "expert"],
)
def test_races_are_noticed(watched_objects: Path, tmp_path: Path, name: str, right: str, wrong: str) -> None:
    objects, native = tmp_path / "objects", tmp_path / "native"
    shutil.copytree(watched_objects, objects)
    shutil.copytree(NATIVE, native)
    text = (native / name).read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{right} is not once in {name}"
    (native / name).write_text(text.replace(right, wrong), encoding="utf-8")
    changed = [path.name for path in native.glob("*.cpp") if name == path.name or f'"{name}"' in path.read_text()]
    compile_core(objects, ["-g1", "-w", WATCH], native, changed)
    ended = run_threads(objects, FAST_SETS[0])
    assert ended.returncode != 0
    assert "data race" in ended.stderr
