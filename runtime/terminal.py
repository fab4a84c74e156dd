"""moe-run chat: a conversation at the terminal.

Answers stream as they come; thinking is dim, or hidden; the line at the foot tells the speed and how many experts were
found in memory. Ctrl-C stops an answer and keeps the conversation, what was written of the answer included. Tools are
off unless a tools file is given, and each call is shown and asked about before anything runs. While the user types, the
last answer is read as the next prompt will have it. Where the input is no terminal, every line of it is a message, so
that a conversation can be scripted.

    Terminal(engine, template, Conversation(), ChatSettings(sampling)).run()
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from moepack.layout.errors import MoepackError, UsageError
from moepack.runtime.answer import AnswerParser, Piece, ReasoningPiece, TextPiece, ToolCall, opens_reasoning
from moepack.runtime.chat import ChatTemplate
from moepack.runtime.conversation import Conversation
from moepack.runtime.engine import Engine
from moepack.runtime.generate import Generation
from moepack.runtime.local_tools import LocalTools
from moepack.runtime.sampling import SamplingParams
from moepack.runtime.stats import GenerationStats, format_stats
from moepack.runtime.status_line import DIM, PLAIN, StatusLine

MOST_CALLS = 16  # in a row without a word from the user: a model can go round in circles
PROMPT, MORE = "> ", ". "


class Stopped(Exception):
    """The user stopped the answer."""


@dataclass(frozen=True)
class ChatSettings:
    """How to chat.

    sampling        of every answer; the seed of an answer is this one's plus the number of messages before it
    show_thinking   print the reasoning, dim
    tools           programs that calls may run, None for none
    """

    sampling: SamplingParams
    show_thinking: bool = True
    tools: LocalTools | None = None


class Terminal:
    """One conversation: reads, answers, obeys commands, until the input ends."""

    def __init__(self, engine: Engine, template: ChatTemplate, conversation: Conversation, settings: ChatSettings):
        self.engine, self.template = engine, template
        self.conversation, self.settings = conversation, settings
        self.last_stats: GenerationStats | None = None
        self._is_terminal = sys.stdin.isatty()
        self._read_line = _prompt_reader() if self._is_terminal else _plain_reader()
        self._use_tools(settings.tools)
        # All computing is one thread's: the scratch memory of the kernels is a thread's own.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def run(self) -> None:
        """Converse until the input ends. Raises MoepackError if the model cannot go on (a damaged pack)."""
        self._note("Enter sends, Alt-Enter or \\ at the end begins another line, /help lists the commands")
        while (text := self._read_ahead_and_message()) is not None:
            if not text.strip():
                continue
            try:
                if text.startswith("/"):
                    if not self._obey(text):
                        return
                else:
                    self.conversation.add_user(text)
                    self._answer()
            except UsageError as error:  # the conversation goes on
                self._note(f"error: {error}")

    # Answers

    def _answer(self) -> None:
        """The model's turn, and its tools' turns, until it has answered in words or the user has stopped it."""
        before = len(self.conversation.messages)
        for _ in range(MOST_CALLS):
            try:
                pieces, was_stopped = self._generate()
            except UsageError:  # too long for the context: as if it had not been said
                if len(self.conversation.messages) == before:
                    self.conversation.take_back()
                raise
            calls = self.conversation.add_answer(pieces)
            if was_stopped or not calls:
                return
            if not self._call_tools(calls):
                return
        self._note(f"stopped after {MOST_CALLS} rounds of calls: say something to go on")

    def _generate(self) -> tuple[list[Piece], bool]:
        """One answer as it was printed, and whether the user stopped it."""
        prompt = self.conversation.render(self.template)
        token_ids = self.engine.tokenizer.encode(prompt)
        planned = self.engine.max_context
        if planned < len(token_ids) <= self.engine.architecture.max_position_embeddings:  # the engine refuses the rest
            raise UsageError(
                f"the conversation has {len(token_ids)} tokens, memory was planned for {planned}: /clear forgets what "
                "was said, and a larger --context has room for more"
            )
        parser = AnswerParser(opens_reasoning(prompt), self.conversation.tools or None)
        seed = self.settings.sampling.seed + len(self.conversation.messages)
        printer = _Printer(self.settings.show_thinking)
        with StatusLine(sys.stdout) as status, _stop_on_interrupt() as check_stop:
            done = 0.0

            def on_prefill(tokens: float) -> None:
                nonlocal done
                done += tokens
                check_stop()
                status.show(f"reading {done:.0f} of {len(token_ids)} tokens")

            generation = self.engine.generate(token_ids, replace(self.settings.sampling, seed=seed), on_prefill)
            text = self.engine.tokenizer.decoder()
            was_stopped = False
            try:
                while (token_id := self._worker.submit(next, generation, None).result()) is not None:
                    printer.show(parser.push(text.push(token_id)))
                    status.show(_describe_progress(generation, parser.in_reasoning))
                    check_stop()
                printer.show(parser.push(text.finish()))
            except Stopped:
                was_stopped = True
            printer.show(parser.finish())
            printer.close()
        self.last_stats = generation.stats()
        self._note("stopped" if was_stopped else format_stats(self.last_stats))
        return printer.pieces, was_stopped

    def _call_tools(self, calls: list[ToolCall]) -> bool:
        """Run the calls that the user agrees to and add what they return; whether there is anything to go on with."""
        results = []
        for call in calls:
            result = self._call_tool(call)
            if result is None:
                self._note("no result: the call stays unanswered")
                return False
            results.append(result)
        for result in results:
            self.conversation.add_tool_result(result)
        return True

    def _call_tool(self, call: ToolCall) -> str | None:
        tools = self.settings.tools
        command = tools.commands.get(call.name) if tools else None
        if tools and command:
            reply = self._ask(f"run {' '.join(command)} with {json.dumps(call.arguments, ensure_ascii=False)}? [y/N] ")
            if reply is not None and reply.strip().lower() in ("y", "yes"):
                result = tools.run(call.name, call.arguments)
                self._note(result)
                return result
            return "The user did not allow this call."
        return self._ask(f"result of {call.name} (empty: none): ") or None

    def _ask(self, question: str) -> str | None:
        try:
            return self._read_line(question)
        except KeyboardInterrupt:
            return None

    # Commands

    def _obey(self, text: str) -> bool:
        """Run a /command; false if it ends the conversation. Raises UsageError."""
        name, _, argument = text[1:].strip().partition(" ")
        commands = self._commands()
        if name not in commands:
            raise UsageError(f"/{name}: no such command: /help lists them")
        _, _, run = commands[name]
        return run(argument.strip()) is not False

    def _commands(self) -> dict[str, tuple[str, str, Callable[[str], bool | None]]]:
        return {
            "help": ("", "list the commands", self._help),
            "system": ("[TEXT]", "set the system message, or remove it", self._set_system),
            "temperature": ("[T]", "0 is greedy; without T the model's own", self._set_temperature),
            "think": ("on|off|hide|show", "let the model think first; hide or show its thinking", self._set_thinking),
            "tools": ("[FILE]", "list the tools, or take them from a file", self._set_tools),
            "retry": ("", "answer the last question again", self._retry),
            "stats": ("", "what the last answer cost, and how memory is used", self._stats),
            "save": ("FILE", "write the conversation", lambda path: self.conversation.save(_path(path, "save"))),
            "load": ("FILE", "go on with a saved one", self._load),
            "clear": ("", "forget everything but the system message", lambda _: self.conversation.messages.clear()),
            "quit": ("", "end, as Ctrl-D does", lambda _: False),
        }

    def _help(self, _: str) -> None:
        for name, (arguments, text, _run) in self._commands().items():
            print(f"/{name + ' ' + arguments:24} {text}")

    def _set_system(self, text: str) -> None:
        self.conversation.system = text or None

    def _set_temperature(self, text: str) -> None:
        try:
            temperature = float(text) if text else self.engine.default_sampling().temperature
        except ValueError:
            raise UsageError(f"/temperature {text}: expected a number") from None
        self._change(sampling=replace(self.settings.sampling, temperature=temperature))

    def _set_thinking(self, text: str) -> None:
        if text in ("on", "off"):
            self.conversation.thinking = text == "on"
        elif text in ("hide", "show"):
            self._change(show_thinking=text == "show")
        else:
            raise UsageError(f"/think {text}: expected on, off, hide or show")

    def _set_tools(self, text: str) -> None:
        if text:
            self._use_tools(LocalTools.load(Path(text).expanduser()))
        for tool in self.conversation.tools:
            name = tool["function"]["name"]
            command = self.settings.tools.commands.get(name) if self.settings.tools else None
            print(f"{name}: {' '.join(command) if command else 'answered by you'}")
        if not self.conversation.tools:
            print("no tools")

    def _use_tools(self, tools: LocalTools | None) -> None:
        self._change(tools=tools)
        if tools is not None:
            self.conversation.tools = tools.schemas

    def _retry(self, _: str) -> None:
        question = self.conversation.take_back()
        if question is None:
            raise UsageError("/retry: nothing has been asked yet")
        sampling = self.settings.sampling
        self._change(sampling=replace(sampling, seed=(sampling.seed + 2**32) % 2**63))  # else the same answer again
        self.conversation.add_user(question)
        self._answer()

    def _stats(self, _: str) -> None:
        if self.last_stats:
            for name, value in vars(self.last_stats).items():
                print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
        for name, text in self.engine.describe().items():
            print(f"{name}: {text}")

    def _load(self, text: str) -> None:
        self.conversation = Conversation.load(_path(text, "load"))

    def _change(self, **values: Any) -> None:
        self.settings = replace(self.settings, **values)

    # Input and output

    def _read_ahead_and_message(self) -> str | None:
        """What the user says; meanwhile, what the next prompt begins with is read, until the message is there."""
        is_there = threading.Event()

        def check(_: float) -> None:
            if is_there.is_set():
                raise Stopped

        def read_ahead() -> None:
            with contextlib.suppress(Stopped, MoepackError):  # the next answer meets the same error, and tells it
                expected = self.conversation.expect(self.template, self.engine.tokenizer.encode)
                self.engine.read_ahead(expected, check)

        reading = self._worker.submit(read_ahead) if self._is_terminal and self.conversation.messages else None
        try:
            return self._read_message()
        finally:
            is_there.set()
            if reading:
                reading.result()

    def _read_message(self) -> str | None:
        """What the user says, over several lines if they end in a backslash; None at the end of the input."""
        lines: list[str] = []
        while True:
            try:
                line = self._read_line(MORE if lines else PROMPT)
            except KeyboardInterrupt:  # what was typed is dropped
                return ""
            if line is None:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _note(self, text: str) -> None:
        """A line that is not part of the conversation."""
        print(f"{DIM}{text}{PLAIN}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


class _Printer:
    """Prints the pieces of an answer, and keeps them."""

    def __init__(self, show_thinking: bool):
        self.pieces: list[Piece] = []
        self._show_thinking = show_thinking
        self._styled = sys.stdout.isatty()
        self._in_thinking = self._needs_newline = False

    def show(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self.pieces.append(piece)
            if isinstance(piece, ReasoningPiece):
                if self._show_thinking:
                    self._write(piece.text, dim=True)
            elif isinstance(piece, TextPiece):
                self._write(piece.text)
            elif isinstance(piece, ToolCall):
                arguments = ", ".join(
                    f"{key}={json.dumps(v, ensure_ascii=False)}" for key, v in piece.arguments.items()
                )
                self.close()
                self._write(f"[{piece.name}({arguments})]\n")

    def close(self) -> None:
        """End the line."""
        if self._needs_newline:
            self._write("\n")

    def _write(self, text: str, dim: bool = False) -> None:
        if self._in_thinking and not dim:
            text = "\n\n" + text.lstrip("\n")
        self._in_thinking = dim
        self._needs_newline = not text.endswith("\n")
        print(f"{DIM}{text}{PLAIN}" if dim and self._styled else text, end="", flush=True)


def _describe_progress(generation: Generation, in_reasoning: bool) -> str:
    stats = generation.stats()
    speed = "" if stats.decode_tok_s is None else f" | {stats.decode_tok_s:.1f} tok/s"
    fetched = stats.expert_hits + stats.expert_misses
    hits = f" | {stats.expert_hits / fetched:.0%} of experts in memory" if fetched else ""
    return f"{'thinking' if in_reasoning else 'answering'}, {stats.generated_tokens} tokens{speed}{hits} | Ctrl-C stops"


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], None]]:
    """Ctrl-C only sets a flag, which the function given raises as Stopped: the engine is never left half-way.

    A second Ctrl-C interrupts at once, for whoever cannot wait for a layer to end.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    def check() -> None:
        if stopped:
            raise Stopped

    earlier = signal.signal(signal.SIGINT, stop)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, earlier)


def _prompt_reader() -> Callable[[str], str | None]:
    """Lines from the terminal with editing and history; Alt-Enter begins another line."""
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(key_bindings=bindings)

    def read(question: str) -> str | None:
        try:
            return session.prompt(question)
        except EOFError:
            return None

    return read


def _plain_reader() -> Callable[[str], str | None]:
    """Lines of standard input."""

    def read(question: str) -> str | None:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    return read


def _path(text: str, command: str) -> Path:
    if not text:
        raise UsageError(f"/{command}: expected a file name")
    return Path(text).expanduser()
