"""Quality of the demo model by how its routed experts are stored: perplexity, KL to bf16, tool calls, recall, peers.

Converts the checkpoint each way (resident weights stay as they are, so that only the experts differ), evaluates each
pack with `moe-run eval` in a process of its own, and prints a table in Markdown. With --reuse, results of an earlier
run that was cut off are taken from the work folder. Tool calls are compared with bf16's on the same prompts, in pairs.

    python benchmarks/quality.py --text book.txt --tools tests/data/tools.jsonl
    python benchmarks/quality.py --text book.txt --tools FILE --calibration FILE --rounded DIR --plot docs/quality.png

A calibration (moe-run calibrate --full) adds error feedback and mixed bits, a tuned file (moe-run calibrate --tune) the
pack that it makes; a checkpoint of round_experts.py adds a peer, --experts-per-token the model run with fewer. --plot
needs matplotlib (extra `plot`); tool calls go into a second picture beside the first, as quality_tools.png. --only text
(or tools, or recall) leaves the others out.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepack.layout.calibration import Calibration
from moepack.runtime.intervals import Interval, compare_rates

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
WIDTHS = (8, 4, 3, 2)
CALIBRATED_BELOW = 8  # bits at which nothing is left to gain
MIXED = (4.83, 4.5, 3.79, 3.5, 3.25, 3.0, 2.5)  # among them the sizes of llama.cpp's types
TEXT_COLUMNS = ("perplexity", "KL mean", "KL 99 %", "top-1")
RECALL_LENGTHS = "64,128,256"  # tokens; in longer prompts the demo model finds nothing at any width
RECALL_COLUMNS = ("needle found", "of bf16's own", "tokens copied", "of bf16's own")
KINDS = ("tools", "text", "recall")  # of measurements
TOOL_COLUMNS = ("well-formed calls", "right function", "right call", "of bf16's own", "95 % interval")
FEEDBACK, MIX, TUNED, PEERS = "error feedback", "mixed bits", "tuned", "peers"  # lines of a plot


@dataclass(frozen=True)
class Row:
    """One way to store the experts: the pack's name, what the table calls it, and how it is made and run.

    line   what a plot joins it with; "" for none
    """

    name: str
    title: str
    line: str
    convert: tuple[str, ...]
    checkpoint: Path
    evaluate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A row with its bits per weight, and what moe-run eval says of it on what it was asked for."""

    row: Row
    bits: float
    text: dict[str, Any] | None = None
    tools: dict[str, Any] | None = None
    recall: dict[str, Any] | None = None

    def share_of(self, original: Measured) -> tuple[float, Interval]:
        """Right calls as a share of the original's, over the same prompts in pairs."""
        assert self.tools
        assert original.tools
        compared = compare_rates(self.tools["is_correct"], original.tools["is_correct"])
        share, interval = compared or (math.nan, None)
        return share, interval or (math.nan, math.nan)


