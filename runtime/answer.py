"""An answer back to reasoning, text and tool calls, while it is being written.

The model writes its reasoning up to </think>, then text, then calls in the one form of its family: <tool_call> around
<function=NAME> around <parameter=KEY>. What is certain is handed out at once, what could still become a tag or a call
is held back, and whatever turns out not to have the form is text: nothing in here raises for what a model writes.
However the text is cut into pieces, those handed out join to the same answer. Forcing the form is constrain.py.

    parser = AnswerParser(opens_reasoning(prompt), tools)
    for piece in stream: show(parser.push(piece))       # ReasoningPiece, TextPiece, ToolCall
    show(parser.finish())

A call is handed out when it is complete. While parser.streams_calls is set, as it may be where the form is forced, one
that is begun is handed out as it grows: CallStart, ArgumentsPiece after ArgumentsPiece, and its ToolCall at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moepack.runtime.tool_schema import Tool, allowed_types, find_schema, read_value

THINK, THINK_END, CALL = "<think>", "</think>", "<tool_call>"


@dataclass(frozen=True)
class ReasoningPiece:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class TextPiece:
    """More of the text that answers."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called. Arguments are typed by the tool's schema."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class CallStart:
    """A call has begun, whose ToolCall follows, unless the answer ends before it."""

    name: str


@dataclass(frozen=True)
class ArgumentsPiece:
    """More of its arguments, as JSON: the pieces of a call join to write_arguments of its ToolCall's."""

    text: str


Piece = ReasoningPiece | TextPiece | CallStart | ArgumentsPiece | ToolCall


