"""Constrained answers: whatever the model would choose, what comes out is a call of a declared function that fits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepack.layout.errors import UsageError
from moepack.runtime.answer import ToolCall, parse_tool_calls
from moepack.runtime.constrain import AnswerConstraint, Grammars
from moepack.runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
VOCAB = 4096
tokenizer = Tokenizer.load(DEMO)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tokenizer, VOCAB)


def tool(name: str, properties: dict[str, Any], required: list[str], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("ping", {}, [], additionalProperties=False),
    tool(
        "order",
        {
            "note": {"type": "string"},
            "kind": {"type": "string", "enum": ["tea", "black coffee", "<b>"]},
            "count": {"type": "integer"},
            "now": {"type": "boolean"},
            "price": {"type": ["number", "null"]},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$", "maxLength": 8},
            "size": {"$ref": "#/$defs/Size"},
            "parts": {"type": "array", "items": {"type": "object", "properties": {"id": {"type": "string"}}}},
        },
        ["kind", "count", "now"],
        **{"$defs": {"Size": {"enum": ["S", "M", 40]}}},
    ),
]
TEXT = (
    "Oslo </parameter>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
    "a <tool_call>\n<function=ping>",
)


def write(constraint: AnswerConstraint, rng: random.Random, start: str = "", most: int = 1500) -> tuple[str, bool]:
    """An answer of a model that chooses at random among what is allowed, and does its best to break out of a value.

    Returns the text and whether it came to an end.
    """
    ids = tokenizer.encode(start)
    for token_id in ids:
        constraint.push(token_id)
    plot: list[int] = []
    for _ in range(most):
        allowed = constraint.list_allowed()
        assert allowed is not None
        assert allowed.any()
        if not plot and rng.random() < 0.05:
            plot = tokenizer.encode(rng.choice(TEXT))
        # Ends of values are what a random choice would never find.
        ends = [id_ for id_ in END_IDS if allowed[id_]]
        if plot and allowed[plot[0]]:
            token_id = plot.pop(0)
        else:
            plot = []
            token_id = rng.choice(ends) if ends and rng.random() < 0.6 else int(rng.choice(np.flatnonzero(allowed)))
        if token_id in tokenizer.stop_token_ids:
            return tokenizer.decode(ids), True
        constraint.push(token_id)
        ids.append(token_id)
    return tokenizer.decode(ids), False


END_IDS = list(dict.fromkeys(tokenizer.encode('\n</parameter>\n</function>\n</tool_call>"}],' + "0")))
END_IDS += sorted(tokenizer.stop_token_ids)


def check(call: ToolCall) -> None:
    """The call fits its tool's schema, written out."""
    if call.name == "ping":
        assert call.arguments == {}
        return
    assert call.name == "order"
    given = call.arguments
    assert {"kind", "count", "now"} <= given.keys() <= TOOLS[1]["function"]["parameters"]["properties"].keys()
    assert given["kind"] in ("tea", "black coffee", "<b>")
    assert type(given["count"]) is int
    assert type(given["now"]) is bool
    assert isinstance(given.get("note", ""), str)
    assert isinstance(given.get("price"), (int, float, type(None)))
    assert given.get("size", "S") in ("S", "M", 40)
    assert all(isinstance(part, dict) and isinstance(part.get("id", ""), str) for part in given.get("parts", []))
    if "code" in given:
        assert len(given["code"]) <= 8
        left, dash, digits = given["code"].partition("-")
        assert (len(left), dash, left.isupper(), digits.isdigit()) == (2, "-", True, True)


def test_a_random_model_writes_only_calls_that_fit(grammars: Grammars) -> None:
    whole = 0
    for seed in range(25):
        text, is_whole = write(AnswerConstraint(grammars, False, TOOLS, "required"), random.Random(seed))
        rest, calls = parse_tool_calls(text, TOOLS)
        for call in calls:
            check(call)
        if is_whole:
            assert calls
            assert rest == ""
            whole += 1
    assert whole > 5


def test_a_call_begun_in_free_text_is_held(grammars: Grammars) -> None:
    whole = 0
    for seed in range(8):
        constraint = AnswerConstraint(grammars, True, TOOLS, "auto")
        assert constraint.list_allowed() is None
        start = "Let me <tool_call> think.\n</think>\n\nOne moment.\n\n<tool_call>"
        text, is_whole = write(constraint, random.Random(seed), start)
        rest, calls = parse_tool_calls(text.partition("</think>\n\n")[2], TOOLS)
        for call in calls:
            check(call)
        if is_whole:
            assert calls
            assert rest == "One moment."
            whole += 1
    assert whole


def test_what_looks_like_a_call_inside_of_json_is_not_held_to_be_one(grammars: Grammars) -> None:
    constraint = AnswerConstraint(grammars, False, TOOLS, "auto", schema={})
    for token_id in tokenizer.encode('{"a": "<tool_call'):
        constraint.push(token_id)
    for token_id in tokenizer.encode(">\n<function=ping>"):
        constraint.push(token_id)
    assert not constraint.holds_call
    constraint = AnswerConstraint(grammars, False, TOOLS, "auto")
    for token_id in tokenizer.encode("So: <tool_call>\n<function=ping>\n"):
        constraint.push(token_id)
    assert constraint.holds_call


