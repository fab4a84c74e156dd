"""What is known of a machine: data sheets of some Macs, and the settings that planning found on this one.

Settings lie beside a pack, not in it: a finished pack holds only listed files, and what suits one machine is wrong on
the next. They name the machine that they were measured on; on another one they are not used.

    save_settings(Path("model.moepack"), ReadSettings(direct=True, queue_depth=4, prefetch=True), measured={})
    settings, note = load_settings(Path("model.moepack"))
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepack.layout.errors import UsageError

SETTINGS_SUFFIX = ".plan.json"
KIND, VERSION = "moepack settings", 1
MAX_SETTINGS_BYTES = 2**20
MAX_QUEUE_DEPTH = 64
MIN_GB_S, MAX_GB_S = 1e-6, 10_000
MACHINES = Path(__file__).with_name("machines.json")


@dataclass(frozen=True)
class ReadSettings:
    """How moe-run reads on this machine.

    direct        past the page cache
    queue_depth   reads in flight
    prefetch      read the next layer's likely experts ahead while the disk is idle
    advise        tell the system which block is read after the one under way
    """

    direct: bool
    queue_depth: int
    prefetch: bool
    advise: bool = False


@dataclass(frozen=True)
class Limits:
    """What a machine can do at most, in GB/s; None is not known.

    memory_gb_s   reading memory with all threads
    disk_gb_s     reading blocks at random
    """

    memory_gb_s: float | None = None
    disk_gb_s: float | None = None

    @classmethod
    def of_facts(cls, facts: Any) -> Limits:
        """From an object of a file; what is no speed is left out."""
        found: list[Any] = [facts.get(name) for name in ("memory_gb_s", "disk_gb_s")] if isinstance(facts, dict) else []
        return cls(*(float(one) if type(one) in (int, float) and MIN_GB_S <= one < MAX_GB_S else None for one in found))

    def or_else(self, other: Limits) -> Limits:
        """These, and the other's where nothing is known."""
        return Limits(self.memory_gb_s or other.memory_gb_s, self.disk_gb_s or other.disk_gb_s)


@dataclass(frozen=True)
class KnownMachine:
    """Of a data sheet; None where no source says it."""

    memory_gb_s: float | None
    ssd_gb_s: float | None
    source: str


def known_machine(name: str) -> KnownMachine:
    """A machine of the table. Raises UsageError with the names that there are."""
    table = json.loads(MACHINES.read_text())["machines"]
    if name not in table:
        raise UsageError(f"--machine {name}: expected one of {', '.join(sorted(table))}")
    return KnownMachine(**table[name])


def settings_path(pack: Path) -> Path:
    """Where the settings for a pack are: beside it, under its name."""
    resolved = pack.resolve()
    return resolved.with_name(resolved.name + SETTINGS_SUFFIX)


def save_settings(pack: Path, settings: ReadSettings, measured: dict[str, Any]) -> Path:
    """Write the settings with what was measured for them, for people; returns the file's path. Raises OSError."""
    path = settings_path(pack)
    facts = {"kind": KIND, "version": VERSION, "machine": describe_machine(), **vars(settings), "measured": measured}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(path)
    return path


def load_settings(pack: Path) -> tuple[ReadSettings | None, str | None]:
    """(the settings for a pack on this machine, None), or (None, why not); (None, None) if there is no such file."""
    path = settings_path(pack)
    try:
        with open(path, "rb") as file:
            facts = json.loads(file.read(MAX_SETTINGS_BYTES))
        if facts["kind"] != KIND or facts["version"] != VERSION:
            raise ValueError("not of this version")
        settings = ReadSettings(facts["direct"], facts["queue_depth"], facts["prefetch"], facts.get("advise", False))
        kinds = [type(value) for value in vars(settings).values()]
        if kinds != [bool, int, bool, bool] or not 1 <= settings.queue_depth <= MAX_QUEUE_DEPTH:
            raise ValueError("values out of range")
        is_ours = facts["machine"] == describe_machine()
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return None, f"{path}: not used ({str(error) or type(error).__name__}): run moe-inspect plan again"
    if not is_ours:
        return None, f"{path}: not used, it is of another machine: run moe-inspect plan here"
    return settings, None


def load_limits(pack: Path) -> Limits:
    """The limits of this machine that planning for a pack found; nothing is known where it has not been planned."""
    settings, _ = load_settings(pack)
    return Limits.of_facts(json.loads(settings_path(pack).read_bytes()).get("measured")) if settings else Limits()


def describe_machine() -> dict[str, Any]:
    """What tells this machine from another one."""
    return {
        "name": platform.node(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }
