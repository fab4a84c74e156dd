"""Synthetic conversations: with tools, without tools, and single tool prompts.

A tool chat offers one to five tools, everyday ones and made-up ones, and goes through what happens with
tools: one call, several calls, a value that is missing, a tool that is missing, an error, small talk in
between. Everything is drawn from one random generator, so a seed gives the same conversations for ever. The
splits `train`, `dev` and `test` take words and everyday tools from disjoint parts of the vocabulary
(vocabulary.py). Nothing comes from another model.

    python conversations.py --seed 1 --count 3        print some
"""

import argparse
import json
from collections.abc import Sequence
from random import Random
from typing import Any

from chat_format import TOOL_INSTRUCTIONS, Conversation, join_text, value_text
from everyday_tools import EVERYDAY_TOOLS, EverydayTool, ToolUse
from made_up_tools import MadeUpTool, show_value
from small_talk import plain
from vocabulary import SPLITS

Tool = EverydayTool | MadeUpTool
Use = tuple[Tool, ToolUse]

SYSTEM_TEXTS = [
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "You are a helpful assistant with access to tools.",
    "Be concise and polite.",
    "You are the moepack demo model.",
    "You are an assistant for a small company.",
    "Help the user.",
    "You are a careful assistant. Use a tool when it helps.",
    "Keep your answers short.",
    "You are an assistant in a terminal.",
    "Be kind.",
    "You are a home assistant.",
    "Reply in plain English.",
    "Never make things up.",
]
ERRORS = [
    "not found",
    "permission denied",
    "timeout",
    "invalid {parameter}",
    "service unavailable",
    "rate limit reached",
    "no such {noun}",
    "the {noun} is locked",
    "internal error",
    "network unreachable",
]
BEFORE_A_CALL = [
    "Let me check.",
    "One moment.",
    "I will do that now.",
    "Sure.",
    "Of course.",
    "I will use a tool for this.",
    "Okay.",
]
NO_TOOL = [
    "I am sorry, I cannot do that here.",
    "Sorry, I have no way to do that.",
    "I cannot help with that, because I have no tool for it.",
    "That is not something I can do with what I have.",
]


def draw_tools(rng: Random, split: str) -> list[Tool]:
    """Draw one to five tools with different names; some are near misses of each other."""
    count = rng.choice([1, 1, 2, 2, 3, 3, 4, 5])
    tools: list[Tool] = []
    while len(tools) < count:
        kind, last = rng.random(), tools[-1] if tools else None
        tool: Tool
        if kind < 0.42:
            pool = "train" if split == "train" or rng.random() < 0.3 else split
            tool = EverydayTool(rng, rng.choice(EVERYDAY_TOOLS[pool]), split)
            if any(isinstance(other, EverydayTool) and other.spec is tool.spec for other in tools):
                continue
        elif kind < 0.62 and isinstance(last, MadeUpTool):  # the same verb or the same noun as its neighbour
            same_verb = rng.random() < 0.5
            verb, noun = (last.verb, "") if same_verb else ("", last.noun)
            tool = MadeUpTool(rng, split, verb, noun)
        else:
            tool = MadeUpTool(rng, split, small=count > 4)
        if all(tool.name != other.name for other in tools):
            tools.append(tool)
    rng.shuffle(tools)
    return tools


def tool_chat(rng: Random, split: str = "train") -> Conversation:
    """Return a conversation in which tools are offered and mostly used."""
    thinking = rng.random() < 0.45
    tools = draw_tools(rng, split)
    chat = Conversation(thinking, _own_system_text(rng), [tool.schema() for tool in tools])
    kind = rng.random()
    if rng.random() < 0.1:
        _talk(rng, chat)
    if kind < 0.08:  # tools are there and nobody needs them
        _talk(rng, chat, rng.choice(["", " I need no tool for that."]))
        return chat
    if kind < 0.16 and _ask_for_absent_tool(rng, split, chat, tools):
        return chat
    if kind < 0.2 and _ask_with_missing_value(rng, split, chat, rng.choice(tools)):
        return chat
    uses = _ask_with_values(rng, split, chat, tools)
    _answer_with_calls(rng, chat, uses, with_words=True)
    _report(rng, chat, uses)
    while rng.random() < 0.3:
        if rng.random() < 0.65:
            tool = rng.choice(tools)
            use = tool.use(rng, split)
            chat.ask(use.request)
            chat.reply(f"{use.thought} I will call {tool.name}.", calls=[(tool.name, use.arguments)])
            chat.return_results([use.result])
            chat.reply("I have the result.", use.answer)
        else:
            _talk(rng, chat)
    return chat


