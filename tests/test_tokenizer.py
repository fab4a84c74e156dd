"""The tokenizer: ids to text as a stream and at once, the ids that end an answer, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from moepack.layout.errors import MoepackError, UsageError
from moepack.runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
END, TURN_END, THINK, TOOL_CALL = 4070, 4072, 4094, 4084  # <|endoftext|>, <|im_end|>, <think>, <tool_call>
TEXTS = [
    "",
    "Hello, world",
    " leading and trailing ",
    "Grüße aus Zürich, naïve café",
    "日本語の文章です。",
    "emoji 👩‍👩‍👧‍👦🇳🇴 and ​zero width",
    "tabs\tand\n\n\nlines\r\n",
    "0123456789",
    "<think>\nso\n</think>\n\n<tool_call>\n<function=f>\n</function>\n</tool_call>",
]
tokenizer = Tokenizer.load(DEMO)
library = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
byte_ids = [i for token, i in library.get_vocab().items() if len(token) == 1]  # tokens of one byte
any_id = st.integers(0, 4100) | st.sampled_from(byte_ids) | st.sampled_from([END, TURN_END, THINK, TOOL_CALL])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copyfile(DEMO / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_any_text_encodes_as_the_library_does(text: str) -> None:
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_encode_recognises_special_tokens_and_adds_nothing() -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.encode("<|im_end|><think>") == [TURN_END, THINK]


def test_decode_skips_special_tokens_only() -> None:
    assert tokenizer.decode([TURN_END, THINK, END, TOOL_CALL]) == "<think><tool_call>"


def test_ids_without_a_token_decode_to_nothing() -> None:
    assert tokenizer.vocab_size == 4096
    assert tokenizer.decode([4096, 248319, -1, 10**12]) == ""


@given(st.lists(any_id, max_size=40))
def test_stream_equals_decode_equals_library(ids: list[int]) -> None:
    decoder = tokenizer.decoder()
    text = "".join([decoder.push(i) for i in ids]) + decoder.finish()
    assert text == tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


@given(st.text())
def test_stream_of_bytes_shows_a_character_when_it_is_whole(text: str) -> None:
    decoder, alphabet = tokenizer.decoder(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in text:
        [(word, _)] = alphabet.pre_tokenize_str(character)
        *first, last = [library.token_to_id(token) for token in word]
        assert [decoder.push(i) for i in first] == [""] * len(first)
        assert decoder.push(last) == character
    assert decoder.finish() == ""


def test_stream_gives_up_a_broken_character_once() -> None:
    first, second, _ = [library.token_to_id(token) for token in "æ¼¢"]  # the bytes of 漢
    decoder = tokenizer.decoder()
    assert [decoder.push(first), decoder.push(TURN_END), decoder.push(second)] == ["", "", ""]
    assert decoder.push(THINK) == "�<think>"
    assert decoder.push(first) + decoder.finish() == "�"


def test_added_tokens_are_their_own_text(directory: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken("é long", normalized=False)])  # é alone is byte 0xE9 of the alphabet
    backend.save(str(directory / "tokenizer.json"))
    grown = Tokenizer.load(directory)
    assert grown.vocab_size == 4097
    assert grown.decode([4096]) == "é long"


def test_truncation_and_padding_of_the_file_are_off(directory: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(directory / "tokenizer.json"))
    text = "one two three four five six seven"
    assert Tokenizer.load(directory).encode(text) == tokenizer.encode(text)


def test_a_begin_token_of_the_file_is_not_added(directory: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END)])
    backend.save(str(directory / "tokenizer.json"))
    assert backend.encode("Hello").ids[0] == END
    assert Tokenizer.load(directory).encode("Hello") == tokenizer.encode("Hello")


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(UsageError, match="not valid Unicode at character 2"):
        tokenizer.encode("ab\udc80")


def test_end_tokens_come_from_every_file(directory: Path) -> None:
    assert tokenizer.stop_token_ids == {END, TURN_END}
    edit(directory / "generation_config.json", eos_token_id=11)
    config = json.loads((directory / "config.json").read_text())
    edit(directory / "config.json", eos_token_id=[12, 13], text_config=config["text_config"] | {"eos_token_id": 14})
    edit(directory / "tokenizer_config.json", eos_token={"content": "<think>"})
    assert Tokenizer.load(directory).stop_token_ids == {11, 12, 13, 14, THINK}


def test_optional_files_may_be_missing(directory: Path) -> None:
    (directory / "generation_config.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    assert Tokenizer.load(directory).stop_token_ids == {END}  # of config.json


def test_vision_tokens(directory: Path) -> None:
    assert tokenizer.vision_token_ids == {4079, 4080, 4082, 4083}
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config["text_config"]))  # a text-only release
    flat = Tokenizer.load(directory)
    assert (flat.vision_token_ids, flat.stop_token_ids) == (frozenset(), {END, TURN_END})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "No such file or directory: copy it from the checkpoint"),
        ("tokenizer.json", b'{"version": "1.0"}', "not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not a tokenizer"),
        ("config.json", None, "not found: copy it from the checkpoint"),
        ("config.json", b"{", "not JSON"),
        ("config.json", b'{"eos_token_id": "<|im_end|>"}', "eos_token_id must be a token id"),
        ("config.json", b'{"eos_token_id": [true]}', "eos_token_id must be a token id"),
        ("generation_config.json", b"[]", "expected a JSON object, found list"),
        ("tokenizer_config.json", b"\xff", "not JSON"),
    ],
)
def test_bad_files_are_named(directory: Path, name: str, content: bytes | None, message: str) -> None:
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(MoepackError, match=message) as caught:
        Tokenizer.load(directory)
    assert str(caught.value).startswith(str(directory / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("decoder", "found"),
    [
        (None, "none"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), "Replace.ByteF"),
    ],
)
def test_other_kinds_of_tokenizer_are_refused(directory: Path, decoder: Any, found: str) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    backend.save(str(directory / "tokenizer.json"))
    with pytest.raises(MoepackError, match=f"expected a byte-level tokenizer .*, found {found}"):
        Tokenizer.load(directory)


@pytest.mark.parity
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(text: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install moepack[parity]")
    theirs = transformers.AutoTokenizer.from_pretrained(DEMO)
    ids = theirs.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode([*ids, TURN_END]) == theirs.decode([*ids, TURN_END], skip_special_tokens=True)
