"""Runs Metal kernels on the CPU, lane by lane: the proof of their logic where there is no Apple GPU.

A file of kernels is translated (msl.py), compiled with the system's C++ compiler against shim/ at its first use, and
kept by its content. Two ways to run it:

    Executor().run(launch)                      # in this process, tensors in place: --device metal-emulated, tests
    WatchedExecutor("address").run(launch)      # in a process of its own, under AddressSanitizer or ThreadSanitizer

What it shows: results, accesses out of bounds or not aligned, races between lanes that no barrier orders and between
threadgroups, barriers and simdgroup operations that not all lanes reach, threadgroup memory beyond 32 KiB. What it
cannot show: that Apple's compiler takes the text, the order of a simdgroup's sums there, speed, and a threadgroup
barrier that names the wrong memory (here every barrier but mem_none orders all of it).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from moepack.kernels import msl
from moepack.kernels.launches import Launch
from moepack.layout.errors import UsageError

SANITIZERS = {"address": "SIMT_ADDRESS", "thread": "SIMT_THREAD"}
WATCHED = {"address": "address,alignment", "thread": "thread"}  # a GPU reads no vector that is not aligned, x86 may
SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "history_size=4"}
FLAGS = ("-std=c++17", "-fPIC", "-g1", "-w")
NATIVE_FLAGS = ("-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno")


class KernelError(RuntimeError):
    """A kernel did what it must not: the executor or a sanitizer says what."""


class Executor:
    """Kernels in this process. lane_order: 0 ascending, 1 descending, any other a seed of random orders.

    replaced   kernel files by name with another text, for tests of faulty kernels
    """

    def __init__(self, lane_order: int = 0, replaced: Mapping[str, msl.Source] | None = None):
        self.lane_order, self.replaced = lane_order, replaced or {}
        self._libraries: dict[str, ctypes.CDLL] = {}
        self.threadgroup_bytes = 0  # of the last launch

    def run(self, launch: Launch) -> None:
        """Run a launch on CPU tensors. Raises KernelTextError for arguments that do not fit, KernelError for faults."""
        source = _check(launch, self.replaced)
        library = self._libraries.get(launch.file)
        if library is None:
            library = self._libraries[launch.file] = load_library(source)
        buffers = [
            torch.frombuffer(bytearray(a), dtype=torch.uint8) if isinstance(a, bytes) else a for a in launch.arguments
        ]
        addresses = (ctypes.c_void_p * len(buffers))(*[buffer.data_ptr() for buffer in buffers])
        grid, group = (ctypes.c_uint * 3)(*launch.grid), (ctypes.c_uint * 3)(*launch.group)
        kernel = ctypes.cast(getattr(library, launch.kernel), ctypes.c_void_p)
        failed = library.simt_launch(kernel, addresses, grid, group, self.lane_order)
        self.threadgroup_bytes = library.simt_threadgroup_bytes()
        if failed:
            raise KernelError(f"{launch.file}.metal: {launch.kernel}: {library.simt_error().decode()}")


class WatchedExecutor:
    """Kernels in a process of their own under a sanitizer: every buffer is a fresh allocation of its exact size.

    sanitizer   address or thread
    """

    def __init__(self, sanitizer: str, lane_order: int = 0, replaced: Mapping[str, msl.Source] | None = None):
        self.sanitizer, self.lane_order, self.replaced = sanitizer, lane_order, replaced or {}

    def run(self, launch: Launch) -> None:
        """As Executor.run. Raises KernelError with the sanitizer's report."""
        source = _check(launch, self.replaced)
        program = _build(source, self.sanitizer)
        raw = [a if isinstance(a, bytes) else _bytes_of(a) for a in launch.arguments]
        with tempfile.TemporaryDirectory() as folder:
            case = Path(folder) / "case"
            numbers = (*launch.grid, *launch.group, self.lane_order, len(raw), *map(len, raw))
            case.write_bytes(struct.pack(f"<{len(numbers)}q", *numbers) + b"".join(raw))
            command = [str(program), launch.kernel, str(case)]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SANITIZER_OPTIONS})
            if done.returncode:
                raise KernelError(f"{launch.file}.metal: {launch.kernel}: {done.stderr or done.returncode}")
            rest = case.read_bytes()[len(numbers) * 8 :]
        for argument, data in zip(launch.arguments, raw):
            if isinstance(argument, torch.Tensor):
                result = torch.frombuffer(bytearray(rest[: len(data)]), dtype=torch.uint8)
                argument.view(-1).view(torch.uint8).copy_(result)
            rest = rest[len(data) :]


