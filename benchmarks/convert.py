"""Conversion beside llama.cpp and mlx-lm: time, memory and extra disk on the same checkpoint, in one run.

Each contender is a process of its own and starts with the page cache dropped (root; without it the figures say warm).
llama.cpp takes two steps, as it does for everybody: its converter writes a bf16 GGUF, its quantizer reads that.
All write 4 bits in every large matrix. Extra disk is what lay in the work directory at the worst moment beyond the
finished output; outputs are deleted at once. `--only` picks contenders, results are merged into WORK/convert.json.

    python benchmarks/convert.py CHECKPOINT WORK --peer-python PEER/bin/python --peer-sources SOURCES --mlx-python MLX
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
POLL_S = 0.2
NAMES = {
    "moepack": "moe-convert, min/max",
    "moepack-mse": "moe-convert, mse (its default)",
    "llama.cpp": "llama.cpp, converter and quantizer",
    "mlx-lm": "mlx_lm.convert",
}


def main() -> None:
    """Parse the arguments, run every contender, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path, help="directory for outputs and results")
    parser.add_argument("--peer-python", help="Python with llama_cpp (README.md)")
    parser.add_argument("--peer-sources", help="llama.cpp's sources with the converter")
    parser.add_argument("--mlx-python", help="Python with mlx_lm")
    parser.add_argument("--only", default="moepack,moepack-mse,llama.cpp,mlx-lm")
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results_file = arguments.work / "convert.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    source_bytes = sum(path.stat().st_size for path in arguments.checkpoint.glob("*.safetensors"))
    for name, command in list_commands(arguments).items():
        runs = [measure(command, arguments.work / "out") for _ in range(arguments.repeat)]
        results[name] = {"source_bytes": source_bytes, "runs": runs}
        results_file.write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)


def list_commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each contender that was asked for and is there, OUT standing for the output."""
    checkpoint, wanted = str(arguments.checkpoint), arguments.only.split(",")
    program = str(Path(sys.executable).with_name("moe-convert"))
    ours = [program, checkpoint, "OUT", "--bits", "4", "--resident-bits", "4", "--json", "--quantizer"]
    commands = {"moepack": [*ours, "minmax"], "moepack-mse": [*ours, "mse"]}
    if arguments.peer_python and arguments.peer_sources:
        script = str(HERE / "make_gguf.py")
        commands["llama.cpp"] = [
            arguments.peer_python,
            script,
            checkpoint,
            "OUT",
            "--converter",
            arguments.peer_sources,
        ]
    if arguments.mlx_python:
        convert = ["-m", "mlx_lm", "convert", "--hf-path", checkpoint, "--mlx-path", "OUT", "-q", "--q-bits", "4"]
        commands["mlx-lm"] = [arguments.mlx_python, *convert]
    return {name: command for name, command in commands.items() if name in wanted}


def measure(command: Sequence[str], out: Path) -> dict[str, Any]:
    """Run one conversion from a cold cache and delete what it wrote."""
    remove(out.parent, out)
    os.sync()
    is_cold = os.access(DROP_CACHES, os.W_OK)
    if is_cold:
        DROP_CACHES.write_text("3")
    busy_before, own_before, started = _user_seconds(), os.times(), time.perf_counter()
    arguments = [part.replace("OUT", str(out)) for part in command]
    most_disk = 0
    with open(out.parent / "log", "w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            most_disk = max(most_disk, disk_bytes(out))
            time.sleep(POLL_S)
    _, status, usage = ended
    seconds, own = time.perf_counter() - started, os.times()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {process.returncode}, see {out.parent / 'log'}")
    others_s = _user_seconds() - busy_before - usage.ru_utime - (own.user - own_before.user)
    output_bytes = disk_bytes(out)
    remove(out.parent, out)
    return {
        "seconds": round(seconds, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "output_bytes": output_bytes,
        "extra_disk_bytes": max(0, most_disk - output_bytes),
        "cold": is_cold,
        "others_cores": round(others_s / seconds, 2),
    }


def disk_bytes(out: Path) -> int:
    """Bytes of everything that begins with the output's name: temporary files stand beside it."""
    total = 0
    for path in out.parent.glob(f"{out.name}*"):
        for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
            with suppress(FileNotFoundError):  # renamed since
                total += file.stat().st_size if file.is_file() else 0
    return total


def remove(folder: Path, out: Path) -> None:
    """Delete an output and what was left beside it."""
    for path in folder.glob(f"{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def print_table(results: dict[str, Any]) -> None:
    """The fastest run of each contender as Markdown, with what it was disturbed by."""
    print("| conversion | time | source GB/s | processor | peak RSS | extra disk | output | others' cores |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, result in results.items():
        best = min(result["runs"], key=lambda run: run["seconds"])
        rate = result["source_bytes"] / best["seconds"] / 1e9
        size, extra = best["output_bytes"] / 1e9, best["extra_disk_bytes"] / 1e9
        print(
            f"| {NAMES[name]} | {best['seconds']:.1f} s | {rate:.2f} | {best['cpu_s']:.1f} s "
            f"| {best['peak_rss_bytes'] / 1e6:,.0f} MB | {extra:.1f} GB | {size:.1f} GB | {best['others_cores']:.2f} |"
        )


def _user_seconds() -> float:
    """User time of all processes of the machine, and what its host has taken from it."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, stolen = (int(fields[n]) for n in (1, 2, 8))
    return (user + nice + stolen) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
