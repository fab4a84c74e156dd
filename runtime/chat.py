"""Messages to a prompt, and an answer back to reasoning, text and tool calls.

The prompt is what the model's own Jinja template makes of the messages, rendered with the settings that templates are
written for (those of transformers' apply_chat_template), so that the model sees the text it was trained on. A template
comes with a checkpoint from anywhere, so it runs in Jinja's sandbox. Answers are read in the one form this model family
uses, <tool_call> around <function=NAME> around <parameter=KEY>; whatever does not have that form stays text. Not here:
holding back a half-written call while streaming (the server), and forcing the form.

    template = ChatTemplate.load("model.moepack")
    prompt = template.render([{"role": "user", "content": "Hello"}], enable_thinking=False)
    reasoning, answer = split_reasoning(text, opens_reasoning(prompt))
    answer, calls = parse_tool_calls(answer, tools)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moepack.layout.errors import MoepackError, UsageError
from moepack.runtime.tokenizer import read_json_object, token_text

TEMPLATE_NAME = "chat_template.jinja"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MEDIA = ("image", "video", "audio")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]
Tool = dict[str, Any]


class ChatTemplate:
    """A compiled chat template. Make one with ChatTemplate.load, or from its source and the file to name in errors."""

    def __init__(self, source: str, path: str | Path = TEMPLATE_NAME, named_tokens: dict[str, str] | None = None):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._named_tokens = named_tokens or {}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise MoepackError(f"{path}: not a chat template: {_one_line(error)}: copy it again") from None

    @classmethod
    def load(cls, directory: str | Path) -> ChatTemplate | None:
        """The template in chat_template.jinja, else in tokenizer_config.json; None if neither has one.

        Raises MoepackError if it cannot be read or is no Jinja template.
        """
        path = Path(directory) / TEMPLATE_NAME
        config_path = Path(directory) / "tokenizer_config.json"
        config = read_json_object(config_path) or {}
        named_tokens = {key: text for key in NAMED_TOKENS if (text := token_text(config.get(key))) is not None}
        try:
            return cls(path.read_text(encoding="utf-8"), path, named_tokens)
        except FileNotFoundError:
            source = config.get("chat_template")
        except (OSError, UnicodeDecodeError) as error:
            raise MoepackError(f"{path}: cannot be read: {_one_line(error)}") from None
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default", source)
        if source is None:
            return None
        if not isinstance(source, str):
            raise MoepackError(f"{config_path}: chat_template must be a text or have a default, found {source!r:.80}")
        return cls(source, config_path, named_tokens)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation. Further arguments go to the template, such as enable_thinking=False.

        messages   OpenAI's form. Content may be a list of text parts; arguments of tool calls may be JSON strings
        tools      OpenAI's form, or None

        Raises UsageError if the messages are malformed, hold an image, video or sound, or the template refuses them.
        """
        if not messages:
            raise UsageError("messages is empty: expected at least one message")
        context = {**self._named_tokens, "documents": None, **kwargs}
        prepared = [_prepare_message(f"messages[{n}]", message) for n, message in enumerate(messages)]
        tools = None if tools is None else list(tools)
        try:
            return self._template.render(
                context, messages=prepared, tools=tools, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program of others: whatever it raises, it refuses these messages
            raise UsageError(f"the model's chat template refuses the messages: {_one_line(error)}") from None


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called. Arguments are typed by the tool's schema."""

    name: str
    arguments: dict[str, Any]


def opens_reasoning(prompt: str) -> bool:
    """Whether the answer to this prompt begins inside a think block."""
    return prompt.rstrip().endswith("<think>")


def split_reasoning(text: str, starts_inside: bool) -> tuple[str | None, str]:
    """Reasoning (None if there is none) and the answer after it. Without a </think> all is reasoning so far.

    starts_inside   the prompt has opened the think block (see opens_reasoning); else only a leading <think> opens one
    """
    opened = text.lstrip().startswith("<think>")
    if not (starts_inside or opened):
        return None, text
    if opened:
        text = text.lstrip().removeprefix("<think>")
    reasoning, _, answer = text.partition("</think>")
    return reasoning.strip() or None, answer.lstrip("\n")


_CALL_START = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\s*")
_CALL_END = re.compile(r"</function>\s*</tool_call>")
_PARAMETER_START = re.compile(r"<parameter=([^>\n]+)>\n?")
# Of several </parameter>, the one that what follows shows to be markup and not part of the value.
_PARAMETER_END = re.compile(r"</parameter>(?=\s*(?:<parameter=|</function>))\s*")


def parse_tool_calls(text: str, tools: Sequence[Tool] | None = None) -> tuple[str, list[ToolCall]]:
    """The text of an answer and the calls in it, in order. Never raises: a malformed call stays part of the text.

    The text is what stands before the first call, and anything else that is not a well-formed call.
    tools   OpenAI's form: their schemas type the arguments; without a schema a value that is JSON is taken as JSON
    """
    starts = list(_CALL_START.finditer(text))
    limits = [start.start() for start in starts[1:]] + [len(text)]  # a call ends before the next one starts
    calls, rest, position = [], "", 0
    for start, limit in zip(starts, limits):
        if found := _read_call(text, start, limit, tools or ()):
            rest += text[position : start.start()].rstrip()
            position = found[1]
            calls.append(found[0])
    return (rest + text[position:].rstrip() if calls else text), calls


def _read_call(text: str, start: re.Match[str], limit: int, tools: Sequence[Tool]) -> tuple[ToolCall, int] | None:
    """The call that begins at a match of _CALL_START and where it ends; None if it is malformed."""
    name, position, values = start[1].strip(), start.end(), {}
    while parameter := _PARAMETER_START.match(text, position, limit):
        end = _PARAMETER_END.search(text, parameter.end(), limit)
        if end is None:
            return None
        value = text[parameter.end() : end.start()].removesuffix("\n")
        if _PARAMETER_START.search(value):  # a missing </parameter>: two parameters would become one wrong value
            return None
        values[parameter[1].strip()] = value
        position = end.end()
    finish = _CALL_END.match(text, position, limit)
    if finish is None:
        return None
    schema = _find_schema(name, tools)
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    arguments = {key: _typed(value, _allowed_types(properties.get(key), schema)) for key, value in values.items()}
    return ToolCall(name, arguments), finish.end()


_JSON_TYPES = frozenset({"null", "boolean", "integer", "number", "object", "array", "string"})
_PYTHON_CONSTANTS = {"True": True, "False": False, "None": None}  # some templates write booleans as Python does
_MAX_SCHEMA_DEPTH = 16  # a schema that refers to itself ends here


def _find_schema(name: str, tools: Sequence[Tool]) -> dict[str, Any]:
    """The parameters of the tool of that name, empty if there is none."""
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and function.get("name") == name:
            schema = function.get("parameters")
            return schema if isinstance(schema, dict) else {}
    return {}


def _allowed_types(schema: object, root: dict[str, Any], depth: int = 0) -> frozenset[str]:
    """JSON types that a schema allows: of a union all of its members', of a schema that names none all there are."""
    if not isinstance(schema, dict) or depth > _MAX_SCHEMA_DEPTH:
        return _JSON_TYPES
    names = schema.get("type")
    types = {name for name in (names if isinstance(names, list) else [names]) if isinstance(name, str)}
    if types & _JSON_TYPES:
        return frozenset(types & _JSON_TYPES)
    if isinstance(schema.get("$ref"), str):
        target: object = root
        for key in schema["$ref"].split("/")[1:]:
            target = target.get(key) if isinstance(target, dict) else None
        return _allowed_types(target, root, depth + 1)
    members = _as_list(schema.get("anyOf")) + _as_list(schema.get("oneOf"))
    if members:
        return frozenset[str]().union(*(_allowed_types(member, root, depth + 1) for member in members))
    values = [*_as_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
    return frozenset(map(_type_name, values)) if values else _JSON_TYPES


def _typed(raw: str, allowed: frozenset[str]) -> Any:
    """A parameter's text as the first of: a JSON value of an allowed type, the text as it is."""
    if allowed == {"string"}:
        return raw
    try:
        text = raw.strip()
        value = _PYTHON_CONSTANTS[text] if text in _PYTHON_CONSTANTS else _read_json(text)
    except (ValueError, RecursionError):
        return raw
    if isinstance(value, float) and value.is_integer() and "number" not in allowed:
        value = int(value)  # to JSON, 3.0 is an integer
    name = _type_name(value)
    fits = name in allowed or (name == "integer" and "number" in allowed)
    return value if fits and name != "string" else raw


def _read_json(text: str) -> Any:
    """JSON that can be written again: no NaN, no infinity, no lone surrogate. Raises ValueError or RecursionError."""

    def read_number(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is no JSON number")
        return value

    value = json.loads(text, parse_float=read_number, parse_constant=read_number)
    json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _type_name(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", dict: "object", list: "array", str: "string"}
    return names.get(type(value), "null")


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _prepare_message(where: str, message: Message) -> Message:
    """A copy as templates expect it: absent instead of null, content as text, arguments as objects."""
    if not isinstance(message, dict):
        raise UsageError(f"{where}: expected an object with role and content, found {type(message).__name__}")
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content", "")
    if isinstance(content, list):
        message["content"] = "".join(_part_text(f"{where}.content[{n}]", part) for n, part in enumerate(content))
    elif not isinstance(content, str):
        raise UsageError(f"{where}.content: expected a string or a list of parts, found {type(content).__name__}")
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise UsageError(f"{where}.tool_calls: expected a list, found {type(calls).__name__}")
        message["tool_calls"] = [_prepare_call(f"{where}.tool_calls[{n}]", call) for n, call in enumerate(calls)]
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    if reasoning is not None:  # clients and templates name it differently
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _part_text(where: str, part: object) -> str:
    if isinstance(part, dict):
        medium = next((name for name in MEDIA for key in (part.get("type"), *part) if name in str(key)), None)
        if medium:
            raise UsageError(f"{where} holds {medium}, but this pack holds the text model only: send text parts")
        if part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
    raise UsageError(f'{where}: expected {{"type": "text", "text": ...}}, found {str(part)[:80]!r}')


def _prepare_call(where: str, call: object) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise UsageError(f"{where}: expected an object with a function, found {str(call)[:80]!r}")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    elif isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: arguments are not JSON ({error}): send a JSON object") from None
    if not isinstance(arguments, dict):
        raise UsageError(f"{where}: arguments must be a JSON object, found {type(arguments).__name__}")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


class _GenerationTag(Extension):
    """{% generation %} marks what the model itself wrote, for training; here its body is only rendered."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it an instance variable)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is. Jinja's own filter escapes HTML, which the model has never seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
