"""Plain English sentences from a small grammar of the project's own: free text for messages and notes.

data/sentences.json holds patterns and the phrases that fill their slots; `{subject}` stands for any subject,
with a capital (`{Subject}`) where the slot begins a sentence. Millions of sentences are possible; they are
grammatical and mean little, which is all that a value to be copied needs.

    python -c "import random, sentences; print(sentences.plain_sentence(random.Random(1)))"
"""

import re
from random import Random

from data_files import read_json

SHORTEST, LONGEST = 20, 110  # characters
_GRAMMAR: dict[str, list[str]] = read_json("sentences.json")
_SLOT = re.compile(r"{(\w+)}")


def plain_sentence(rng: Random) -> str:
    """Return one sentence of 20 to 110 characters on one line."""

    def fill(slot: re.Match[str]) -> str:
        name = slot[1]
        phrase = rng.choice(_GRAMMAR[name.lower()])
        return phrase[0].upper() + phrase[1:] if name[0].isupper() else phrase

    while True:
        sentence = _SLOT.sub(fill, rng.choice(_GRAMMAR["patterns"]))
        if SHORTEST <= len(sentence) <= LONGEST:
            return sentence


def free_text(rng: Random) -> str:
    """Return what people put into a text field: a sentence, or two, some with a quotation or no full stop."""
    text = plain_sentence(rng)
    kind = rng.random()
    if kind < 0.12:  # quotation marks inside a value are what a caller has to escape
        words = text.split()
        i = rng.randrange(len(words))
        words[i] = f'"{words[i]}"'
        return " ".join(words)
    if kind < 0.18:
        return text + " " + plain_sentence(rng)
    if kind < 0.24:
        return text + "\n" + plain_sentence(rng)
    return text.rstrip(".!?") if kind < 0.34 else text
