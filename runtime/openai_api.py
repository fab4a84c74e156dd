"""OpenAI's wire format: chat completions and completions, whole and as a stream.

Clients of that API work unchanged. Beyond it: reasoning_content (the thinking, apart from the answer), top_k, min_p and
repetition_penalty, chat_template_kwargs, and usage.constrained, which says what an answer was held to. Whatever
changes the answer and is not supported (n above 1, images, ...) is an error; what does not change it is ignored.

    request = ChatRequest.model_validate(body)
    completion = service.start(prepare_chat(service, request, client))
    chunks = stream_chat(service, completion, request)
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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
from moepack.runtime.completion import Completion, CompletionRequest, Ending, Failure, Pieces, Usage, Waiting
from moepack.runtime.sampling import TokenLogprobs
from moepack.runtime.service import Service, check_stop
from moepack.runtime.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity
TOP_LOGPROBS_OF_TEXT = 5
Json = dict[str, Any]


class Request(BaseModel):
    """What chats and texts have in common. Unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def read_sampling(self, service: Service, max_tokens: int | None, top_logprobs: int | None) -> Any:
        """The sampling asked for. Raises UsageError."""
        if self.n not in (None, 1):
            raise UsageError(f"n must be 1, got {self.n}: send several requests for several answers")
        seed = None if self.seed is None else self.seed % 2**64  # clients send negative ones
        return service.sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k if self.top_k != -1 else 0,  # others' way to say off
            min_p=self.min_p,
            seed=seed,
            max_tokens=max_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_read_bias(self.logit_bias),
            top_logprobs=top_logprobs,
        )


class ChatRequest(Request):
    """POST /v1/chat/completions"""

    messages: list[Any]
    max_completion_tokens: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None


class TextRequest(Request):
    """POST /v1/completions"""

    prompt: str | list[Annotated[int, Field(ge=0)]] | list[str] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


def prepare_chat(service: Service, request: ChatRequest, client: str) -> CompletionRequest:
    """A chat as a request to the service. Raises UsageError."""
    if request.functions or request.function_call:
        raise UsageError("functions and function_call are not supported: send tools and tool_choice")
    if request.modalities not in (None, [], ["text"]):
        raise UsageError(f"modalities: this is a text model, found {request.modalities}")
    if request.top_logprobs is not None and not request.logprobs:
        raise UsageError("top_logprobs needs logprobs: true")
    top = (request.top_logprobs or 0) if request.logprobs else None
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    template = dict(request.chat_template_kwargs or {})
    reserved = {"messages", "tools", "add_generation_prompt", "self"} & template.keys()
    if reserved:
        raise UsageError(f"chat_template_kwargs: {', '.join(sorted(reserved))} cannot be given there")
    tools = request.tools or []
    return service.prepare_chat(
        request.messages,
        request.read_sampling(service, limit, top),
        tools=tools,
        choice=_read_choice(request.tool_choice, bool(tools)),
        parallel=request.parallel_tool_calls is not False,
        schema=_read_format(request.response_format),
        stop=request.stops,
        client=client,
        template=template,
        streams=bool(request.stream),
    )


def prepare_text(service: Service, request: TextRequest, client: str) -> CompletionRequest:
    """A text to continue as a request to the service. Raises UsageError."""
    if request.suffix or request.echo or request.best_of not in (None, 1):
        raise UsageError("suffix, echo and best_of are not supported: leave them out")
    if request.logprobs is not None and not 0 <= request.logprobs <= TOP_LOGPROBS_OF_TEXT:
        raise UsageError(f"logprobs must be an integer from 0 to {TOP_LOGPROBS_OF_TEXT}, got {request.logprobs}")
    prompt: Any = request.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) != 1:
            raise UsageError(f"prompt: found {len(prompt)} prompts, send one a request")
        prompt = prompt[0]
    sampling = request.read_sampling(service, request.max_tokens, request.logprobs)
    if isinstance(prompt, list):
        service.engine.check_prompt(prompt)
    else:
        prompt = service.encode(prompt)
    return CompletionRequest(
        prompt_ids=prompt,
        sampling=sampling,
        is_chat=False,
        stop=check_stop(request.stops),
        client=client,
        max_seconds=service.settings.max_seconds,
    )


