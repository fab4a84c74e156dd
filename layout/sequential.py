"""A large file written from start to end, past the page cache where the file system lets us.

A pack is larger than memory: written through the cache it would push out everything else that the machine has cached,
and the disk would stall while hundreds of megabytes are flushed at once. What is written collects in one aligned
buffer.

    with SequentialFile(path) as file:
        file.write(block)
        file.flush()
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from moepack.layout.pages import Pages
from moepack.layout.storage import DIRECT_ALIGNMENT, REFUSED, stop_direct

BUFFER_BYTES = 4 * 2**20


class SequentialFile:
    """A new file, to be written once. `flush` ends it: what comes after goes through the cache."""

    def __init__(self, path: Path):
        self._path, self._buffer, self._filled, self._written = path, Pages(BUFFER_BYTES).buffer, 0, 0
        self._is_direct = hasattr(os, "O_DIRECT")
        self._file = open(path, "wb", buffering=0, opener=self._open)  # noqa: SIM115 (closed by close)
        if sys.platform == "darwin":
            fcntl.fcntl(self._file.fileno(), fcntl.F_NOCACHE, 1)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append all of it; returns its size. Raises OSError that names the file and the byte."""
        view = memoryview(data).cast("B")
        size_bytes = len(view)
        while view:
            count = min(len(view), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled, view = self._filled + count, view[count:]
            if self._filled == len(self._buffer):
                self._write_out(self._filled)
        return size_bytes

    def flush(self) -> None:
        """Hand all of it to the file system; the last, broken sector through the cache."""
        self._write_out(self._filled // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT)
        if self._filled and self._is_direct:
            self._stop_direct()
        self._write_out(self._filled)

    def fileno(self) -> int:
        """The system's number for the open file."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file; what was not flushed is lost."""
        self._file.close()

    def __enter__(self) -> SequentialFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: str, flags: int) -> int:
        if self._is_direct:
            try:
                return os.open(path, flags | os.O_DIRECT, 0o666)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
            self._is_direct = False
        return os.open(path, flags, 0o666)

    def _write_out(self, size_bytes: int) -> None:
        """Write the first bytes of the buffer and move the rest to its start. Raises OSError with the place."""
        done = 0
        try:
            while done < size_bytes:
                done += self._write_some(self._buffer[done:size_bytes])
        except OSError as error:
            place = f"{error.strerror} at byte {self._written + done}"
            raise OSError(error.errno, place, str(self._path)) from None
        self._written += size_bytes
        rest = self._filled - size_bytes
        self._buffer[:rest] = bytes(self._buffer[size_bytes : self._filled])
        self._filled = rest

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self.fileno(), data)
        except OSError as error:
            # Some file systems take the flag and refuse the write; or a short one left us between two sectors.
            if not self._is_direct or error.errno not in REFUSED:
                raise
        self._stop_direct()
        return os.write(self.fileno(), data)

    def _stop_direct(self) -> None:
        stop_direct(self.fileno())
        self._is_direct = False
