"""What a stretch of work cost this process in time, processor time and bytes from the disk, and what others took.

Used in both engines' processes and beside the limits, so that everything is measured by the same clock and counters
(Linux: the kernel's own count of bytes read from storage, page faults and their readahead included, page cache hits
not). What other programs computed, and the host of a virtual machine took, is part of every lap: a rate measured
meanwhile is no rate of ours. It is told by user time: the kernel's own threads have none, and theirs is spent on
whoever reads, which may well be the process that is measured. A neighbour that only reads the disk goes unseen.

    meter = Meter()
    work()
    meter.lap()     # {"seconds": 0.21, "cpu_s": 0.4, "read_bytes": 1769472, "others_s": 0.01}
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

QUIET_CORES = 0.1  # that others may take; the counters themselves are good to about 0.03


class Meter:
    """A stopwatch that also looks at the processor and the disk. Starts when made."""

    def __init__(self) -> None:
        self._last = self._now()

    def lap(self) -> dict[str, float]:
        """The cost since the lap before, threads included."""
        last, self._last = self._last, self._now()
        seconds, cpu_s, read_bytes, others_s = (now - then for now, then in zip(self._last, last))
        return {"seconds": seconds, "cpu_s": cpu_s, "read_bytes": read_bytes, "others_s": others_s}

    def _now(self) -> tuple[float, float, int, float]:
        others_s = _all_users_s() - os.times().user
        return time.perf_counter(), time.process_time(), _proc_value("io", "read_bytes:"), others_s


def others_cores(laps: Sequence[dict[str, float]]) -> float:
    """Cores that other processes kept busy on average; quiet is at most QUIET_CORES."""
    return sum(lap["others_s"] for lap in laps) / sum(lap["seconds"] for lap in laps)


def peak_rss_bytes() -> int:
    """The most memory that this process has had in use, pages of mapped files included."""
    return 1024 * _proc_value("status", "VmHWM:")


def _all_users_s() -> float:
    """User time of all processes of the machine, and what its host has taken from it."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, stolen = (int(fields[n]) for n in (1, 2, 8))
    return (user + nice + stolen) / os.sysconf("SC_CLK_TCK")


def _proc_value(file: str, key: str) -> int:
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
