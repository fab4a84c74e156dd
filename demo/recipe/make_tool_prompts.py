"""Write a tools file: prompts that ask for tool calls, each with the calls it asks for.

    python make_tool_prompts.py --split dev --count 60 --seed 7 tools.jsonl

One JSON object a line: vocabulary, messages, tools, expected_calls (OpenAI form, arguments as JSON text).
Prompts alternate between `unseen` (words and tools kept from training, those of --split) and `seen` (the
training vocabulary, with fresh values). --familiar is the share of prompts that are short and ask one
everyday tool under a usual name, which a small model can be expected to meet; the others are as they come.
The same arguments write the same file.
"""

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from conversations import tool_record
from everyday_tools import EVERYDAY_TOOLS

SPLITS = ("dev", "test")
SHORT_REQUEST = 100  # characters
FEW_TOOLS = 2
_USUAL_NAMES = {name for specs in EVERYDAY_TOOLS.values() for spec in specs for name in spec.names}
_USUAL_PARAMETERS = {
    name
    for specs in EVERYDAY_TOOLS.values()
    for spec in specs
    for parameter in spec.parameters
    for name in parameter["names"]
}


def is_familiar(record: dict[str, Any]) -> bool:
    """Say whether a record is one short request to an everyday tool, with few tools to choose from."""
    calls, tools = record["expected_calls"], [tool["function"] for tool in record["tools"]]
    return (
        len(calls) == 1
        and len(tools) <= FEW_TOOLS
        and len(record["messages"][-1]["content"]) <= SHORT_REQUEST
        and all(tool["name"] in _USUAL_NAMES for tool in tools)
        and all(name in _USUAL_PARAMETERS for name in json.loads(calls[0]["function"]["arguments"]))
    )


def tool_prompts(split: str, count: int, seed: int, familiar: float) -> list[dict[str, Any]]:
    """Return `count` records; `familiar` of them (a share from 0 to 1) are short and everyday."""
    rng = Random(seed)
    records = []
    for i in range(count):
        vocabulary = ("unseen", "seen")[i % 2]
        pair = i // 2
        wants_familiar = int((pair + 1) * familiar) > int(pair * familiar)  # spread evenly
        while True:
            record = tool_record(rng, split if vocabulary == "unseen" else "train")
            if not wants_familiar or is_familiar(record):
                break
        records.append({"vocabulary": vocabulary, **record})
    return records


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, default="dev", help="source of unseen words and tools")
    parser.add_argument("--count", type=int, default=60, help="prompts")
    parser.add_argument("--seed", type=int, default=7, help="the same seed writes the same file")
    parser.add_argument("--familiar", type=float, default=0.6, help="share of short everyday prompts")
    parser.add_argument("out", type=Path, help="tools file to write")
    args = parser.parse_args()
    records = tool_prompts(args.split, args.count, args.seed, args.familiar)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    args.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
