"""Messages to a prompt, by the model's own chat template.

The prompt is what the model's own Jinja template makes of the messages, rendered with the settings that templates are
written for (those of transformers' apply_chat_template), so that the model sees the text it was trained on. A template
comes with a checkpoint from anywhere, so it runs in Jinja's sandbox. Reading the answer back is answer.py.

    template = ChatTemplate.load("model.moepack")
    prompt = template.render([{"role": "user", "content": "Hello"}], enable_thinking=False)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moepack.layout.errors import MoepackError, UsageError
from moepack.runtime.tokenizer import read_json_object, token_text
from moepack.runtime.tool_schema import Tool

TEMPLATE_NAME = "chat_template.jinja"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MEDIA = ("image", "video", "audio")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


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
