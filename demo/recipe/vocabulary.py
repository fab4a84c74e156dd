"""The words that tools are made of, in three disjoint parts: `train`, `dev` and `test`.

Each pool (verbs, nouns, words, names, cities) gives a tenth of its entries to `dev` and a tenth to `test`. A
prompt of the dev split takes most of its words from the dev tenth, so it shows whether a model copies what
stands in the prompt or remembers its training. Names, cities and words are also made up on the spot, a
quarter of the time.

The split holds within a pool. Stories and small talk use common words freely.

    python -c "import random, vocabulary; print(vocabulary.pick(random.Random(1), 'word', 'dev'))"
"""

import re
from random import Random

from data_files import read_json, read_lines
from values import CITIES, FIRST_NAMES, LAST_NAMES

SPLITS = ("train", "dev", "test")
MADE_UP_SHARE = 0.25
_TOOL_WORDS = read_json("tool_words.json")
SPARE_PREFIXES: list[str] = _TOOL_WORDS["spare_prefixes"]
_COPIED_POOLS = ("word", "name", "city")  # pools whose entries are values: to be copied, not remembered


def _split_pool(entries: list[str]) -> dict[str, list[str]]:
    """Cut a pool into its three parts, by position and length so that neighbours and themes are spread."""
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for i, entry in enumerate(entries):
        digit = (i * 7919 + len(entry) * 31) % 10
        parts["dev" if digit == 3 else "test" if digit == 7 else "train"].append(entry)
    return parts


POOLS: dict[str, dict[str, list[str]]] = {
    "verb": _split_pool(_TOOL_WORDS["verbs"]),
    "noun": _split_pool(_TOOL_WORDS["nouns"]),
    "word": _split_pool([word for line in read_lines("words.txt") for word in line.split()]),
    "name": _split_pool(FIRST_NAMES),
    "city": _split_pool(CITIES),
}


def made_up_word(rng: Random) -> str:
    """Return a pronounceable word that means nothing."""
    if rng.random() < 0.5:
        parts = ["bcdfghjklmnprstvwz", "aeiou", ["", "", "n", "r", "s", "l", "t", "ck"]]
        return "".join(rng.choice(part) for _ in range(rng.randint(1, 3)) for part in parts)
    return "".join(rng.choice(_TOOL_WORDS["syllables"]) for _ in range(rng.randint(2, 4)))


def pick(rng: Random, pool: str, split: str) -> str:
    """Return a word of a pool; of `dev` and `test`, four in ten come from the training part all the same."""
    if pool in _COPIED_POOLS and rng.random() < MADE_UP_SHARE:
        word = made_up_word(rng)
        return word if pool == "word" else word.title()
    if split == "train" or rng.random() < 0.4:
        return rng.choice(POOLS[pool]["train"])
    return rng.choice(POOLS[pool][split])


def pick_words(rng: Random, split: str, fewest: int, most: int) -> str:
    """Return a few words of the word pool, separated by spaces."""
    return " ".join(pick(rng, "word", split) for _ in range(rng.randint(fewest, most)))


def person(rng: Random, split: str) -> str:
    """Return a first name, sometimes with a family name."""
    name = pick(rng, "name", split)
    return f"{name} {rng.choice(LAST_NAMES)}" if rng.random() < 0.4 else name


def spell_identifier(rng: Random, words: list[str]) -> str:
    """Join words as programmers do: mostly snake_case, also camelCase, PascalCase, kebab-case and dots."""
    parts = [part for word in words for part in re.split(r"[_ ]", word)]
    kind = rng.random()
    if kind < 0.62:
        return "_".join(parts)
    if kind < 0.82:
        return parts[0] + "".join(part.title() for part in parts[1:])
    if kind < 0.88:
        return "".join(part.title() for part in parts)
    if kind < 0.95:
        return "-".join(parts)
    return parts[0] + "." + "_".join(parts[1:]) if len(parts) > 1 else parts[0]


def article(noun: str) -> str:
    """Return the noun with `a` or `an` before it."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun
