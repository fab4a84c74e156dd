"""Anthropic's wire format: messages with tools, whole and as a stream.

Their content blocks are turned into the messages that the chat template knows, and answers back into blocks: thinking,
text, tool_use. Thinking follows the template unless the request says otherwise; thinking blocks of earlier turns are
handed to the template, which decides what it keeps. A signature of thinking is never checked, so it is empty.

    request = MessagesRequest.model_validate(body)
    completion = service.start(prepare_messages(service, request, client))
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from moepack.layout.errors import UsageError
from moepack.runtime.answer import (
    ArgumentsPiece,
    CallStart,
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolCall,
    write_arguments,
)
from moepack.runtime.completion import Completion, CompletionRequest, Ending, Pieces, Usage, Waiting
from moepack.runtime.sampling import SamplingParams
from moepack.runtime.service import Service

Json = dict[str, Any]
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
MEDIA = ("image", "document")


class TokensRequest(BaseModel):
    """POST /v1/messages/count_tokens: what makes the prompt. Unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    model: str | None = None
    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesRequest(TokensRequest):
    """POST /v1/messages"""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


def prepare_messages(service: Service, request: MessagesRequest, client: str) -> CompletionRequest:
    """Messages as a request to the service. Raises UsageError."""
    choice = request.tool_choice or {}
    return service.prepare_chat(
        read_messages(request),
        _read_sampling(service, request),
        tools=[_read_tool(f"tools[{number}]", tool) for number, tool in enumerate(request.tools or [])],
        choice=_read_choice(choice),
        parallel=choice.get("disable_parallel_tool_use") is not True,
        stop=request.stop_sequences or (),
        client=client,
        template=_read_thinking(request.thinking),
        streams=bool(request.stream),
    )


def count_tokens(service: Service, request: TokensRequest) -> Json:
    """How long the prompt is. Raises UsageError."""
    tools = [_read_tool(f"tools[{number}]", tool) for number, tool in enumerate(request.tools or [])]
    prompt = service.render_chat(read_messages(request), tools, **_read_thinking(request.thinking))
    return {"input_tokens": len(service.engine.tokenizer.encode(prompt))}


async def answer_messages(service: Service, completion: Completion) -> Json:
    """The response. Raises what the generation failed with."""
    whole = await completion.whole()
    service.note(completion, whole.ending)
    content: list[Json] = []
    if whole.reasoning:
        content.append({"type": "thinking", "thinking": whole.reasoning, "signature": ""})
    if whole.text or not whole.calls:
        content.append({"type": "text", "text": whole.text})
    content += [{**_open_call(call), "input": call.arguments} for call in whole.calls]
    return {
        **_head(service),
        "content": content,
        **_write_stop(whole.ending),
        "usage": _write_usage(whole.ending.usage),
    }


async def stream_messages(service: Service, completion: Completion) -> AsyncIterator[str]:
    """Server-sent events of an answer."""
    usage = {"input_tokens": len(completion.job.prompt_ids), "output_tokens": 0}
    message = {**_head(service), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    yield _event({"type": "message_start", "message": message})
    blocks = _Blocks()
    async for event in completion.events(service.settings.quiet_seconds):
        if isinstance(event, Waiting):
            yield _event({"type": "ping"})
        elif isinstance(event, Pieces):
            for piece in event.pieces:
                for part in blocks.add(piece):
                    yield _event(part)
        elif isinstance(event, Ending):
            service.note(completion, event)
            if not blocks.index:
                for part in blocks.add(TextPiece("")):
                    yield _event(part)
            for part in blocks.close():
                yield _event(part)
            yield _event({"type": "message_delta", "delta": _write_stop(event), "usage": _write_usage(event.usage)})
            yield _event({"type": "message_stop"})
        else:
            service.note(completion, event)
            yield _event({"type": "error", "error": {"type": "api_error", "message": str(event.error) or "cancelled"}})


class _Blocks:
    """The blocks of a stream, which grow. index: of the next block."""

    def __init__(self) -> None:
        self.index = 0
        self._open: str | None = None

    def add(self, piece: Piece) -> list[Json]:
        if isinstance(piece, CallStart):
            return self._begin("tool_use", {**_open_call(piece), "input": {}})
        if isinstance(piece, ArgumentsPiece):
            return [self._delta({"type": "input_json_delta", "partial_json": piece.text})]
        if isinstance(piece, ToolCall):
            parts = (CallStart(piece.name), ArgumentsPiece(write_arguments(piece.arguments)))
            is_new = self._open != "tool_use"  # it has not been handed out as it grew
            return [event for part in parts if is_new for event in self.add(part)] + self.close()
        if isinstance(piece, ReasoningPiece):
            opened = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            return [*opened, self._delta({"type": "thinking_delta", "thinking": piece.text})]
        opened = self._begin("text", {"type": "text", "text": ""})
        return [*opened, self._delta({"type": "text_delta", "text": piece.text})]

    def close(self) -> list[Json]:
        """End the open block, if there is one."""
        if self._open is None:
            return []
        signature = [self._delta({"type": "signature_delta", "signature": ""})] if self._open == "thinking" else []
        self._open = None
        return [*signature, {"type": "content_block_stop", "index": self.index - 1}]

    def _begin(self, kind: str, block: Json) -> list[Json]:
        if self._open == kind and kind != "tool_use":
            return []
        closed = self.close()
        self._open = kind
        self.index += 1
        return [*closed, {"type": "content_block_start", "index": self.index - 1, "content_block": block}]

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self.index - 1, "delta": delta}


