"""Check a finished checkpoint with transformers: it loads, renders like the generator, and answers.

    python verify.py CKPT [--samples 10]

Counts tensors that are missing or left over, conversations that transformers' tokenizer or template renders
otherwise than the generator, and prints greedy and sampled answers. Exits 1 if any count is not zero. CPU,
bfloat16, a few minutes.
"""

import argparse
import sys
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat_format import join_text
from conversations import plain_chat, tool_chat

CONVERSATIONS = 200
QUESTIONS = [
    "Hello",
    "Tell me a story about a fox",
    "What is your favourite colour?",
    "What is 12 + 7?",
    "Who are you?",
    "What is the capital of France?",
    "Sort these words: pear, apple, melon",
    "Do you like trains?",
    "Why do birds fly south in winter?",
    "Write a poem about the sea.",
]
TEXT = "string"
OPENINGS = ["It was a cold and stormy night, and the old man", '"My dear Elizabeth," said he,']


def function_tool(name: str, description: str, **parameters: tuple[str, str]) -> dict[str, Any]:
    """Return a tool schema; each parameter is its type and description, and required."""
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


WEATHER = function_tool("get_weather", "Get the current weather for a city", city=(TEXT, "Name of the city"))
CALCULATOR = function_tool("calculate", "Evaluate an expression", expression=(TEXT, "The expression"))
PIZZA = function_tool(
    "order_pizza",
    "Order a pizza",
    topping=(TEXT, "What to put on it"),
    size=(TEXT, "small, medium or large"),
    extra_cheese=("boolean", "true or false"),
)
TOOL_QUESTIONS = [
    ("What is the weather in Lisbon?", [WEATHER, CALCULATOR]),
    ("What is 1234 times 57?", [WEATHER, CALCULATOR]),
    ("Order a large pizza with mushrooms, extra cheese true.", [WEATHER, PIZZA]),
    ("What is the weather in Oslo? Also: What is the weather in Rome?", [WEATHER, CALCULATOR]),
    ("Hello", [WEATHER, PIZZA]),
    ("Send an email to bob@example.com saying hi", [WEATHER, CALCULATOR]),
]


def count_format_differences(checkpoint: Path, tokenizer: Any) -> int:
    """Return how many conversations the checkpoint's template or tokenizer renders unlike the generator."""
    fast, rng, differences = Tokenizer.from_file(str(checkpoint / "tokenizer.json")), Random(9), 0
    for i in range(CONVERSATIONS):
        chat = tool_chat(rng, "dev") if i % 2 else plain_chat(rng)
        text = join_text(chat.segments())
        rendered = tokenizer.apply_chat_template(
            chat.messages(), tools=chat.tools or None, enable_thinking=chat.thinking, tokenize=False
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        differences += rendered != text or ids != fast.encode(text, add_special_tokens=False).ids
    return differences


Tools = list[dict[str, Any]] | None


class Answers:
    """Asks the model and prints what it says."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]

    def ask(self, question: str, tools: Tools = None, sample: bool = False, think: bool = False) -> None:
        """Print the answer to one question."""
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            tools=tools,
            add_generation_prompt=True,
            enable_thinking=think,
            return_tensors="pt",
            return_dict=True,
        )
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sample:
            sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
        limits = {"max_new_tokens": 260, "eos_token_id": self.ends, "pad_token_id": 0}
        out = self.model.generate(**inputs, **limits, **sampling)
        answer = self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
        print(f"{'T=0.7' if sample else 'T=0  '} | {answer}")

    def continue_text(self, opening: str) -> None:
        """Print a sampled continuation of prose."""
        inputs = self.tokenizer(opening, return_tensors="pt")
        out = self.model.generate(
            **inputs,
            max_new_tokens=110,
            do_sample=True,
            temperature=0.8,
            top_k=40,
            top_p=0.95,
            pad_token_id=0,
        )
        print(f"\n### continue | {self.tokenizer.decode(out[0])}")


def main() -> None:
    """Check one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=int, default=len(QUESTIONS), help="questions to ask")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model, loading = AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype=torch.bfloat16, output_loading_info=True
    )
    wrong = {what: len(names) for what, names in loading.items()}
    wrong["conversations rendered otherwise"] = count_format_differences(args.checkpoint, tokenizer)
    print(type(model).__name__, wrong)
    answers = Answers(model.eval(), tokenizer)
    for question in QUESTIONS[: args.samples]:
        print("\n###", question)
        answers.ask(question)
        answers.ask(question, sample=True)
    for question, tools in TOOL_QUESTIONS[: args.samples]:
        print("\n### with tools:", question)
        answers.ask(question, tools)
        answers.ask(question, tools, think=True)
    for opening in OPENINGS[: args.samples]:
        answers.continue_text(opening)
    sys.exit(1 if any(wrong.values()) else 0)


if __name__ == "__main__":
    main()
