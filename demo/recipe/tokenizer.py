"""Train the tokenizer: byte-level BPE with 4096 entries, split like Qwen3.5 (digits stand alone).

    python tokenizer.py text.jsonl tokenizer.json

An eighth of the prose and 9000 generated conversations are enough for so few entries. The special tokens and
their order are Qwen's, so that a runtime finds the ones it looks for; the demo model uses the first three.
Short texts do not yield 4096 entries, which is refused: model and tokenizer must have the same size.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from chat_format import Conversation, join_text
from config import Config
from conversations import plain_chat, tool_chat

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
MARKERS = [  # one token each, but kept when text is decoded
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
_ANY_MARKER = re.compile(r"<\|.*?\|>|</?think>|</?tool_\w+>")
PLAIN_CHATS, TOOL_CHATS = 6000, 3000


def training_texts(chapters: list[str]) -> Iterator[str]:
    """Yield prose, then conversations without their markers, which are never merged with anything."""
    yield from chapters
    rng = Random(0)

    def text(conversation: Conversation) -> str:
        return _ANY_MARKER.sub("", join_text(conversation.segments()))

    for _ in range(PLAIN_CHATS):
        yield text(plain_chat(rng))
    for _ in range(TOOL_CHATS):
        yield text(tool_chat(rng))


def train_tokenizer(chapters: list[str]) -> Tokenizer:
    """Return a tokenizer trained on these chapters and on conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    learned = Config().vocab_size - len(SPECIAL_TOKENS) - len(MARKERS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=learned, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training_texts(chapters), trainer)
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    return tokenizer


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="text.jsonl of corpus.py")
    parser.add_argument("out", type=Path, help="tokenizer.json")
    args = parser.parse_args()
    with open(args.text, encoding="utf-8") as file:
        chapters = [chapter["text"] for chapter in map(json.loads, file) if not chapter["held_out"]]
    Random(5).shuffle(chapters)
    tokenizer = train_tokenizer(chapters[::8])
    size, wanted = tokenizer.get_vocab_size(), Config().vocab_size
    if size != wanted:
        raise SystemExit(f"{args.text}: gives {size} tokens, expected {wanted}: train on more text")
    tokenizer.save(str(args.out))


if __name__ == "__main__":
    main()
