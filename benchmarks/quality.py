"""Quality of the demo model by bits of its routed experts: perplexity, distance to bf16, tool calls that are right.

Converts the checkpoint at each width (resident weights stay as they are, so that only the experts differ), evaluates
each pack with `moe-run eval` in a process of its own, and prints a table in Markdown. With --reuse, results of an
earlier run that was cut off are taken from the work folder.

    python benchmarks/quality.py --text book.txt --tools tests/data/tools.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
WIDTHS = (16, 8, 4, 3, 2)
COLUMNS = ("experts", "perplexity", "KL mean", "KL 99 %", "top-1", "well-formed", "right function", "right call")


def main() -> None:
    """Parse the arguments, evaluate every width, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "demo" / "checkpoint")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "sampled.txt")
    parser.add_argument("--tools", type=Path, default=ROOT / "tests" / "data" / "tools.jsonl")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--quantizer", default="minmax", help="as moe-convert has it")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality", help="folder for packs and results")
    parser.add_argument("--jobs", type=int, default=2, help="evaluations side by side, one thread each")
    parser.add_argument("--reuse", action="store_true", help="take results that are in the work folder already")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    packs = {bits: convert(arguments, bits) for bits in WIDTHS}
    jobs = [(bits, kind) for kind in ("tools", "text") for bits in WIDTHS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = dict(zip(jobs, pool.map(lambda job: evaluate(arguments, packs, *job), jobs)))
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for bits in WIDTHS:
        print(format_row(bits, results[bits, "text"], results[bits, "tools"]["tool_calls"]))


def convert(arguments: argparse.Namespace, bits: int) -> Path:
    """The pack of a width, converted unless it is there."""
    pack = arguments.work / f"experts{bits}_{arguments.quantizer}_{arguments.group_size}.moepack"
    command = [BIN / "moe-convert", arguments.checkpoint, pack, "--bits", str(bits), "--resident-bits", "16"]
    subprocess.run(
        [*command, "--group-size", str(arguments.group_size), "--quantizer", arguments.quantizer],
        check=True,
        stdout=sys.stderr,
    )
    return pack


def evaluate(arguments: argparse.Namespace, packs: dict[int, Path], bits: int, kind: str) -> dict[str, Any]:
    """What `moe-run eval` says of a pack, on the text or on the tool prompts."""
    given = arguments.text if kind == "text" else arguments.tools
    kept = arguments.work / f"{packs[bits].stem}_{kind}_{given.stem}.json"
    if not (arguments.reuse and kept.exists()):
        command = [BIN / "moe-run", "eval", packs[bits], f"--{kind}", given, "--threads", "1", "--exact", "--json"]
        command += ["--memory", "2GiB"]
        command += ["--reference", packs[16]] if kind == "text" else []
        kept.write_bytes(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    result: dict[str, Any] = json.loads(kept.read_bytes())
    return result


def format_row(bits: int, text: dict[str, Any], tools: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [f"{text['perplexity']:.3f}"]
    cells += [f"{text[key]:.4f}" for key in ("kl_mean", "kl_p99", "top1_agreement")]
    cells += [f"{tools[key]:.3f}" for key in ("well_formed", "right_function", "correct")]
    return f"| {'bf16' if bits == 16 else f'{bits} bits'} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
