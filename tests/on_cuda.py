"""A pytest plugin: the tests of the Metal kernels, with the same text run by an NVIDIA GPU instead of the CPU executor.

Every buffer is an allocation of its own and of its exact size, so that compute-sanitizer sees what leaves it:

    PYTHONPATH=tests pytest -p on_cuda tests/test_metal_matrices.py tests/test_metal_token.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m pytest -p on_cuda ...
"""

from __future__ import annotations

import functools

import pytest
import torch

from moepack.kernels.cuda_device import CudaDevice
from moepack.kernels.launches import Launch
from moepack.kernels.simt import Executor


@functools.cache
def device() -> CudaDevice:
    return CudaDevice()


def run_on_gpu(executor: Executor, launch: Launch) -> None:
    """What Executor.run does: tensors in place. Those that share memory share it on the GPU too."""
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    arguments: list[torch.Tensor | bytes] = []
    for argument in launch.arguments:
        if isinstance(argument, bytes):
            arguments.append(argument)
            continue
        storage = argument.untyped_storage()
        if storage.data_ptr() not in copies:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            copies[storage.data_ptr()] = (whole, whole.cuda())
        _, copy = copies[storage.data_ptr()]
        seen = torch.empty(0, dtype=argument.dtype, device="cuda")
        arguments.append(
            seen.set_(copy.untyped_storage(), argument.storage_offset(), argument.shape, argument.stride())  # type: ignore[call-overload]
        )
    device().run(Launch(launch.file, launch.kernel, tuple(arguments), launch.grid, launch.group))
    device().wait()
    for whole, copy in copies.values():
        whole.copy_(copy)


@pytest.fixture(autouse=True)
def _kernels_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "run", run_on_gpu)