def _check(launch: Launch, replaced: Mapping[str, msl.Source]) -> msl.Source:
    """The file of a launch, whose arguments fit its kernel."""
    source = replaced.get(launch.file) or msl.load(launch.file)
    source.kernels[launch.kernel].check(launch.arguments, launch.group)
    return source


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def load_library(source: msl.Source) -> ctypes.CDLL:
    """A file's kernels, compiled, with the functions of shim/simt.h. Raises KernelError if it does not compile."""
    library = ctypes.CDLL(str(_build(source)))
    library.simt_launch.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_uint]
    library.simt_error.restype = ctypes.c_char_p
    library.simt_threadgroup_bytes.restype = ctypes.c_size_t
    return library


def _build(source: msl.Source, sanitizer: str | None = None) -> Path:
    """The compiled file: a shared library, or a program of its own that is watched by a sanitizer."""
    text = msl.translate(source, "cpu")
    executor = _kept(f"executor-{sanitizer or 'plain'}", "", lambda name: _executor_command(name, sanitizer))
    include = ["-I", str(msl.SHIM), str(executor)]
    if sanitizer is None:
        return _kept(source.name, text, lambda name: [*NATIVE_FLAGS, "-shared", *include, f"{name}.cpp", "-o", name])
    # Not for a lane's own variables after their scope: g++ 12 crashes on large kernels when it looks for those.
    watched = [
        f"-fsanitize={WATCHED[sanitizer]}",
        "-fno-sanitize-recover=alignment",
        "-fno-sanitize-address-use-after-scope",
        "-O1",
        "-rdynamic",
        str(msl.SHIM / "run_case.cpp"),
        "-ldl",
    ]
    return _kept(f"{source.name}-{sanitizer}", text, lambda name: [*include, f"{name}.cpp", *watched, "-o", name])


def _executor_command(name: str, sanitizer: str | None) -> list[str]:
    """How to compile the executor itself: never watched, only told to report its switches to a sanitizer."""
    reports = [f"-D{SANITIZERS[sanitizer]}"] if sanitizer else []
    return [*NATIVE_FLAGS, *reports, "-c", str(msl.SHIM / "simt.cpp"), "-o", name]


def _kept(name: str, text: str, command: Callable[[str], list[str]]) -> Path:
    """What the compiler makes of a text by a command, made once: its name in the cache tells all that it depends on."""
    compiler = _compiler()
    shim = [path.read_text(encoding="utf-8") for path in sorted(msl.SHIM.glob("*.*"))]
    machine = (compiler, os.uname().nodename, os.uname().machine)
    digest = hashlib.sha256(repr((text, shim, FLAGS, command(name), machine)).encode()).hexdigest()[:16]
    folder = _cache()
    result = folder / f"{name}-{digest}{'' if text else '.o'}"
    if not result.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            (Path(scratch) / f"{name}.cpp").write_text(text, encoding="utf-8")
            done = subprocess.run([compiler, *FLAGS, *command(name)], cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                raise KernelError(f"{name} does not compile:\n{done.stderr}")
            (Path(scratch) / name).rename(result)  # another process may have been faster: the same replaces the same
    return result


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise UsageError("running Metal kernels on the CPU needs a C++ compiler: install g++, or name one in CXX")
    return compiler


def _cache() -> Path:
    """Where compiled kernels are kept; they can be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "moepack" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
