"""A safetensors file whose tensors are written side by side, each from its start to its end.

A pack holds all of an expert in one block, a shard all experts of one matrix: whoever reads blocks once has bytes for
several places of the file at a time. Each tensor collects in an aligned buffer of its own and goes past the page cache
where the file system lets it, which is twice as fast and leaves the machine's cache alone. Sectors that two tensors
share wait for the end and go through the cache.

    with atomic_file(path) as file, ShardWriter(file.fileno(), header, specs) as shard:
        shard.write("lm_head.weight", data)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import TracebackType

from moepack.layout.geometry import align_up
from moepack.layout.pages import Pages
from moepack.layout.storage import DIRECT_ALIGNMENT, REFUSED, start_direct, stop_direct
from moepack.layout.tensor_file import TensorSpec

BUFFER_BYTES = 2 * 2**20  # there are nine of them, for the arrays of a quantized expert


@dataclass
class _Stream:
    """A tensor that is being written. The buffer begins at a sector of the file, its first bytes may be another's.

    offset_bytes   where in the file the buffer begins
    start          where in it this tensor's bytes begin, and `end` where they end so far
    missing        bytes of the tensor that are still to come
    """

    pages: Pages
    offset_bytes: int
    start: int
    end: int
    missing: int


class ShardWriter:
    """Writes one new file, which somebody else opens and flushes to the disk. The end of the `with` completes it."""

    def __init__(self, descriptor: int, header: bytes, specs: list[TensorSpec]):
        self._descriptor, self._specs = descriptor, {spec.name: spec for spec in specs}
        self._streams: dict[str, _Stream] = {}
        self._spare: list[Pages] = []
        self._shared: list[tuple[int, bytes]] = [(0, header)]
        self._missing = sum(spec.size_bytes for spec in specs)
        self._is_direct = start_direct(descriptor)

    def write(self, name: str, data: memoryview) -> None:
        """Append to a tensor. Raises OSError."""
        view = data.cast("B")
        stream = self._streams.get(name)
        if stream is None:
            stream = self._streams[name] = self._begin(self._specs[name])
        if len(view) > stream.missing:
            raise ValueError(f"{name}: {len(view)} bytes, but only {stream.missing} are missing")
        stream.missing -= len(view)
        self._missing -= len(view)
        while view:
            count = min(len(view), BUFFER_BYTES - stream.end)
            stream.pages.buffer[stream.end : stream.end + count] = view[:count]
            stream.end, view = stream.end + count, view[count:]
            if stream.end == BUFFER_BYTES:
                self._write_out(stream)
        if not stream.missing:
            self._write_out(stream)
            self._spare.append(self._streams.pop(name).pages)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            return
        if self._missing:
            raise ValueError(f"{self._missing} bytes of {sorted(self._streams)[:4]} were not written")
        self._stop_direct()
        for offset, data in self._shared:
            self._write_at(memoryview(data), offset)

    def _begin(self, spec: TensorSpec) -> _Stream:
        start = spec.offset_bytes % DIRECT_ALIGNMENT
        pages = self._spare.pop() if self._spare else Pages(BUFFER_BYTES)
        return _Stream(pages, spec.offset_bytes - start, start, start, spec.size_bytes)

    def _write_out(self, stream: _Stream) -> None:
        """Write the buffer's whole sectors and keep for the end what lies in broken ones."""
        buffer, start, end = stream.pages.buffer, stream.start, stream.end
        first = min(align_up(start, DIRECT_ALIGNMENT), end)
        last = max(end // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT, first)
        self._write_at(buffer[first:last], stream.offset_bytes + first)
        for begin, stop in ((start, first), (last, end)):
            if begin < stop:
                self._shared.append((stream.offset_bytes + begin, bytes(buffer[begin:stop])))
        stream.offset_bytes, stream.start, stream.end = stream.offset_bytes + end, 0, 0

    def _write_at(self, data: memoryview, offset_bytes: int) -> None:
        while data:
            try:
                count = os.pwrite(self._descriptor, data, offset_bytes)
            except OSError as error:
                # Some file systems take the flag and refuse the write; or a short one left us between two sectors.
                if not self._is_direct or error.errno not in REFUSED:
                    raise
                self._stop_direct()
                continue
            data, offset_bytes = data[count:], offset_bytes + count

    def _stop_direct(self) -> None:
        if self._is_direct:
            stop_direct(self._descriptor)
            self._is_direct = False
