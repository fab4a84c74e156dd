"""Which backend runs the operations: chosen once, by name, when an engine is opened.

A backend has the functions of reference.py as its own. Nothing outside this folder asks which one it is.

    ops, device = choose_backend("auto")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moepack.kernels import reference
from moepack.kernels.cuda_device import CudaDevice
from moepack.kernels.device import Device
from moepack.kernels.emulated_device import EmulatedDevice
from moepack.kernels.gpu_ops import GpuOps
from moepack.kernels.metal_device import MetalDevice
from moepack.kernels.native_library import count_threads, isa, set_threads
from moepack.kernels.native_ops import NativeOps
from moepack.layout.errors import UsageError

DEVICES = ("cpu", "metal", "cuda", "metal-emulated", "reference")
AUTO_DEVICE = "cpu"
GPU_LOAD_FLOATS, GPU_LOAD_PASSES = 2**26, 4  # 2 GiB of traffic: some milliseconds, like the work beside it
GPUS: dict[str, type[Device]] = {"metal": MetalDevice, "cuda": CudaDevice, "metal-emulated": EmulatedDevice}


def choose_backend(device: str, exact: bool = False, threads: int = 1) -> tuple[Any, str]:
    """The backend for a device and the device's name; "auto" takes the best one here. Raises UsageError.

    device   cpu: the native kernels. metal, cuda: a GPU. metal-emulated: Metal's kernels run by the processor, for
             tests. reference: the operations' definition in plain torch, slow, always exact
    exact    float32 arithmetic throughout
    threads  of the arithmetic, for the whole process
    """
    name = AUTO_DEVICE if device == "auto" else device
    if name not in DEVICES:
        raise UsageError(f"--device {device}: expected auto, {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")
    if name == "reference":
        torch.set_num_threads(threads)
        return reference, name
    if name in GPUS:
        torch.set_num_threads(threads)
        return GpuOps(GPUS[name](), exact), name
    torch.set_num_threads(1)  # what is left to torch is small, and two pools would fight for the cores
    set_threads(threads)
    return NativeOps(exact), name


def device_memory(device: str) -> tuple[int, int] | None:
    """Bytes that this process has taken, and may still take, of a device's own memory; None if it has none."""
    return GPUS[device].memory() if device in GPUS else None


def describe_backend(ops: Any) -> str:
    """A backend's arithmetic, and its instruction set and threads or its GPU, in words."""
    if isinstance(ops, GpuOps):
        return describe_arithmetic(ops)
    threads = torch.get_num_threads() if ops is reference else count_threads()
    return f"{describe_arithmetic(ops)}, {threads} threads"


def describe_arithmetic(ops: Any) -> str:
    """All that decides the bits of a backend's results, in words."""
    if ops is reference:
        return "reference, float32"
    if isinstance(ops, GpuOps):
        return f"float32, {ops.device.name}"
    return f"{'float32' if ops.exact else 'int8 activations'}, {isa()}"


def share_memory_load(work: Callable[[], object]) -> Callable[[], object]:
    """Work of the processor, and meanwhile that of a GPU that shares its memory, if there is one: reading, writing."""
    if not torch.backends.mps.is_available():
        return work
    buffer, begun = torch.zeros(GPU_LOAD_FLOATS, device=MetalDevice.place), torch.mps.Event()

    def both() -> None:
        for _ in range(GPU_LOAD_PASSES):
            buffer.add_(1)
        begun.record()  # commits
        work()
        torch.mps.synchronize()

    return both
