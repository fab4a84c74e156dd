"""One run of moepack on given token ids: prefill, then greedy decode; the counterpart of peer.py, lap for lap.

Uses the public Python interface that `moe-run generate` is made of, not the command: a prefill with all experts in
memory can only be measured in a process that has them there, which takes a warm-up before it. Prints one JSON object.

    python benchmarks/ours.py experts4.moepack --prompt prompt.json --decode 96 --memory 1900MiB
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laps import Meter, peak_rss_bytes
from moepack.layout.summary import count_token_bytes
from moepack.runtime import Engine, SamplingParams


def main() -> None:
    """Parse the arguments, run, print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--prompt", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--decode", type=int, default=0, help="tokens to decode after the first")
    parser.add_argument("--warm-up", type=Path, help="JSON list of token ids to run and forget first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", help="budget of the process, as in 1900MiB; default: what the machine can give")
    arguments = parser.parse_args()
    prompt, warm_up = (json.loads(path.read_text()) if path else [] for path in (arguments.prompt, arguments.warm_up))
    json.dump(measure(arguments, prompt, warm_up), sys.stdout)
    print()


def measure(arguments: argparse.Namespace, prompt: Sequence[int], warm_up: Sequence[int]) -> dict[str, Any]:
    """Open the pack and run it; the laps of opening, prefill (first token included) and each further token."""
    meter = Meter()
    context = max(len(prompt) + arguments.decode + 1, len(warm_up) + 1)
    engine = Engine.open(arguments.pack, memory=arguments.memory, threads=arguments.threads, max_context=context)
    load = meter.lap()
    if warm_up:
        list(engine.generate(warm_up, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)))
        meter.lap()
    sampling = SamplingParams(temperature=0, max_tokens=arguments.decode + 1, ignore_eos=True)
    generation = engine.generate(prompt, sampling)
    laps = [meter.lap() for _ in generation]
    plan, a = engine.memory_plan, engine.architecture
    return {
        "load": load,
        "prompt_tokens": len(prompt),
        "prefill": laps[0],
        "steps": laps[1:],
        "peak_rss_bytes": peak_rss_bytes(),
        "token_ids": generation.token_ids,
        "stats": vars(generation.stats()),
        "fixed_bytes": plan.total_bytes - plan.num_slots * plan.slot_bytes,
        "all_experts_bytes": a.num_hidden_layers * a.num_experts * plan.slot_bytes,
        "touched_bytes_per_token": count_token_bytes(engine.pack, a.num_experts_per_tok),
    }


if __name__ == "__main__":
    main()