class AnswerParser:
    """Reads one answer piece by piece.

    starts_inside   the prompt has opened the think block (see opens_reasoning); else only a leading <think> opens one
    tools           OpenAI's form: their schemas type the arguments. None: no calls are looked for, all is text
    streams_calls   whether what is begun as a call will be one, and is handed out before it is complete; may change
    """

    def __init__(self, starts_inside: bool, tools: Sequence[Tool] | None = None):
        self.streams_calls = False
        self._reasoning = _ReasoningReader(starts_inside)
        self._calls = None if tools is None else _CallReader(tools)

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends within the reasoning."""
        return self._reasoning.is_inside

    @property
    def in_streamed_call(self) -> bool:
        """Whether a call has been handed out in part."""
        return self._calls is not None and self._calls.streamed is not None

    def push(self, text: str) -> list[Piece]:
        """What this text makes certain."""
        return self._read(self._reasoning.push(text), is_final=False)

    def finish(self) -> list[Piece]:
        """What was held back."""
        return self._read(self._reasoning.push("", is_final=True), is_final=True)

    def _read(self, parts: tuple[str, str], is_final: bool) -> list[Piece]:
        reasoning, answer = parts
        pieces: list[Piece] = [ReasoningPiece(reasoning)] if reasoning else []
        if self._calls is not None:
            pieces += self._calls.push(answer, is_final, self.streams_calls)
        elif answer:
            pieces.append(TextPiece(answer))
        return pieces


class StopStrings:
    """Ends a text at the first of some strings, which is not part of it. found is that string once it has come."""

    def __init__(self, stop: Sequence[str]):
        self.found: str | None = None
        self._stop, self._held = tuple(filter(None, stop)), ""

    def push(self, text: str, is_final: bool = False) -> str:
        """What of the text so far is certain to come before any stop string, and was not handed out."""
        if self.found is not None:
            return ""
        text = self._held + text
        # The one that is complete first, of those that begin at the same character the longest.
        hits = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if hits:
            end, _, self.found = min(hits)
            return text[: end - len(self.found)]
        keep = 0 if is_final else max((_count_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def opens_reasoning(prompt: str) -> bool:
    """Whether the answer to this prompt begins inside a think block."""
    return prompt.rstrip().endswith(THINK)


def split_reasoning(text: str, starts_inside: bool) -> tuple[str | None, str]:
    """Reasoning (None if there is none) and the answer after it. Without a </think> all is reasoning so far."""
    reasoning, answer = _ReasoningReader(starts_inside).push(text, is_final=True)
    return reasoning or None, answer


def write_arguments(arguments: Mapping[str, Any]) -> str:
    """Arguments of a call as JSON, as clients get them."""
    return json.dumps(arguments, ensure_ascii=False)


def parse_tool_calls(text: str, tools: Sequence[Tool] | None = None) -> tuple[str, list[ToolCall]]:
    """The text of an answer and the calls in it, in order. Never raises: a malformed call stays part of the text.

    The text is what stands before the first call, and anything else that is not a well-formed call.
    tools   OpenAI's form: their schemas type the arguments; without a schema a value that is JSON is taken as JSON
    """
    pieces = _CallReader(tools or ()).push(text, is_final=True)
    rest = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    return rest, [piece for piece in pieces if isinstance(piece, ToolCall)]


class _ReasoningReader:
    """Splits an answer at </think>. Blanks around the reasoning and line ends before the answer belong to neither.

    is_inside   what comes next is reasoning
    """

    def __init__(self, starts_inside: bool):
        self.is_inside = starts_inside
        self._has_begun = self._has_answer = False
        self._is_blank = True  # nothing of the reasoning has come
        self._held = ""

    def push(self, text: str, is_final: bool = False) -> tuple[str, str]:
        """(reasoning, answer) that this text makes certain."""
        text, self._held = self._held + text, ""
        if not self._has_begun:
            start = text.lstrip()
            if THINK.startswith(start) and start != THINK and not is_final:
                self._held = text
                return "", ""
            self._has_begun = True
            if start.startswith(THINK):
                self.is_inside, text = True, start.removeprefix(THINK)
            elif not self.is_inside:
                self._has_answer = True  # there is no reasoning: all of it is the answer, leading line ends too
        if self.is_inside:
            return self._read_inside(text, is_final)
        if not self._has_answer:
            text = text.lstrip("\n")
            self._has_answer = bool(text)
        return "", text

    def _read_inside(self, text: str, is_final: bool) -> tuple[str, str]:
        reasoning, end_tag, answer = text.partition(THINK_END)
        if not end_tag:
            keep = 0 if is_final else _count_overlap(reasoning, THINK_END)
            reasoning, self._held = reasoning[: len(reasoning) - keep], reasoning[len(reasoning) - keep :]
        if self._is_blank:
            reasoning = reasoning.lstrip()
        certain = reasoning.rstrip()
        if not end_tag and not is_final:
            self._held = reasoning[len(certain) :] + self._held  # blanks, which more reasoning would make part of it
        self._is_blank = self._is_blank and not certain
        if end_tag:
            self.is_inside = False
            return certain, self.push(answer, is_final)[1]
        return certain, ""


_CALL_START = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\s*")
_CALL_END = re.compile(r"</function>\s*</tool_call>")
_PARAMETER_START = re.compile(r"<parameter=([^>\n]+)>\n?")
_VALUE_END = "</parameter>"
# Of several </parameter>, the one that what follows shows to be markup and not part of the value.
_PARAMETER_END = re.compile(r"</parameter>(?=\s*(?:<parameter=|</function>))\s*")


class _CallReader:
    """Splits an answer into text and calls. Blanks before a call, and after the last, do not belong to the text.

    streamed   what has been handed out of the arguments of a call that is not complete; None if there is no such call
    """

    def __init__(self, tools: Sequence[Tool]):
        self.streamed: str | None = None
        self._tools = tools
        self._held, self._blanks = "", ""
        self._has_calls = False

    def push(self, text: str, is_final: bool = False, streams_calls: bool = False) -> list[Piece]:
        """Text and calls that this text makes certain."""
        text, self._held = self._held + text, ""
        texts: list[str] = []
        pieces: list[Piece] = []
        begun: _BegunCall | None = None
        while True:
            before, tag, rest = text.partition(CALL)
            if not tag:
                keep = 0 if is_final else _count_overlap(before, CALL)
                self._held = before[len(before) - keep :]
                texts.append(before[: len(before) - keep])
                break
            texts.append(before)
            following = _CALL_START.search(rest) if _CALL_START.match(text, len(before)) else None
            limit = len(text) if following is None else len(text) - len(rest) + following.start()
            read = _read_call(text[len(before) : limit], self._tools)
            if isinstance(read, _BegunCall) and following is None and (not is_final or self.streamed is not None):
                self._held, begun = tag + rest, read
                break
            ended, length = self._end_call(read)
            if not ended:
                texts.append(tag)
                text = rest
                continue
            pieces += [*self._join(texts), *ended]
            texts, self._blanks, self._has_calls = [], "", True
            text = text[len(before) + length :]
        pieces += self._join(texts)
        if begun is not None and streams_calls and not is_final:
            pieces += self._stream(begun)
        if is_final and self._blanks and not self._has_calls and self.streamed is None:
            pieces.append(TextPiece(self._blanks))
        return pieces

    def _stream(self, call: _BegunCall) -> Iterator[Piece]:
        """What is certain of a call, and was not handed out."""
        if not call.name:
            return
        if self.streamed is None:
            self.streamed = ""
            yield CallStart(call.name)
        certain = call.write_certain(self._tools)
        if len(certain) > len(self.streamed):
            yield ArgumentsPiece(certain[len(self.streamed) :])
            self.streamed = certain

    def _end_call(self, read: tuple[ToolCall, int] | _BegunCall | None) -> tuple[list[Piece], int]:
        """The rest of a call that is complete, and its length; nothing if it is none, or not the one that has been
        handed out in part."""
        streamed, self.streamed = self.streamed, None
        if not isinstance(read, tuple):
            return [], 0
        call, length = read
        if streamed is None:
            return [call], length
        arguments = write_arguments(call.arguments)
        return ([ArgumentsPiece(arguments[len(streamed) :]), call] if arguments.startswith(streamed) else []), length

    def _join(self, texts: list[str]) -> Iterator[TextPiece]:
        text = self._blanks + "".join(texts)
        certain = text.rstrip()
        self._blanks = text[len(certain) :]
        if certain:
            yield TextPiece(certain)


@dataclass(frozen=True)
class _BegunCall:
    """What there is of a call that more text could complete: its name, the parameters that are complete, and the key
    and the text so far of one that is not."""

    name: str = ""
    values: dict[str, str] = field(default_factory=dict)
    key: str | None = None
    value: str = ""

    def write_certain(self, tools: Sequence[Tool]) -> str:
        """As much of the arguments' JSON as no further text can change: of values that are text each character."""
        schema, arguments = find_schema(self.name, tools), _read_arguments(self.name, self.values, tools)
        certain = write_arguments(arguments).removesuffix("}")
        if self.key is None or self.key in self.values or _types_of(self.key, schema) != {"string"}:
            return certain
        opened = write_arguments({self.key: _cut_at_end(self.value)}).removeprefix("{").removesuffix('"}')
        return certain + (", " if arguments else "") + opened