def main() -> None:
    """Parse the arguments, evaluate every row, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "demo" / "checkpoint")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "sampled.txt")
    parser.add_argument("--tools", type=Path, default=ROOT / "tests" / "data" / "tools.jsonl")
    parser.add_argument("--recall", type=int, default=40, help="prompts of each length and kind")
    parser.add_argument("--only", choices=KINDS, action="append", help="leave the others out")
    parser.add_argument("--bits", type=int, nargs="+", default=WIDTHS, help="widths beside bf16")
    parser.add_argument("--bpw", type=float, nargs="*", default=MIXED, help="sizes of mixed bits")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--quantizer", default="minmax", help="of the rows without calibration, as moe-convert has it")
    parser.add_argument("--calibration", type=Path, help="adds rows of error feedback and of mixed bits")
    parser.add_argument("--tuned", type=Path, action="append", default=[], help="tuned file: adds a row of its pack")
    parser.add_argument("--rounded", type=Path, action="append", default=[], help="checkpoint of round_experts.py")
    parser.add_argument("--experts-per-token", type=int, action="append", default=[], help="adds a row of bf16 with N")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality", help="folder for packs and results")
    parser.add_argument("--jobs", type=int, default=2, help="evaluations side by side, one thread each")
    parser.add_argument("--reuse", action="store_true", help="take results that are in the work folder already")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = list_rows(arguments)
    packs = {row: convert(arguments, row) for row in rows}
    kinds = arguments.only or KINDS
    jobs = [(row, kind) for kind in kinds for row in rows]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = dict(zip(jobs, pool.map(lambda job: evaluate(arguments, packs[rows[0]], packs[job[0]], *job), jobs)))
    measured = []
    for row in rows:
        found = {kind: results.get((row, kind)) for kind in KINDS}
        measured.append(Measured(row, bits_per_weight(row, packs[row]), **found))
    columns = ["experts", "bits per weight"]
    for kind, titles in (("text", TEXT_COLUMNS), ("tools", TOOL_COLUMNS), ("recall", RECALL_COLUMNS)):
        columns += titles if kind in kinds else ()
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for one in measured:
        print(format_row(one, measured[0]))
    if arguments.plot:
        draw(measured, arguments.plot)


def list_rows(arguments: argparse.Namespace) -> list[Row]:
    """What to evaluate; bf16, which the others are compared with, first."""
    source, group = arguments.checkpoint, arguments.group_size
    rows = []
    for bits in (16, *arguments.bits):
        options = ("--bits", str(bits), "--group-size", str(group), "--quantizer", arguments.quantizer)
        title = "bf16" if bits == 16 else f"{bits} bits, {arguments.quantizer}"
        rows.append(Row(f"experts{bits}_{arguments.quantizer}_{group}", title, arguments.quantizer, options, source))
    if arguments.calibration:
        known = ("--calibration", str(arguments.calibration))
        narrow = [bits for bits in arguments.bits if bits < CALIBRATED_BELOW]
        for bits, size in [*((bits, group) for bits in narrow), *((2, 32) for bits in narrow if bits == 2)]:
            options = ("--bits", str(bits), "--group-size", str(size), *known)
            rows.append(Row(f"experts{bits}_gptq_{size}", f"{bits} bits, gptq, {size}", FEEDBACK, options, source))
        for bpw in arguments.bpw:
            options = ("--bits", "mixed", "--bpw", str(bpw), *known)
            rows.append(Row(f"mixed{bpw}", f"mixed, {bpw}", MIX, options, source))
    for file in arguments.tuned:
        tuned = Calibration.open(file).facts["tuned"]["arguments"]
        size = tuned.get("bits_per_weight") or tuned.get("target_bytes") or tuned["group_size"]
        title = f"{tuned['bits']}{'' if tuned['bits'] == 'mixed' else ' bits'}, tuned, {size}"
        options = ("--calibration", str(file))
        line = f"{MIX}, {TUNED}" if tuned["bits"] == "mixed" else TUNED
        rows.append(Row(f"tuned{tuned['bits']}_{size}", title, line, options, source))
    for checkpoint in arguments.rounded:
        scheme = json.loads((checkpoint / "rounding.json").read_text())["scheme"]
        name = scheme.replace("/", "_")
        rows.append(Row(name, scheme, f"{PEERS}: {scheme.partition('-')[0]}", ("--bits", "16"), checkpoint))
    for count in arguments.experts_per_token:
        chosen = ("--experts-per-token", str(count))
        rows.append(Row(rows[0].name, f"bf16, {count} experts per token", "", rows[0].convert, source, chosen))
    return rows


def convert(arguments: argparse.Namespace, row: Row) -> Path:
    """The pack of a row, converted unless it is there."""
    pack: Path = arguments.work / f"{row.name}.moepack"
    command = [BIN / "moe-convert", row.checkpoint, pack, "--resident-bits", "16", *row.convert]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return pack


def evaluate(arguments: argparse.Namespace, original: Path, pack: Path, row: Row, kind: str) -> dict[str, Any]:
    """What `moe-run eval` says of a pack, on the text, on the tool prompts, or of its recall."""
    given = {"text": arguments.text, "tools": arguments.tools, "recall": arguments.recall}[kind]
    name = "_".join((row.name, *(option.strip("-") for option in row.evaluate), kind, Path(str(given)).stem))
    kept = arguments.work / f"{name}.json"
    if not (arguments.reuse and kept.exists()):
        command = [BIN / "moe-run", "eval", pack, f"--{kind}", str(given), "--threads", "1", "--exact", "--json"]
        command += ["--memory", "2GiB", *row.evaluate]
        command += ["--lengths", RECALL_LENGTHS] if kind == "recall" else []
        command += ["--reference", original] if kind != "tools" else []  # those are paired here: once is enough
        kept.write_bytes(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    result: dict[str, Any] = json.loads(kept.read_bytes())
    return result if kind == "text" else result[{"tools": "tool_calls", "recall": "recall"}[kind]]


def bits_per_weight(row: Row, pack: Path) -> float:
    """Of the routed experts, scales and the like included; a peer's as its own bytes take them."""
    if (row.checkpoint / "rounding.json").exists():
        return float(json.loads((row.checkpoint / "rounding.json").read_text())["bits_per_weight"])
    command = [BIN / "moe-inspect", "show", pack, "--json"]
    facts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return float(facts["experts"]["bits_per_weight"])


