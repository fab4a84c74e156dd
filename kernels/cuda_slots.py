"""Slots for experts in an NVIDIA GPU's memory: reading threads fill memory that the GPU may copy from, and go on.

A thread reads into one of two pieces of its own, hands the copy into the slot to the GPU's copy engine, on a stream of
its own, and turns to its next read while the copy is under way. The store is told of the read at once: kernels handed
over from then on wait for the copy, on the GPU, so that nobody else does. A slot is not filled again before the copy
into it has ended, whether or not a kernel has read it: admitting counts as a use.

Pieces are huge pages, as slots of the processor's memory are: a direct read into them is as fast.

    slots = CudaSlots(device, num_slots=64, slot_bytes=7077888)
    execute = slots.reads_into(reader.read)
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moepack.kernels.device import Device, DeviceSlots
from moepack.kernels.slots import Read, view_host_pages
from moepack.layout.pages import Pages

PIECES = 2  # of a thread: one is filled while the other is copied from


@dataclasses.dataclass
class _Range:
    """Where a read shall land on the GPU.

    copied   the copy into it has ended; None while it has not been handed over
    """

    slot: int
    size_bytes: int
    copied: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return self.size_bytes


class _Piece:
    """Memory that the disk writes and the GPU copies from.

    copied   the last copy from it has ended
    """

    def __init__(self, size_bytes: int):
        pages = Pages(size_bytes)
        self.bytes, self.size_bytes = view_host_pages(pages), pages.size_bytes
        self.copied = torch.cuda.Event(blocking=True)  # it is rarely waited for, and then nobody should burn a core
        runtime, place = torch.cuda.cudart(), self.bytes.data_ptr()
        # Where the system refuses, copies take a way round through memory of the driver's: slower, not wrong.
        if int(runtime.cudaHostRegister(place, pages.size_bytes, 0)) == 0:
            weakref.finalize(self, _unregister, runtime, self.bytes, self.copied).atexit = False


def _unregister(runtime: Any, memory: torch.Tensor, copied: torch.cuda.Event) -> None:
    """Before the memory goes, which this keeps until then, and after the last copy from it."""
    copied.synchronize()
    runtime.cudaHostUnregister(memory.data_ptr())


class _Staging(threading.local):
    """A reading thread's pieces, taken in turn, and its stream."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        self.pieces: list[_Piece] = []

    def next_piece(self, size_bytes: int) -> _Piece:
        """A piece of at least so many bytes that nothing is copied from any more."""
        piece = self.pieces.pop(0) if len(self.pieces) == PIECES else None
        if piece is not None:
            piece.copied.synchronize()
        if piece is None or piece.size_bytes < size_bytes:
            piece = _Piece(size_bytes)
        self.pieces.append(piece)
        return piece


class CudaSlots(DeviceSlots):
    """Slots in the GPU's memory, filled by way of pieces of the processor's."""

    def __init__(self, device: Device, num_slots: int, slot_bytes: int):
        bank = torch.empty(num_slots * slot_bytes, dtype=torch.uint8, device=device.place)
        super().__init__(device, [bank], num_slots, slot_bytes)
        self._own = _Staging()
        self.is_huge = Pages(1).is_huge

    def buffer(self, slot: int, size_bytes: int) -> Any:
        return _Range(slot, size_bytes)

    def reads_into(self, execute: Callable[[Read], None]) -> Callable[[Read], None]:
        def read_and_copy(read: Any) -> None:
            own, ranges = self._own, read.buffers
            if own.stream is None:
                own.stream = torch.cuda.Stream(self._device.place)
            piece = own.next_piece(sum(map(len, ranges)))
            parts = piece.bytes[: sum(map(len, ranges))].split(list(map(len, ranges)))
            landed = dataclasses.replace(read, buffers=[part.numpy().data for part in parts])
            try:
                execute(landed)
            finally:
                read.retries = landed.retries
            with torch.cuda.stream(own.stream):
                for place, part in zip(ranges, parts):
                    self.block(place.slot)[: len(place)].copy_(part, non_blocking=True)
                piece.copied.record()
            for place in ranges:
                place.copied = piece.copied

        return read_and_copy

    def admit(self, buffers: Sequence[Any]) -> None:
        # An event may have been recorded again since, behind a later copy of the same stream: that waits longer.
        for event in {place.copied for place in buffers}:
            torch.cuda.current_stream(self._device.place).wait_event(event)
        self.mark_used([place.slot for place in buffers])