def _read_call(text: str, tools: Sequence[Tool]) -> tuple[ToolCall, int] | _BegunCall | None:
    """The call at the start of a text and its length, or what there is of it; None if no text can make it a call."""
    start = _CALL_START.match(text)
    if start is None:
        return _BegunCall() if _could_begin(text.removeprefix(CALL).lstrip(), "<function=", "") else None
    name, position, values = start[1].strip(), start.end(), dict[str, str]()
    while parameter := _PARAMETER_START.match(text, position):
        end = _PARAMETER_END.search(text, parameter.end())
        if end is None:
            return _BegunCall(name, values, parameter[1].strip(), text[parameter.end() :])
        value = text[parameter.end() : end.start()].removesuffix("\n")
        if _PARAMETER_START.search(value):  # a missing </parameter>: two parameters would become one wrong value
            return None
        values[parameter[1].strip()] = value
        position = end.end()
    finish = _CALL_END.match(text, position)
    if finish is None:
        rest = text[position:]
        could_end = _could_begin(rest, "</function>", "</tool_call>")
        return _BegunCall(name, values) if could_end or _could_begin(rest, "<parameter=", "") else None
    return ToolCall(name, _read_arguments(name, values, tools)), finish.end()


def _read_arguments(name: str, values: Mapping[str, str], tools: Sequence[Tool]) -> dict[str, Any]:
    schema = find_schema(name, tools)
    return {key: read_value(value, _types_of(key, schema)) for key, value in values.items()}


def _types_of(key: str, schema: dict[str, Any]) -> frozenset[str]:
    properties = schema.get("properties")
    return allowed_types(properties.get(key) if isinstance(properties, dict) else None, schema)


def _cut_at_end(value: str) -> str:
    """A value so far without what could turn out to be its end."""
    cut = value.rfind(_VALUE_END)
    rest = value[cut + len(_VALUE_END) :].lstrip()
    if cut < 0 or not ("<parameter=".startswith(rest) or "</function>".startswith(rest)):
        cut = len(value) - _count_overlap(value, _VALUE_END)
    return value[:cut].removesuffix("\n")


def _could_begin(text: str, tag: str, following: str) -> bool:
    """Whether more text could make this a tag, or with a `following` one the two of them. A tag <x= ends with its line
    or with >, and both would have been found."""
    if len(text) < len(tag):
        return tag.startswith(text)
    if not text.startswith(tag):
        return False
    rest = text.removeprefix(tag)
    return following.startswith(rest.lstrip()) if following else "\n" not in rest and ">" not in rest


def _count_overlap(text: str, tag: str) -> int:
    """How many last characters of the text could be the beginning of the tag."""
    most = min(len(text), len(tag) - 1)
    return next((count for count in range(most, 0, -1) if tag.startswith(text[-count:])), 0)
