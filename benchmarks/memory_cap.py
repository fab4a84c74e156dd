"""Run a command with less memory than the machine has: in a control group of its own, page cache included.

The group is made below this process's own, so that whatever limits this process limits the command as well. Version 1
and version 2 hierarchies; both need root, or a group that was handed to the user. A file's pages count for the group
that read them first: drop them before a capped run (disk_cache.py), or the command uses them for nothing.

    with MemoryCap(1900 * 2**20) as cap:
        subprocess.run(cap.command(["python", "peer.py", ...]))
        print(cap.peak_bytes())
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
# The shell joins the group before the command starts, so that every byte of it counts.
JOIN = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"']
REMOVAL_S = 10  # within which the system lets go of a group whose processes have ended


class CannotCap(Exception):
    """This system does not let this process limit memory; the text says why and what to do."""


class MemoryCap:
    """A control group with a memory limit, for as long as the `with` lasts. Raises CannotCap on entering."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self._parent, self._is_v2 = _find_parent()
        self._group = self._parent / f"moepack-{os.getpid()}-{time.monotonic_ns()}"

    def __enter__(self) -> MemoryCap:
        try:
            self._group.mkdir()
        except OSError as error:
            raise CannotCap(f"{self._group}: {error.strerror}: memory caps need root: run as root") from None
        try:
            if self._is_v2:
                (self._group / "memory.swap.max").write_text("0")
            (self._group / ("memory.max" if self._is_v2 else "memory.limit_in_bytes")).write_text(str(self.limit_bytes))
        except OSError as error:
            self._group.rmdir()
            raise CannotCap(f"{error.filename}: {error.strerror}: this system sets no memory limit here") from None
        return self

    def __exit__(self, *exception: object) -> None:
        deadline = time.monotonic() + REMOVAL_S
        while (self._group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)  # its last process is still being taken down
        self._group.rmdir()

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that joins the group and becomes the given one."""
        return [*JOIN, str(self._group), *arguments]

    def peak_bytes(self) -> int:
        """The most that the group has had, pages of files included."""
        return int((self._group / ("memory.peak" if self._is_v2 else "memory.max_usage_in_bytes")).read_text())


def _find_parent() -> tuple[Path, bool]:
    """The group to make ours in, and whether the hierarchy is of version 2."""
    try:
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        raise CannotCap("/proc/self/cgroup: not there: memory caps need Linux") from None
    for _, controllers, path in entries:
        if "memory" in controllers.split(","):
            return ROOT / "memory" / path.strip("/"), False
    own = next((ROOT / path.strip("/") for _, controllers, path in entries if not controllers), None)
    for group in [own, *own.parents] if own else []:
        # In version 2 a group that holds processes passes no controllers on: the nearest above that does.
        passed_on = group / "cgroup.subtree_control"
        if passed_on.exists() and "memory" in passed_on.read_text().split():
            return group, True
    raise CannotCap(f"{ROOT}: no control group with a memory controller: mount one, or run where there is one")
