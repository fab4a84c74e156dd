"""Several answers at the same time: steps taken together beside a token of each in turn, on the same engine.

For each number of answers, with all experts in memory and under a budget that holds a share of them: as many answers
on different random prompts, continued greedily, so many steps together, then as many in turns, and so on in pairs. An
answer's tokens do not depend on it. Prints a table of medians; a pair counts where other programs were quiet, all
pairs do if none was.

    python benchmarks/together.py build/speed/experts4.moepack --answers 1,2,4 --pairs 5
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from laps import QUIET_CORES, Meter, others_cores
from moepack.runtime import Engine, SamplingParams
from moepack.runtime.expert_store import StoreCounts
from moepack.runtime.generate import Generation, step_together

PROMPT_TOKENS, WARM_UP_STEPS = 8, 8
SEED = 0


@dataclass
class Stretch:
    """So many steps of all answers: seconds of a step, what was read, and cores that others took."""

    step_s: float
    counts: StoreCounts
    others: float


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--answers", default="1,2,4", help="how many at the same time")
    parser.add_argument("--shares", default="1,0.4", help="of the experts that the budget holds; 1: all")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="of a stretch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print("| experts in memory | answers | | tok/s, all together | ms from token to token | MB read a token | hits |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for share in map(float, arguments.shares.split(",")):
        for answers in map(int, arguments.answers.split(",")):
            measure(arguments, share, answers)


def measure(arguments: argparse.Namespace, share: float, answers: int) -> None:
    """One row for steps in turns and, with several answers, one for steps together."""
    steps = WARM_UP_STEPS + 2 * arguments.pairs * arguments.steps + 1
    with open_engine(arguments, share, answers, PROMPT_TOKENS + steps + 1) as engine:
        choose, sampling = random.Random(SEED), SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
        prompts = [
            [choose.randrange(engine.architecture.vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(answers)
        ]
        if engine.store.holds_everything:
            engine.store.load_all()
        generations = [engine.generate(prompt, sampling) for prompt in prompts]
        run(engine, generations, WARM_UP_STEPS, is_joint=answers > 1)
        pairs = []
        for number in range(arguments.pairs):
            pairs.append([run(engine, generations, arguments.steps, is_joint) for is_joint in (True, False)[:answers]])
            others = max(stretch.others for stretch in pairs[-1])
            print(f"{share:.0%} {answers} {number + 1}/{arguments.pairs}: others {others:.2f}", file=sys.stderr)
    quiet = [pair for pair in pairs if max(stretch.others for stretch in pair) <= QUIET_CORES]
    where = f"{share:.0%} | {answers}"
    for name, stretches in zip(("together" if answers > 1 else "alone", "in turns"), zip(*(quiet or pairs))):
        print(
            f"| {where} | {name}, {len(quiet)} quiet pairs | {format_stretches(stretches, answers, arguments.steps)} |"
        )
    if answers > 1:
        ratios = sorted(turns.step_s / joint.step_s for joint, turns in quiet or pairs)
        gain = f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {where} | gain | {gain} | | | |", flush=True)


def open_engine(arguments: argparse.Namespace, share: float, answers: int, context: int) -> Engine:
    """With a budget of what is needed in any case and a share of all experts."""
    options = {"threads": arguments.threads, "max_context": context, "sequences": answers, "device": arguments.device}
    with Engine.open(arguments.pack, **options) as engine:
        plan, a = engine.memory_plan, engine.architecture
    if share == 1:
        return Engine.open(arguments.pack, **options)
    budget = plan.total_bytes - plan.num_slots * plan.slot_bytes
    budget += int(share * a.num_hidden_layers * a.num_experts) * plan.slot_bytes
    return Engine.open(arguments.pack, memory=budget, process_bytes=plan.process_bytes, **options)


def run(engine: Engine, generations: list[Generation], steps: int, is_joint: bool) -> Stretch:
    """So many tokens of every answer."""
    meter, before = Meter(), engine.store.counts.copy()
    for _ in range(steps):
        if is_joint:
            step_together(generations)
        for generation in generations:
            next(generation)
    lap = meter.lap()
    return Stretch(lap["seconds"] / steps, engine.store.counts.since(before), others_cores([lap]))


def format_stretches(stretches: tuple[Stretch, ...], answers: int, steps: int) -> str:
    """Medians of the times, means of the rest, as cells of the table."""
    step_s = statistics.median(stretch.step_s for stretch in stretches)
    spent = sum((stretch.counts for stretch in stretches), StoreCounts())
    read_mb = spent.bytes_read / (len(stretches) * steps * answers) / 1e6
    hits = spent.hits / (spent.hits + spent.misses)
    return f"{answers / step_s:.1f} | {1e3 * step_s:.1f} | {read_mb:.1f} | {hits:.1%}"


if __name__ == "__main__":
    main()
