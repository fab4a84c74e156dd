"""How fast experts of each kind of release become blocks: GB of the bf16 that they stand for, per second of one core.

Experts of Qwen3.5-35B's shapes, written as each release has them by the tests' own writers, are read, quantized and
hashed by the function that a conversion calls for each expert. Processor time of one thread, so that neighbours cost
less than they do by the clock; the second of two passes, when the files are in memory.

    python benchmarks/sources.py
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import thread_time

from moepack.convert.pipeline import encode_expert
from moepack.convert.plan import plan_conversion
from moepack.convert.recipe import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_checkpoint import TinyModel, write_checkpoint
from tiny_releases import write_fp8, write_gptq, write_mlx

SIZES = {"hidden": 2048, "moe_intermediate": 512, "shared_intermediate": 512, "experts": 24}
MODEL = replace(TinyModel(), layers=1, full_attention_interval=1, mtp=False, **SIZES)
RELEASES: dict[str, Callable[[Path], Path]] = {
    "BF16": partial(write_checkpoint, model=MODEL),
    "FP8": partial(write_fp8, model=MODEL),
    "GPTQ, 4 bits": partial(write_gptq, model=MODEL),
    "MLX, 4 bits": partial(write_mlx, model=MODEL, group_size=64),
}
WAYS = {"as they are, or min/max": (4, "minmax"), "3 bits, min/max": (3, "minmax"), "4 bits, mse": (4, "mse")}


def main() -> None:
    """Print a table."""
    print(f"| GB/s of bf16 a core | {' | '.join(WAYS)} |\n|" + " --- |" * (1 + len(WAYS)))
    with tempfile.TemporaryDirectory() as folder:
        for name, write in RELEASES.items():
            source = write(Path(folder) / name)
            rates = [measure(source, Path(folder) / "out", bits, quantizer) for bits, quantizer in WAYS.values()]
            print(f"| {name} | " + " | ".join(f"{rate:.2f}" for rate in rates) + " |")


def measure(source: Path, out: Path, bits: int, quantizer: str) -> float:
    """GB of bf16 per second."""
    plan = plan_conversion(source, out, Recipe(bits, 64, 16, quantizer))
    size_bytes = 2 * 3 * MODEL.experts * MODEL.hidden * MODEL.moe_intermediate
    for _ in range(2):
        started = thread_time()
        for expert in range(MODEL.experts):
            encode_expert(plan, 0, expert)
        seconds = thread_time() - started
    plan.checkpoint.reader.close()
    return size_bytes / seconds / 1e9


if __name__ == "__main__":
    main()