async def answer_chat(service: Service, completion: Completion) -> Json:
    """The response to a chat. Raises what the generation failed with."""
    whole = await completion.whole()
    message: Json = {"role": "assistant", "content": whole.text or (None if whole.calls else "")}
    if whole.reasoning:
        message["reasoning_content"] = whole.reasoning
    if whole.calls:
        message["tool_calls"] = [_write_call(call) for call in whole.calls]
    choice: Json = {"index": 0, "message": message, "logprobs": None, "finish_reason": whole.ending.finish_reason}
    if whole.logprobs:
        choice["logprobs"] = _write_logprobs(service.engine.tokenizer, whole.logprobs)
    service.note(completion, whole.ending)
    usage = write_usage(whole.ending.usage)
    return {**_head(service, "chat.completion", "chatcmpl"), "choices": [choice], "usage": usage}


async def answer_text(service: Service, completion: Completion) -> Json:
    """The response to a text. Raises what the generation failed with."""
    whole = await completion.whole()
    choice: Json = {"index": 0, "text": whole.text, "logprobs": None, "finish_reason": whole.ending.finish_reason}
    if whole.logprobs:
        choice["logprobs"] = _TextLogprobs(service.engine.tokenizer).write(whole.logprobs)
    service.note(completion, whole.ending)
    usage = write_usage(whole.ending.usage)
    return {**_head(service, "text_completion", "cmpl"), "choices": [choice], "usage": usage}


