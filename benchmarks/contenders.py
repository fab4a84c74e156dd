"""Who is measured, and one run of one of them: a process of its own, under a memory cap or not, with its cost.

A run gives one sample: the rate, what was read from the disk, which share of the processor it took, and how much of it
others took meanwhile, all of the measured stretch alone.

    sample = run(MOEPACK_4, phase, workspace, cap_bytes=None, threads=2)
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disk_cache import drop_cached, readahead
from laps import others_cores
from memory_cap import MemoryCap
from workspace import HERE, Workspace

PEER_UBATCH = 2048  # README.md, "The peer"
RUN_LIMIT_S = 420
SMALL_READAHEAD_KIB = 128


@dataclass(frozen=True)
class Phase:
    """One thing to measure. share is that of the experts which the memory cap holds, None is no cap.

    decode_tokens of 0 measures the prefill of the prompt. In memory, the warm-up fills the caches; under a cap one
    token is enough for what every token touches.
    """

    name: str
    share: float | None
    warm_up_tokens: int
    prompt_tokens: int
    decode_tokens: int


@dataclass(frozen=True)
class Contender:
    """An engine with its setting: bits of a pack for moepack, a way of loading for the peer.

    decode_share   part of a phase's tokens to decode under a cap: all, or fewer where one takes seconds
    """

    name: str
    bits: int | None = None
    load: str | None = None
    readahead_kib: int | None = None
    decode_share: float = 1.0


MOEPACK_4 = Contender("moepack 4 bit", bits=4)
MOEPACK_2 = Contender("moepack 2 bit", bits=2)
PEER_REPACKED = Contender("llama.cpp repacked", load="repacked")
PEER_MAPPED = Contender("llama.cpp mapped", load="mapped", decode_share=0.25)
PEER_MAPPED_128 = Contender("llama.cpp mapped, 128 KiB readahead", load="mapped", readahead_kib=SMALL_READAHEAD_KIB)
IN_MEMORY = (MOEPACK_4, PEER_REPACKED, MOEPACK_2, PEER_MAPPED)
UNDER_CAP = (MOEPACK_4, PEER_MAPPED_128, MOEPACK_2, PEER_MAPPED)


def run(
    contender: Contender, phase: Phase, workspace: Workspace, cap_bytes: int | None, threads: int
) -> dict[str, Any]:
    """One sample, or {"failed": why} where the run did not end well. Raises CannotCap where memory cannot be capped."""
    share = contender.decode_share if cap_bytes else 1.0
    command = _command(contender, phase, workspace, cap_bytes, threads, round(share * phase.decode_tokens))
    model = workspace.gguf if contender.load else workspace.pack(contender.bits or 0)
    files = [path for path in model.rglob("*") if path.is_file()] if model.is_dir() else [model]
    with ExitStack() as stack:
        cap = None
        if cap_bytes:
            drop_cached(files)  # or their pages would lie outside the cap
            cap = stack.enter_context(MemoryCap(cap_bytes))
            stack.enter_context(readahead(model, contender.readahead_kib))
        try:
            process = subprocess.run(
                cap.command(command) if cap else command, stdout=subprocess.PIPE, timeout=RUN_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {RUN_LIMIT_S} s"}
        if process.returncode:
            return {"failed": f"exit code {process.returncode}" + (" under the cap" if cap else "")}
        sample = summarize(json.loads(process.stdout))
        sample["group_peak_bytes"] = cap.peak_bytes() if cap else None
    return sample


def summarize(output: dict[str, Any]) -> dict[str, Any]:
    """A sample from what ours.py or peer.py printed: the last half of the decoded tokens, or else the prefill.

    The first eighth of the decoded tokens is reported as cold: with caches that hold next to nothing yet.
    """
    steps = output["steps"]
    sample = _rate(steps[len(steps) // 2 :], 1) if steps else _rate([output["prefill"]], output["prompt_tokens"])
    sample["cold_tok_s"] = _rate(steps[: len(steps) // 8], 1)["tok_s"] if len(steps) >= 8 else None
    sample["load_s"], sample["peak_rss_bytes"] = output["load"]["seconds"], output["peak_rss_bytes"]
    sample["touched_bytes_per_token"] = output.get("touched_bytes_per_token")
    sample["step_seconds"] = [lap["seconds"] for lap in steps]
    return sample


def _command(
    contender: Contender, phase: Phase, workspace: Workspace, cap_bytes: int | None, threads: int, decode_tokens: int
) -> list[str]:
    common: list[object] = ["--prompt", workspace.prompt(phase.prompt_tokens, "prompt"), "--threads", threads]
    common += ["--warm-up", workspace.prompt(phase.warm_up_tokens, "warm-up")]
    command: list[object]
    if contender.load:
        command = [workspace.peer_python, HERE / "peer.py", workspace.gguf, *common]
        command += ["--load", contender.load, "--ubatch", PEER_UBATCH]
        command += ["--decode", _first_ids(workspace.answer, decode_tokens)] if decode_tokens else []
    else:
        command = [sys.executable, HERE / "ours.py", workspace.pack(contender.bits or 0), *common]
        command += ["--decode", decode_tokens] if decode_tokens else []
        command += ["--memory", f"{cap_bytes // 2**20}MiB"] if cap_bytes else []
    return [str(part) for part in command]


def _first_ids(path: Path, count: int) -> Path:
    """A file with the first ids of a file of token ids."""
    shorter = path.with_name(f"{path.stem}{count}.json")
    shorter.write_text(json.dumps(json.loads(path.read_text())[:count]))
    return shorter


def _rate(laps: Sequence[dict[str, float]], tokens_per_lap: int) -> dict[str, Any]:
    seconds, tokens = sum(lap["seconds"] for lap in laps), tokens_per_lap * len(laps)
    return {
        "tok_s": tokens / seconds,
        "read_bytes_per_token": sum(lap["read_bytes"] for lap in laps) / tokens,
        "cores": sum(lap["cpu_s"] for lap in laps) / seconds,
        "others_cores": others_cores(laps),
    }
