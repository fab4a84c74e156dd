"""The native quantizer alone: GB of bf16 source per second of one core's processor time, by bits and instruction set.

Processor time of the calling thread, so that neighbours cost less than they do by the clock (caches and memory are
still shared). The definition in numpy and sha256, which every byte of a conversion goes through, stand beside it.

    python benchmarks/quantize.py
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from time import thread_time

import numpy as np

from moepack.convert.quantizers import define_minmax
from moepack.kernels import native_library
from moepack.kernels.native_hash import sha256_each
from moepack.kernels.native_quantize import quantize_minmax
from moepack.layout.quantized import float32_to_bf16

ROWS, COLUMNS, GROUP_SIZE = 1024, 4096, 64  # gate_proj of one expert of Qwen3.5-397B: 8 MiB
REPEATS = 7


def main() -> None:
    """Print a table."""
    weights = float32_to_bf16(np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32) * 0.02)
    print("| GB/s of bf16 a core | 2 bits | 3 bits | 4 bits | 8 bits |")
    print("| --- | --- | --- | --- | --- |")
    for name in ("avx512", "avx2", "neon", "portable"):
        if native_library.set_isa(name):
            print_row(name, [measure(weights, lambda bits=bits: run(weights, bits)) for bits in (2, 3, 4, 8)])
    print_row(
        "numpy", [measure(weights, lambda bits=bits: define_minmax(weights, bits, 64), 1) for bits in (2, 3, 4, 8)]
    )
    one_by_one = measure(weights, lambda: hashlib.sha256(weights.data).digest())
    two_at_a_time = measure(weights, lambda: sha256_each(np.split(weights, 2)))
    print(f"\nsha256: {one_by_one:.2f} GB/s, two messages at a time {two_at_a_time:.2f}")


def run(weights: np.ndarray, bits: int) -> None:
    """Quantize once into arrays of its own, as a conversion does."""
    w_q = np.empty((ROWS, COLUMNS * bits // 32), np.uint32)
    scales, biases = (np.empty((ROWS, COLUMNS // GROUP_SIZE), np.uint16) for _ in range(2))
    quantize_minmax(weights, bits, GROUP_SIZE, w_q, scales, biases)


def measure(weights: np.ndarray, work: Callable[[], object], repeats: int = REPEATS) -> float:
    """GB of the weights per second, the median."""
    samples = []
    for _ in range(repeats):
        started = thread_time()
        work()
        samples.append(thread_time() - started)
    return weights.nbytes / statistics.median(samples) / 1e9


def print_row(name: str, rates: list[float]) -> None:
    print(f"| {name} | " + " | ".join(f"{rate:.2f}" for rate in rates) + " |")


if __name__ == "__main__":
    main()
