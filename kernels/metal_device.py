"""Apple's GPU through torch: kernels compiled from text, memory that the disk fills and the GPU reads without a copy.

torch.mps.compile_shader takes the text of metal/ as it is and runs it in torch's own stream; _host_alias_storage (torch
2.13) shows the processor the memory of a tensor, so that reads of the SSD land where the kernels look. Both processors
share the memory: nothing is copied. What is handed over is committed when somebody waits, reads, or submits.

Nobody has run this file on a Mac yet: kernels/README.md says what was shown without one, and how to check the rest.

    ops, device = choose_backend("metal")
"""

from __future__ import annotations

import functools
from math import prod
from typing import Any

import torch

from moepack.kernels import msl
from moepack.kernels.device import Device, Mailbox, Step, UnifiedSlots
from moepack.kernels.launches import Launch
from moepack.layout.errors import UsageError
from moepack.layout.pages import HUGE_PAGE_BYTES, Pages

MAX_BANKS = 2  # buffers that an expert kernel is given


class _SharedPages(Pages):
    """Memory of the GPU as the processor fills it. Starts on 2 MiB, for the same reason as any Pages.

    bytes   the memory as a tensor of the GPU
    """

    def __init__(self, size_bytes: int, place: torch.device):
        self.size_bytes = size_bytes
        whole = torch.zeros(size_bytes + HUGE_PAGE_BYTES, dtype=torch.uint8, device=place)
        torch.mps.synchronize()  # the zeros are there before anybody writes
        alias = torch.mps._host_alias_storage(whole.untyped_storage())
        seen = torch.empty(0, dtype=torch.uint8).set_(alias)  # type: ignore[call-overload]
        first = whole.storage_offset() + -(seen.data_ptr() + whole.storage_offset()) % HUGE_PAGE_BYTES
        self.bytes = whole.as_strided((size_bytes,), (1,), first)
        self.buffer = seen.as_strided((size_bytes,), (1,), first).numpy().data
        self.is_huge, self.is_locked = False, False


class MetalDevice(Device):
    """torch's MPS device. Raises UsageError where there is none, or torch is too old for it."""

    place = torch.device("mps")

    def __init__(self) -> None:
        super().__init__()
        if not torch.backends.mps.is_available():
            raise UsageError("--device metal: torch finds no Metal GPU here: use --device cpu")
        if not hasattr(torch.mps, "_host_alias_storage"):
            found = torch.__version__
            raise UsageError(
                f"--device metal needs torch 2.13 or newer, found {found}: reads could not land in the GPU's memory; "
                "pip install -U torch, or use --device cpu"
            )
        self.name = f"Metal, torch {torch.__version__}"
        self._compile = functools.cache(lambda text: torch.mps.compile_shader(text))
        self._begun = torch.mps.Event()

    def new_mailbox(self, size_bytes: int) -> Mailbox:
        pages = _SharedPages(size_bytes, self.place)
        return Mailbox(self, pages.bytes, pages.buffer)

    def new_pages(self, size_bytes: int) -> Pages:
        return _SharedPages(size_bytes, self.place)

    def view_pages(self, pages: Pages) -> torch.Tensor:
        assert isinstance(pages, _SharedPages)
        return pages.bytes

    def new_slots(self, num_slots: int, slot_bytes: int, huge: bool = True) -> UnifiedSlots:
        """In one buffer, or in two where one may not be so large. Raises UsageError if two are not enough."""
        most = (int(getattr(torch._C, "_mps_maxBufferLength")()) - HUGE_PAGE_BYTES) // slot_bytes  # noqa: B009  no stub has it
        if num_slots > MAX_BANKS * most:
            have, want = MAX_BANKS * most * slot_bytes / 2**30, num_slots * slot_bytes / 2**30
            text = f"this GPU's buffers hold {have:.1f} GiB of experts, {want:.1f} GiB were planned"
            raise UsageError(f"--device metal: {text}: give --memory about {want - have:.1f} GiB less")
        per_bank = min(num_slots, most)
        counts = [per_bank, num_slots - per_bank]
        banks = [_SharedPages(count * slot_bytes, self.place) for count in counts if count]
        return UnifiedSlots(self, [b.bytes for b in banks], [b.buffer for b in banks], per_bank, slot_bytes)

    def submit(self) -> None:
        self._begun.record()  # commits the command buffer

    def _bind(self, source: msl.Source, launch: Launch, arguments: list[torch.Tensor]) -> Step:
        kernel: Any = getattr(self._compile(source.text), launch.kernel)
        if kernel.max_threads_per_threadgroup < prod(launch.group):
            most = kernel.max_threads_per_threadgroup
            text = f"{launch.kernel} needs {prod(launch.group)} threads in a group, this GPU runs {most}"
            raise UsageError(f"--device metal: {text}: use --device cpu, and report it")
        threads = [groups * size for groups, size in zip(launch.grid, launch.group)]
        return functools.partial(kernel, *arguments, threads=threads, group_size=list(launch.group))

    def _wait(self) -> None:
        torch.mps.synchronize()
