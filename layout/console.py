"""What the three commands share: exit codes, one-line errors, progress on stderr, JSON on stdout.

The one module of layout/ beside cli.py that may import the command-line libraries: the commands of the other folders
use it too, and nothing that is not a command does.

    app = create_app("moe-inspect")
    run_app(app)
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

import typer
from tqdm import tqdm

from moepack.layout.errors import EXIT_FAILED, EXIT_INTERRUPTED, MoepackError
from moepack.layout.report import format_table

EXIT_CODES = """Exit codes: 0 well, 1 failed, 2 usage, 3 damaged pack, 4 unsupported format version, 130 interrupted."""
# Every error of parsing; typer exports only this child of it.
CommandLineError: type[Any] = typer.BadParameter.__bases__[0]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"moepack {version('moepack')}")
        raise typer.Exit


VERSION = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit.")


def create_app(name: str) -> typer.Typer:
    """A Typer application with shell completion."""
    return typer.Typer(name=name, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def run_app(app: typer.Typer) -> NoReturn:
    """Run a command: a MoepackError becomes one line on stderr and its exit code, Ctrl-C exit code 130."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as in `2>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False) or 0
        if code == EXIT_INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            raise KeyboardInterrupt
        sys.exit(code)
    except MoepackError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except CommandLineError as error:
        error.show()
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as in `moe-inspect show PACK | head`
        sys.stderr.close()
        sys.exit(EXIT_FAILED)
    except OSError as error:  # what no part of the program could say more about than the system does
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def open_progress(total: int, title: str, unit: str = "B", shown: bool = True) -> tqdm:
    """A progress bar on stderr with rate and time left; rare lines where stderr is no terminal."""
    return tqdm(
        total=total,
        disable=not shown,
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        unit_divisor=1024,
        file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 5,
        dynamic_ncols=True,
    )


def log(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False))


def print_lines(lines: Sequence[str]) -> None:
    """Lines on stdout."""
    print("\n".join(lines))


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Rows of equal length on stdout: the first row is the heading, columns after the first stand to the right."""
    print("\n".join(format_table(rows)))
