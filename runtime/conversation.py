"""A conversation as it is kept, saved and turned into a prompt: messages in OpenAI's form, tools, whether to think.

conversation = Conversation(system="You are terse.")
conversation.add_user("Hello")
token_ids = conversation.encode(tokenizer, template)
conversation.add_answer(pieces)                       # what AnswerParser made of the answer
conversation.save(Path("talk.json"))
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moepack.layout.errors import UsageError
from moepack.runtime.answer import Piece, ReasoningPiece, TextPiece, ToolCall
from moepack.runtime.chat import ChatTemplate, Message
from moepack.runtime.prompt import common_beginning, read_text
from moepack.runtime.tool_schema import Tool

ROLES = ("system", "user", "assistant", "tool")


@dataclass
class Conversation:
    """What has been said.

    system     the system message, None for none
    messages   the turns after it, OpenAI's form
    tools      OpenAI's form, empty for none
    thinking   whether the model thinks before it answers; None leaves it to the template
    """

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    thinking: bool | None = None

    def add_user(self, text: str) -> None:
        """What the user says."""
        self.messages.append({"role": "user", "content": text})

    def add_answer(self, pieces: Sequence[Piece]) -> list[ToolCall]:
        """The model's turn; returns the calls in it."""
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        self.messages.append(answer_message(_join(pieces, TextPiece), _join(pieces, ReasoningPiece), calls))
        return calls

    def add_tool_result(self, text: str) -> None:
        """What a tool has returned, in the order of the calls."""
        self.messages.append({"role": "tool", "content": text})

    def take_back(self) -> str | None:
        """Remove the last question and all that came of it; returns the question, None if there is none."""
        for index in reversed(range(len(self.messages))):
            if self.messages[index]["role"] == "user":
                question = self.messages[index]["content"]
                del self.messages[index:]
                return str(question)
        return None

    def render(self, template: ChatTemplate, *more: Message) -> str:
        """The prompt for the next answer, after more messages if there are any."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking}
        return template.render([*head, *self.messages, *more], self.tools or None, **thinking)

    def expect(self, template: ChatTemplate, encode: Callable[[str], list[int]]) -> list[int]:
        """The token ids that the next prompt begins with, whatever the user will say."""
        return common_beginning(encode, (self.render(template, {"role": "user", "content": text}) for text in "ab"))

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all. Raises UsageError if the file cannot be written."""
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(vars(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what save has written. Raises UsageError naming the file and what is wrong with it."""
        try:
            raw = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: is no valid JSON: {error}") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list):
            raise UsageError(f"{path}: expected a saved conversation, an object with messages")
        system, tools, thinking = raw.get("system"), raw.get("tools") or [], raw.get("thinking")
        for message in raw["messages"]:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise UsageError(f"{path}: expected messages with a role of {', '.join(ROLES)}")
        if not isinstance(system, str | None) or not isinstance(thinking, bool | None) or not isinstance(tools, list):
            raise UsageError(f"{path}: expected system as text, thinking as true or false, tools as a list")
        return cls(system, raw["messages"], tools, thinking)


def answer_message(content: str, reasoning: str, calls: Sequence[ToolCall]) -> Message:
    """The model's turn in OpenAI's form; without reasoning and calls where there are none."""
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
        message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return message


def _join(pieces: Sequence[Piece], kind: Any) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, kind)).strip()
