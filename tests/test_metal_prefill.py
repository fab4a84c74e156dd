"""Metal kernels for several tokens at once, run on the CPU executor, against reference.py: odd sizes, lane orders.

Tolerances: products as in test_metal_matrices.py, with weights widened one by one, so 2e-6; states and attention as in
test_metal_token.py, after up to 40 dependent steps 1e-5.
"""

from __future__ import annotations

import pytest
import torch

from kernel_devices import Runner, default_runner
from kernel_memory import bytes_tensor, lay_out
from moepack.kernels import launches, reference
from moepack.kernels.matrix import Expert, Matrix
from test_metal_token import close
from test_native_matrices import check_experts, check_linear, quantized, random_input

PRODUCT, EXPERT, STEPS = 2e-6, 2e-6, 1e-5
RUNNER = default_runner()


def run_matmul(executor: Runner, x: torch.Tensor, matrices: list[Matrix], accumulate: bool = False) -> torch.Tensor:
    base, matrices = lay_out(matrices)
    out = torch.full((len(x), sum(matrix.out_features for matrix in matrices)), 0.5)
    forms = bytes_tensor(launches.tile_forms(matrices, base))
    executor.run(launches.matmul(base, forms, matrices, x, out, accumulate))
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 5, 32), (33, 37, 96), (7, 64, 160)])
def test_matmul_on_quantized_weights(bits: int, tokens: int, rows: int, columns: int) -> None:
    matrix, x = quantized(rows, columns, bits, 32), random_input(tokens, columns)
    check_linear(run_matmul(RUNNER, x, [matrix]), x, matrix, PRODUCT)


def test_matmul_of_several_matrices(executor: Runner) -> None:
    """Of several storages, onto what is there, from the front of longer rows, with row lengths that fill no step."""
    plain = [Matrix.from_floats(random_input(rows, 75).to(d)) for rows, d in ((40, torch.bfloat16), (3, torch.float16))]
    x = random_input(34, 80)
    parts = run_matmul(executor, x, plain, accumulate=True).split([40, 3], dim=1)
    for part, matrix in zip(parts, plain):
        check_linear(part - 0.5, x[:, :75], matrix, PRODUCT)


def test_experts_of_a_prompt(executor: Runner) -> None:
    """Experts of several sizes and bits, chosen by different numbers of tokens; the sum in the order of the choices."""
    tokens, hidden, chosen = 37, 64, 2
    sizes = [(32, 4), (96, 2), (32, 8)]
    experts = [
        [quantized(w, hidden, b, 32, 1), quantized(w, hidden, b, 32, 2), quantized(hidden, w, b, 32, 3)]
        for w, b in sizes
    ]
    base, flat = lay_out([matrix for expert in experts for matrix in expert])
    groups = [flat[i : i + 3] for i in range(0, len(flat), 3)]
    forms = bytes_tensor(b"".join(launches.expert_form(group, base, 1) for group in groups))

    choices = torch.tensor([[t % 3, (t + 1 + t % 2) % 3] for t in range(tokens)])
    weights = torch.rand(tokens, chosen, generator=torch.Generator().manual_seed(5))
    pairs = choices.flatten().argsort(stable=True)
    counts = choices.flatten().bincount(minlength=3).tolist()
    firsts = [sum(counts[:i]) for i in range(3)]
    segments = bytes_tensor(launches.pack_segments((0, i, firsts[i], counts[i]) for i in range(3)))
    order = torch.empty(tokens * chosen, dtype=torch.int32)
    order[pairs] = torch.arange(tokens * chosen, dtype=torch.int32)
    order = torch.cat([order.view(tokens, chosen).sort(dim=1).values, torch.full((tokens, 1), -1)], dim=1).int()

    x, products, rows = (
        random_input(tokens, hidden),
        torch.zeros(tokens * chosen, 96),
        torch.zeros(tokens * chosen, hidden),
    )
    out, expected = torch.ones(tokens, hidden), torch.ones(tokens, hidden)
    banks, of_pairs = [base] * 3, (pairs // chosen).int()
    executor.run(launches.experts_gate_up_rows(banks, forms, segments, of_pairs, x, products, max(counts)))
    executor.run(launches.experts_down_rows(banks, forms, segments, products, rows, max(counts)))
    executor.run(launches.add_expert_rows(rows, order, weights.flatten()[pairs], out))
    for i, group in enumerate(groups):
        at, which = (choices == i).nonzero(as_tuple=True)
        reference.add_expert(expected, x, Expert(*group), at, weights[at, which])
    check_experts(out, expected, EXPERT)


@pytest.mark.parametrize(
    ("tokens", "key_heads", "heads", "key_width", "value_width"),
    [(40, 2, 4, 64, 20), (5, 1, 3, 37, 33), (1, 1, 1, 128, 16), (3, 1, 1, 256, 1), (19, 1, 2, 200, 5)],
)
def test_delta_scan(
    executor: Runner, tokens: int, key_heads: int, heads: int, key_width: int, value_width: int
) -> None:
    keys, values = key_heads * key_width, heads * value_width
    mixed = torch.randn(tokens, 2 * keys + values + 3, generator=torch.Generator().manual_seed(1))
    q, k, v, _ = mixed.split([keys, keys, values, 3], dim=1)
    q, k, v = q.unflatten(1, (key_heads, -1)), k.unflatten(1, (key_heads, -1)), v.unflatten(1, (heads, -1))
    decay, beta = -random_input(tokens, heads).abs(), random_input(tokens, heads).sigmoid()
    state, out = (
        random_input(heads, key_width * value_width).view(heads, key_width, -1),
        torch.zeros(tokens, heads, value_width),
    )
    expected_state = state.double()
    expected = reference.gated_delta(*(part.double() for part in (q, k, v, decay, beta)), expected_state)
    executor.run(launches.delta_scan(q, k, v, decay, beta, state, out))
    close(out, expected, STEPS)
    close(state, expected_state, STEPS)


@pytest.mark.parametrize(
    ("tokens", "context", "heads", "kv_heads", "width"),
    [(19, 30, 4, 2, 64), (5, 5, 2, 1, 37), (1, 40, 2, 2, 256), (22, 22, 6, 2, 128)],
)
def test_attention_tiles(executor: Runner, tokens: int, context: int, heads: int, kv_heads: int, width: int) -> None:
    """The caches are longer than the context; beyond it lie NaN."""
    q = random_input(tokens, heads * width).view(tokens, heads, width)
    caches = torch.full((2, kv_heads, context + 3, width), torch.nan)
    caches[:, :, :context] = random_input(2 * kv_heads * context, width).view(2, kv_heads, context, width)
    keys, values = caches[:, :, :context]
    out = torch.zeros_like(q)
    executor.run(launches.attention_tiles(q, keys, values, out))
    close(out, reference.attention(q.double(), keys.double(), values.double()), STEPS)
