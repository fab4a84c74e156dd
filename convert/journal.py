"""What an unfinished conversion has already written, so that the next run goes on instead of starting over.

A folder `.convert` in the output holds a fingerprint of source and settings and one small file for each finished
step. A step counts as done only when its data file was flushed and renamed before its record was. The last act is:
manifest safe on disk under its temporary name, journal removed, manifest renamed; so a pack never holds a journal,
and a kill between the two is finished by the next run.

    with Journal.open(out, fingerprint) as journal:
        entry = journal.get("layer_03")
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moepack.layout.errors import PackError, UsageError
from moepack.layout.manifest import Manifest
from moepack.layout.spec import MANIFEST_NAME, PARTIAL_SUFFIX
from moepack.layout.writer import atomic_file, finish_partial

JOURNAL_NAME = ".convert"
SETTINGS = "settings"
SETTINGS_FILE = f"{SETTINGS}.json"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold an output directory against other processes. Raises UsageError if another one holds it."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{out}: another moe-convert is at work here: wait for it") from None
        yield
    finally:
        os.close(descriptor)


class Journal:
    """The record of one conversion."""

    def __init__(self, out: Path):
        self.folder = out / JOURNAL_NAME

    @classmethod
    @contextmanager
    def open(cls, out: Path, settings: dict[str, Any]) -> Iterator[Journal]:
        """Begin or go on with a conversion into `out`, locked against a second process.

        settings   everything that decides the output's bytes; must equal those of the run to go on with
        Raises UsageError if another process works there or the settings differ.
        """
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            journal = cls(out)
            journal.folder.mkdir(exist_ok=True)
            earlier = journal.get(SETTINGS)
            if earlier is None:
                for record in filter(Path.is_file, journal.folder.iterdir()):
                    record.unlink()  # of steps whose settings nobody knows
                journal.put(SETTINGS, settings)
            else:
                check_settings(str(out), earlier, settings)
            yield journal

    def get(self, step: str) -> dict[str, Any] | None:
        """The record of a finished step, None if it is not finished."""
        try:
            record = json.loads((self.folder / f"{step}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def put(self, step: str, record: dict[str, Any]) -> None:
        """Note a step as finished; its data must be safe on the disk already."""
        with atomic_file(self.folder / f"{step}.json") as file:
            file.write(json.dumps(record).encode())

    def remove(self) -> None:
        """Delete the journal: the conversion is complete but for the manifest's rename."""
        shutil.rmtree(self.folder)


def check_settings(out: str, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise UsageError naming what differs where an unfinished conversion had other settings."""
    if earlier != settings:
        changed = sorted(key for key in {*earlier, *settings} if earlier.get(key) != settings.get(key))
        found = " and ".join(f"{'other' if key == 'arguments' else 'another'} {key}" for key in changed)
        raise UsageError(
            f"{out}: holds an unfinished conversion with {found}"
            f"{_name_differences(earlier, settings)}: repeat its command, or start over with --overwrite"
        )


def _name_differences(earlier: dict[str, Any], settings: dict[str, Any]) -> str:
    """ " (bits 2, now 4)" for the arguments that changed, and the names of source files that did."""
    texts: list[str] = []
    for group, with_values in (("arguments", True), ("source", False)):
        before, now = earlier.get(group) or {}, settings.get(group) or {}
        if not isinstance(before, dict):  # damaged
            continue
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        texts += [f"{key} {before.get(key)}, now {now.get(key)}" if with_values else key for key in keys]
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return f" ({'; '.join(texts[:4])}{more})" if texts else ""


def finish_interrupted_manifest(out: Path) -> None:
    """Complete a conversion that was killed between writing its manifest and renaming it; else do nothing."""
    partial = out / (MANIFEST_NAME + PARTIAL_SUFFIX)
    if not partial.exists():
        return
    with locked(out):
        try:
            Manifest.from_bytes(partial.read_bytes(), partial)
        except (OSError, PackError):  # not whole: the journal knows what is left to do
            return
        shutil.rmtree(out / JOURNAL_NAME, ignore_errors=True)
        finish_partial(out / MANIFEST_NAME)
