"""Who may import whom, held over the syntax trees of all files: the architecture as a test.

    convert ──► layout ◄── kernels ◄── runtime ──► layout        convert ──► kernels

layout needs the standard library and numpy alone, so that a pack can be read without torch. A cli.py may import
anything, and no package imports a cli.py.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("convert", "kernels", "layout", "runtime")
OTHERS = ("tests", "benchmarks", "demo")  # they may import every package, by its full name
MAY_IMPORT = {
    "layout": {"layout"},
    "kernels": {"kernels", "layout"},
    "convert": {"convert", "kernels", "layout"},
    "runtime": {"kernels", "layout", "runtime"},
}
THIRD_PARTY = {"layout": {"numpy"}, "kernels": {"numpy", "torch", "cuda"}}  # the others are held by HOMES alone
# Traces are compressed as they are written. Nothing that reads a pack imports this file but the store that fills it.
PICTURE_FILE = "layout/picture.py"  # draws with the extra `plot`, imported when something is drawn
COMPRESSION_FILE = "layout/trace_file.py"
COMMAND_LINE = {"tqdm", "typer"}
HOMES = {
    "cuda": "kernels/cuda_device.py",
    "tokenizers": "runtime/tokenizer.py",
    "jinja2": "runtime/chat.py",
    "llguidance": "runtime/constrain.py",
    "prometheus_client": "runtime/metrics.py",
    "fastapi": "runtime/server.py",
    "lm_eval": "runtime/harness.py",
}
CONSOLE, CONSOLE_FILE = "moepack.layout.console", "layout/console.py"
MAX_LINES = 600


@cache
def read_files(*folders: str) -> dict[str, str]:
    """Path from the root -> text of every Python file in these folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


@cache
def list_imports(file: str) -> tuple[tuple[int, str], ...]:
    """(line, full name of a module or of something in one) for every import, wherever in the file it stands."""
    return tuple(_walk_imports(ast.parse(read_files(file.split("/")[0])[file], file)))


def _walk_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def check(files: dict[str, str], is_wrong: Callable[[str, str], bool], rule: str) -> None:
    """Fail with every import that breaks the rule."""
    wrong = [f"{file}:{line}: {name}" for file in files for line, name in list_imports(file) if is_wrong(file, name)]
    assert not wrong, f"{rule}:\n" + "\n".join(wrong)


def top_of(name: str) -> str:
    return name.split(".")[0]


def package_of(name: str) -> str | None:
    """The package of ours that an imported name lies in: layout of moepack.layout.reader."""
    parts = name.split(".")
    return parts[1] if parts[0] == "moepack" and len(parts) > 1 else None


def is_third_party(name: str) -> bool:
    return top_of(name) not in sys.stdlib_module_names and top_of(name) not in ("moepack", "__future__", "")


def is_command(file: str) -> bool:
    return file.endswith("/cli.py")


def test_the_files_are_found() -> None:
    """The other tests would be silent if they looked in the wrong place."""
    assert all(f"{package}/__init__.py" in read_files(package) for package in PACKAGES)
    assert "moepack.layout.errors.DamagedPack" in {name for _, name in list_imports("layout/reader.py")}
    assert {"layout/console.py", "layout/cli.py", "convert/cli.py", "runtime/cli.py"} <= set(read_files(*PACKAGES))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_in_one_direction(package: str) -> None:
    allowed = MAY_IMPORT[package]

    def is_wrong(file: str, name: str) -> bool:
        return not is_command(file) and package_of(name) not in (None, *allowed)

    check(read_files(package), is_wrong, f"{package} may import {', '.join(sorted(allowed))}")


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_third_party_imports_are_few(package: str) -> None:
    def is_wrong(file: str, name: str) -> bool:
        extra = COMMAND_LINE if is_command(file) or file == CONSOLE_FILE else set()
        extra = extra | ({"matplotlib"} if file == PICTURE_FILE else set())
        extra = extra | ({"zstandard"} if file == COMPRESSION_FILE else set())
        allowed = THIRD_PARTY[package] | extra | ({"torch"} if is_command(file) else set())
        return is_third_party(name) and top_of(name) not in allowed

    check(read_files(package), is_wrong, f"{package} needs the standard library and {THIRD_PARTY[package]}")


def test_command_line_libraries_stay_in_commands() -> None:
    def is_wrong(file: str, name: str) -> bool:
        return top_of(name) in COMMAND_LINE and not is_command(file) and file != CONSOLE_FILE

    check(read_files(*PACKAGES), is_wrong, "typer and tqdm are imported by cli.py files and layout/console.py")


def test_commands_are_imported_by_nobody() -> None:
    def is_wrong(file: str, name: str) -> bool:
        return name.startswith("moepack.") and "cli" in name.split(".")

    check(read_files(*PACKAGES, "benchmarks", "demo"), is_wrong, "nothing imports a cli.py")


def test_the_console_is_for_commands() -> None:
    def is_wrong(file: str, name: str) -> bool:
        return f"{name}.".startswith(f"{CONSOLE}.") and not is_command(file)

    check(read_files(*PACKAGES), is_wrong, "layout/console.py is imported by cli.py files")


def test_names_are_absolute_and_full() -> None:
    """A bare `import layout` would load a second copy of each class, and except and isinstance would miss it."""

    def is_wrong(file: str, name: str) -> bool:
        return top_of(name) in PACKAGES or name.startswith(".") or name == "moepack"

    check(read_files(*PACKAGES, *OTHERS), is_wrong, "packages are imported as moepack.<package>")


@pytest.mark.parametrize("library", HOMES)
def test_some_libraries_have_one_home(library: str) -> None:
    def is_wrong(file: str, name: str) -> bool:
        return top_of(name) == library and file != HOMES[library]

    check(read_files(*PACKAGES), is_wrong, f"{library} is imported in {HOMES[library]} alone")


def test_nothing_imports_tests() -> None:
    modules = {Path(file).stem for file in read_files("tests")}

    def is_wrong(file: str, name: str) -> bool:
        return top_of(name) == "tests" or top_of(name) in modules - {"conftest"}

    check(read_files(*PACKAGES), is_wrong, "packages do not import tests")


def test_files_are_short() -> None:
    long = {
        file: text.count("\n") for file, text in read_files(*PACKAGES, *OTHERS).items() if text.count("\n") > MAX_LINES
    }
    assert not long, f"files of more than {MAX_LINES} lines: name their parts and split them"
