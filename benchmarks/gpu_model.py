"""Decode and prefill of part of a model on an NVIDIA GPU, beside transformers with the same weights in bf16.

The part has a release's widths and few layers (make_checkpoint.py): 8 of 35B's 40, a fifth in every cost; or 4 of
397B's 60, each with 32 of 512 experts: about a fifteenth of a token, but neither its prefill nor its misses, for an
expert is chosen sixteen times as often. Checkpoint and pack are made in WORK unless they are there. Runs, a process
each: all experts in the GPU's memory (resident), --cap of them (capped), transformers.

decode tok/s        by the median time of the last 64 of 128 tokens after a prompt of 64
processor ms        of such a token on the CPU: its time less the waits for GPU and disk. May double from one process to
                    the next on a machine that others use
layers GPU ms       of all layers of such a token on the GPU, without embedding, output and argmax: events around the
                    recorded work, its start included. Steady. Only where all are handed over at once: resident
prefill tok/s       by the median of 11 prompts of 2048 after 3
chunk               tokens of a prompt that are computed together, at most
GPU GB              the most that torch has reserved
experts in memory   with random weights the choice is nearly even: a token misses about the share that is not there

    python benchmarks/gpu_model.py WORK                     # all runs, a table
    python benchmarks/gpu_model.py WORK --only resident     # or capped, transformers
    python benchmarks/gpu_model.py WORK --only capped --cap 0.99    # hardly a miss: what streaming costs by itself
    python benchmarks/gpu_model.py WORK --model 397B --bits 2       # of another model and other bits
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, CONTEXT_PROMPT, DECODE, SEED = 2048, 64, 128, 0
WARM_UP, PROMPTS = 3, 11  # prompts that do not count, and those whose median does
RUNS = ("resident", "capped", "transformers")
CAP = 0.4  # of the experts, unless said otherwise
VOCABULARY = 4096  # ids that every tokenizer involved has
BITS = ("2", "3", "4", "8", "16")
COLUMNS = (  # title, measurement, format
    ("decode tok/s", "decode_tok_s", ".1f"), ("processor ms", "processor_ms", ".2f"),
    ("layers GPU ms", "layers_gpu_ms", ".3f"), ("prefill tok/s", "prefill_tok_s", ".0f"),
    ("chunk", "chunk", "d"), ("GPU GB", "gpu_gb", ".1f"), ("experts in memory", "slots", "d"),
)  # fmt: skip


def prompt(length: int, seed: int = SEED) -> list[int]:
    import torch

    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run_moepack(pack: Path, device: str, share: float) -> dict[str, Any]:
    """Decode and prefill with this share of the experts in memory; all of them need no budget."""
    from moepack.runtime import Engine

    options: dict[str, Any] = {"device": device, "max_context": PROMPT + 8}
    if share < 1:  # a budget this tight makes a prompt's chunks and batches smaller too
        with Engine.open(pack, **options) as engine:
            plan = engine.memory_plan
        memory = plan.total_bytes - int((1 - share) * plan.num_slots) * plan.slot_bytes
        options |= {"memory": memory, "process_bytes": plan.process_bytes}
    with Engine.open(pack, **options) as engine:
        list(answer(engine, prompt(CONTEXT_PROMPT, 1), DECODE))  # compiles, and fills the slots
        result = decode(engine)
        if share == 1 and engine.model.ops.device.can_capture:
            result["layers_gpu_ms"] = layers_gpu_ms(engine)
        result["prefill_tok_s"] = prefill(engine)
        found = {"slots": engine.store.num_slots, "chunk": engine.memory_plan.prefill_chunk}
        return result | found | {"gpu_gb": gpu_bytes(device) / 1e9}


def answer(engine: Any, ids: list[int], count: int) -> Any:
    from moepack.runtime import SamplingParams

    return engine.generate(ids, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))


def decode(engine: Any) -> dict[str, Any]:
    """Of the last half of an answer's tokens."""
    steps, busy, generation = [], [], answer(engine, prompt(CONTEXT_PROMPT), DECODE)
    waited = watch_waits(engine)
    before = time.perf_counter()
    for _ in generation:
        now = time.perf_counter()
        steps.append(now - before)
        busy.append(now - before - waited())
        before = now
    return {
        "decode_tok_s": 1 / statistics.median(steps[DECODE // 2 :]),
        "processor_ms": 1e3 * statistics.median(busy[DECODE // 2 :]),
        "bytes_per_token": generation.stats().bytes_per_token,
    }


def prefill(engine: Any) -> float:
    """Tokens a second."""
    seconds = []
    for seed in range(2, 2 + WARM_UP + PROMPTS):
        started = time.perf_counter()
        list(answer(engine, prompt(PROMPT, seed), 1))
        seconds.append(time.perf_counter() - started)
    return PROMPT / statistics.median(seconds[WARM_UP:])


def layers_gpu_ms(engine: Any) -> float:
    """Milliseconds that all layers of a token take the GPU, by another answer's tokens."""
    times = watch_graphs(engine)
    list(answer(engine, prompt(CONTEXT_PROMPT), DECODE))
    return statistics.median(times()[DECODE // 2 :])


def watch_waits(engine: Any) -> Callable[[], float]:
    """A function that tells the seconds since its last call in which the GPU or the disk was waited for."""
    device, store = engine.model.ops.device, engine.store
    spent, wait = [0.0, store.counts.io_wait_s], device.wait

    def timed_wait() -> None:
        started = time.perf_counter()
        wait()
        spent[0] += time.perf_counter() - started

    def take() -> float:
        seconds = spent[0] + store.counts.io_wait_s - spent[1]
        spent[:] = 0.0, store.counts.io_wait_s
        return seconds

    device.wait = timed_wait
    return take


def watch_graphs(engine: Any) -> Callable[[], list[float]]:
    """Time what is recorded from now on: before a sequence's first token. The result lists milliseconds by replay."""
    import torch

    device, events = engine.model.ops.device, []
    capture = device.capture

    def timed_capture(work: Callable[[], object]) -> Callable[[], None]:
        replay = capture(work)

        def timed_replay() -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            events.append((start, end))

        return timed_replay

    device.capture = timed_capture
    return lambda: [start.elapsed_time(end) for start, end in events]


def run_transformers(checkpoint: Path, device: str) -> dict[str, Any]:
    """The same with transformers in bf16; its kernels for DeltaNet are used only if they are installed."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device).eval()
    ids = torch.tensor([prompt(CONTEXT_PROMPT)], device=device)
    steps, seconds = [], []
    with torch.inference_mode():
        cache = None
        for _ in range(DECODE):
            started = time.perf_counter()
            result = model(ids, past_key_values=cache, use_cache=True)
            ids, cache = result.logits[:, -1:].argmax(-1), result.past_key_values
            ids.cpu()
            steps.append(time.perf_counter() - started)
        for seed in range(2, 2 + WARM_UP + PROMPTS):
            long = torch.tensor([prompt(PROMPT, seed)], device=device)
            started = time.perf_counter()
            model(long, use_cache=True, logits_to_keep=1).logits.argmax(-1).cpu()
            seconds.append(time.perf_counter() - started)
    return {
        "decode_tok_s": 1 / statistics.median(steps[DECODE // 2 :]),
        "prefill_tok_s": PROMPT / statistics.median(seconds[WARM_UP:]),
        "gpu_gb": gpu_bytes(device) / 1e9,
    }


def gpu_bytes(device: str) -> int:
    """The most that torch has taken of the GPU's memory."""
    import torch

    return torch.cuda.max_memory_reserved() if device == "cuda" else 0


def prepare(work: Path, model: str, bits: str) -> tuple[Path, Path]:
    """The checkpoint and its pack: 35B's are where speed.py has them (workspace.py)."""
    home = work if model == "35B" else work / model
    checkpoint, pack = home / "checkpoint", home / f"experts{bits}.moepack"
    if not (checkpoint / "model.safetensors.index.json").exists():
        make = Path(__file__).with_name("make_checkpoint.py")
        subprocess.run([sys.executable, make, checkpoint, "--model", model], check=True)
    if not pack.exists():
        convert = "from moepack.convert.cli import main; main()"
        subprocess.run(
            [sys.executable, "-c", convert, checkpoint, pack, "--bits", bits, "--quantizer", "minmax"], check=True
        )
    return checkpoint, pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", choices=RUNS, help="this run alone, its measurements as JSON")
    parser.add_argument("--model", choices=("35B", "397B"), default="35B", help="whose part is measured")
    parser.add_argument("--bits", choices=BITS, default="4", help="of the experts")
    parser.add_argument("--cap", type=float, default=CAP, help="share of the experts in memory when capped")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    checkpoint, pack = prepare(arguments.work, arguments.model, arguments.bits)
    if arguments.only == "transformers":
        print(json.dumps(run_transformers(checkpoint, arguments.device)))
    elif arguments.only:
        print(json.dumps(run_moepack(pack, arguments.device, arguments.cap if arguments.only == "capped" else 1.0)))
    else:
        print(f"{f'{arguments.model}, {arguments.bits} bits':14}  " + "  ".join(title for title, _, _ in COLUMNS))
        for name in RUNS:
            command = [sys.executable, __file__, arguments.work, "--only", name, "--device", arguments.device]
            command += ["--cap", str(arguments.cap), "--model", arguments.model, "--bits", arguments.bits]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                print(f"{name:14} failed: {lines[-1]}")
            else:
                print(row(name, json.loads(done.stdout.splitlines()[-1])), flush=True)


def row(name: str, result: dict[str, Any]) -> str:
    """A line of the table; what a run has not measured is left out."""
    cells = (format(result[key], form) if key in result else "" for _, key, form in COLUMNS)
    return f"{name:14}  " + "  ".join(f"{cell:>{len(title)}}" for cell, (title, _, _) in zip(cells, COLUMNS))


if __name__ == "__main__":
    main()