async def stream_chat(service: Service, completion: Completion, request: ChatRequest) -> AsyncIterator[str]:
    """Server-sent events of a chat."""
    head = _head(service, "chat.completion.chunk", "chatcmpl")
    if request.wants_usage:
        head["usage"] = None
    deltas = _Deltas()

    def chunk(delta: Json, logprobs: Any = None, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return _event({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    async for event in completion.events(service.settings.quiet_seconds):
        if isinstance(event, Waiting):
            yield _comment(event, completion)
        elif isinstance(event, Pieces):
            logprobs = _write_logprobs(service.engine.tokenizer, event.logprobs) if event.logprobs else None
            for piece in event.pieces or [TextPiece("")]:
                if delta := deltas.add(piece):
                    yield chunk(delta, logprobs)
                    logprobs = None  # told once
        elif isinstance(event, Ending):
            service.note(completion, event)
            yield chunk({}, finish_reason=event.finish_reason)
            if request.wants_usage:
                yield _event({**head, "choices": [], "usage": write_usage(event.usage)})
            yield "data: [DONE]\n\n"
        else:
            service.note(completion, event)
            yield _failure(event)


class _Deltas:
    """What a stream tells. A call comes whole, or, if it is handed out as it grows, by its name and then in pieces."""

    def __init__(self) -> None:
        self._index, self._is_in_call = -1, False

    def add(self, piece: Piece) -> Json | None:
        """The delta to send; None if all of a call has been sent."""
        was_in_call, self._is_in_call = self._is_in_call, isinstance(piece, (CallStart, ArgumentsPiece))
        if isinstance(piece, ReasoningPiece):
            return {"reasoning_content": piece.text}
        if isinstance(piece, TextPiece):
            return {"content": piece.text}
        if isinstance(piece, ArgumentsPiece):
            return {"tool_calls": [{"index": self._index, "function": {"arguments": piece.text}}]}
        if isinstance(piece, ToolCall) and was_in_call:
            return None
        self._index += 1
        return {"tool_calls": [{"index": self._index, **_write_call(piece)}]}


async def stream_text(service: Service, completion: Completion, request: TextRequest) -> AsyncIterator[str]:
    """Server-sent events of a text."""
    head = _head(service, "text_completion", "cmpl")
    if request.wants_usage:
        head["usage"] = None
    writer = _TextLogprobs(service.engine.tokenizer)

    def chunk(text: str, logprobs: Any = None, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return _event({**head, "choices": [choice]})

    async for event in completion.events(service.settings.quiet_seconds):
        if isinstance(event, Waiting):
            yield _comment(event, completion)
        elif isinstance(event, Pieces):
            text = "".join(piece.text for piece in event.pieces if isinstance(piece, TextPiece))
            yield chunk(text, writer.write(event.logprobs) if event.logprobs else None)
        elif isinstance(event, Ending):
            service.note(completion, event)
            yield chunk("", finish_reason=event.finish_reason)
            if request.wants_usage:
                yield _event({**head, "choices": [], "usage": write_usage(event.usage)})
            yield "data: [DONE]\n\n"
        else:
            service.note(completion, event)
            yield _failure(event)


def write_usage(usage: Usage) -> Json:
    """Token counts as the API names them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "constrained": usage.constrained,
        "constrained_tokens": usage.constrained_tokens,
    }


def _read_choice(choice: Any, has_tools: bool) -> str:
    """auto, none, required, or the name of a tool. Raises UsageError."""
    if choice is None or choice == "auto":
        return "auto"
    if choice in ("none", "required"):
        return str(choice)
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str) or name in ("auto", "none", "required"):
        expected = 'none, auto, required or {"type": "function", "function": {"name": ...}}'
        raise UsageError(f"tool_choice: expected {expected}, found {json.dumps(choice)[:80]}")
    if not has_tools:
        raise UsageError(f"tool_choice names {name!r}, but there are no tools")
    return name


def _read_format(form: Json | None) -> Json | None:
    """The schema that a response format asks for, {} for any object, None for text. Raises UsageError."""
    kind: Literal["text", "json_object", "json_schema"] | Any = "text" if form is None else form.get("type")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {}
    holder = form.get("json_schema")
    schema = holder.get("schema", {}) if isinstance(holder, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        raise UsageError(
            'response_format: expected {"type": "text" | "json_object"} or {"type": "json_schema", "json_schema": '
            f'{{"name": ..., "schema": {{...}}}}}}, found {json.dumps(form)[:80]}'
        )
    return schema or {"type": ["object", "array", "string", "number", "boolean", "null"]}


def _read_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    """Token ids are keys of a JSON object, so they come as text. Raises UsageError."""
    if bias is None:
        return None
    wrong = [key for key in bias if not (key.isascii() and key.isdigit() and len(key) < 12)]
    if wrong:
        raise UsageError(f"logit_bias: expected token ids, found {wrong[0][:40]!r}")
    return {int(key): value for key, value in bias.items()}


def _head(service: Service, kind: str, prefix: str) -> Json:
    identifier = f"{prefix}-{secrets.token_hex(12)}"
    return {"id": identifier, "object": kind, "created": int(time.time()), "model": service.name}


def _write_call(call: ToolCall | CallStart) -> Json:
    arguments = write_arguments(call.arguments) if isinstance(call, ToolCall) else ""
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _write_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprobs]) -> Json:
    def entry(token_id: int, logprob: float) -> Json:
        text, content = tokenizer.describe(token_id)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(content)}

    content = [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(*other) for other in one.top]} for one in logprobs
    ]
    return {"content": content, "refusal": None}


class _TextLogprobs:
    """The older form, of /v1/completions: lists beside each other, with offsets in the text so far."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._offset = tokenizer, 0

    def write(self, logprobs: Iterable[TokenLogprobs]) -> Json:
        result: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in logprobs:
            text = self._tokenizer.describe(one.token_id)[0]
            result["tokens"].append(text)
            result["token_logprobs"].append(max(one.logprob, LEAST_LOGPROB))
            top = {self._tokenizer.describe(other)[0]: max(value, LEAST_LOGPROB) for other, value in one.top}
            result["top_logprobs"].append(top)
            result["text_offset"].append(self._offset)
            self._offset += len(self._tokenizer.decode([one.token_id]))
        return result


def _event(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _comment(waiting: Waiting, completion: Completion) -> str:
    """A line that clients skip and people can read: the connection lives, and this is how far it is."""
    total = len(completion.job.prompt_ids)
    if waiting.ahead:
        return f": waiting for {waiting.ahead} requests\n\n"
    return f": prompt {waiting.prefilled} of {total} tokens\n\n"


def _failure(failure: Failure) -> str:
    """An error in the middle of a stream, whose status has been sent."""
    return _event(
        {"error": {"message": str(failure.error) or "cancelled", "type": "api_error", "param": None, "code": None}}
    )