def plain_chat(rng: Random, split: str = "train") -> Conversation:
    """Return a conversation without tools: small talk, stories, sums, and requests that would need a tool."""
    while True:
        chat = Conversation(rng.random() < 0.45)
        if rng.random() < 0.25:
            chat.system = rng.choice(SYSTEM_TEXTS)
        for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
            if rng.random() >= 0.05:
                _talk(rng, chat)
                continue
            tool = _draw_absent_tool(rng, split, everyday_share=0.6)
            if not _is_calculator(tool):  # small sums need no tool
                _decline(rng, split, chat, tool, " I have no tools here.")
        if chat.turns:
            return chat


def tool_prompt(rng: Random, split: str) -> Conversation:
    """Return a conversation that ends with the calls its request asks for; thinking is off."""
    tools = draw_tools(rng, split)
    chat = Conversation(False, _own_system_text(rng), [tool.schema() for tool in tools])
    uses = _ask_with_values(rng, split, chat, tools)
    _answer_with_calls(rng, chat, uses, with_words=False)
    return chat


def tool_record(rng: Random, split: str) -> dict[str, Any]:
    """Return one tool prompt as a line of a tools file: messages, tools and expected_calls (OpenAI form)."""
    chat = tool_prompt(rng, split)
    calls = [
        {
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for name, arguments in chat.turns[-1].calls
    ]
    return {"messages": chat.messages()[:-1], "tools": chat.tools, "expected_calls": calls}


# --- parts of a conversation ---


def _own_system_text(rng: Random) -> str:
    return rng.choice(SYSTEM_TEXTS) if rng.random() < 0.4 else ""


def _talk(rng: Random, chat: Conversation, afterthought: str = "") -> None:
    """Add one question and answer that have nothing to do with tools."""
    request, thought, answer = plain(rng)
    chat.ask(request)
    chat.reply(thought + afterthought, answer)


def _is_calculator(tool: Tool) -> bool:
    return isinstance(tool, EverydayTool) and tool.spec.key == "calculator"


def _draw_absent_tool(rng: Random, split: str, everyday_share: float) -> Tool:
    """Draw a tool to ask for in vain; its name must say what it does, as the request may use it."""
    if rng.random() < everyday_share:
        return EverydayTool(rng, rng.choice(EVERYDAY_TOOLS["train"]))
    tool = MadeUpTool(rng, split)
    tool.name, tool.is_opaque = tool.plain_name, False
    return tool


def _decline(rng: Random, split: str, chat: Conversation, tool: Tool, reason: str) -> None:
    use = tool.use(rng, split)
    chat.ask(use.request)
    chat.reply(use.thought + reason, rng.choice(NO_TOOL))


def _offers(tools: Sequence[Tool], wanted: Tool) -> bool:
    """Say whether one of the tools could meet a request for the wanted one."""
    if isinstance(wanted, EverydayTool):
        return any(isinstance(tool, EverydayTool) and tool.spec is wanted.spec for tool in tools)
    made_up = [tool for tool in tools if isinstance(tool, MadeUpTool)]
    return any(tool.verb == wanted.verb or tool.noun == wanted.noun for tool in made_up)


def _ask_for_absent_tool(rng: Random, split: str, chat: Conversation, tools: Sequence[Tool]) -> bool:
    """Add a request that none of the tools can meet, and a refusal; False if none was found."""
    for _ in range(20):
        tool = _draw_absent_tool(rng, split, everyday_share=0.5)
        if _offers(tools, tool):
            continue
        if _is_calculator(tool):
            return False
        _decline(rng, split, chat, tool, " No tool here can do that.")
        return True
    return False


def _ask_with_missing_value(rng: Random, split: str, chat: Conversation, tool: Tool) -> bool:
    """Add a request without its only required value, the question for it, the call; False if impossible."""
    if isinstance(tool, EverydayTool) or tool.is_opaque:
        return False
    required = [parameter for parameter in tool.parameters if parameter.required]
    if len(required) != 1:
        return False
    parameter = required[0]
    value = parameter.draw(rng, split)
    if isinstance(value, str) and "\n" in value:
        return False
    noun = tool.noun
    chat.ask(
        rng.choice(
            [
                f"Please {tool.verb} the {noun}.",
                f"{tool.verb.title()} a {noun}.",
                f"I want to {tool.verb} a {noun}.",
            ]
        )
    )
    questions = [
        f"Which {parameter.label} should I use?",
        f"What is the {parameter.label}?",
        f"Please tell me the {parameter.label}.",
    ]
    chat.reply(f"The value of {parameter.name} is missing.", rng.choice(questions))
    chat.ask(show_value(rng, value))
    chat.reply(
        f"Now I know the {parameter.label}. I will call {tool.name}.",
        calls=[(tool.name, {parameter.name: value})],
    )
    result, answer = tool.draw_result(rng, split)
    chat.return_results([result])
    chat.reply("I have the result.", answer)
    return True


def _ask_with_values(rng: Random, split: str, chat: Conversation, tools: Sequence[Tool]) -> list[Use]:
    """Add a request that needs one to three calls; return the calls it needs."""
    count = 1 if rng.random() < 0.8 else rng.choice([2, 2, 3])
    if count > 1 and rng.random() < 0.4:
        chosen = [rng.choice(tools) for _ in range(count)]
    else:
        chosen = rng.sample(tools, min(count, len(tools)))
    uses = [(tool, tool.use(rng, split)) for tool in chosen]
    if any("\n" in use.request for _, use in uses[:-1]):  # a block of text ends a request
        uses = uses[:1]
    request = uses[0][1].request
    for _, use in uses[1:]:
        request += rng.choice([" Also: ", " And then: ", " ", "\n", " Then "]) + use.request
    if rng.random() < 0.12:
        request = rng.choice(["Hi! ", "Hello, ", "Hey. ", "Please help me. ", "Good morning. "]) + request
    elif rng.random() < 0.06 and "\n" not in request:
        request += rng.choice([" Thanks!", " Thank you.", " please"])
    chat.ask(request)
    return uses


def _answer_with_calls(rng: Random, chat: Conversation, uses: Sequence[Use], with_words: bool) -> None:
    """Add the reply that makes the calls, now and then with a few words before them."""
    names = [tool.name for tool, _ in uses]
    thought = " ".join(use.thought for _, use in uses)
    if len(uses) == 1:
        thought += f" I will call {names[0]}."
    else:
        thought += f" I will make {len(uses)} calls: " + " and ".join(names) + "."
    first = {key: value_text(value) for key, value in uses[0][1].arguments.items()}
    if rng.random() < 0.2 and first:
        short = {key: text for key, text in first.items() if "\n" not in text and len(text) < 40}
        thought += " " + " ".join(f"The {key} is {text}." for key, text in short.items())
    words = "" if rng.random() < 0.85 or not with_words else rng.choice(BEFORE_A_CALL)
    chat.reply(thought, words, [(tool.name, use.arguments) for tool, use in uses])


def _report(rng: Random, chat: Conversation, uses: Sequence[Use]) -> None:
    """Add the results of the calls and what the assistant makes of them; a tenth of the first calls fail."""
    (tool, first), others = uses[0], [use for _, use in uses[1:]]
    if rng.random() < 0.1:
        parameter, noun = (list(first.arguments) or ["value"])[0], getattr(tool, "noun", "entry")
        error = rng.choice(ERRORS).format(parameter=parameter, noun=noun)
        reports = [
            f"That did not work. The tool reported an error: {error}.",
            f"Sorry, there was an error: {error}.",
            f"I could not do it: {error}.",
        ]
        chat.return_results([json.dumps({"error": error}), *(use.result for use in others)])
        answers = [rng.choice(reports), *(use.answer for use in others)]
        chat.reply("The tool reported an error.", " ".join(answers))
        return
    chat.return_results([use.result for _, use in uses])
    thought = "I have all results."
    if len(uses) == 1:
        thought = rng.choice(["I have the result.", "The tool answered.", "Now I can answer."])
    chat.reply(thought, " ".join(use.answer for _, use in uses))


def main() -> None:
    """Print conversations, each with the tool instructions left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=4, help="conversations of each sort")
    parser.add_argument("--split", choices=SPLITS, default="train")
    args = parser.parse_args()
    rng = Random(args.seed)
    for make in (tool_chat, plain_chat):
        for _ in range(args.count):
            print(join_text(make(rng, args.split).segments()).replace(TOOL_INSTRUCTIONS, ""), end="\n\n")


if __name__ == "__main__":
    main()
