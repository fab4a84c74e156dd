"""The conversation format of the demo model, in two forms that must agree: a Jinja template and plain code.

The format is that of Qwen3.5: `<|im_start|>role`, thoughts in <think>, calls in <tool_call>, results in
<tool_response>. Training text is rendered by `Conversation.segments`, which also says which parts the model
is trained on; the template renders the same text from messages and is what goes into the checkpoint. The
wording of the tool instructions is the project's own and is written once, in TOOL_INSTRUCTIONS. Text only: no
images.

    conversation.segments()                        [("<|im_start|>user\\nHi<|im_end|>\\n", False), ...]
    chat_template().render(messages=conversation.messages(), tools=conversation.tools)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEMPLATE_FILE = Path(__file__).resolve().parent / "chat_template.jinja"
TOOL_INSTRUCTIONS = """

To call a function, answer in this form and end there:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
another value,
over several lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Notes:
- Every call has one function block inside <tool_call></tool_call>
- Give all required parameters
- Reasons may stand before a call, never after it
- Where no function fits, answer in words
</IMPORTANT>"""

Segment = tuple[str, bool]  # text, and whether the model is trained to write it
Call = tuple[str, dict[str, Any]]  # name of the function, arguments


def template_text() -> str:
    """Return the chat template of the checkpoint: chat_template.jinja with the tool instructions put in."""
    instructions = TOOL_INSTRUCTIONS.replace("\n", "\\n")
    return TEMPLATE_FILE.read_text(encoding="utf-8").replace("@TAIL@", instructions)


def chat_template() -> Any:
    """Return the compiled template (jinja2), set up as chat runtimes set it up."""
    import jinja2  # only those who render messages need it; the generator itself does not

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template_text())


def message_text(role: str, content: str) -> str:
    """Return one message of a conversation."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def value_text(value: Any) -> str:
    """Return an argument as a call holds it: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """Return one tool call."""
    lines = "".join(f"<parameter={key}>\n{value_text(v)}\n</parameter>\n" for key, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


def system_text(tools: Sequence[dict[str, Any]], own: str) -> str:
    """Return the system message: any tools and how to call them, then the conversation's own words."""
    if not tools:
        return own
    listing = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    opening = "# Tools\n\nYou have access to the following functions:\n\n"
    text = f"{opening}<tools>{listing}\n</tools>{TOOL_INSTRUCTIONS}"
    return f"{text}\n\n{own}" if own else text


def join_text(segments: Sequence[Segment]) -> str:
    """Return the whole text of rendered segments."""
    return "".join(text for text, _ in segments)


@dataclass(frozen=True)
class Turn:
    """One turn after the system message; `results` are tool results, one per call of the turn before."""

    role: str
    content: str = ""
    thought: str = ""
    calls: Sequence[Call] = ()
    results: Sequence[str] = ()


@dataclass
class Conversation:
    """A conversation as it is being written; `thinking` says whether its last replies carry thoughts."""

    thinking: bool
    system: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def ask(self, content: str) -> None:
        """Add a user's message."""
        self.turns.append(Turn("user", content.strip()))

    def reply(self, thought: str, content: str = "", calls: Sequence[Call] = ()) -> None:
        """Add an answer of the assistant: words, calls, or words and then calls."""
        self.turns.append(Turn("assistant", content.strip(), thought.strip(), calls))

    def return_results(self, results: Sequence[str]) -> None:
        """Add the results of the calls of the last reply."""
        self.turns.append(Turn("tool", results=results))

    def segments(self) -> list[Segment]:
        """Render it. Replies before the last user turn carry no thoughts: a runtime drops them too."""
        system = system_text(self.tools, self.system)
        segments: list[Segment] = [(message_text("system", system), False)] if system else []
        last_user = max(i for i, turn in enumerate(self.turns) if turn.role == "user")
        for i, turn in enumerate(self.turns):
            if turn.role == "user":
                segments.append((message_text("user", turn.content), False))
            elif turn.role == "tool":
                results = "".join(f"\n<tool_response>\n{result}\n</tool_response>" for result in turn.results)
                segments.append((f"<|im_start|>user{results}<|im_end|>\n", False))
            else:
                segments += self._reply_segments(turn, with_thought=i > last_user)
        return segments

    def _reply_segments(self, turn: Turn, with_thought: bool) -> list[Segment]:
        calls = "\n".join(call_text(*call) for call in turn.calls)
        text = turn.content + ("\n\n" if turn.content and calls else "") + calls + "<|im_end|>\n"
        start: Segment = ("<|im_start|>assistant\n", False)
        if not with_thought:
            return [start, (text, True)]
        if not self.thinking:  # the empty thought is part of the prompt, not of the answer
            return [start, ("<think>\n\n</think>\n\n", False), (text, True)]
        return [start, ("<think>\n", False), (f"{turn.thought}\n</think>\n\n{text}", True)]

    def messages(self) -> list[dict[str, Any]]:
        """Return the conversation as chat messages (OpenAI form, arguments as objects)."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            if turn.role == "tool":
                messages += [{"role": "tool", "content": result} for result in turn.results]
                continue
            message: dict[str, Any] = {"role": turn.role, "content": turn.content}
            if turn.role == "assistant" and self.thinking:
                message["reasoning_content"] = turn.thought
            if turn.calls:
                message["tool_calls"] = [
                    {"type": "function", "function": {"name": name, "arguments": arguments}}
                    for name, arguments in turn.calls
                ]
            messages.append(message)
        return messages
