"""Files opened for reading large pieces: past the page cache where the file system lets us, through it elsewhere.

A pack is far larger than memory, so what the system would cache is mostly thrown away before it is used again, and the
copy out of the cache costs more time than a fast SSD. Direct I/O wants offsets, sizes and memory on sector
boundaries: blocks start on multiples of 16384 bytes, which serves every disk in view.

Where reads go through the cache the system can be told what will be read next. On macOS that may help direct reads,
too, which take what they find there, or hurt them: who uses it measures it first (disk_speed.py).

    file = DataFile(path, direct=True)
    file.read_into([slot[:size]], offset_bytes)
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

DIRECT_ALIGNMENT = 4096  # of offset, size and memory; the sectors of disks are 512 or 4096 bytes
F_RDADVISE = 44  # of macOS, <sys/fcntl.h>: Python has no name for it
RADVISORY = struct.Struct("@qi0q")  # struct radvisory {off_t ra_offset; int ra_count;}, its end on a whole off_t
PROT_READ, MAP_SHARED, MS_INVALIDATE = 1, 1, 2  # of macOS, as of Linux
REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # what file systems without direct I/O answer


class DataFile:
    """One file, opened for reading by position. Safe to use from several threads.

    is_direct   whether reads go past the page cache; turns False with the first read that the file system refuses
    """

    def __init__(self, path: Path, direct: bool = False):
        self.path = path
        self.is_direct = direct and (hasattr(os, "O_DIRECT") or sys.platform == "darwin")
        self._descriptor = self._open()

    def read_into(self, buffers: Sequence[memoryview], offset_bytes: int, needed_bytes: int | None = None) -> None:
        """Fill buffers, one after the other, with what starts at an offset; one system call if all goes well.

        needed_bytes   how much of it must be there, where a direct read is rounded up past the end of the file

        Raises OSError, EIO with the number of bytes that were there if the file ends too early.
        """
        needed = sum(len(buffer) for buffer in buffers) if needed_bytes is None else needed_bytes
        done = 0
        while True:
            found = done + self._read(_skip(buffers, done), offset_bytes + done)
            if found >= needed:
                return
            # A direct read goes on from a whole sector: what came of a broken one is read again.
            step = found // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT if self.is_direct else found
            if step <= done:
                raise OSError(errno.EIO, f"the file ends after {found} of them")
            done = step

    def fileno(self) -> int:
        """The system's number for the open file."""
        return self._descriptor

    def drop_cache(self, offset_bytes: int = 0, size_bytes: int = 0) -> None:
        """Let the system forget what it cached of this file, where it takes such advice; size 0 is all the rest."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset_bytes, size_bytes, os.POSIX_FADV_DONTNEED)
        elif sys.platform == "darwin":
            invalidate(self._descriptor, offset_bytes, size_bytes)

    @property
    def takes_advice(self) -> bool:
        """Whether advise does anything here: on Linux a direct read never looks at what that brings."""
        return sys.platform == "darwin" or (hasattr(os, "posix_fadvise") and not self.is_direct)

    def advise(self, offset_bytes: int, size_bytes: int) -> None:
        """Tell the system that this will be read soon: it may begin by itself, into its cache."""
        try:
            if sys.platform == "darwin":
                fcntl.fcntl(self._descriptor, F_RDADVISE, RADVISORY.pack(offset_bytes, size_bytes))
            elif self.takes_advice:
                os.posix_fadvise(self._descriptor, offset_bytes, size_bytes, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # advice is not needed, and the read will say what is wrong

    def close(self) -> None:
        """Close the file; it cannot be read afterwards."""
        os.close(self._descriptor)

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if self.is_direct and hasattr(os, "O_DIRECT"):
            try:
                return os.open(self.path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self.is_direct = False
        descriptor = os.open(self.path, flags)
        if self.is_direct and sys.platform == "darwin":
            fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        return descriptor

    def _read(self, buffers: Sequence[memoryview], offset_bytes: int) -> int:
        was_direct = self.is_direct  # another thread may be refused meanwhile, and end it for both
        try:
            return os.preadv(self._descriptor, buffers, offset_bytes)
        except OSError as error:
            if not was_direct or error.errno not in REFUSED:
                raise
        # Some file systems take the flag and refuse the read. Without it the same descriptor reads through the cache.
        stop_direct(self._descriptor)
        self.is_direct = False
        return os.preadv(self._descriptor, buffers, offset_bytes)


def start_direct(descriptor: int) -> bool:
    """Let an open file be read and written past the page cache; whether it must be by whole sectors now."""
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return False
    return True


def stop_direct(descriptor: int) -> None:
    """Let an open file be read and written through the page cache from now on."""
    if hasattr(os, "O_DIRECT"):
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def invalidate(descriptor: int, offset_bytes: int, size_bytes: int) -> None:
    """Drop what is cached of a file as macOS lets one: by a mapping of it. Size 0 is all the rest."""
    size_bytes = size_bytes or os.fstat(descriptor).st_size - offset_bytes
    libc = ctypes.CDLL(None, use_errno=True)
    memory = (ctypes.c_void_p, ctypes.c_size_t)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [*memory, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.msync.argtypes, libc.munmap.argtypes = [*memory, ctypes.c_int], memory
    place = libc.mmap(None, size_bytes, PROT_READ, MAP_SHARED, descriptor, offset_bytes)
    if place != ctypes.c_void_p(-1).value:
        libc.msync(place, size_bytes, MS_INVALIDATE)
        libc.munmap(place, size_bytes)


def _skip(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What remains of buffers after their first `count` bytes."""
    rest = []
    for buffer in buffers:
        if count < len(buffer):
            rest.append(buffer[count:] if count else buffer)
        count = max(0, count - len(buffer))
    return rest
