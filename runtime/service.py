"""What the APIs share: the model behind them, and a chat or a text turned into a request to it.

service = Service(engine, name="demo", settings=Settings())
request = service.prepare_chat(messages, tools, choice="auto", sampling=..., ...)
completion = service.start(request)
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moepack.layout.errors import UsageError
from moepack.runtime.answer import opens_reasoning, parse_tool_calls, split_reasoning
from moepack.runtime.completion import Completion, CompletionRequest, Ending, Event, Failure
from moepack.runtime.constrain import AnswerConstraint, Grammars, is_writable
from moepack.runtime.conversation import answer_message
from moepack.runtime.engine import Engine
from moepack.runtime.metrics import Metrics
from moepack.runtime.prompt import common_beginning
from moepack.runtime.sampling import SamplingParams
from moepack.runtime.scheduler import Cancelled, Scheduler
from moepack.runtime.stats import format_stats
from moepack.runtime.tool_schema import Tool

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_STOPS = 16
SERVER_BYTES = 96 * 2**20  # bodies, prompts, connections, compiled grammars; the vocabulary's own part is measured
logger = logging.getLogger("moepack.serve")


@dataclass(frozen=True)
class Settings:
    """How a server answers.

    constrain       hold calls and JSON to their form
    max_waiting     requests that may wait
    max_running     answers written at the same time: the engine must have been opened for as many sequences
    max_seconds     for one answer, from its turn on
    max_tokens      of an answer where the request does not say
    seed            where the request does not say
    quiet_seconds   after which a stream that has nothing to say says so
    reads_ahead     while nobody waits, an answer is read as the conversation's next prompt will have it
    """

    constrain: bool = True
    max_waiting: int = 256
    max_running: int = 1
    max_seconds: float = 3600.0
    max_tokens: int = 2048
    seed: int = 0
    quiet_seconds: float = 2.0
    reads_ahead: bool = False


class Service:
    """One engine, its queue, and what it knows about itself. grammars: if they are loaded already."""

    def __init__(self, engine: Engine, name: str, settings: Settings = Settings(), grammars: Grammars | None = None):
        self.engine, self.name, self.settings = engine, name, settings
        self.created = int(time.time())
        self.template = engine.chat_template()
        self.scheduler = Scheduler(engine, settings.max_waiting, settings.max_running)
        self.metrics = Metrics(engine, self.scheduler)
        self._grammars: Grammars | None = None
        if settings.constrain:
            self._grammars = grammars or Grammars(engine.tokenizer, engine.architecture.vocab_size)

    def close(self) -> None:
        """Cancel what runs and end the engine's thread."""
        self.scheduler.close()

    def sampling(self, **overrides: Any) -> SamplingParams:
        """The model's own sampling with a request's values in place of it. Raises UsageError."""
        values = {key: value for key, value in overrides.items() if value is not None}
        defaults = {"seed": self.settings.seed, "max_tokens": self.settings.max_tokens}
        return self.engine.default_sampling(**defaults | values)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, checked. Raises UsageError."""
        ids = self.engine.tokenizer.encode(text)
        self.engine.check_prompt(ids)
        return ids

    def render_chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool], **template: Any) -> str:
        """The prompt for a conversation. Raises UsageError."""
        if self.template is None:
            raise UsageError("the pack has no chat template: use /v1/completions")
        if len(messages) > MAX_MESSAGES:
            raise UsageError(f"messages: {len(messages)} are more than {MAX_MESSAGES}")
        for number, message in enumerate(messages):
            if isinstance(message, dict) and message.get("role") not in ROLES:
                raise UsageError(
                    f"messages[{number}].role: expected {', '.join(ROLES)}, found {str(message.get('role'))[:40]!r}"
                )
        renamed = [
            {**message, "role": "system"}
            if isinstance(message, dict) and message.get("role") == "developer"
            else message
            for message in messages
        ]
        return self.template.render(renamed, tools=list(tools) or None, **template)

    def prepare_chat(
        self,
        messages: Sequence[dict[str, Any]],
        sampling: SamplingParams,
        tools: Sequence[Tool] = (),
        choice: str = "auto",
        parallel: bool = True,
        schema: dict[str, Any] | None = None,
        stop: Sequence[str] = (),
        client: str = "",
        template: dict[str, Any] | None = None,
        streams: bool = False,
    ) -> CompletionRequest:
        """A conversation as a request.

        choice     auto, none, required, or a tool's name
        schema     that the answer as JSON must fit, {} for any object
        template   arguments of the chat template, such as enable_thinking
        streams    calls are sent while they are written

        Raises UsageError for whatever is wrong with it.
        """
        check_tools(tools, choice)
        template = template or {}
        prompt = self.render_chat(messages, tools, **template)
        inside = opens_reasoning(prompt)
        constraint = None
        if self._grammars and (tools or schema is not None):
            constraint = AnswerConstraint(self._grammars, inside, tools, choice, parallel, schema)
        elif schema is not None or choice not in ("auto", "none"):
            raise UsageError("this server runs with --no-constrain: it cannot hold an answer to a form")
        return CompletionRequest(
            prompt_ids=self.encode(prompt),
            sampling=sampling,
            starts_inside=inside,
            tools=tools if tools and choice != "none" else None,
            stop=check_stop(stop),
            streams_calls=streams,
            expect=functools.partial(self._expect, messages, tools, template) if self.settings.reads_ahead else None,
            constraint=constraint,
            client=client,
            max_seconds=self.settings.max_seconds,
        )

    def _expect(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool], template: dict[str, Any], text: str
    ) -> list[int]:
        """What the next prompt of a conversation begins with, if it goes on from an answer. Raises UsageError."""
        inside = opens_reasoning(self.render_chat(messages, tools, **template))
        reasoning, answer = split_reasoning(text, inside)
        content, calls = parse_tool_calls(answer, tools) if tools else (answer, [])
        message = answer_message(content, reasoning or "", calls)
        role = "tool" if calls else "user"
        prompts = [
            self.render_chat([*messages, message, {"role": role, "content": what}], tools, **template) for what in "ab"
        ]
        return common_beginning(self.engine.tokenizer.encode, prompts)

    def start(self, request: CompletionRequest) -> Completion:
        """Queue a request. Called in the event loop. Raises QueueFull."""
        return Completion(self.scheduler, request).start()

    def note(self, completion: Completion, event: Event) -> None:
        """Count and log how a request ended."""
        if isinstance(event, Ending):
            self.metrics.count(event, time.monotonic() - completion.job.created)
            usage, held = event.usage, ""
            if usage.constrained:
                held = f", held to {usage.constrained} for {usage.constrained_tokens} tokens (--no-constrain: bare)"
            logger.info("%s%s %s", event.finish_reason, held, format_stats(event.stats))
        elif isinstance(event, Failure):
            end = "cancelled" if isinstance(event.error, Cancelled) else "failed"
            self.metrics.requests.labels(end).inc()
            logger.info("%s %s", end, "" if end == "cancelled" else event.error)


def check_tools(tools: Sequence[Tool], choice: str) -> None:
    """Raise UsageError for tools that the model could not call, or a choice that is none of them."""
    if len(tools) > MAX_TOOLS:
        raise UsageError(f"tools: {len(tools)} are more than {MAX_TOOLS}")
    names = []
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise UsageError(f'tools[{number}]: expected {{"type": "function", "function": {{"name": ...}}}}')
        name, parameters = function.get("name"), function.get("parameters", {})
        if not is_writable(name) or len(str(name)) > 128:
            raise UsageError(
                f"tools[{number}].function.name: expected a name without < and >, found {str(name)[:80]!r}"
            )
        if parameters is not None and not isinstance(parameters, dict):
            raise UsageError(f"tools[{number}].function.parameters: expected a JSON schema, found {parameters!r:.80}")
        if name in names:
            raise UsageError(f"tools[{number}].function.name: {name!r} is there twice")
        names.append(name)
    if choice == "required" and not tools:
        raise UsageError("tool_choice is required, but there are no tools")
    if choice not in ("auto", "none", "required", *names):
        raise UsageError(f"tool_choice: there is no tool {choice!r}")


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple. Raises UsageError."""
    if len(stop) > MAX_STOPS or not all(isinstance(text, str) and 0 < len(text) <= 1000 for text in stop):
        raise UsageError(f"stop: expected at most {MAX_STOPS} strings of 1 to 1000 characters")
    return tuple(stop)
