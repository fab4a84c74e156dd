"""Where the tests of the Metal kernels run them: on the CPU executor, or on the GPU that MOEPACK_KERNELS names.

MOEPACK_KERNELS=metal pytest tests/test_metal_token.py        # what make test-metal does on a Mac; cuda works too
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import torch

from moepack.kernels import msl
from moepack.kernels.device import Device
from moepack.kernels.launches import Launch
from moepack.kernels.simt import Executor, WatchedExecutor

CHOSEN = os.environ.get("MOEPACK_KERNELS", "")


class DeviceExecutor:
    """Kernels on a GPU as Executor runs them: tensors of the processor go there and come back."""

    def __init__(self, device: Device):
        self.device = device

    def run(self, launch: Launch) -> None:
        copies: dict[tuple[int, int], torch.Tensor] = {}  # one for tensors that are the same memory
        arguments: list[torch.Tensor | bytes] = []
        for argument in launch.arguments:
            if isinstance(argument, torch.Tensor):
                place = (argument.data_ptr(), argument.numel() * argument.element_size())
                argument = copies.setdefault(place, self.device.upload(argument.clone()))
            arguments.append(argument)
        self.device.run(replace(launch, arguments=tuple(arguments)))
        self.device.wait()
        for parameter, mine, theirs in zip(signature_of(launch).buffers, launch.arguments, arguments):
            if parameter.is_written and isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
                mine.copy_(theirs)


Runner = Executor | WatchedExecutor | DeviceExecutor


def signature_of(launch: Launch) -> msl.Signature:
    return msl.load(launch.file).kernels[launch.kernel]


@cache
def default_runner() -> Runner:
    """The GPU that was chosen, else the CPU executor with its lanes in ascending order."""
    if CHOSEN == "metal":
        from moepack.kernels.metal_device import MetalDevice

        return DeviceExecutor(MetalDevice())
    if CHOSEN == "cuda":
        from moepack.kernels.cuda_device import CudaDevice

        return DeviceExecutor(CudaDevice())
    if CHOSEN == "emulated":  # the way through a device, where there is none
        from moepack.kernels.emulated_device import EmulatedDevice

        return DeviceExecutor(EmulatedDevice())
    return Executor(0)
