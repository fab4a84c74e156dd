"""From a request in the engine's own terms to pieces of an answer, whichever API it came through.

The text of an answer is decoded, read and cut at stop strings in the engine's thread, token by token, so that its end
depends on no timing. What comes of it goes to the event loop of the server as events: Pieces while it is written, one
Ending or Failure. Not here: what any of it looks like to a client (openai_api.py, anthropic_api.py).

    answer = Completion(scheduler, request).start()
    async for event in answer.events(): ...
    answer.cancel()
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from moepack.layout.errors import UsageError
from moepack.runtime.answer import AnswerParser, Piece, ReasoningPiece, StopStrings, TextPiece, ToolCall
from moepack.runtime.constrain import AnswerConstraint
from moepack.runtime.generate import Generation
from moepack.runtime.sampling import SamplingParams, TokenLogprobs
from moepack.runtime.scheduler import Cancelled, Job, Scheduler
from moepack.runtime.stats import GenerationStats
from moepack.runtime.tool_schema import Tool


@dataclass(frozen=True)
class CompletionRequest:
    """What is to be answered.

    starts_inside   the prompt has opened the think block
    is_chat         the answer is read for reasoning and calls; otherwise all of it is text
    tools           whose calls are looked for; None: none are
    stop            strings that end the text of the answer; reasoning and calls are not searched
    streams_calls   hand out calls while they are written, as long as the constraint holds them to their form
    expect          from the text of an answer to token ids that the next prompt of its conversation will begin with
    """

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    starts_inside: bool = False
    is_chat: bool = True
    tools: Sequence[Tool] | None = None
    stop: Sequence[str] = ()
    streams_calls: bool = False
    expect: Callable[[str], Sequence[int]] | None = None
    constraint: AnswerConstraint | None = None
    client: str = ""
    max_seconds: float = 3600.0


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. constrained: what the answer was held to, None if nothing; constrained_tokens: how many
    tokens were chosen under it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    constrained: str | None
    constrained_tokens: int


@dataclass(frozen=True)
class Pieces:
    """What one token made certain, and its log-probabilities if they were asked for."""

    pieces: list[Piece]
    logprobs: list[TokenLogprobs]


@dataclass(frozen=True)
class Waiting:
    """Nothing has come for a while. ahead: requests before this one; prefilled: prompt tokens read."""

    ahead: int
    prefilled: int


@dataclass(frozen=True)
class Ending:
    """The answer is complete. finish_reason: stop, length or tool_calls; stop_string: what ended it, if one did."""

    finish_reason: str
    stop_string: str | None
    usage: Usage
    stats: GenerationStats


@dataclass(frozen=True)
class Failure:
    """The answer ended with an error: a MoepackError for the client, or a defect of ours."""

    error: Exception


Event = Pieces | Waiting | Ending | Failure


@dataclass
class Whole:
    """All of an answer."""

    ending: Ending
    reasoning: str = ""
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Completion:
    """One request on its way. Made and read in the event loop."""

    def __init__(self, scheduler: Scheduler, request: CompletionRequest):
        self._scheduler, self._request = scheduler, request
        self._decoder = scheduler.engine.tokenizer.decoder()
        self._parser = AnswerParser(request.starts_inside, request.tools) if request.is_chat else None
        self._stops = StopStrings(request.stop)
        self._reasoning_tokens = self._num_logprobs = 0
        self._has_calls = False
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self.job = Job(
            request.prompt_ids,
            request.sampling,
            self._take_token,
            self._end,
            request.client,
            request.constraint,
            request.max_seconds,
        )

    def start(self) -> Completion:
        """Queue it. Raises QueueFull."""
        self._scheduler.submit(self.job)
        return self

    def cancel(self) -> None:
        """Stop generating: nobody waits for the answer any more."""
        self.job.cancel()

    async def events(self, quiet_seconds: float | None = None) -> AsyncIterator[Event]:
        """Events up to Ending or Failure; with quiet_seconds also a Waiting whenever nothing came for so long."""
        get = asyncio.ensure_future(self._queue.get())
        try:
            while True:
                await asyncio.wait({get}, timeout=quiet_seconds)
                if not get.done():
                    yield Waiting(self._scheduler.count_ahead(self.job), int(self.job.prefilled))
                    continue
                event = get.result()
                get = asyncio.ensure_future(self._queue.get())
                yield event
                if isinstance(event, (Ending, Failure)):
                    return
        finally:
            get.cancel()

    async def whole(self) -> Whole:
        """The complete answer. Raises what the generation failed with."""
        pieces: list[Piece] = []
        logprobs: list[TokenLogprobs] = []
        async for event in self.events():
            if isinstance(event, Pieces):
                pieces += event.pieces
                logprobs += event.logprobs
            elif isinstance(event, Failure):
                raise event.error
            elif isinstance(event, Ending):
                ending = event
        return Whole(
            ending,
            "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece)),
            "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)),
            [piece for piece in pieces if isinstance(piece, ToolCall)],
            logprobs,
        )

    # In the engine's thread

    def _take_token(self, token_id: int, generation: Generation) -> bool:
        constraint = self._request.constraint
        if self._parser:
            self._reasoning_tokens += self._parser.in_reasoning
            self._parser.streams_calls = (
                self._request.streams_calls and constraint is not None and constraint.holds_call
            )
        pieces = self._read(self._decoder.push(token_id), is_final=False)
        self._send_pieces(pieces, generation)
        return self._stops.found is None

    def _read(self, text: str, is_final: bool) -> list[Piece]:
        if self._parser is None:
            pieces: list[Piece] = [TextPiece(text)]
        else:
            pieces = self._parser.push(text)
            pieces += self._parser.finish() if is_final else []
        kept: list[Piece] = []
        for piece in pieces:
            if self._stops.found is not None:
                break
            if isinstance(piece, TextPiece):
                kept.append(TextPiece(self._stops.push(piece.text)))
            else:  # a stop string does not reach over a call
                kept += [TextPiece(self._stops.push("", is_final=True)), piece]
        if is_final:
            kept.append(TextPiece(self._stops.push("", is_final=True)))
        self._has_calls = self._has_calls or any(isinstance(piece, ToolCall) for piece in kept)
        return [piece for piece in kept if not isinstance(piece, TextPiece) or piece.text]

    def _send_pieces(self, pieces: list[Piece], generation: Generation) -> None:
        logprobs = generation.logprobs[self._num_logprobs :]
        self._num_logprobs += len(logprobs)
        if pieces or logprobs:
            self._send(Pieces(pieces, logprobs))

    def _end(self, generation: Generation | None, error: Exception | None) -> None:
        if generation is None or error is not None:
            self._send(Failure(error or Cancelled()))
            return
        rest = self._read(self._decoder.finish(), is_final=True)
        self._send_pieces(rest, generation)
        reason = "stop" if self._stops.found is not None else generation.finish_reason or "length"
        is_in_call = self._parser is not None and self._parser.in_streamed_call
        is_cut = reason == "length" and (rest or is_in_call)
        if self._has_calls and not is_cut:
            reason = "tool_calls"
        constraint = self._request.constraint
        usage = Usage(
            prompt_tokens=len(self._request.prompt_ids),
            completion_tokens=len(generation.token_ids),
            cached_tokens=generation.cached_tokens,
            reasoning_tokens=self._reasoning_tokens,
            constrained=constraint.describe() if constraint else None,
            constrained_tokens=constraint.num_constrained if constraint else 0,
        )
        self._send(Ending(reason, self._stops.found, usage, generation.stats()))
        if self._request.expect and generation.finish_reason == "stop":
            text = self._scheduler.engine.tokenizer.decode(generation.token_ids[:-1])
            self._scheduler.do_when_idle(functools.partial(self._read_ahead, self._request.expect, text))

    def _read_ahead(self, expect: Callable[[str], Sequence[int]], text: str, check: Callable[[float], None]) -> None:
        with contextlib.suppress(UsageError):  # a conversation at its end: too long, or not to be gone on with
            self._scheduler.engine.read_ahead(expect(text), check)

    def _send(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:  # the loop has ended: the server is shutting down
            self.job.cancel()