def read_messages(request: TokensRequest) -> list[Json]:
    """The conversation in the form that templates know. Raises UsageError."""
    if not request.messages:
        raise UsageError("messages is empty: expected at least one message")
    messages: list[Json] = []
    if request.system:
        messages.append({"role": "system", "content": _read_text("system", request.system)})
    for number, message in enumerate(request.messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            raise UsageError(f"{where}: expected an object with the role user or assistant")
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list):
            raise UsageError(f"{where}.content: expected a string or a list of blocks")
        read = _read_user if message["role"] == "user" else _read_assistant
        messages += read(where, blocks)
    return messages


def _read_user(where: str, blocks: list[Any]) -> list[Json]:
    """Tool results are messages of their own, before what the user says."""
    results: list[Json] = []
    texts: list[str] = []
    for number, block in enumerate(blocks):
        place = f"{where}.content[{number}]"
        if isinstance(block, dict) and block.get("type") == "tool_result":
            text = _read_text(f"{place}.content", block.get("content") or "")
            results.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": text})
        else:
            texts.append(_read_text(place, [block]))
    return results + ([{"role": "user", "content": "\n".join(texts)}] if texts or not results else [])


def _read_assistant(where: str, blocks: list[Any]) -> list[Json]:
    message: Json = {"role": "assistant", "content": ""}
    for number, block in enumerate(blocks):
        place = f"{where}.content[{number}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + str(block.get("thinking", ""))
        elif kind == "tool_use":
            if not isinstance(block.get("name"), str) or not isinstance(block.get("input"), dict):
                raise UsageError(f"{place}: expected a tool_use with a name and an input object")
            function = {"name": block["name"], "arguments": block["input"]}
            call = {"id": str(block.get("id")), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif kind != "redacted_thinking":
            message["content"] += _read_text(place, [block])
    return [message]


def _read_text(where: str, content: Any) -> str:
    """A string, or text blocks joined. Raises UsageError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UsageError(f"{where}: expected a string or a list of text blocks")
    texts = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in MEDIA:
            raise UsageError(f"{where} holds {kind}, but this pack holds the text model only: send text blocks")
        if kind != "text" or not isinstance(block.get("text"), str):
            raise UsageError(f'{where}: expected {{"type": "text", "text": ...}}, found {str(block)[:80]!r}')
        texts.append(block["text"])
    return "\n".join(texts)


def _read_tool(where: str, tool: Any) -> Json:
    if not isinstance(tool, dict) or tool.get("type", "custom") != "custom":
        raise UsageError(f"{where}: expected a tool with name and input_schema, found {str(tool)[:80]!r}")
    function = {"name": tool.get("name"), "description": tool.get("description", "")}
    return {"type": "function", "function": {**function, "parameters": tool.get("input_schema", {})}}


def _read_choice(choice: Json) -> str:
    kind = choice.get("type", "auto")
    if kind == "tool" and isinstance(choice.get("name"), str) and choice["name"] not in ("auto", "none", "required"):
        return str(choice["name"])
    if not isinstance(kind, str) or kind not in CHOICES:
        raise UsageError(f"tool_choice: expected auto, any, none, or tool with a name, found {str(choice)[:80]!r}")
    return CHOICES[kind]


def _read_thinking(thinking: Json | None) -> Json:
    kind = None if thinking is None else thinking.get("type")
    if kind not in (None, "enabled", "disabled", "adaptive"):
        raise UsageError(f"thinking: expected the type enabled or disabled, found {kind!r:.80}")
    return {} if kind is None else {"enable_thinking": kind != "disabled"}


def _read_sampling(service: Service, request: MessagesRequest) -> SamplingParams:
    return service.sampling(
        temperature=request.temperature, top_p=request.top_p, top_k=request.top_k, max_tokens=request.max_tokens
    )


def _head(service: Service) -> Json:
    return {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": service.name}


def _open_call(call: ToolCall | CallStart) -> Json:
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": call.name}


def _write_stop(ending: Ending) -> Json:
    reason = "stop_sequence" if ending.stop_string is not None else STOP_REASONS[ending.finish_reason]
    return {"stop_reason": reason, "stop_sequence": ending.stop_string}


def _write_usage(usage: Usage) -> Json:
    """Their input_tokens leave out what was cached."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "constrained": usage.constrained,
        "constrained_tokens": usage.constrained_tokens,
    }


def _event(value: Json) -> str:
    return f"event: {value['type']}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"
