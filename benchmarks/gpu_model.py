"""Part of a model on an NVIDIA GPU: decode and prefill, beside transformers with the same weights in bf16.

It is a fifth of 35B, or a fifteenth of 397B with an eighth of its experts, in every cost of a token. Writes the random
checkpoint of make_checkpoint.py and a pack of it, unless they are there. Each run is a process of its own. Decode is
the median step of the last half, prefill the median of eleven prompts after three. With random weights the router's
choices are nearly uniform: under a cap on the experts a token misses nearly as many as do not fit.

What a token of the last half costs the processor is its time less what it waits for the GPU and for the disk. It may
double from one process to the next on a machine that others use; what all layers of a token take the GPU, by events
around them, does not. Under a cap they are not handed over together, and there is no such number.

    python benchmarks/gpu_model.py WORK                     # all runs, a table
    python benchmarks/gpu_model.py WORK --only resident     # or capped, transformers
    python benchmarks/gpu_model.py WORK --only capped --cap 0.99    # hardly a miss: what streaming costs by itself
    python benchmarks/gpu_model.py WORK397 --model 397B --bits 2    # of another model and other bits
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
PARTS = {"35B": (), "397B": ("--model", "397B", "--layers", "4", "--vocab", "16640", "--experts", "64")}


def prompt(length: int, seed: int = SEED) -> list[int]:
    import torch

    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run_moepack(pack: Path, device: str, share: float) -> dict[str, Any]:
    """Decode and prefill with so large a share of the experts in memory."""
    from moepack.runtime import Engine, SamplingParams

    context = PROMPT + 8
    with Engine.open(pack, device=device, max_context=context) as engine:
        plan = engine.memory_plan
    memory = plan.total_bytes - int((1 - share) * plan.num_slots) * plan.slot_bytes
    with Engine.open(
        pack, device=device, max_context=context, memory=memory, process_bytes=plan.process_bytes
    ) as engine:
        greedy = SamplingParams(temperature=0, max_tokens=DECODE, ignore_eos=True)
        list(engine.generate(prompt(CONTEXT_PROMPT, 1), greedy))  # compiles, and fills the slots
        steps, busy, generation = [], [], engine.generate(prompt(CONTEXT_PROMPT), greedy)
        waited = watch_waits(engine)
        before = time.perf_counter()
        for _ in generation:
            now = time.perf_counter()
            steps.append(now - before)
            busy.append(now - before - waited())
            before = now
        seconds = []
        for seed in range(2, 2 + WARM_UP + PROMPTS):
            one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
            started = time.perf_counter()
            list(engine.generate(prompt(PROMPT, seed), one))
            seconds.append(time.perf_counter() - started)
        stats, times = generation.stats(), watch_graphs(engine)
        list(engine.generate(prompt(CONTEXT_PROMPT), greedy))
        return {
            "slots": engine.store.num_slots,
            "decode_tok_s": 1 / statistics.median(steps[DECODE // 2 :]),
            "processor_ms": 1e3 * statistics.median(busy[DECODE // 2 :]),
            "gpu_ms": statistics.median(times()[-DECODE // 2 :]) if share == 1 else None,
            "prefill_tok_s": PROMPT / statistics.median(seconds[WARM_UP:]),
            "bytes_per_token": stats.bytes_per_token,
            "gpu_bytes": gpu_bytes(device),
        }


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
    """A function that lists the milliseconds that the GPU took for each replay of recorded work until then."""
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
    """The same with transformers in bf16, as it comes from the package index."""
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
        "gpu_bytes": gpu_bytes(device),
    }


def gpu_bytes(device: str) -> int:
    """The most that torch has taken of the GPU's memory."""
    import torch

    return torch.cuda.max_memory_reserved() if device == "cuda" else 0


def prepare(work: Path, model: str, bits: str) -> tuple[Path, Path]:
    """The checkpoint and its pack."""
    checkpoint, pack = work / "checkpoint", work / f"experts{bits}.moepack"
    if not (checkpoint / "model.safetensors.index.json").exists():
        make = Path(__file__).with_name("make_checkpoint.py")
        subprocess.run([sys.executable, make, checkpoint, *PARTS[model]], check=True)
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
    parser.add_argument("--model", choices=PARTS, default="35B", help="of which WORK has a part, or gets one")
    parser.add_argument("--bits", default="4", help="of the experts")
    parser.add_argument("--cap", type=float, default=CAP, help="share of the experts in memory when capped")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    checkpoint, pack = prepare(arguments.work, arguments.model, arguments.bits)
    if arguments.only == "transformers":
        print(json.dumps(run_transformers(checkpoint, arguments.device)))
    elif arguments.only:
        print(json.dumps(run_moepack(pack, arguments.device, arguments.cap if arguments.only == "capped" else 1.0)))
    else:
        titles = (
            f"{'decode tok/s':>12} {'processor ms':>13} {'layers GPU ms':>14} {'prefill tok/s':>14} {'GPU GB':>8} "
            f"{'experts in memory':>18}"
        )
        print(f"{'':14} {titles}", flush=True)
        for name in RUNS:
            command = [sys.executable, __file__, arguments.work, "--only", name, "--device", arguments.device]
            command += ["--cap", str(arguments.cap), "--model", arguments.model, "--bits", arguments.bits]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{name:14} failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            r = json.loads(done.stdout.splitlines()[-1])
            decode, prefill, gigabytes = r["decode_tok_s"], r["prefill_tok_s"], r["gpu_bytes"] / 1e9
            processor = f"{r['processor_ms']:13.2f}" if "processor_ms" in r else f"{'':13}"
            layers = f"{r['gpu_ms']:14.3f}" if r.get("gpu_ms") else f"{'':14}"
            rest = f"{prefill:14.0f} {gigabytes:8.1f} {r.get('slots', ''):>18}"
            print(f"{name:14} {decode:12.1f} {processor} {layers} {rest}", flush=True)


if __name__ == "__main__":
    main()
