"""Every error a user can cause or meet, with the exit code it ends a command with.

One line each: where, what was expected, what was found, what to do next. The command line prints a MoepackError and
exits with its code; any other exception is our own bug and keeps its traceback.

    raise DamagedPack("pack/experts/layer_07.bin", "sha256 is 9f2c…, the manifest says 41ab…", layer=7, expert=31)
"""

from __future__ import annotations

from pathlib import Path

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DAMAGED = 3
EXIT_UNSUPPORTED = 4
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class MoepackError(Exception):
    """Root of the project's errors: something outside the program is not as it must be."""

    exit_code = EXIT_FAILED


class UsageError(MoepackError):
    """The request itself cannot be met: a bad option, a prompt that is too long, an impossible value."""

    exit_code = EXIT_USAGE


class Interrupted(MoepackError):
    """The user pressed Ctrl-C; the text says what is kept and how to go on."""

    exit_code = EXIT_INTERRUPTED


class CheckpointError(MoepackError):
    """The source checkpoint lacks something, holds something unexpected, or is damaged."""


class CalibrationError(MoepackError):
    """A calibration file is damaged or belongs to another model."""


class NotEnoughSpace(MoepackError):
    """The disk cannot hold what is to be written."""


class WriteError(MoepackError):
    """The disk refuses what is to be written, and not for want of space."""


class MemoryBudgetError(MoepackError):
    """The memory budget cannot hold what must be in memory."""


class PackError(MoepackError):
    """A pack cannot be used as it is. `file` is the path it concerns."""

    def __init__(self, file: str | Path, message: str):
        self.file = str(file)
        super().__init__(f"{file}: {message}")


class DamagedPack(PackError):
    """A pack's bytes are not what its writer wrote, or were not written by the rules of FORMAT.md.

    layer, expert, offset_bytes   the block it concerns, where there is one
    """

    exit_code = EXIT_DAMAGED

    def __init__(
        self,
        file: str | Path,
        message: str,
        *,
        layer: int | None = None,
        expert: int | None = None,
        offset_bytes: int | None = None,
    ):
        self.layer, self.expert, self.offset_bytes = layer, expert, offset_bytes
        places = (("layer", layer), ("expert", expert), ("at byte", offset_bytes))
        place = " ".join(f"{name} {value}" for name, value in places if value is not None)
        super().__init__(file, f"{place}: {message}" if place else message)


class UnsupportedVersion(PackError):
    """The pack was written by a later format than this program reads."""

    exit_code = EXIT_UNSUPPORTED

    def __init__(self, file: str | Path, found: int, supported: int):
        self.found, self.supported = found, supported
        super().__init__(
            file,
            f"format version {found}, but this moepack reads version {supported}: install a newer moepack "
            "or convert the model again",
        )
