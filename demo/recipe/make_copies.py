"""Write chats in which a list of words is said again: text for moe-run calibrate --text, for prose has no copies.

    python make_copies.py ../checkpoint copies.txt --count 10000 --seed 1

A list has 4 to 64 words, either of the tokenizer's own (one token each after a blank) or made up. No request is the one
that moe-run eval --recall asks with, and words are drawn anew for every chat.
"""

import argparse
import json
from pathlib import Path
from random import Random

from chat_format import Conversation, join_text
from moepack.runtime.recall import list_words
from moepack.runtime.tokenizer import Tokenizer

REQUESTS = (
    "Say these words again: {}",
    "Please write this list once more: {}",
    "Copy the following exactly: {}",
    "{}\n\nNow give me the same words in the same order.",
    "Recite: {}",
    "What did I say? I said: {}",
    "Echo this back to me: {}",
)
SEPARATORS = (" ", ", ", "\n", "; ")
FEWEST, MOST = 4, 64  # words of a list
MADE_UP = 0.4  # the share of lists of words that no tokenizer knows
AS_JSON = 0.2  # the share of lists that are written as JSON
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def make_up(rng: Random) -> str:
    """A word of two to four syllables. vocabulary.made_up_word is not for this: it makes words of scored prompts."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 4)))


def copy_chat(rng: Random, words: list[str]) -> Conversation:
    """One request to say a list again, and the list."""
    count = round(FEWEST * (MOST / FEWEST) ** rng.random())  # as many short lists as long ones, by their logarithm
    is_made_up = rng.random() < MADE_UP
    chosen = [make_up(rng) if is_made_up else rng.choice(words) for _ in range(count)]
    passage = json.dumps(chosen) if rng.random() < AS_JSON else rng.choice(SEPARATORS).join(chosen)
    chat = Conversation(thinking=False)
    chat.ask(rng.choice(REQUESTS).format(passage))
    chat.reply("", passage)
    return chat


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="whose tokenizer the words are of")
    parser.add_argument("out", type=Path, help="text file to write")
    parser.add_argument("--count", type=int, default=10_000, help="chats")
    parser.add_argument("--seed", type=int, default=1, help="the same seed writes the same file")
    args = parser.parse_args()
    rng, words = Random(args.seed), sorted(list_words(Tokenizer.load(args.checkpoint)))
    chats = (join_text(copy_chat(rng, words).segments()) for _ in range(args.count))
    args.out.write_text("".join(chats), encoding="utf-8")


if __name__ == "__main__":
    main()
