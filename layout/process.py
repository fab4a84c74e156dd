"""What this process takes of the machine's memory, by the system's own count: both budgets start from it.

resident_set_bytes(), peak_rss_bytes()
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def resident_set_bytes() -> int:
    """Memory of this process now; where the system does not say, its peak."""
    statm = _read("statm")
    return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """The most memory that this process has had. (getrusage would count a parent's, from before exec, on Linux.)"""
    for line in _read("status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _read(name: str) -> str:
    try:
        return Path("/proc/self", name).read_text()
    except OSError:
        return ""
