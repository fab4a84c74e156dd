"""The experts of one token on the CPU, as a share of the speed at which the same threads read memory.

All chosen experts of a layer in one native call, as in decode with everything in memory, which makes none from Python:
gate and up, SiLU, down. Weights are random, in blocks like a pack's, in huge pages, and so many that no cache holds
them; each call takes other ones. Every round reads memory and then runs the experts, so a share is of the limit in the
same second; the table has medians of the rounds. Sizes are those of one layer of Qwen3.5-35B-A3B and 397B-A17B.

    python benchmarks/experts.py --threads 2
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from laps import Meter, others_cores
from moepack.kernels.matrix import Expert
from moepack.kernels.native_library import ADDRESS, INT, declare, isa, set_threads
from moepack.kernels.native_matrix import place
from moepack.kernels.native_ops import read_stream
from moepack.layout.geometry import BlockGeometry, uniform_schemes
from moepack.layout.pages import Pages

WORKING_SET = 512 * 2**20
ROUNDS = 15
SCALE = 0x3C23  # of every group and bias, as bf16: 0.01. Random ones would be subnormal now and then, which is slow


@dataclass(frozen=True)
class Model:
    """Sizes of one layer."""

    name: str
    hidden: int
    width: int
    chosen: int


MODELS = (Model("35B", 2048, 512, 8), Model("397B", 4096, 1024, 10))


def main() -> None:
    """Measure every width of both models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2, 3, 8])
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    print(f"{isa()}, {arguments.threads} threads\n")
    print("| experts of one token | bits | GB/s | reading memory | share | others' cores |")
    print("|" + " --- |" * 6)
    for model in MODELS:
        for bits in arguments.bits:
            speeds, limits, others = measure(model, bits)
            share = statistics.median(speed / limit for speed, limit in zip(speeds, limits))
            found = f"{statistics.median(speeds):.1f} | {statistics.median(limits):.1f} | {share:.0%} | {others:.2f}"
            print(f"| {model.name}: {model.chosen} of {model.hidden} x {model.width} | {bits} | {found} |")


def measure(model: Model, bits: int) -> tuple[list[float], list[float], float]:
    """Of each round: GB/s of weights computed with, and of reading as much memory; the cores that others took."""
    geometry = BlockGeometry.of(model.hidden, model.width, uniform_schemes(bits, 64))
    layers = WORKING_SET // (model.chosen * geometry.block_stride)
    pages = Pages(layers * model.chosen * geometry.block_stride)
    memory = torch.frombuffer(pages.buffer, dtype=torch.uint8)
    experts = [make_expert(geometry, block) for block in memory.split(geometry.block_stride)[: layers * model.chosen]]
    order = torch.randperm(len(experts), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [
        [experts[place] for place in order[first : first + model.chosen]]
        for first in range(0, len(order), model.chosen)
    ]
    x, out = torch.randn(1, model.hidden), torch.empty(model.chosen, model.hidden)
    outs = (ADDRESS * model.chosen)(*[row.data_ptr() for row in out])
    places = [(ADDRESS * model.chosen)(*map(place, some)) for some in chosen]
    run_experts = declare("run_experts", ADDRESS, ADDRESS, ADDRESS, INT, ctypes.c_int)
    moved = len(experts) * geometry.payload_bytes

    def run_all() -> None:
        for some in places:
            run_experts(outs, x.data_ptr(), some, model.chosen, False)

    run_all()
    meter = Meter()
    speeds, limits = [], []
    for _ in range(ROUNDS):
        limits.append(memory.numel() / seconds(lambda: read_stream(memory)) / 1e9)
        speeds.append(moved / seconds(run_all) / 1e9)
    return speeds, limits, others_cores([meter.lap()])


def make_expert(geometry: BlockGeometry, block: torch.Tensor) -> Expert:
    """Random integers in a block [block_stride] of bytes, with plausible scales."""
    for section in geometry.sections:
        values = block[section.offset_bytes : section.offset_bytes + section.size_bytes]
        if section.name.endswith(".w_q"):
            values.random_(0, 256)
        else:
            values.view(torch.int16).fill_(SCALE)
    return Expert.from_block(geometry, block)


def seconds(work: Callable[[], object]) -> float:
    """The time that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
