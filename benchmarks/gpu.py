"""The kernels on an NVIDIA GPU, metal/'s and cuda/'s: speed as a share of the GPU's copy bandwidth.

Each kernel runs inside a CUDA graph over so many different weights that the L2 cannot hold them, all chosen experts of
a layer in one dispatch, as in a decode step. The limit is what a copy of 4 GiB within the GPU moves, bytes read plus
bytes written. Sizes are those of one layer of Qwen3.5-397B-A17B and 35B-A3B. What lies between the matrices is timed
the same way; a kernel that is not bound by bytes has a small share. Few bytes may not reach that limit even by a copy:
beside a layer's chosen experts stands what as many bytes take a copy, which reads half of them, and cuBLAS's product of
a bf16 matrix with a vector. The shared expert, which a token has beside them, is one more of the same bits there.

    python benchmarks/gpu.py                 # a table
    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --only between  # only what lies between the matrices
    python benchmarks/gpu.py --portable      # metal/'s kernels throughout
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from moepack.kernels import launches
from moepack.kernels.cuda_device import CudaDevice
from moepack.kernels.forms import expert_form, pack_places
from moepack.kernels.gpu_token import memory_of
from moepack.kernels.matrix import Expert, Matrix
from moepack.layout.geometry import BlockGeometry, MatrixGeometry, Scheme, align_up, uniform_schemes

COPY_BYTES = 4 * 2**30
WORKING_SET = 512 * 2**20  # bytes of different weights in a graph: far above any L2
REPEATS = 20
CONTEXTS = (128, 4096, 32768)
CACHES = 8  # of keys and values: 128 MiB each
PROMPT = 2048
VOCABULARY = 248_320


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
    experts: int


MODELS = (
    Model("397B", 4096, 1024, 10, 32, 2, 256, 16, 64, 512),
    Model("35B", 2048, 512, 8, 16, 2, 256, 16, 32, 256),
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


def time_graph(
    capture: Callable[[Callable[[], object]], Callable[[], object]], work: Sequence[Callable[[], object]]
) -> float:
    """Seconds of one piece of work, all of them in one CUDA graph; the median of several replays.

    capture   Device.capture, or capture_torch for torch's own kernels
    """
    for step in work[:2]:
        step()
    return median_seconds(capture(lambda: [step() for step in work])) / len(work)


def capture_torch(work: Callable[[], object]) -> Callable[[], object]:
    """What replays the kernels that work starts through torch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def median_seconds(work: Callable[[], object]) -> float:
    """Seconds that work takes the GPU, after a few times that do not count."""
    times = []
    for _ in range(REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large copy within the GPU."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_seconds(lambda: target.copy_(source))


def random_bank(size_bytes: int) -> torch.Tensor:
    """Weights of random integers; scales and biases among them are random too, which no product minds but its value."""
    halves = torch.randint(0, 2**14, (size_bytes // 2,), dtype=torch.int16, device="cuda")  # as bf16: small, finite
    return halves.view(torch.uint8)


def bench_experts(device: CudaDevice, model: Model, bits: int, limit: float) -> list[Row]:
    """experts_gate_up and experts_down for the chosen experts of a layer, and with the shared one beside them."""
    gate_up, down = bind_experts(device, model, bits, model.chosen)
    sizes = {name: matrix.payload_bytes for name, matrix in expert_geometry(model, bits).matrices}
    moved_up, moved_down = sizes["gate_proj"] + sizes["up_proj"], sizes["down_proj"]
    rows = []
    for name, count, moved, seconds in (
        ("experts_gate_up", model.chosen, moved_up, time_graph(device.capture, gate_up)),
        ("experts_down", model.chosen, moved_down, time_graph(device.capture, down)),
        ("both", model.chosen, moved_up + moved_down, time_in_turn(device, gate_up, down)),
        (
            "both, with the shared expert",
            model.chosen + 1,
            moved_up + moved_down,
            time_in_turn(device, *bind_experts(device, model, bits, model.chosen + 1)),
        ),
    ):
        share = count * moved / seconds / limit
        rows.append(Row(name, model.name, bits, count * moved / 1e6, seconds * 1e6, share))
    return rows


def expert_geometry(model: Model, bits: int) -> BlockGeometry:
    return BlockGeometry.of(model.hidden, model.width, uniform_schemes(bits, 64))


def bind_experts(device: CudaDevice, model: Model, bits: int, count: int) -> list[list[Callable[[], object]]]:
    """experts_gate_up and experts_down of many layers, of so many experts each."""
    geometry = expert_geometry(model, bits)
    layers = -(-WORKING_SET // (geometry.block_stride * count))
    bank = random_bank(geometry.block_stride * count * layers)
    forms = device.upload_bytes(expert_form(Expert.from_block(geometry, bank), bank, 0))
    x = torch.randn(1, model.hidden, device="cuda")
    experts = device.expert_launches(model.hidden, model.width, {bits})
    hidden = torch.randn(count, experts.hidden_width(model.width), device="cuda")
    weights = torch.rand(count, device="cuda")
    gate_up, down = [], []
    order = torch.randperm(count * layers, generator=torch.Generator().manual_seed(0)).tolist()
    for layer in range(layers):
        ids = order[layer * count : (layer + 1) * count]
        raw = pack_places((expert * geometry.block_stride, 0, rank) for rank, expert in enumerate(ids))
        places = device.upload_bytes(raw)
        gate_up.append(device.bind(experts.experts_gate_up([bank] * 3, forms, places, x, hidden)))
        down.append(device.bind(experts.experts_down([bank] * 3, forms, places, hidden, weights, x.clone())))
    return [gate_up, down]


def time_in_turn(
    device: CudaDevice, first: Sequence[Callable[[], object]], second: Sequence[Callable[[], object]]
) -> float:
    """Seconds of a pair of them."""
    return 2 * time_graph(device.capture, [step for pair in zip(first, second) for step in pair])


def bench_peers(model: Model, bits: int, limit: float) -> list[Row]:
    """A copy and cuBLAS's product with a vector that move as many bytes as either, and as both."""
    sizes, rows = dict(expert_geometry(model, bits).matrices), []
    for name, parts in (
        ("gate_up", ("gate_proj", "up_proj")),
        ("down", ("down_proj",)),
        ("both", ("gate_proj", "up_proj", "down_proj")),
    ):
        wanted = model.chosen * sum(sizes[part].payload_bytes for part in parts)
        half = wanted // (4 * model.hidden)  # rows of bf16
        layers = -(-WORKING_SET // wanted)
        banks = random_bank(layers * 4 * half * model.hidden).view(torch.bfloat16).view(layers, 2 * half, model.hidden)
        x, out = torch.randn(model.hidden, device="cuda").bfloat16(), banks.new_empty(2 * half)
        moved = banks[0].nbytes
        for peer, steps in (
            ("copy", [partial(bank[half:].copy_, bank[:half]) for bank in banks]),
            ("cuBLAS", [partial(torch.mv, bank, x, out=out) for bank in banks]),
        ):
            seconds = time_graph(capture_torch, steps)
            share = moved / seconds / limit
            rows.append(Row(f"{peer}, as {name}", model.name, bits, moved / 1e6, seconds * 1e6, share))
    return rows


def bench_linears(device: CudaDevice, model: Model, bits: int, limit: float) -> list[Row]:
    """The input and output projections of both mixers, and the router with the shared expert's gate.

    As in a pack, DeltaNet's a and b and the router are never quantized.
    """
    value = model.value_heads * 128
    delta = [(2 * model.key_heads * 128 + value, bits), (value, bits), *[(model.value_heads, 16)] * 2]
    attention = [(2 * model.heads * model.head_dim, bits), *[(model.kv_heads * model.head_dim, bits)] * 2]
    rows = [
        bench_matrices(device, "linears: DeltaNet in", model, delta, model.hidden, limit),
        bench_matrices(device, "linears: attention in", model, attention, model.hidden, limit),
        bench_matrices(device, "linears: DeltaNet out", model, [(model.hidden, bits)], value, limit),
    ]
    if bits == 16:
        router = [(model.experts, bits), (1, bits)]
        rows.append(bench_matrices(device, "linears: router", model, router, model.hidden, limit))
    return rows


def bench_matrices(
    device: CudaDevice, name: str, model: Model, sizes: Sequence[tuple[int, int]], columns: int, limit: float
) -> Row:
    """linears of matrices of such (rows, bits), which share a normed input of so many columns."""
    geometries = [MatrixGeometry(rows, columns, Scheme.of(bits, 64)) for rows, bits in sizes]
    payload = sum(geometry.payload_bytes for geometry in geometries)
    copies = -(-WORKING_SET // payload)
    bank = random_bank(copies * (payload + 4096 * len(sizes)))
    x, norm = torch.randn(1, columns, device="cuda"), torch.randn(columns, device="cuda")
    out, steps, end = torch.empty(1, sum(rows for rows, _ in sizes), device="cuda"), [], 0
    for _ in range(copies):
        matrices = []
        for geometry, (_, bits) in zip(geometries, sizes):
            arrays = []
            for _, _, shape in geometry.arrays:
                size = shape[0] * shape[1] * (4 if not arrays and bits != 16 else 2)
                arrays.append(bank[end : end + size])
                end = align_up(end + size, 64)
            matrices.append(Matrix.from_arrays(geometry, arrays))
        memory = memory_of(bank)
        forms = device.upload_bytes(device.launches.matrix_forms(matrices, memory))
        steps.append(device.bind(device.launches.linears(memory, forms, matrices, x, out, norm=norm, eps=1e-6)))
    seconds = time_graph(device.capture, steps)
    return Row(name, model.name, sizes[0][1], payload / 1e6, seconds * 1e6, payload / seconds / limit)


def bench_attention(device: CudaDevice, model: Model, limit: float) -> list[Row]:
    """Attention of one token at several contexts, in caches planned for the longest."""
    heads, kv_heads, width, rows = model.heads, model.kv_heads, model.head_dim, []
    longest = CONTEXTS[-1]
    splits = launches.count_splits(longest)
    q, gate = torch.randn(heads, width, device="cuda"), torch.randn(heads, 2 * width, device="cuda")
    partial, stats = (torch.zeros(heads, splits, n, device="cuda") for n in (width, 2))
    caches = torch.randn(CACHES, 2, kv_heads, longest, width, device="cuda")
    for context in CONTEXTS:
        position = torch.tensor([context - 1], dtype=torch.int32, device="cuda")
        split = [launches.attention_split(q, k, v, position, partial, stats) for k, v in caches]
        combine = [launches.attention_combine(partial, stats, k, position, gate, q.clone()) for k, _ in caches]
        moved = 8 * kv_heads * context * width
        rows += [
            time_launches(device, f"attention_split {context}", model, split, moved, limit),
            time_launches(device, f"attention_combine {context}", model, combine, 4 * heads * width, limit),
        ]
    return rows


def bench_between(device: CudaDevice, model: Model, limit: float) -> list[Row]:
    """The other kernels of one token between its matrices."""
    keys, values = model.key_heads * 128, model.value_heads * 128
    channels = 2 * keys + values

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda")

    states = random(-(-WORKING_SET // (512 * values)), model.value_heads, 128, 128)
    mixed, projected, gates, norm = random(channels), random(channels + 3 * values), random(values), random(128)
    offsets = (model.key_heads, channels, channels + values, channels + 2 * values)
    steps = [
        launches.delta_step(mixed, projected, gates, gates, norm, state, random(model.value_heads, 128), *offsets, 1e-6)
        for state in states
    ]
    conv = launches.causal_conv(random(1, channels + values), random(channels, 4), random(3, channels), mixed)
    x, weight = random(1, model.hidden), random(model.hidden)
    logits, ids = random(1, model.experts + 1), torch.zeros(1, model.chosen, dtype=torch.int32, device="cuda")
    unused = torch.zeros(16 * (model.experts + 1), dtype=torch.uint8, device="cuda")
    choice = launches.choose_experts(logits, ids, random(1, model.chosen + 1), unused, unused.clone())
    heads, width = model.heads, model.head_dim
    caches, position = random(2, model.kv_heads, 128, width), torch.zeros(1, dtype=torch.int32, device="cuda")
    row, frequencies = random(1, 2 * (heads + model.kv_heads) * width), random(32)
    rope = launches.rope_cache(row, *random(2, width), frequencies, position, random(1, heads, width), *caches, 1e-6)
    parts = torch.zeros(2, 1, launches.count_parts(VOCABULARY), dtype=torch.int32, device="cuda")
    best_of_parts = launches.argmax_parts(random(1, VOCABULARY), *parts)
    likeliest = launches.argmax(*parts, torch.zeros(1, dtype=torch.int32, device="cuda"), random(1), VOCABULARY)
    moved = 2 * states[0].numel() * 4
    return [
        time_launches(device, "delta_step", model, steps, moved, limit),
        time_launches(device, "causal_conv", model, [conv] * 100, 4 * 12 * channels, limit),
        time_launches(device, "rope_cache", model, [rope] * 100, 8 * row.numel(), limit),
        time_launches(device, "rms_norm", model, [launches.rms_norm(x, weight, x, 1e-6)] * 100, 12 * x.numel(), limit),
        time_launches(device, "choose_experts", model, [choice] * 100, 4 * logits.numel(), limit),
        time_launches(device, "argmax_parts", model, [best_of_parts] * 100, 4 * VOCABULARY, limit),
        time_launches(device, "argmax", model, [likeliest] * 100, 4 * parts.numel(), limit),
    ]


def bench_prompt(device: CudaDevice, model: Model, limit: float) -> list[Row]:
    """Convolution, delta rule and attention of a prompt; its matrices are in gpu_prompt.py."""
    keys, values = model.key_heads * 128, model.value_heads * 128
    channels, heads, width = 2 * keys + values, model.heads, model.head_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda")

    mixed, out = random(PROMPT, channels), random(PROMPT, channels)
    q, k, v = mixed.split([keys, keys, values], dim=1)
    q, k, v = q.unflatten(1, (-1, 128)), k.unflatten(1, (-1, 128)), v.unflatten(1, (-1, 128))
    decay, beta = torch.rand(2, PROMPT, model.value_heads, device="cuda")
    state, read = random(model.value_heads, 128, 128), random(PROMPT, model.value_heads, 128)
    query, caches = random(PROMPT, heads, width), random(2, model.kv_heads, PROMPT, width)
    conv = launches.causal_conv(mixed, random(channels, 4), random(3, channels), out)
    scan = launches.delta_scan(q, k, v, -decay, beta, state, read)
    tiles = launches.attention_tiles(query, *caches, query.clone())
    return [
        time_launches(device, f"causal_conv, {PROMPT} tokens", model, [conv] * 4, 8 * mixed.numel(), limit),
        time_launches(device, f"delta_scan, {PROMPT} tokens", model, [scan] * 2, 4 * mixed.numel(), limit),
        time_launches(device, f"attention_tiles, {PROMPT}", model, [tiles] * 2, 8 * query.numel(), limit),
    ]


def time_launches(
    device: CudaDevice, name: str, model: Model, calls: Sequence[launches.Launch], moved: int, limit: float
) -> Row:
    """One of these calls, each of which moves so many bytes."""
    seconds = time_graph(device.capture, [device.bind(call) for call in calls])
    return Row(name, model.name, 32, moved / 1e6, seconds * 1e6, moved / seconds / limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the table to this file")
    parser.add_argument("--portable", action="store_true", help="the kernels of metal/ throughout, not those of cuda/")
    parser.add_argument("--only", choices=["matrices", "between"], help="one half of the table")
    arguments = parser.parse_args()
    device = CudaDevice()
    if arguments.portable:
        device.launches = launches
    limit = copy_bandwidth()
    print(f"{device.name}: copies {limit / 1e12:.2f} TB/s")
    rows = []
    for model in MODELS:
        if arguments.only != "between":
            for bits in (4, 2, 3, 8):
                rows += bench_experts(device, model, bits, limit) + bench_peers(model, bits, limit)
            for bits in (8, 4, 16):
                rows += bench_linears(device, model, bits, limit)
        if arguments.only != "matrices":
            for bench in (bench_between, bench_attention, bench_prompt):
                rows += bench(device, model, limit)
    print(f"{'kernel':28} {'model':5} {'bits':>4} {'MB':>8} {'us':>8} {'share':>6}")
    for row in rows:
        print(
            f"{row.kernel:28} {row.model:5} {row.bits:4} {row.megabytes:8.1f} {row.microseconds:8.1f} {row.share:6.0%}"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": device.name, "copy_bytes_per_s": limit, "rows": [vars(row) for row in rows]}, file)


if __name__ == "__main__":
    main()
