"""The plain data beside the code: word lists, wordings and facts in data/, read once each.

Text that is only text lives in data/*.json and data/*.txt, so that the code shows the rules and the data the
words. The files are part of the project and are trusted: nothing here validates them.

    read_json("values.json")["cities"]
"""

import functools
import json
from pathlib import Path
from random import Random
from typing import Any

DATA = Path(__file__).resolve().parent / "data"


@functools.cache
def read_json(name: str) -> Any:
    """Return the parsed content of data/<name>; callers must not change it."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def read_lines(name: str) -> list[str]:
    """Return the lines of data/<name> that are neither empty nor a comment (first character #)."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def choose(rng: Random, options: list[str]) -> str:
    """Pick one of the wordings; a single one is taken without drawing a random number."""
    return options[0] if len(options) == 1 else rng.choice(options)
