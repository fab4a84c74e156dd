"""Large memory that the SSD writes into and kernels read from: one run of huge pages, lockable.

Pages of 2 MiB make a direct read two to three times as fast as pages of 4 KiB (the kernel pins and maps 512 times fewer
of them) and save the kernels most address translations. They are asked for, not demanded: where the system has none,
the same memory comes in plain pages. The system backs a page when it is first touched.

    pages = Pages(num_slots * slot_bytes)
    weights = torch.frombuffer(pages.buffer, dtype=torch.uint8)
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from moepack.layout.geometry import align_up

HUGE_PAGE_BYTES = 2 * 2**20
THP_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Pages:
    """Zeroed memory that starts on a huge page and fills whole ones. It lives as long as something refers to `buffer`.

    buffer       all of it, writable
    size_bytes   what was asked for, rounded up to huge pages
    is_huge      whether the system was asked for huge pages and gives them
    is_locked    whether it stays in memory whatever else runs
    """

    def __init__(self, size_bytes: int, huge: bool = True):
        self.size_bytes = self.round_up(size_bytes)
        # Private: shared anonymous memory, Python's default, counts as a file in memory and gets no huge pages.
        # One page more than needed, never touched, so that a huge page can start inside.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mapping = mmap.mmap(-1, self.size_bytes + HUGE_PAGE_BYTES, flags=flags)
        start = -_address(mapping) % HUGE_PAGE_BYTES
        self.is_huge = _advise(mapping, start, self.size_bytes, huge)
        self.buffer = memoryview(mapping)[start : start + self.size_bytes]
        self.is_locked = False

    @staticmethod
    def round_up(size_bytes: int) -> int:
        """The size of the memory that is got for a size asked for."""
        return align_up(max(1, size_bytes), HUGE_PAGE_BYTES)

    def lock(self) -> bool:
        """Keep this memory from being swapped out, if the user may; often the limit (ulimit -l) is too low."""
        libc = ctypes.CDLL(None)
        self.is_locked = libc.mlock(ctypes.c_void_p(_address(self.buffer)), ctypes.c_size_t(self.size_bytes)) == 0
        return self.is_locked


def _address(memory: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _advise(mapping: mmap.mmap, start: int, size_bytes: int, huge: bool) -> bool:
    """Ask for huge pages, or for none; whether they will come."""
    advice = getattr(mmap, "MADV_HUGEPAGE" if huge else "MADV_NOHUGEPAGE", None)
    if advice is None:
        return False
    try:
        mapping.madvise(advice, start, size_bytes)
        return huge and "[never]" not in THP_SETTING.read_text()
    except OSError:  # a kernel without them
        return False
