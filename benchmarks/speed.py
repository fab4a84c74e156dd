"""moepack beside llama.cpp: decode and prefill, in memory and under memory caps, with the machine's own limits.

Makes what is missing in the work folder (checkpoint, packs at 4 and 2 bits, GGUF), then measures each phase in pairs,
the engines taking turns. A cap holds moepack's fixed needs and a share of the experts; the peer gets the same cap.
Results go to WORK/speed.json after every pair, so that phases can be run one by one; each run ends by writing the
table WORK/speed.md and, where matplotlib is installed (extra `plot`), WORK/speed.png. README.md tells the rest.

    python benchmarks/speed.py --peer-python PEER/bin/python --peer-sources llama_cpp_python-0.3.36/vendor/llama.cpp
    python benchmarks/speed.py --only decode-ram,decode-40 --pairs 3
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contenders import IN_MEMORY, MOEPACK_4, UNDER_CAP, Contender, Phase, run
from disk_cache import readahead_kib
from laps import QUIET_CORES
from limits import measure_limits
from memory_cap import CannotCap
from speed_report import draw_plot, format_table
from workspace import HERE, Workspace

MIB = 2**20
DECODE_TOKENS = 128
SHARES = (0.60, 0.40, 0.25)
PREFILL_TOKENS = (512, 4096)
PREFILL_SHARE = 0.40
FILL_TOKENS = 512  # a prompt that uses every expert of every layer
LIMIT_SECONDS = 1.5
ATTEMPTS = 3  # of a measurement, while other processes disturb it


def list_phases() -> list[Phase]:
    """Everything that is measured, by default in this order."""
    phases = [Phase("decode-ram", None, FILL_TOKENS, 1, DECODE_TOKENS)]
    phases += [Phase(f"decode-{share:.0%}".rstrip("%"), share, 1, 1, DECODE_TOKENS) for share in SHARES]
    phases += [Phase(f"prefill-{n}-ram", None, FILL_TOKENS, n, 0) for n in PREFILL_TOKENS]
    cap = f"{PREFILL_SHARE:.0%}".rstrip("%")
    return phases + [Phase(f"prefill-{n}-{cap}", PREFILL_SHARE, 1, n, 0) for n in PREFILL_TOKENS]


def main() -> None:
    """Parse the arguments, prepare, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=HERE.parent / "build" / "speed")
    parser.add_argument("--peer-python", type=Path, help="Python with llama-cpp-python; without it moepack runs alone")
    parser.add_argument("--peer-sources", type=Path, help="llama.cpp's sources, to make the GGUF")
    parser.add_argument("--only", help="phases, by names or their beginnings, as in decode-ram,prefill-512")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one pair, a quarter of the decoded tokens, short prompts")
    arguments = parser.parse_args()
    phases = choose_phases(arguments.only, arguments.quick)
    if not phases:
        parser.error(f"--only {arguments.only}: no such phase, expected {', '.join(p.name for p in list_phases())}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))  # unwinds: readahead and caps are put back
    workspace = Workspace(arguments.work_dir, arguments.peer_python, arguments.peer_sources)
    try:
        workspace.prepare()
        measure(workspace, phases, 1 if arguments.quick else arguments.pairs, arguments.threads)
    except (CannotCap, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(error.cmd)}: exit code {error.returncode}")


def choose_phases(only: str | None, quick: bool) -> list[Phase]:
    """The phases whose name begins with one of those asked for; all if none is."""
    wanted = tuple(only.split(",")) if only else ("",)
    phases = [phase for phase in list_phases() if phase.name.startswith(wanted)]
    if not quick:
        return phases
    short = [phase for phase in phases if phase.prompt_tokens <= min(PREFILL_TOKENS)]
    return [dataclasses.replace(phase, decode_tokens=phase.decode_tokens // 4) for phase in short]


def measure(workspace: Workspace, phases: list[Phase], pairs: int, threads: int) -> None:
    """Run the phases and bring the results of the work folder up to date."""
    path = workspace.directory / "speed.json"
    results = json.loads(path.read_text()) if path.exists() else {"phases": {}}
    results["machine"] = describe_machine(workspace, threads)
    if "plan" not in results:
        results["plan"] = plan_caps(workspace, threads)
    workspace.answer.write_text(json.dumps(results["plan"]["answer_ids"]))
    for phase in phases:
        cap = None if phase.share is None else cap_bytes(results["plan"], phase.share)
        entry: dict[str, Any] = {"cap_bytes": cap, "limits": [], "samples": {}}
        results["phases"][phase.name] = entry
        for pair in range(pairs):
            entry["limits"] += until_quiet(lambda: measure_limits(workspace.pack(4), threads, LIMIT_SECONDS))
            for contender in list_contenders(workspace, phase):
                samples = until_quiet(lambda: run(contender, phase, workspace, cap, threads))  # noqa: B023 (called now)
                entry["samples"].setdefault(contender.name, []).extend(samples)
                rate = samples[-1].get("failed") or "{tok_s:.2f} tok/s, others {others_cores:.2f}".format(**samples[-1])
                print(f"{phase.name} {pair + 1}/{pairs} {contender.name}: {rate}", file=sys.stderr, flush=True)
            _write(path, json.dumps(results, indent=1))
    table = format_table(results)
    _write(workspace.directory / "speed.md", table)
    draw_plot(results, workspace.directory / "speed.png")
    print(table)


def until_quiet(measure_once: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure again while others disturb it, a few times; all that was measured, the last one quiet if any.

    Whether to repeat depends on the others alone, never on the result.
    """
    samples: list[dict[str, Any]] = []
    while len(samples) < ATTEMPTS:
        samples.append(measure_once())
        if samples[-1].get("others_cores", 0) <= QUIET_CORES:
            break
    return samples


def list_contenders(workspace: Workspace, phase: Phase) -> list[Contender]:
    """Who takes part in a phase, in turn."""
    everyone = IN_MEMORY if phase.share is None else UNDER_CAP
    return [contender for contender in everyone if contender.load is None or workspace.peer_python]


def plan_caps(workspace: Workspace, threads: int) -> dict[str, Any]:
    """What moepack needs whatever the cap, what all experts take, and its answer, which the peer is fed."""
    script = [sys.executable, HERE / "ours.py", workspace.pack(MOEPACK_4.bits or 0), "--threads", threads]
    script += ["--prompt", workspace.prompt(1, "prompt"), "--decode", DECODE_TOKENS]
    output = json.loads(subprocess.run([str(part) for part in script], check=True, stdout=subprocess.PIPE).stdout)
    plan = {key: output[key] for key in ("fixed_bytes", "all_experts_bytes", "touched_bytes_per_token")}
    return {**plan, "answer_ids": output["token_ids"]}


def cap_bytes(plan: dict[str, Any], share: float) -> int:
    """The cap that holds a share of the experts beside the fixed needs, in whole MiB."""
    return -(-int(plan["fixed_bytes"] + share * plan["all_experts_bytes"]) // MIB) * MIB


def describe_machine(workspace: Workspace, threads: int) -> dict[str, Any]:
    """What a number needs beside it to mean something."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return {
        "processor": next(
            (line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), platform.machine()
        ),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
        "readahead_kib": readahead_kib(workspace.pack(4)),
        "threads": threads,
    }


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
