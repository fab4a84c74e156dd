"""A GPU on the processor: the .metal text on the SIMT executor, as late as a real one may be. For tests, tiny models.

Nothing runs when it is handed over. The queue runs when somebody waits, reads a value, or lets torch compute with a
tensor of the device; so a slot that is filled too early, or a small buffer that is written again too early, changes
the answer here as it would, now and then, on a GPU. It shows bindings, types, sizes, order and waits, not speed.

    ops, device = choose_backend("metal-emulated", exact=True)
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from moepack.kernels import msl
from moepack.kernels.device import Device, Mailbox, Step, UnifiedSlots
from moepack.kernels.launches import Launch
from moepack.kernels.simt import Executor
from moepack.kernels.slots import view_host_pages
from moepack.layout.pages import Pages

# What torch does without looking at values: everything else runs the queue first.
VIEWS = {"__get__", "as_strided", "chunk", "data_ptr", "detach", "dim", "element_size", "expand", "flatten"}
VIEWS |= {"is_contiguous", "narrow", "new_empty", "numel", "permute", "size", "split", "squeeze", "storage_offset"}
VIEWS |= {"stride", "transpose", "unflatten", "unsqueeze", "untyped_storage", "view", "view_as"}


class _Queue:
    """Work handed over and not begun. One for the process, like the device."""

    def __init__(self) -> None:
        self._waiting: deque[Launch] = deque()
        self._executor = Executor()

    def add(self, launch: Launch) -> None:
        self._waiting.append(launch)

    def run(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            while self._waiting:
                self._executor.run(self._waiting.popleft())


class EmulatedTensor(torch.Tensor):
    """A tensor of the emulated device: torch's operations on it wait for their turn."""

    queue = _Queue()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        is_basic = name == "__getitem__" and not _has_tensor(args[1])
        if name not in VIEWS and not is_basic:
            cls.queue.run()
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _has_tensor(index: Any) -> bool:
    """Whether an index picks by values, and so copies."""
    return any(isinstance(part, torch.Tensor | list) for part in (index if isinstance(index, tuple) else (index,)))


class EmulatedDevice(Device):
    """The kernels on the processor. One queue for all that a process opens."""

    name = "Metal kernels emulated on the processor"
    place = torch.device("cpu")

    def zeros(self, *shape: int) -> torch.Tensor:
        return _adopt(torch.zeros(shape))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        empty = torch.empty(shape, dtype=dtype)
        return _adopt(empty.fill_(torch.nan if dtype.is_floating_point else -1))  # what is read unwritten shows

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, EmulatedTensor) else _adopt(tensor.clone())

    def new_mailbox(self, size_bytes: int) -> Mailbox:
        shared = torch.zeros(size_bytes, dtype=torch.uint8)
        return Mailbox(self, _adopt(shared), shared.numpy().data)

    def new_pages(self, size_bytes: int) -> Pages:
        return Pages(size_bytes)

    def view_pages(self, pages: Pages) -> torch.Tensor:
        return _adopt(view_host_pages(pages))

    def new_slots(self, num_slots: int, slot_bytes: int, huge: bool = True) -> UnifiedSlots:
        """In two banks, as on a Mac with more slots than a buffer may hold."""
        per_bank = -(-num_slots // 2)
        banks = [Pages(slots * slot_bytes, huge) for slots in (per_bank, max(1, num_slots - per_bank))]
        return UnifiedSlots(
            self, list(map(self.view_pages, banks)), [bank.buffer for bank in banks], per_bank, slot_bytes
        )

    def _bind(self, source: msl.Source, launch: Launch, arguments: list[torch.Tensor]) -> Step:
        bound = Launch(launch.file, launch.kernel, tuple(arguments), launch.grid, launch.group)
        return lambda: EmulatedTensor.queue.add(bound)

    def _wait(self) -> None:
        EmulatedTensor.queue.run()

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        self._wait()
        return tensor.as_subclass(torch.Tensor).clone()


def _adopt(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(EmulatedTensor)
