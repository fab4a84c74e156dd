"""Operations on a prompt on a GPU, by kernels and by torch, which multiplies with weights that a kernel has widened.

Sizes of one layer of Qwen3.5-35B-A3B at 4 bits; the median of several calls, what they cost the processor included.

    python benchmarks/gpu_prompt.py --tokens 2048
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from moepack.kernels import reference
from moepack.kernels.backend import choose_backend
from moepack.kernels.matrix import Expert, Matrix
from moepack.layout.geometry import BlockGeometry, MatrixGeometry, Scheme, uniform_schemes

HIDDEN, WIDTH, EXPERTS, CHOSEN = 2048, 512, 256, 8
KEY_HEADS, VALUE_HEADS, HEAD = 16, 32, 128
HEADS, KV_HEADS, HEAD_DIM = 16, 2, 256
OPERATIONS = ("linears", "causal_conv", "attention", "gated_delta", "add_experts")
REPEATS = 5


def time_call(call: Callable[[], object], wait: Callable[[], object]) -> float:
    """Milliseconds of one call, the median."""
    times = []
    for _ in range(REPEATS + 1):
        wait()
        started = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    ops, tokens = choose_backend(arguments.device, exact=True)[0], arguments.tokens
    place = ops.device.place
    x = torch.randn(tokens, HIDDEN, device=place)
    calls = {**mixers(ops, tokens, x), "add_experts": experts(ops, tokens, x)}
    print(f"{ops.device.name}, {tokens} tokens, ms: kernels, torch")
    for name in OPERATIONS:
        by_kernels, by_torch = (time_call(call, ops.device.wait) for call in calls[name])
        print(f"{name:14} {by_kernels:9.2f} {by_torch:9.2f}", flush=True)


def mixers(ops, tokens: int, x: torch.Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    place, channels = x.device, 2 * KEY_HEADS * HEAD + VALUE_HEADS * HEAD
    memory = ops.view_pages(ops.new_pages(32 * 2**20))
    geometry = MatrixGeometry(channels + VALUE_HEADS * HEAD, HIDDEN, Scheme.of(4, 64))
    arrays, end = [], 0
    for _, _, (rows, columns) in geometry.arrays:
        size = rows * columns * (2 if arrays else 4)
        arrays.append(memory[end : end + size])
        end += size
    matrix = Matrix.from_arrays(geometry, arrays)
    mixed = torch.randn(tokens, channels, device=place)
    conv, state = torch.randn(channels, 4, device=place), torch.zeros(3, channels, device=place)
    q, k, v = mixed.split([KEY_HEADS * HEAD, KEY_HEADS * HEAD, VALUE_HEADS * HEAD], dim=-1)
    q, k, v = q.unflatten(-1, (KEY_HEADS, -1)), k.unflatten(-1, (KEY_HEADS, -1)), v.unflatten(-1, (VALUE_HEADS, -1))
    decay, beta = -torch.rand(tokens, VALUE_HEADS, device=place), torch.rand(tokens, VALUE_HEADS, device=place)
    memory_state = torch.zeros(VALUE_HEADS, HEAD, HEAD, device=place)
    query = torch.randn(tokens, HEADS, HEAD_DIM, device=place)
    keys, values = torch.randn(2, KV_HEADS, tokens, HEAD_DIM, device=place)

    def by_torch(operation: Callable[..., object], *operands: torch.Tensor) -> Callable[[], object]:
        def call() -> None:
            with torch.device(place):
                operation(*operands)

        return call

    delta = (q, k, v, decay, beta, memory_state)
    return {
        "linears": (lambda: ops.linears(x, [matrix]), lambda: ops._widened_product(x, matrix)),
        "causal_conv": (
            lambda: ops.causal_conv(mixed, conv, state),
            by_torch(reference.causal_conv, mixed, conv, state),
        ),
        "attention": (lambda: ops.attention(query, keys, values), by_torch(reference.attention, query, keys, values)),
        "gated_delta": (lambda: ops.gated_delta(*delta), by_torch(reference.gated_delta, *delta)),
    }


def experts(ops, tokens: int, x: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    geometry = BlockGeometry.of(HIDDEN, WIDTH, uniform_schemes(4, 64))
    slots = ops.new_slots(EXPERTS, geometry.block_stride)
    blocks = [Expert.from_block(geometry, slots.block(slot)) for slot in range(EXPERTS)]
    chosen = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(0)).topk(CHOSEN).indices.flatten()
    counts, order = chosen.bincount(minlength=EXPERTS).tolist(), chosen.argsort(stable=True)
    at, weights, out = order // CHOSEN, torch.rand(len(order), device=x.device), torch.zeros_like(x)
    on_device = at.to(x.device)

    def by_torch() -> None:
        first = 0
        for expert, count in zip(blocks, counts):
            part = slice(first, first + count)
            some = x[on_device[part]]
            gate, up = (ops._widened_product(some, matrix) for matrix in (expert.gate_proj, expert.up_proj))
            result = ops._widened_product(ops.silu_mul(gate, up), expert.down_proj)
            out.index_add_(0, on_device[part], result * weights[part].unsqueeze(-1))
            first += count

    return (lambda: ops.add_experts(out, x, blocks, counts, at, weights)), by_torch


if __name__ == "__main__":
    main()