def format_row(one: Measured, original: Measured) -> str:
    """One line of the table."""
    cells = [one.row.title, f"{one.bits:.2f}"]
    if one.text:
        cells += [f"{one.text['perplexity']:.3f}"]
        cells += [f"{one.text[key]:.4f}" for key in ("kl_mean", "kl_p99", "top1_agreement")]
    if one.tools:
        share, (low, high) = one.share_of(original)
        cells += [f"{one.tools[key]:.3f}" for key in ("well_formed", "right_function", "correct")]
        cells += [f"{share:.3f}", f"{low:.3f} to {high:.3f}"]
    if one.recall:
        for kind in ("needle", "copy"):
            facts = one.recall[kind]
            low, high = facts["intervals"].get("correct_of_reference", (math.nan, math.nan))
            share = facts.get("correct_of_reference", math.nan)  # of nothing, where bf16 has none right
            cells += [f"{facts['correct']:.3f}", f"{share:.3f} ({low:.3f} to {high:.3f})"]
    return f"| {' | '.join(cells)} |"


def draw(measured: list[Measured], out: Path) -> None:
    """KL, and tool calls beside it, against bits per weight."""
    drawn = [one for one in measured if one.row.line and one.bits < CALIBRATED_BELOW and not one.row.evaluate]
    if measured[0].text:
        values = [(one.text["kl_mean"], None) for one in drawn if one.text]
        draw_lines(drawn, values, "KL to bf16 (nats, mean)", out, yscale="log")
    if measured[0].tools:
        shares = [one.share_of(measured[0]) for one in drawn]
        title = f"right tool calls, share of bf16's own ({measured[0].tools['n']:,} prompts)"
        draw_lines(drawn, shares, title, out.with_name(f"{out.stem}_tools.png"), yscale="linear")


def draw_lines(
    drawn: list[Measured], values: Sequence[tuple[float, Interval | None]], title: str, out: Path, yscale: str
) -> None:
    """A value, with its interval if it has one, against bits per weight; rows of the same line are joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for one, (value, interval) in zip(drawn, values):
        low, high = interval or (value, value)
        lines.setdefault(one.row.line, []).append((one.bits, value, value - low, high - value))
        if one.row.line.startswith(PEERS):
            axes.annotate(one.row.title, (one.bits, value), textcoords="offset points", xytext=(6, 4), fontsize=8)
    for name, points in lines.items():
        bits, heights, below, above = zip(*sorted(points))
        style = {"marker": "x", "linestyle": ":"} if name.startswith(PEERS) else {"marker": "o", "linestyle": "-"}
        axes.errorbar(bits, heights, yerr=(below, above), capsize=3, elinewidth=0.8, label=name, **style)
    axes.set(yscale=yscale, xlabel="bits per weight of the routed experts", ylabel=title)
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