def test_what_an_answer_may_begin_with(grammars: Grammars) -> None:
    stop = next(iter(tokenizer.stop_token_ids))
    call_id = tokenizer.find("<tool_call>")
    assert call_id is not None
    required = AnswerConstraint(grammars, False, TOOLS, "required").list_allowed()
    assert required is not None
    assert required[call_id]
    assert not required[stop]
    thinking = AnswerConstraint(grammars, True, TOOLS, "required").list_allowed()
    assert thinking is not None
    assert not thinking[stop]
    assert thinking.sum() == VOCAB - len(tokenizer.stop_token_ids)
    none = AnswerConstraint(grammars, False, TOOLS, "none").list_allowed()
    assert none is not None
    assert not none[call_id]
    assert none.sum() == VOCAB - 1
    either = AnswerConstraint(grammars, False, TOOLS, "auto", schema={}).list_allowed()
    assert either is not None
    assert either[call_id]
    assert either[tokenizer.encode("{")[0]]


def test_a_named_function_is_called_once(grammars: Grammars) -> None:
    text, is_whole = write(AnswerConstraint(grammars, False, TOOLS, "ping"), random.Random(0))
    assert is_whole
    assert parse_tool_calls(text, TOOLS) == ("", [ToolCall("ping", {})])
    several = AnswerConstraint(grammars, False, TOOLS[:1], "required", parallel=False)
    assert parse_tool_calls(write(several, random.Random(1))[0], TOOLS)[1] == [ToolCall("ping", {})]


@pytest.mark.parametrize("seed", range(6))
def test_json_fits_its_schema(grammars: Grammars, seed: int) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", None]}}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    text, is_whole = write(AnswerConstraint(grammars, False, schema=schema), random.Random(seed))
    if is_whole:
        value = json.loads(text)
        assert type(value["a"]) is int
        assert value["b"] in ("x", None)


@pytest.mark.parametrize(
    ("schema", "given", "expected"),
    [
        ({}, "anything <b> \n at all", "anything <b> \n at all"),
        ({"type": "string"}, "a </par b", "a </par b"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": ["integer", "null"]}, "None", None),
        ({"type": "array", "items": {"type": "integer"}}, "[1, 2]", [1, 2]),
        ({"type": "object"}, '{"a": {"b": [true, "<x>"]}}', {"a": {"b": [True, "<x>"]}}),
        ({"type": "string", "minLength": 2, "maxLength": 3}, "abc", "abc"),
        ({"type": "string", "pattern": "b+"}, "abbc", "abbc"),
        ({"enum": [True, "x", 3]}, "True", True),
        ({"const": "only"}, "only", "only"),
        ({"type": "integer", "not": {"const": 3}}, "4", 4),  # "not" is one of the keywords that are left out
        ({"type": "object", "patternProperties": {"(?=x)": {}}}, "{}", {}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"type": "string", "format": "surprise"}, "x", "x"),
    ],
)
def test_what_the_template_would_write_is_allowed(grammars: Grammars, schema: Any, given: str, expected: Any) -> None:
    tools = [tool("f", {"x": schema}, ["x"])]
    constraint = AnswerConstraint(grammars, False, tools, "f")
    text = f"<tool_call>\n<function=f>\n<parameter=x>\n{given}\n</parameter>\n</function>\n</tool_call>"
    for token_id in tokenizer.encode(text):
        allowed = constraint.list_allowed()
        assert allowed is not None
        assert allowed[token_id], tokenizer.describe(token_id)
        constraint.push(token_id)
    assert parse_tool_calls(text, tools) == ("", [ToolCall("f", {"x": expected})])
    done = constraint.list_allowed()
    assert done is not None
    assert set(np.flatnonzero(done)) == tokenizer.stop_token_ids


def test_parameters_come_in_any_order(grammars: Grammars) -> None:
    constraint = AnswerConstraint(grammars, False, TOOLS, "required")
    values = (
        "<parameter=now>\nTrue\n</parameter>\n<parameter=count>\n2\n</parameter>\n<parameter=kind>\ntea\n</parameter>"
    )
    text = f"<tool_call>\n<function=order>\n{values}\n</function>\n</tool_call>\n<tool_call>\n<function=ping>\n"
    for token_id in tokenizer.encode(text):
        allowed = constraint.list_allowed()
        assert allowed is not None
        assert allowed[token_id], tokenizer.describe(token_id)
        constraint.push(token_id)


def test_a_schema_that_cannot_be_held_to_is_refused(grammars: Grammars) -> None:
    for schema in ({"type": "zebra"}, {"not": {"type": "object"}}, {"properties": {"a": {"pattern": "(?=x)"}}}):
        with pytest.raises(UsageError, match="response_format: this schema cannot be held to"):
            AnswerConstraint(grammars, False, schema=schema)
