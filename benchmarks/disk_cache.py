"""The operating system's part in reading files: what it has cached of them, and how far it reads ahead.

A cold measurement starts with drop_cached(files). Mapped files are read in pieces of the disk's readahead: machines
come with anything from 128 KiB to 8 MiB, and for scattered reads of single experts that decides the speed of a mapping.

    drop_cached([Path("peer.gguf")])
    with readahead(Path("peer.gguf"), kib=128): ...
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def drop_cached(files: Iterable[Path]) -> None:
    """Remove the pages of these files from the page cache; where allowed, all clean pages of the system's too."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not written yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    if os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("1")


@contextmanager
def readahead(path: Path, kib: int | None) -> Iterator[None]:
    """Set the readahead of the disk that holds a file, and put it back; None leaves it alone.

    Counts for files opened meanwhile. Raises PermissionError where this process may not set it.
    """
    if kib is None:
        yield
        return
    setting = _readahead_setting(path)
    before = setting.read_text()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)


def readahead_kib(path: Path) -> int:
    """The readahead of the disk that holds a file, as it is."""
    return int(_readahead_setting(path).read_text())


def _readahead_setting(path: Path) -> Path:
    device = path.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    disk = entry if (entry / "queue").exists() else entry.parent  # a partition's queue is its disk's
    return disk / "queue" / "read_ahead_kb"
