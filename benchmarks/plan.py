"""How well moe-inspect plan predicts: its decode speed beside the measured one, at several memory budgets.

The budgets hold the given shares of the experts. For each, in turn, the pack is run as moe-run runs it, greedily from
a prompt of one token, in a process of its own; the speed is that of the last half of the tokens, when the cache is as
full as it gets. Before the first and after the last of a round the machine is planned for once, with the hit rates of
a trace of the same tokens and with those of equally likely experts. A row has the medians of the rounds.

    python benchmarks/plan.py build/speed/experts4.moepack --json plan.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from laps import others_cores

HERE = Path(__file__).resolve().parent
MIB = 2**20
INSPECT = [sys.executable, "-c", "from moepack.layout.cli import main; main()"]
RUN = [sys.executable, "-c", "from moepack.runtime.cli import main; main()"]


def main() -> None:
    """Measure, predict, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.4, 0.6, 0.8])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = compare(arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    print(format_table(results))


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Predictions and measurements of all rounds, by share of the experts in memory."""
    prompt = folder / "prompt.json"
    prompt.write_text("[17]")
    first = run(arguments, prompt, None)
    budgets = {share: int(first["fixed_bytes"] + share * first["all_experts_bytes"]) for share in arguments.shares}
    trace = record_trace(arguments, prompt, folder / "routing.zst")
    rounds = []
    for _ in range(arguments.rounds):
        plans = [predict(arguments, budgets, trace)]
        laps = {share: last_half(run(arguments, prompt, budget)) for share, budget in budgets.items()}
        plans.append(predict(arguments, budgets, trace))
        measured = {share: len(steps) / sum(lap["seconds"] for lap in steps) for share, steps in laps.items()}
        others = {share: others_cores(steps) for share, steps in laps.items()}
        rounds.append({"measured": measured, "plans": plans, "others_cores": others})
    return {"budgets": budgets, "rounds": rounds}


def run(arguments: argparse.Namespace, prompt: Path, budget: int | None) -> dict[str, Any]:
    """One run of ours.py."""
    command = [sys.executable, HERE / "ours.py", arguments.pack, "--prompt", prompt, "--decode", arguments.tokens]
    command += ["--threads", arguments.threads]
    command += ["--memory", f"{-(-budget // MIB)}MiB"] if budget else []
    return call(command)


def last_half(output: dict[str, Any]) -> list[dict[str, float]]:
    """Laps of the tokens that are measured."""
    return output["steps"][len(output["steps"]) // 2 :]


def record_trace(arguments: argparse.Namespace, prompt: Path, path: Path) -> Path:
    """Run once more, recording what is asked for."""
    command = [*RUN, "generate", arguments.pack, "--token-ids", prompt, "--max-tokens", arguments.tokens + 1]
    command += ["--temperature", "0", "--ignore-eos", "--trace", path, "--json", "--threads", arguments.threads]
    call(command)
    return path


def predict(arguments: argparse.Namespace, budgets: dict[float, int], trace: Path) -> dict[str, dict[float, float]]:
    """Predicted decode speed by kind of hit rate and share; measured once for the trace, once for even routing."""
    sizes = ",".join(f"{-(-budget // MIB)}MiB" for budget in budgets.values())
    command = [*INSPECT, "plan", arguments.pack, "--memory", sizes, "--threads", arguments.threads, "--json"]
    command += ["--no-save", "--prompt-tokens", "16", "--context", arguments.tokens + 2]
    found = {}
    for name, options in (("trace", ["--trace", trace]), ("even", [])):
        rows = call([*command, *options])["rows"]
        found[name] = {share: row["decode_tok_s"] for share, row in zip(budgets, rows)}
    return found


def call(command: list[Any]) -> dict[str, Any]:
    """The JSON object that a command prints. Raises CalledProcessError if it fails."""
    ended = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE)
    return json.loads(ended.stdout)


def format_table(results: dict[str, Any]) -> str:
    """A row for each budget, and the median of the errors."""
    lines = [
        "| experts in memory | budget MiB | measured | by a trace | error | by even routing | error |",
        "|" + " --- |" * 7,
    ]
    errors: dict[str, list[float]] = {"trace": [], "even": []}
    for share, budget in results["budgets"].items():
        measured = statistics.median(one["measured"][share] for one in results["rounds"])
        cells = [f"{share:.0%}", f"{-(-budget // MIB)}", f"{measured:.1f}"]
        for kind, found in errors.items():
            predicted = statistics.median(plan[kind][share] for one in results["rounds"] for plan in one["plans"])
            found.append(abs(predicted / measured - 1))
            cells += [f"{predicted:.1f}", f"{predicted / measured - 1:+.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    medians = ", ".join(f"{statistics.median(found):.0%} by {kind}" for kind, found in errors.items())
    others = statistics.median(cores for one in results["rounds"] for cores in one["others_cores"].values())
    return "\n".join([*lines, "", f"Median error: {medians}. Other processes took {others:.2f} cores meanwhile."])


if __name__ == "__main__":
    main()
