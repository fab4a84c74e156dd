"""What of this machine decides the speed of a pack, and one line of advice for each thing that costs some.

Direct I/O is tried with a read, not looked up by the file system's name; everything else is what the system says of
itself. What the arithmetic runs on is told by the caller, because reading packs needs no torch. Nothing is changed, and
nothing is measured: `moe-inspect plan` does that.

    for finding in examine_machine() + examine_disk(Path("model.moepack")): print(finding.text, finding.advice)
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepack.layout.pages import THP_SETTING, Pages
from moepack.layout.sizes import format_size
from moepack.layout.storage import DIRECT_ALIGNMENT, DataFile

REMOTE_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "afs", "ceph", "smbfs")
LOW_SPACE_BYTES = 2 * 2**30  # room for snapshots, settings, a trace
SOME_SWAP_BYTES = 64 * 2**20  # pages that nobody has needed for days are no sign of pressure
KILO = 1024
CAP_IPC_LOCK = 14  # linux/capability.h
VIRTUAL_DISKS = ("vd", "xvd", "nbd", "loop")  # they say that they rotate, whatever is behind them


@dataclass(frozen=True)
class Finding:
    """One fact.

    name     what it is about, the same in every report
    value    for programs
    text     the same for people
    advice   what to do about it; None if it costs nothing
    blocks   whether moepack cannot run because of it
    """

    name: str
    value: Any
    text: str
    advice: str | None = None
    blocks: bool = False


def examine_machine(lock_bytes: int = 0) -> list[Finding]:
    """Processor, memory and what the system grants of them.

    lock_bytes   resident weights that a run would lock, if known
    """
    return [_system(), _cores(), *_governor(), _memory(), _swap(), _huge_pages(), _locked_memory(lock_bytes)]


def examine_disk(path: Path) -> list[Finding]:
    """File system, direct I/O and free space where a pack is, or would be: a directory that exists."""
    return [_file_system(path), _direct_io(path), *_rotation(path), _free_space(path)]


def _system() -> Finding:
    cpuinfo = _read(Path("/proc/cpuinfo")).splitlines()
    processor = next((line.split(": ", 1)[1] for line in cpuinfo if line.startswith("model name")), platform.machine())
    text = f"{processor}, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    return Finding("system", {"processor": processor, "platform": platform.platform()}, text)


def _cores() -> Finding:
    """Cores that this process may use: the system's, less what affinity and a control group's quota take away."""
    present = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    quota = cpu_quota()
    value = {"present": present, "usable": usable, "quota": quota}
    text = f"{usable} of {present} usable" + (f", a quota of {quota:g}" if quota else "")
    if quota and quota < usable:
        threads = max(1, int(quota))
        return Finding("cores", value, text, f"give moe-run --threads {threads}: more are stopped in turn")
    advice = "start it without taskset, or on a machine without cpusets, to use them all" if usable < present else None
    return Finding("cores", value, text, advice)


def cpu_quota() -> float | None:
    """Cores that the control group grants on average; None if it sets no limit."""
    parts = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(parts) == 2 and parts[0].isdigit():
        return int(parts[0]) / int(parts[1])
    quota = _read(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")).strip()
    period = _read(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")).strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _governor() -> list[Finding]:
    name = _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")).strip()
    if not name:
        return []
    advice = "sudo cpupower frequency-set -g performance, while plugged in" if name == "powersave" else None
    return [Finding("cpu governor", name, name, advice)]


def _memory() -> Finding:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _meminfo().get("MemAvailable")
    text = f"{format_size(total)}" + (f", {format_size(available)} available" if available is not None else "")
    advice = None
    if available is not None and available < total // 2:
        advice = "close other programs: what is free becomes cache for experts"
    return Finding("memory", {"total_bytes": total, "available_bytes": available}, text, advice)


def _swap() -> Finding:
    memory = _meminfo()
    total = memory.get("SwapTotal", 0)
    used = total - memory.get("SwapFree", 0)
    value = {"total_bytes": total, "used_bytes": used}
    if sys.platform != "linux":
        return Finding("swap", None, "not examined on this system")
    text = f"{format_size(used)} of {format_size(total)} used" if total else "none"
    advice = "memory is short: close other programs, or lower --memory" if used > SOME_SWAP_BYTES else None
    return Finding("swap", value, text, advice)


def _huge_pages() -> Finding:
    setting = _read(THP_SETTING).strip()
    if not setting:
        return Finding("huge pages", None, "not known to this system")
    chosen = setting.partition("[")[2].partition("]")[0]
    if chosen == "never":
        advice = f"echo madvise | sudo tee {THP_SETTING}: direct reads are 2 to 3 times as fast into pages of 2 MiB"
        return Finding("huge pages", chosen, chosen, advice)
    return Finding("huge pages", chosen, chosen)


def _locked_memory(needed_bytes: int) -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    is_unlimited = limit == resource.RLIM_INFINITY or _has_capability(CAP_IPC_LOCK)
    can_lock = is_unlimited or limit >= needed_bytes
    text = "no limit" if is_unlimited else f"at most {format_size(limit)}"
    advice = None
    if not can_lock:
        text += f", the resident weights have {format_size(needed_bytes)}"
        wanted = f"ulimit -l {needed_bytes // KILO + 1} (and memlock in /etc/security/limits.conf)"
        advice = f"{wanted}: weights that are paged out stall a token"
    value = {"limit_bytes": None if is_unlimited else limit, "needed_bytes": needed_bytes, "can_lock": can_lock}
    return Finding("locked memory", value, text, advice)


def _has_capability(number: int) -> bool:
    """Whether the process has a capability of Linux: root's powers, one by one."""
    lines = _read(Path("/proc/self/status")).splitlines()
    effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(effective >> number & 1)


