"""Names of files that are no UTF-8: every command takes them, and says them without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convert_command import SMALL
from tiny_checkpoint import write_checkpoint

ODD = os.fsdecode(b"caf\xe9")
SHOWN = "caf\\udce9"


def run(command: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command as a shell starts it, its output as a terminal of UTF-8 reads it."""
    program = Path(sys.executable).with_name(command)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    ended = subprocess.run(
        [program, *map(str, arguments)], env=environment, capture_output=True, encoding="utf-8", timeout=120
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (code, False), ended.stderr
    return ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `source`, both under such a name."""
    folder = tmp_path_factory.mktemp("odd") / ODD
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    plain = write_checkpoint(folder.parent / "plain", SMALL)  # the tokenizers library writes to UTF-8 names only
    plain.rename(folder / f"source-{ODD}")
    return folder


def test_every_command_takes_a_name_that_is_no_utf8(folder: Path) -> None:
    source, pack = folder / f"source-{ODD}", folder / f"pack-{ODD}"
    facts = json.loads(run("moe-convert", source, pack, "--group-size", 32, "--json").stdout)
    assert facts["pack"] == str(pack)
    again = run("moe-convert", source, pack, "--group-size", 32)
    assert f"{SHOWN}: converted already" in again.stderr
    shown = run("moe-inspect", "verify", pack, "--source", source)
    assert f"pack-{SHOWN}: well (" in shown.stdout
    assert f"against {folder.parent}/{SHOWN}/source-{SHOWN}" in shown.stdout
    assert run("moe-inspect", "show", pack).stdout.startswith(f"{folder.parent}/{SHOWN}/pack-{SHOWN}: qwen3_5_moe")
    prompt = folder / "ids.json"
    prompt.write_text("[1, 2, 3]")
    trace = folder / f"run-{ODD}.trace"
    generate = ("generate", pack, "--token-ids", prompt, "--max-tokens", 3, "--trace", trace, "--json")
    assert len(json.loads(run("moe-run", *generate).stdout)["token_ids"]) <= 3
    assert f"run-{SHOWN}.trace: " in run("moe-inspect", "trace", trace).stdout
    archive = folder / f"pack-{ODD}.tar.zst"
    run("moe-convert", pack, archive, "--to", "archive")
    run("moe-convert", archive, folder / f"unpacked-{ODD}")
    assert "the same" in run("moe-inspect", "diff", pack, folder / f"unpacked-{ODD}").stdout


def test_errors_name_it_in_one_line(folder: Path) -> None:
    missing = run("moe-convert", folder / f"none-{ODD}", folder / "out", code=1)
    assert missing.stderr.startswith(f"error: {folder.parent}/{SHOWN}/none-{SHOWN}: no such directory")
    refused = run("moe-run", "generate", folder / f"none-{ODD}", "hello", code=3)
    assert f"none-{SHOWN}/manifest.json: cannot be read" in refused.stderr
