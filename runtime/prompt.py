"""From what a user gives on the command line to the token ids of a prompt.

read_prompt(tokenizer, template, PromptSource(text="Hello"))
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from moepack.layout.errors import UsageError
from moepack.runtime.chat import ChatTemplate
from moepack.runtime.tokenizer import Tokenizer

STDIN = Path("-")


@dataclass(frozen=True)
class PromptSource:
    """Exactly one of text, file and token_ids. raw: without the chat template; think: None is its own choice."""

    text: str | None = None
    file: Path | None = None
    token_ids: Path | None = None
    raw: bool = False
    system: str | None = None
    think: bool | None = None


def read_prompt(tokenizer: Tokenizer, template: ChatTemplate | None, source: PromptSource) -> list[int]:
    """Token ids of a prompt. Raises UsageError if it cannot be read or needs a template that is not there."""
    given = [part for part in (source.text, source.file, source.token_ids) if part is not None]
    if len(given) != 1:
        raise UsageError(f"expected one of PROMPT, --prompt-file and --token-ids, found {len(given)}")
    without = "--raw" if source.raw else "--token-ids"
    if (source.raw or source.token_ids is not None) and (source.system is not None or source.think is not None):
        ignored = "--think" if source.system is None else "--system"
        raise UsageError(f"{ignored} is of the chat template, {without} goes without it: leave one of them out")
    if source.token_ids is not None:
        return parse_token_ids(read_text(source.token_ids), source.token_ids)
    text = source.text if source.file is None else read_text(source.file)
    assert text is not None
    if source.raw:
        return tokenizer.encode(text)
    if template is None:
        raise UsageError("the pack has no chat template: use --raw to feed the prompt as it is")
    messages = [{"role": "system", "content": source.system}] if source.system else []
    thinking: dict[str, Any] = {} if source.think is None else {"enable_thinking": source.think}
    return tokenizer.encode(template.render([*messages, {"role": "user", "content": text}], **thinking))


def common_beginning(encode: Callable[[str], list[int]], prompts: Iterable[str]) -> list[int]:
    """The token ids that all of several prompts begin with."""
    columns = zip(*map(encode, prompts))
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns)]


def parse_token_ids(text: str, where: Path) -> list[int]:
    """Token ids from a JSON list or from numbers between blanks. Raises UsageError."""
    try:
        values = json.loads(text) if text.lstrip().startswith("[") else [_digits(word) for word in text.split()]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: expected a JSON list of token ids or numbers between blanks: {error}") from None
    if not all(type(value) is int for value in values):
        raise UsageError(f"{where}: expected integers, found {str(values)[:60]}")
    return list(values)


def _digits(word: str) -> int:
    if not (word.isascii() and word.isdigit()):
        raise ValueError(f"{word[:20]!r} is no number")
    return int(word)


def read_text(path: Path) -> str:
    """A UTF-8 text file, or standard input for "-". Raises UsageError."""
    if path == STDIN and sys.stdin is None:
        raise UsageError("standard input is closed: nothing to read")
    try:
        raw = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text (byte {error.start})") from None