def _file_system(path: Path) -> Finding:
    name = file_system_of(path)
    advice = "put the pack on a local SSD: a network decides the speed here" if name in REMOTE_FILE_SYSTEMS else None
    return Finding("file system", name, f"{name or 'unknown'} at {path}", advice)


def file_system_of(path: Path) -> str | None:
    """Type of the file system that holds a path, by the longest mount point above it; None if it is not known."""
    resolved = path.resolve()
    best: tuple[str, str | None] = ("", None)
    for line in _read(Path("/proc/self/mounts")).splitlines():
        _, mount, kind, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if resolved.is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def _direct_io(path: Path) -> Finding:
    advice = (
        "reads go through the page cache, at about half the speed: use a file system with direct I/O (ext4, xfs, APFS)"
    )
    try:
        works = _try_direct_read(path)
    except OSError as error:
        text = f"cannot be tried: {error.strerror}"
        return Finding("direct I/O", None, text, f"choose a directory that can be written, or a pack: {path}")
    return Finding("direct I/O", works, "works" if works else "refused", None if works else advice)


def _try_direct_read(path: Path) -> bool:
    """Read a sector past the page cache: of a pack's own file, else of a temporary one. Raises OSError."""
    blocks = sorted(path.glob("experts/*.bin"))
    if blocks:
        return _reads_directly(blocks[0])
    with tempfile.NamedTemporaryFile(dir=path) as file:
        file.write(bytes(DIRECT_ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())
        return _reads_directly(Path(file.name))


def _reads_directly(path: Path) -> bool:
    file = DataFile(path, direct=True)
    try:
        file.read_into([Pages(DIRECT_ALIGNMENT).buffer[:DIRECT_ALIGNMENT]], 0)
        return file.is_direct
    finally:
        file.close()


def _rotation(path: Path) -> list[Finding]:
    device = path.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for folder in (entry, entry.parent):  # a partition's queue is its disk's
        flag = _read(folder / "queue" / "rotational").strip()
        if flag:
            if folder.name.startswith(VIRTUAL_DISKS):
                return [Finding("disk", "virtual", f"{folder.name}, virtual: moe-inspect plan measures it")]
            if flag == "0":
                return [Finding("disk", "solid", f"{folder.name}, no moving parts")]
            advice = "put the pack on an SSD: a disk that spins reads an expert in tens of ms"
            return [Finding("disk", "rotating", f"{folder.name}, rotates", advice)]
    return []


def _free_space(path: Path) -> Finding:
    free = shutil.disk_usage(path).free
    advice = (
        "make space: SSDs slow down when full, and settings and traces need some" if free < LOW_SPACE_BYTES else None
    )
    return Finding("free space", free, format_size(free), advice)


def _meminfo() -> dict[str, int]:
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) * KILO for fields in lines if len(fields) > 1}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
