"""Answers: reasoning, text and tool calls, read whole and in pieces, and nothing that a model writes is an error."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.runtime.answer import (
    AnswerParser,
    ArgumentsPiece,
    CallStart,
    Piece,
    ReasoningPiece,
    StopStrings,
    TextPiece,
    ToolCall,
    parse_tool_calls,
    split_reasoning,
    write_arguments,
)
from moepack.runtime.chat import ChatTemplate

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
HI: dict[str, Any] = {"role": "user", "content": "Hi"}


def written(name: str = "f", **parameters: str) -> str:
    """A call as the model writes it."""
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def tool(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"properties": properties, **more}}}


def test_answers_without_calls_are_left_alone() -> None:
    for text in ("", "Hello \n", "<tool_call>", "use <function=f> here", "a </tool_call> b"):
        assert parse_tool_calls(text, []) == (text, [])


def test_text_before_calls_and_the_calls_in_order() -> None:
    text = "Let me see.\n\n" + written(city="Oslo") + "\n" + written("g") + "\n"
    assert parse_tool_calls(text) == ("Let me see.", [ToolCall("f", {"city": "Oslo"}), ToolCall("g", {})])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>",
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n<parameter=b>\n2\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=a\n1\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=a>\n<tool_call>\n<function=g>\n</parameter>\n</function>\n</tool_call>",
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        "<tool_call>\n<function=f>\nsomething else\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=a>\n1",
    ],
)
def test_malformed_calls_stay_text(text: str) -> None:
    assert parse_tool_calls(text) == (text, [])
    good = ToolCall("g", {"x": "y"})
    assert parse_tool_calls(f"{text}\n{written('g', x='y')}") == (text, [good])
    before, calls = parse_tool_calls(f"A\n{written('g', x='y')}\n{text}")
    assert (before, calls) == (f"A\n{text}", [good])


def test_a_value_may_hold_markup_and_lines() -> None:
    value = "\n  <b>\n</parameter>\n</tool_call> <tool_call>\n </function> <function=x>\n\n"
    assert parse_tool_calls(written(code=value, last="")) == ("", [ToolCall("f", {"code": value, "last": ""})])


@pytest.mark.parametrize(
    ("schema", "raw", "expected"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "string"}, " spaced ", " spaced "),
        ({"type": "integer"}, "3", 3),
        ({"type": "integer"}, " -12 ", -12),
        ({"type": "integer"}, "3.0", 3),
        ({"type": "integer"}, "3.5", "3.5"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "integer"}, "three", "three"),
        ({"type": "integer"}, "9" * 5000, "9" * 5000),
        ({"type": "number"}, "3", 3),
        ({"type": "number"}, "2.5e3", 2500.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "null"}, "None", None),
        ({"type": "object"}, '{"a": [1, null], "b": "ü"}', {"a": [1, None], "b": "ü"}),
        ({"type": "object"}, '{"a": 1', '{"a": 1'),
        ({"type": "object"}, '{"a": Infinity}', '{"a": Infinity}'),
        ({"type": "object"}, '{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ({"type": "object"}, "[" * 100_000, "[" * 100_000),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "array"}, '{"a": 1}', '{"a": 1}'),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "3", "3"),
        ({"type": ["integer", "string"]}, "3", 3),
        ({"type": ["integer", "string"]}, "many", "many"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "None", None),
        ({"oneOf": [{"type": "array"}, {"type": "string"}]}, "[1]", [1]),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": True}, "True", True),
        ({"$ref": "#/$defs/Days"}, "3", 3),
        ({"$ref": "#/$defs/Self"}, "3", 3),
        ({"$ref": "#/$defs/Missing"}, "3", 3),
        ({}, "3", 3),
        ({}, "True", True),
        ({}, "text", "text"),
        ({}, '"text"', '"text"'),
        ({}, "007", "007"),
        (None, "[1]", [1]),
        ({"type": "surprise"}, "3", 3),
        ({"type": {"a": 1}}, "3", 3),
    ],
)
def test_values_are_typed_by_the_schema(schema: Any, raw: str, expected: Any) -> None:
    definitions = {"Days": {"type": "integer"}, "Self": {"anyOf": [{"$ref": "#/$defs/Self"}]}}
    _, [found] = parse_tool_calls(written(x=raw), [tool({"x": schema}, **{"$defs": definitions})])
    assert found.arguments == {"x": expected}
    assert type(found.arguments["x"]) is type(expected)


@pytest.mark.parametrize(
    "tools", [None, [], ["f"], [{}], [{"function": 3}], [{"name": "f"}], [tool({})], [{"name": "f", "parameters": 3}]]
)
def test_without_a_schema_values_are_read_as_json(tools: Any) -> None:
    assert parse_tool_calls(written(x="3", y="three"), tools)[1] == [ToolCall("f", {"x": 3, "y": "three"})]


def test_tools_without_the_outer_object_are_found() -> None:
    assert parse_tool_calls(written(x="3"), [tool({"x": {"type": "string"}})["function"]])[1][0].arguments == {"x": "3"}


pieces = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=x>", "</parameter>", "\n", "3", "text"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(pieces, max_size=30))
def test_any_answer_parses(parts: list[str]) -> None:
    text = "".join(parts)
    before, calls = parse_tool_calls(text, [tool({"x": {"type": "integer"}})])
    assert calls or before == text


@given(st.dictionaries(st.from_regex(r"[a-z]\w{0,8}", fullmatch=True), json_values | st.text(), max_size=4))
def test_calls_survive_the_template(arguments: dict[str, Any]) -> None:
    names = {bool: "boolean", int: "integer", float: "number", dict: "object", list: "array", str: "string"}
    schema = {key: {"type": names.get(type(value), "null")} for key, value in arguments.items()}
    history = [
        HI,
        {"role": "assistant", "content": "So:", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
    ]
    template = ChatTemplate.load(DEMO)
    assert template is not None
    answer = template.render(history, add_generation_prompt=False).partition("</think>\n\n")[2]
    assert parse_tool_calls(answer.removesuffix("<|im_end|>\n"), [tool(schema)]) == ("So:", [ToolCall("f", arguments)])


def test_many_open_calls_do_not_take_for_ever() -> None:
    text = "<tool_call><function=f><parameter=x>" * 3000
    assert parse_tool_calls(text) == (text, [])
    assert parse_tool_calls(text + "</parameter></function>")[1] == []


@pytest.mark.parametrize(
    ("text", "starts_inside", "expected"),
    [
        ("Hello", False, (None, "Hello")),
        ("hm\n</think>\n\nHello", True, ("hm", "Hello")),
        ("<think>\nhm\n</think>\n\nHello", False, ("hm", "Hello")),
        ("\n<think>\nhm\n</think>\n\nHello", True, ("hm", "Hello")),
        ("not done", True, ("not done", "")),
        ("<think>not done", False, ("not done", "")),
        ("\n</think>\n\nHello", True, (None, "Hello")),
        ("", True, (None, "")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("a</think>b", False, (None, "a</think>b")),
        ("say <think> aloud", False, (None, "say <think> aloud")),
    ],
)
def test_reasoning_is_split_off(text: str, starts_inside: bool, expected: tuple[str | None, str]) -> None:
    assert split_reasoning(text, starts_inside) == expected


# While it is being written

shreds = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=x>", "</parameter>", "<think>"),
        *("</think>", "\n", " ", "3", "text", "<", "</", "<tool_", "call>", "<parameter=", ">", written("f", x="3")),
        *(written("g") + "\n", "\n\n", "<function=", "=", "\u2003", "</parameter>\n</function>\n</tool_call>"),
    ]
)


def read(text: str, cuts: list[int], starts_inside: bool, tools: Any) -> list[Piece]:
    """The pieces of a text given in parts, joined where nothing of another kind lies between."""
    return join(push_all(AnswerParser(starts_inside, tools), text, cuts))


def push_all(parser: AnswerParser, text: str, cuts: list[int]) -> list[Piece]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [piece for a, b in itertools.pairwise(edges) for piece in parser.push(text[a:b])] + parser.finish()


def join(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece):
            joined[-1] = TextPiece(last.text + piece.text)
        elif isinstance(piece, ReasoningPiece) and isinstance(last, ReasoningPiece):
            joined[-1] = ReasoningPiece(last.text + piece.text)
        else:
            joined.append(piece)
    return joined


@pytest.mark.parametrize("starts_inside", [False, True])
@given(st.lists(shreds, max_size=14).map("".join), st.lists(st.integers(0, 400), max_size=12))
def test_any_cut_gives_the_same_answer(starts_inside: bool, text: str, cuts: list[int]) -> None:
    tools = [tool({"x": {"type": "integer"}})]
    whole = read(text, [], starts_inside, tools)
    assert read(text, cuts, starts_inside, tools) == whole
    assert read(text, list(range(len(text))), starts_inside, tools) == whole
    reasoning, answer = split_reasoning(text, starts_inside)
    rest, calls = parse_tool_calls(answer, tools)
    assert "".join(p.text for p in whole if isinstance(p, ReasoningPiece)) == (reasoning or "")
    assert "".join(p.text for p in whole if isinstance(p, TextPiece)) == rest
    assert [p for p in whole if isinstance(p, ToolCall)] == calls


def split_streamed(pieces: list[Piece]) -> tuple[list[Piece], list[str]]:
    """The pieces without those of calls that are not complete, and the arguments that were handed out in part.

    Checks that a call is opened once, and that what was handed out of it joins to its arguments.
    """
    others: list[Piece] = []
    streamed: list[str] = []
    is_open = False
    for piece in pieces:
        if isinstance(piece, CallStart):
            streamed.append("")
            is_open, name = True, piece.name
        elif isinstance(piece, ArgumentsPiece):
            assert is_open
            assert piece.text
            streamed[-1] += piece.text
        else:
            if isinstance(piece, ToolCall) and is_open:
                assert (piece.name, write_arguments(piece.arguments)) == (name, streamed[-1])
            is_open = is_open and isinstance(piece, ReasoningPiece)
            others.append(piece)
    return others, streamed


@given(st.lists(shreds, max_size=14).map("".join), st.lists(st.integers(0, 400), max_size=12))
def test_handing_calls_out_as_they_grow_changes_nothing_else(text: str, cuts: list[int]) -> None:
    """Whatever is written; a call that the end of the answer cuts is no text then."""
    tools = [tool({"x": {"type": "string"}})]
    for places in (cuts, list(range(len(text)))):
        parser = AnswerParser(False, tools)
        parser.streams_calls = True
        pieces = push_all(parser, text, places)
        others, _ = split_streamed(pieces)
        if not parser.in_streamed_call:
            assert join(others) == read(text, [], False, tools)


values = st.text(st.sampled_from('a"\\\n\t</pé\u2028\U0001f600=>') | st.characters(codec="utf-8"), max_size=30)


@given(
    st.dictionaries(st.sampled_from(["x", "y", "n", "either"]), values, max_size=4),
    st.lists(st.integers(0, 400), max_size=12),
)
def test_a_call_comes_in_pieces_of_its_arguments(raw: dict[str, str], cuts: list[int]) -> None:
    """Text character by character, but for what could be its end; everything else with its last one."""
    kinds = {"x": {"type": "string"}, "y": {"type": "string"}, "n": {"type": "number"}}
    tools, text = [tool({**kinds, "either": {}})], "Well. " + written("f", **raw)
    whole = read(text, [], False, tools)
    parser = AnswerParser(False, tools)
    parser.streams_calls = True
    others, streamed = split_streamed(push_all(parser, text, cuts))
    assert join(others) == whole
    parser = AnswerParser(False, tools)
    parser.streams_calls = True
    others, streamed = split_streamed(push_all(parser, text, list(range(len(text)))))
    if len(whole) == 2 and isinstance(whole[1], ToolCall):  # no value held a tag
        assert streamed == [write_arguments(whole[1].arguments)]


def test_text_of_a_call_comes_at_once_and_numbers_when_they_are_complete() -> None:
    parser = AnswerParser(False, [tool({"city": {"type": "string"}, "days": {"type": "integer"}})])
    parser.streams_calls = True
    assert parser.push("So:\n\n<tool_call>\n<function=f") == [TextPiece("So:")]
    assert parser.push(">\n<parameter=city>") == [CallStart("f"), ArgumentsPiece('{"city": "')]
    assert parser.push('\nNew "Y') == [ArgumentsPiece('New \\"Y')]
    assert parser.push("ork\n</par") == [ArgumentsPiece("ork")]
    assert parser.push("ameter>\n<parameter=days>\n1") == [ArgumentsPiece('"')]
    assert parser.push("2") == []
    assert parser.in_streamed_call
    assert parser.push("\n</parameter>\n</function>") == [ArgumentsPiece(', "days": 12')]
    call = ToolCall("f", {"city": 'New "York', "days": 12})
    assert parser.push("\n</tool_call>") == [ArgumentsPiece("}"), call]
    assert parser.finish() == []


def test_blanks_before_a_call_that_is_cut_are_not_told_behind_it() -> None:
    parser = AnswerParser(False, [tool({"city": {"type": "string"}})])
    parser.streams_calls = True
    assert parser.push("So:\n\n<tool_call>\n<function=f>\n")[0] == TextPiece("So:")
    assert parser.finish() == []


def test_pieces_come_as_soon_as_they_are_certain() -> None:
    parser = AnswerParser(True, [])
    assert parser.push("\nLet me") == [ReasoningPiece("Let me")]
    assert parser.in_reasoning
    assert parser.push(" see.\n</thi") == [ReasoningPiece(" see.")]
    assert parser.push("nk>\n\nHello ") == [TextPiece("Hello")]
    assert not parser.in_reasoning
    assert parser.push("<b>") == [TextPiece(" <b>")]
    assert parser.push("<tool_c") == []
    assert parser.push("ar> ") == [TextPiece("<tool_car>")]
    assert parser.push("<tool_call>\n<function=f>\n<parameter=x>\n3\n</parameter>\n</function>\n") == []
    assert parser.push("</tool_call>") == [ToolCall("f", {"x": 3})]
    assert parser.finish() == []


def test_what_cannot_become_a_call_is_text_at_once() -> None:
    for text in ("<tool_call>x", "<tool_call>\n{", "<tool_call><function=f>x", "<tool_call><function=f\n", CUT_CALL):
        assert "".join(p.text for p in AnswerParser(False, []).push(text) if isinstance(p, TextPiece)).strip()


CUT_CALL = "<tool_call><function=f><parameter=x>1</parameter></function>x"


def test_without_tools_calls_are_text() -> None:
    parser = AnswerParser(False)
    assert parser.push(written("f") + " ") == [TextPiece(written("f") + " ")]


def test_the_parser_is_quick_with_what_never_becomes_a_call() -> None:
    parse_tool_calls("<tool_call>" * 20_000)
    parser = AnswerParser(False, [])
    for _ in range(3000):
        parser.push("<tool_call> ")


@given(
    st.lists(st.sampled_from(["a", "b", "ab", "\n", "stop", "s"]), max_size=30).map("".join),
    st.lists(st.sampled_from(["ab", "b\n", "stop", "aba", "\n\n", "s"]), max_size=3),
    st.lists(st.integers(0, 100), max_size=10),
)
def test_a_stop_string_ends_the_text_wherever_it_is_cut(text: str, stop: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for parts in ([text], list(text), [text[a:b] for a, b in itertools.pairwise(edges)]):
        stops = StopStrings(stop)
        found = "".join(map(stops.push, parts)) + stops.push("", is_final=True)
        ends = [text.find(s) + len(s) for s in stop if s in text]
        assert (stops.found is not None) == bool(ends)
        assert found == (text[: min(ends) - len(stops.found)] if stops.found else text)
