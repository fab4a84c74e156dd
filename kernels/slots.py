"""Where experts lie in memory: places of equal size that reads fill and kernels read.

A store knows a slot by its number only; what memory it is, and when the kernels have done with it, is the backend's
to know. Here is the memory of the processor: the kernels read where the disk writes, and have done when they return.

    slots = HostSlots(num_slots=64, slot_bytes=7077888)
    read_into(slots.buffer(3, block_bytes))
    expert = Expert.from_block(geometry, slots.block(3))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from moepack.kernels.matrix import Expert
from moepack.kernels.native_matrix import place
from moepack.layout.pages import Pages

Read = TypeVar("Read")


def view_host_pages(pages: Pages) -> torch.Tensor:
    """Pages as the kernels of the processor see them: uint8 [size_bytes], the same memory."""
    return torch.frombuffer(pages.buffer, dtype=torch.uint8)


class HostSlots:
    """Slots in huge pages of the processor's memory; the base of those that a GPU reads.

    is_huge               whether the system was asked for huge pages and gives them
    are_read_to_the_end   whether a token's experts are all read once more when the last of them has come
    """

    are_read_to_the_end = False

    def __init__(self, num_slots: int, slot_bytes: int, huge: bool = True):
        self._pages, self._slot_bytes = Pages(num_slots * slot_bytes, huge), slot_bytes
        self._bytes = view_host_pages(self._pages)
        self.is_huge = self._pages.is_huge

    def buffer(self, slot: int, size_bytes: int) -> memoryview:
        """The first bytes of a slot, to be filled by a read."""
        first = slot * self._slot_bytes
        return self._pages.buffer[first : first + size_bytes]

    def block(self, slot: int) -> torch.Tensor:
        """A slot as the kernels see it: uint8 [slot_bytes]."""
        return self._bytes[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]

    def describe(self, expert: Expert) -> int:
        """Where an expert in a slot is, as the backend's own run of the layers finds it; not 0."""
        return place(expert)

    def reads_into(self, execute: Callable[[Read], None]) -> Callable[[Read], None]:
        """How a read is executed so that its bytes arrive in the slots: as it is, or by way of other memory."""
        return execute

    def admit(self, buffers: Sequence[Any]) -> None:
        """Let kernels see what a read has brought into these buffers; from the store's thread, when it has ended."""

    def mark_used(self, slots: Sequence[int]) -> None:
        """Note that work on these slots has been handed to the kernels, which may not have begun."""

    def is_in_use(self, slot: int) -> bool:
        """Whether work noted for a slot may still be under way: filling it now would change a result."""
        return False

    def wait_until_free(self, slot: int) -> None:
        """Return once the work noted for a slot is done."""

    def submit(self) -> None:
        """Let work begin that has been handed over: the caller is about to wait for the disk."""
