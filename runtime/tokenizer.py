"""Text to token ids and back, by the tokenizer.json that the pack carries.

The only home of the `tokenizers` library. Decoding is done here, because a streamed answer needs it token by token: a
byte-level token is a run of bytes, and a character may begin in one token and end in the next, so bytes go through an
incremental UTF-8 decoder that holds back what is not yet certain. `decode` is that stream run to its end, which makes
the two the same by construction. Other kinds of tokenizer (SentencePiece, WordPiece) are refused.

    tokenizer = Tokenizer.load("model.moepack")
    tokenizer.decode(tokenizer.encode("Grüße"))
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from moepack.layout.errors import MoepackError, UsageError

TOKENIZER_NAME = "tokenizer.json"
PIECE_CHARACTERS = 2**15
PIECE_END = re.compile(r"\n(?=\S)")
VISION_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class Tokenizer:
    """A byte-level tokenizer and what the configs beside it say about its ids. Make one with Tokenizer.load.

    vocab_size         rows of the tokenizer: every id below it has a token. The model may have more, which are padding
    stop_token_ids     every id that ends an answer, from all the files that name one: they often disagree
    vision_token_ids   ids that stand for an image or a video, which a text model cannot read
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        stop_token_ids: Iterable[int] = (),
        vision_token_ids: Iterable[int] = (),
    ):
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._added_bytes = {i: b"" if token.special else token.content.encode() for i, token in added.items()}
        self.vocab_size: int = max([backend.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
        self.stop_token_ids = frozenset(stop_token_ids)
        self.vision_token_ids = frozenset(vision_token_ids)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read tokenizer.json and config.json, and tokenizer_config.json and generation_config.json if there.

        Raises MoepackError if a file is missing or unreadable, or the tokenizer is not byte-level.
        """
        directory = Path(directory)
        backend = _read_backend(directory / TOKENIZER_NAME)
        config_path = directory / "config.json"
        config = read_json_object(config_path)
        if config is None:
            raise MoepackError(f"{config_path}: not found: copy it from the checkpoint, it names the end tokens")
        text_config = config.get("text_config")
        tokenizer_config = read_json_object(directory / "tokenizer_config.json") or {}
        generation_path = directory / "generation_config.json"
        stop = _ids(generation_path, read_json_object(generation_path) or {}, "eos_token_id")
        for section in (config, text_config):
            stop |= _ids(config_path, section, "eos_token_id") if isinstance(section, dict) else set()
        eos_id = backend.token_to_id(token_text(tokenizer_config.get("eos_token")) or "")
        if eos_id is not None:
            stop.add(eos_id)
        vision = set[int]().union(*(_ids(config_path, config, key) for key in VISION_KEYS))
        return cls(backend, stop, vision)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens written in it are recognised; nothing is added (no BOS).

        Raises UsageError if the text has lone surrogates, as undecodable bytes of a command line become.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode at character {error.start}: give it as UTF-8") from None
        return [token_id for piece in self.encode_pieces(text) for token_id in piece]

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """The same ids piece by piece, because the library needs hundreds of bytes for each of a text.

        Pieces end at a line end before something that is no blank, where no token of this family goes across.
        """
        start = 0
        while start < len(text):
            cut = PIECE_END.search(text, min(len(text), start + PIECE_CHARACTERS))
            end = cut.end() if cut else len(text)
            yield self._backend.encode(text[start:end], add_special_tokens=False).ids
            start = end

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids without special tokens; <think>, <tool_call> and other added ones that are not special
        stay. Bytes that are not UTF-8 become U+FFFD, ids beyond the tokenizer's rows become nothing."""
        stream = self.decoder()
        return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()

    def decoder(self) -> TextStream:
        """A new stream that turns ids into text one by one."""
        return TextStream(self._token_bytes)

    def find(self, text: str) -> int | None:
        """The id of the token with this very text, as of an added token; None if there is none."""
        return self._backend.token_to_id(text)

    def describe(self, token_id: int) -> tuple[str, bytes]:
        """One token as text, special ones with their names, and the bytes that it adds to an answer."""
        content = self._token_bytes(token_id)
        name = self._backend.id_to_token(token_id) if not content and 0 <= token_id < self.vocab_size else None
        return name or content.decode(errors="replace"), content

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json, for libraries that bring their own reader."""
        return self._backend.to_str()

    def _token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            return b""
        added = self._added_bytes.get(token_id)
        if added is not None:
            return added
        token = self._backend.id_to_token(int(token_id)) or ""
        try:
            return bytes([_BYTE_OF_CHARACTER[character] for character in token])
        except KeyError:  # not in the byte alphabet, so the token was put into the vocabulary as plain text
            return token.encode()


class TextStream:
    """Text of a growing sequence of ids: the pushes and the finish, joined, are what `decode` gives."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that this id makes certain; empty while a character is incomplete."""
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never got complete, else nothing."""
        return self._utf8.decode(b"", final=True)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no such file. Raises MoepackError if it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MoepackError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise MoepackError(f"{path}: not JSON ({error}): copy it again from the checkpoint") from None
    if not isinstance(value, dict):
        raise MoepackError(f"{path}: expected a JSON object, found {type(value).__name__}: copy it from the checkpoint")
    return value


def token_text(token: object) -> str | None:
    """Text of a token as tokenizer_config.json names it: a string, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    """tokenizer.json, checked to be byte-level, without the truncation and padding that it may ask for."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MoepackError(f"{path}: {error.strerror}: copy it from the checkpoint of the model") from None
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())
        raise MoepackError(f"{path}: not a tokenizer ({reason}): copy it again from the checkpoint") from None
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    steps = [step.get("type") for step in decoder.get("decoders", [decoder])]
    if steps != ["ByteLevel"]:
        found = "+".join(map(str, steps)) if decoder else "none"
        raise MoepackError(f"{path}: expected a byte-level tokenizer (decoder ByteLevel), found {found}: not supported")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _ids(path: Path, config: dict[str, Any], key: str) -> set[int]:
    """Token ids under a key that may hold one, a list of them, or null."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise MoepackError(f"{path}: {key} must be a token id or a list of them, found {value!r}: correct it")
    return set(ids)


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, inverted.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and up in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
