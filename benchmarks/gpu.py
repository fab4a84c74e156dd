"""The Metal kernels on an NVIDIA GPU: speed as a share of the GPU's copy bandwidth.

Each kernel runs inside a CUDA graph over so many different weights that the L2 cannot hold them, all chosen experts of
a layer in one dispatch, as in a decode step. The limit is what a copy of 4 GiB within the GPU moves, bytes read plus
bytes written. Sizes are those of one layer of Qwen3.5-397B-A17B and 35B-A3B.

    python benchmarks/gpu.py                 # a table
    python benchmarks/gpu.py --json gpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moepack.kernels import launches
from moepack.kernels.cuda_device import CudaDevice
from moepack.kernels.gpu_token import memory_of
from moepack.kernels.matrix import Matrix
from moepack.layout.geometry import BlockGeometry, MatrixGeometry, Scheme, align_up, uniform_schemes

COPY_BYTES = 4 * 2**30
WORKING_SET = 512 * 2**20  # bytes of different weights in a graph: far above any L2
REPEATS = 20


@dataclass(frozen=True)
class Model:
    """Sizes of one layer."""

    name: str
    hidden: int
    width: int
    chosen: int
    heads: int
    kv_heads: int
    head_dim: int
    key_heads: int
    value_heads: int


MODELS = (
    Model("397B", 4096, 1024, 10, 32, 2, 256, 16, 64),
    Model("35B", 2048, 512, 8, 16, 2, 256, 16, 32),
)


@dataclass(frozen=True)
class Row:
    """One kernel at one size."""

    kernel: str
    model: str
    bits: int
    megabytes: float
    microseconds: float
    share: float


def time_graph(device: CudaDevice, work: Sequence[Callable[[], object]]) -> float:
    """Seconds of one piece of work, all of them in one CUDA graph; the median of several replays."""
    for step in work[:2]:
        step()
    replay = device.capture(lambda: [step() for step in work])
    times = []
    for _ in range(REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(work))
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large copy within the GPU."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * COPY_BYTES / statistics.median(times)


def random_bank(size_bytes: int) -> torch.Tensor:
    """Weights of random integers; scales and biases among them are random too, which no product minds but its value."""
    halves = torch.randint(0, 2**14, (size_bytes // 2,), dtype=torch.int16, device="cuda")  # as bf16: small, finite
    return halves.view(torch.uint8)


def bench_experts(device: CudaDevice, model: Model, bits: int, limit: float) -> list[Row]:
    """experts_gate_up and experts_down for the chosen experts of a layer."""
    geometry = BlockGeometry.of(model.hidden, model.width, uniform_schemes(bits, 64))
    layers = -(-WORKING_SET // (geometry.block_stride * model.chosen))
    bank = random_bank(geometry.block_stride * model.chosen * layers)
    forms = device.upload(torch.frombuffer(bytearray(launches.expert_form_of_block(geometry, 0)), dtype=torch.uint8))
    x = torch.randn(1, model.hidden, device="cuda")
    hidden = torch.randn(model.chosen, model.width, device="cuda")
    weights = torch.rand(model.chosen, device="cuda")
    gate_up, down = [], []
    order = torch.randperm(model.chosen * layers, generator=torch.Generator().manual_seed(0)).tolist()
    for layer in range(layers):
        ids = order[layer * model.chosen : (layer + 1) * model.chosen]
        raw = launches.pack_places((expert * geometry.block_stride, 0, rank) for rank, expert in enumerate(ids))
        places = device.upload(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        gate_up.append(device.bind(launches.experts_gate_up([bank] * 3, forms, places, x, hidden)))
        down.append(device.bind(launches.experts_down([bank] * 3, forms, places, hidden, weights, x.clone())))
    sizes = dict(geometry.matrices)
    rows = []
    for name, steps, parts in (
        ("experts_gate_up", gate_up, ("gate_proj", "up_proj")),
        ("experts_down", down, ("down_proj",)),
    ):
        moved = model.chosen * sum(sizes[part].payload_bytes for part in parts)
        seconds = time_graph(device, steps)
        rows.append(Row(name, model.name, bits, moved / 1e6, seconds * 1e6, moved / seconds / limit))
    both = [step for pair in zip(gate_up, down) for step in pair]
    moved = model.chosen * geometry.payload_bytes
    seconds = 2 * time_graph(device, both)
    rows.append(Row("both", model.name, bits, moved / 1e6, seconds * 1e6, moved / seconds / limit))
    return rows


def bench_linears(device: CudaDevice, model: Model, bits: int, limit: float) -> list[Row]:
    """The input and output projections of both mixers."""
    value = model.value_heads * 128
    delta = [2 * model.key_heads * 128 + value, value, model.value_heads, model.value_heads]
    attention = [2 * model.heads * model.head_dim, *[model.kv_heads * model.head_dim] * 2]
    return [
        bench_matrices(device, "linears: DeltaNet in", model, delta, model.hidden, bits, limit),
        bench_matrices(device, "linears: attention in", model, attention, model.hidden, bits, limit),
        bench_matrices(device, "linears: DeltaNet out", model, [model.hidden], value, bits, limit),
    ]


def bench_matrices(
    device: CudaDevice, name: str, model: Model, rows: Sequence[int], columns: int, bits: int, limit: float
) -> Row:
    geometries = [MatrixGeometry(row, columns, Scheme.of(bits, 64)) for row in rows]
    payload = sum(geometry.payload_bytes for geometry in geometries)
    copies = -(-WORKING_SET // payload)
    bank = random_bank(copies * (payload + 4096 * len(rows)))
    x, norm = torch.randn(1, columns, device="cuda"), torch.randn(columns, device="cuda")
    out, steps, end = torch.empty(1, sum(rows), device="cuda"), [], 0
    for _ in range(copies):
        matrices = []
        for geometry in geometries:
            arrays = []
            for _, _, shape in geometry.arrays:
                size = shape[0] * shape[1] * (4 if not arrays and bits != 16 else 2)
                arrays.append(bank[end : end + size])
                end = align_up(end + size, 64)
            matrices.append(Matrix.from_arrays(geometry, arrays))
        memory = memory_of(bank)
        forms = device.upload(torch.frombuffer(bytearray(device.launches.matrix_forms(matrices, memory)), dtype=torch.uint8))
        steps.append(device.bind(device.launches.linears(memory, forms, matrices, x, out, norm=norm, eps=1e-6)))
    seconds = time_graph(device, steps)
    return Row(name, model.name, bits, payload / 1e6, seconds * 1e6, payload / seconds / limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the table to this file")
    parser.add_argument("--portable", action="store_true", help="the kernels of metal/ throughout, not those of cuda/")
    arguments = parser.parse_args()
    device = CudaDevice()
    if arguments.portable:
        device.launches = launches
    limit = copy_bandwidth()
    print(f"{device.name}: copies {limit / 1e12:.2f} TB/s")
    rows = []
    for model in MODELS:
        for bits in (4, 2, 3, 8):
            rows += bench_experts(device, model, bits, limit)
        for bits in (8, 4, 16):
            rows += bench_linears(device, model, bits, limit)
    print(f"{'kernel':24} {'model':5} {'bits':>4} {'MB':>8} {'us':>8} {'share':>6}")
    for row in rows:
        print(
            f"{row.kernel:24} {row.model:5} {row.bits:4} {row.megabytes:8.1f} {row.microseconds:8.1f} {row.share:6.0%}"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": device.name, "copy_bytes_per_s": limit, "rows": [vars(row) for row in rows]}, file)


if __name__ == "__main__":
    main()
