"""Metal kernels for several tokens at once, run on the CPU executor, against reference.py: odd sizes, lane orders.

Tolerances: products as in test_metal_matrices.py, with weights widened one by one, so 2e-6; states and attention as in
test_metal_token.py, after up to 40 dependent steps 1e-5.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernel_devices import Runner, default_runner
from kernel_memory import Host, bytes_tensor, lay_out
from moepack.kernels import launches, prompt_launches, reference
from moepack.kernels.forms import expert_form, pack_places, pack_segments, segment_bytes
from moepack.kernels.matrix import Expert, Matrix
from test_metal_token import close
from test_native_matrices import SCHEMES, check_experts, check_linear, quantized, random_input

PRODUCT, EXPERT, STEPS = 2e-6, 2e-6, 1e-5
RUNNER = default_runner()


def split(executor: Runner, x: torch.Tensor, columns: int) -> prompt_launches.Parts:
    parts = prompt_launches.Parts.of(Host, len(x), columns)
    executor.run(prompt_launches.split_rows(x, parts))
    return parts


def check_product(found: torch.Tensor, x: torch.Tensor, matrix: Matrix) -> None:
    """check_linear against float64: of thousands of results float32 itself has some that are wrong by the tolerance."""
    weights = reference.dequantize(matrix, 0, matrix.out_features).double()
    scale = x.double().norm(dim=1, keepdim=True) * weights.norm(dim=1) / matrix.in_features**0.5
    assert (((found - x.double() @ weights.T) / scale).abs().max() <= PRODUCT).item()


def run_halves(executor: Runner, x: torch.Tensor, matrices: list[Matrix]) -> torch.Tensor:
    base, matrices = lay_out(matrices)
    out = torch.full((len(x), sum(matrix.out_features for matrix in matrices)), torch.nan)
    forms = bytes_tensor(prompt_launches.tile_forms(matrices, base))
    parts = split(executor, x, matrices[0].in_features)
    executor.run(prompt_launches.matmul(base, forms, matrices, parts, out))
    return out


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


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 5, 128), (70, 37, 384), (3, 270, 256), (5, 20, 1152)])
def test_matmul_by_halves(bits: int, group_size: int, tokens: int, rows: int, columns: int) -> None:
    matrix, x = quantized(rows, columns, bits, group_size), random_input(tokens, columns)
    check_product(run_halves(RUNNER, x, [matrix]), x, matrix)


def test_matmul_by_halves_of_several_matrices(executor: Runner) -> None:
    """Of several storages and of groups that are no multiple of four, from the front of longer rows."""
    matrices = [quantized(rows, 224, bits, 32, bits) for rows, bits in ((40, 4), (3, 8), (257, 3), (16, 2))]
    x = random_input(66, 228)
    for part, matrix in zip(run_halves(executor, x, matrices).split([40, 3, 257, 16], dim=1), matrices):
        check_product(part, x[:, :224], matrix)


class Prompt:
    """Experts of some sizes, bits and groups, chosen two at a time by a prompt's tokens, each by another number."""

    def __init__(self, sizes: list[tuple[int, int, int, int]], hidden: int, tokens: int):
        """sizes: (width, bits of gate and up, bits of down, group size)"""
        experts = [
            [quantized(w, hidden, b, g, 1), quantized(w, hidden, b, g, 2), quantized(hidden, w, d, g, 3)]
            for w, b, d, g in sizes
        ]
        self.base, flat = lay_out([matrix for expert in experts for matrix in expert])
        self.groups = [flat[i : i + 3] for i in range(0, len(flat), 3)]
        self.forms = bytes_tensor(b"".join(expert_form(Expert(*group), self.base, 1) for group in self.groups))
        count = len(sizes)
        self.choices = torch.tensor([[t % count, (t + 1 + t % (count - 1)) % count] for t in range(tokens)])
        self.weights = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(5))
        pairs = self.choices.flatten().argsort(stable=True)
        self.of_pairs, self.pair_weights = (pairs // 2).int(), self.weights.flatten()[pairs]
        counts = self.choices.flatten().bincount(minlength=count).tolist()
        self.segments = np.array([(0, i, sum(counts[:i]), counts[i]) for i in range(count)])
        order = torch.empty(tokens * 2, dtype=torch.int32)
        order[pairs] = torch.arange(tokens * 2, dtype=torch.int32)
        order = order.view(tokens, 2).sort(dim=1).values
        self.order = torch.cat([order, torch.full((tokens, 1), -1)], dim=1).int()
        self.x = random_input(tokens, hidden)
        self.hidden = Host.empty(tokens * 2, max(width for width, *_ in sizes))
        self.rows, self.out = Host.empty(tokens * 2, hidden), torch.ones(tokens, hidden)

    def check(self) -> None:
        """Add the rows up, and compare."""
        RUNNER.run(launches.add_expert_rows(self.rows, self.order, self.pair_weights, self.out))
        expected = torch.ones_like(self.out)
        for i, group in enumerate(self.groups):
            at, which = (self.choices == i).nonzero(as_tuple=True)
            reference.add_expert(expected, self.x, Expert(*group), at, self.weights[at, which])
        check_experts(self.out, expected, EXPERT)


def test_experts_of_a_prompt(executor: Runner) -> None:
    """Experts of several sizes and bits, chosen by different numbers of tokens; the sum in the order of the choices."""
    p = Prompt([(32, 4, 4, 32), (96, 2, 2, 32), (32, 8, 8, 32)], 64, 37)
    segments, most = bytes_tensor(pack_segments(p.segments)), int(p.segments[:, 3].max())
    banks = [p.base] * 3
    executor.run(launches.experts_gate_up_rows(banks, p.forms, segments, p.of_pairs, p.x, p.hidden, most))
    executor.run(launches.experts_down_rows(banks, p.forms, segments, p.hidden, p.rows, most))
    p.check()


def test_experts_of_a_prompt_by_halves(executor: Runner) -> None:
    """The same, in tiles of nearly the same size, a smaller expert's zeros among the rows of a larger one."""
    p = Prompt([(160, 4, 3, 32), (64, 2, 8, 64), (32, 3, 2, 32)], 320, 100)
    segments = bytes_tensor(pack_segments(prompt_launches.cut_segments(p.segments)))
    banks, parts = [p.base] * 3, split(executor, p.x, 320)
    executor.run(prompt_launches.experts_gate_up_rows(banks, p.forms, segments, p.of_pairs, parts, p.hidden))
    parts = split(executor, p.hidden, p.hidden.shape[1])
    executor.run(prompt_launches.experts_down_rows(banks, p.forms, segments, parts, p.rows))
    p.check()


def choices(tokens: int, experts: int, chosen: int) -> torch.Tensor:
    """Ids int32 [T, K], of a token all different, in any order; half of the tokens choose among few experts."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    scores[: tokens // 2, : chosen + 1] += 1.0
    return scores.topk(chosen).indices.int()


@pytest.mark.parametrize(("tokens", "experts", "chosen", "most"), [(1, 5, 2, 8192), (37, 3, 3, 64), (300, 9, 4, 512)])
def test_pairs_are_those_that_the_processor_finds(
    executor: Runner, tokens: int, experts: int, chosen: int, most: int
) -> None:
    check_pairs(executor, tokens, experts, chosen, most)


@pytest.mark.parametrize(("tokens", "experts", "chosen", "most"), [(523, 40, 1, 100), (70, 270, 31, 1000)])
def test_pairs_of_many_experts(tokens: int, experts: int, chosen: int, most: int) -> None:
    check_pairs(RUNNER, tokens, experts, chosen, most)


def check_pairs(executor: Runner, tokens: int, experts: int, chosen: int, most: int) -> None:
    ids = choices(tokens, experts, chosen)
    weights, shared = random_input(tokens, chosen), random_input(tokens, 1).flatten()
    places = [(64 * expert, expert % 3, 7) for expert in range(experts + 1)]
    pairs = prompt_launches.Pairs.of(Host, tokens, chosen, experts, most)
    counts = torch.full((experts,), -1, dtype=torch.int32)
    executor.run(prompt_launches.count_choices(ids, counts))
    executor.run(prompt_launches.order_pairs(ids, weights, shared, counts, bytes_tensor(pack_places(places)), pairs))
    assert counts.tolist() == ids.flatten().bincount(minlength=experts).tolist()

    first_expert = torch.full((tokens, 1), -1)  # the shared one
    all_ids = torch.cat([first_expert, ids], dim=1)
    expected = all_ids.flatten().argsort(stable=True)
    assert torch.equal(pairs.tokens, (expected // (chosen + 1)).int())
    assert torch.equal(pairs.weights, torch.cat([shared[:, None], weights], dim=1).flatten()[expected])
    order = torch.empty(len(expected), dtype=torch.int32)
    order[expected] = torch.arange(len(expected), dtype=torch.int32)
    assert torch.equal(pairs.order, order.view(tokens, -1).sort(dim=1).values)

    ends = np.cumsum([tokens, *counts.tolist()])
    starts, of_experts = ends - [tokens, *counts.tolist()], [places[-1], *places[:-1]]
    for number, found in enumerate(pairs.segments):
        begin, end = number * pairs.part, (number + 1) * pairs.part
        segments = [
            (*place[:2], max(start, begin) - begin, min(stop, end) - max(start, begin))
            for place, start, stop in zip(of_experts, starts, ends)
            if max(start, begin) < min(stop, end)
        ]
        cut = pack_segments(prompt_launches.cut_segments(np.array(segments)))
        used = found.view(-1, segment_bytes())
        used = used[used[:, -4:].contiguous().view(torch.int32).flatten() > 0]
        assert used.flatten().tolist() == list(cut)


def test_experts_of_a_prompt_in_parts(executor: Runner) -> None:
    """By pairs that the kernel has ordered, the shared expert among them, in parts that end within an expert's."""
    p = Prompt([(160, 4, 3, 32), (64, 2, 8, 64), (32, 3, 2, 32), (96, 4, 4, 32)], 320, 50)
    ids, shared = (p.choices % 3).int(), torch.rand(50)
    ids[:, 1] = (ids[:, 0] + 1) % 3
    table = bytes_tensor(pack_places((0, form, 0) for form in range(4)))
    pairs, counts = prompt_launches.Pairs.of(Host, 50, 2, 3, 40), torch.zeros(3, dtype=torch.int32)
    executor.run(prompt_launches.count_choices(ids, counts))
    executor.run(prompt_launches.order_pairs(ids, p.weights, shared, counts, table, pairs))
    banks, parts, out = [p.base] * 3, split(executor, p.x, 320), torch.ones(50, 320)
    for number, segments in enumerate(pairs.segments):
        first = number * pairs.part
        tokens = pairs.tokens[first : first + pairs.part]
        hidden, rows = Host.empty(len(tokens), 160), Host.empty(len(tokens), 320)
        executor.run(prompt_launches.experts_gate_up_rows(banks, p.forms, segments, tokens, parts, hidden))
        executor.run(prompt_launches.experts_down_rows(banks, p.forms, segments, split(executor, hidden, 160), rows))
        RUNNER.run(launches.add_expert_rows(rows, pairs.order, pairs.weights, out, first))
    expected = torch.ones(50, 320)
    reference.add_expert(expected, p.x, Expert(*p.groups[3]), torch.arange(50), shared)
    for i, group in enumerate(p.groups[:3]):
        at, which = (ids == i).nonzero(as_tuple=True)
        reference.add_expert(expected, p.x, Expert(*group), at, p.weights[at, which])
    check_experts(out, expected, EXPERT)


def test_the_rows_of_halves_keep_what_they_hold(executor: Runner) -> None:
    """Of numbers far below a row's largest too; rows of zeros, of nearly none, of nearly too much stay as they are."""
    x = random_input(6, 1088) * 2.0 ** torch.arange(0, -34, -1).repeat_interleave(32)
    x[1], x[2], x[3] = 0.0, x[2] * 1e-37, x[3] * 1e37
    parts = split(executor, x, 1088)
    halves = parts.halves.view(torch.float16).view(6, 34, 2, 4, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].double()
    found = halves.sum(dim=2).flatten(1) * parts.factors[:, None].double()
    bound = x.abs().double() * 2.0**-22 + x.abs().amax(dim=1, keepdim=True).double() * 2.0**-39
    assert ((found - x).abs() <= bound).all()
    blocks = (
        torch.nn.functional.pad(x.double() / parts.factors[:, None], (0, 2048 - 1088)).unflatten(1, (64, 32)).sum(2)
    )
    sums = torch.cat([blocks.unflatten(1, (-1, count)).sum(2) for count in (1, 2, 4)], dim=1)
    close(parts.sums, sums, 3e-6)
    assert (parts.sums[sums == 0] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, 0.0])
def test_a_row_of_halves_minds_no_other(value: float) -> None:
    matrix, x = quantized(40, 128, 4, 64), random_input(9, 128)
    expected = run_halves(RUNNER, x, [matrix])
    x[1] = value
    found = run_halves(RUNNER, x, [matrix])
    others = [0, *range(2, 9)]
    assert torch.equal(found[others], expected[others])
    assert torch.equal(run_halves(RUNNER, x[2:], [matrix]), expected[2:])  # whatever its place


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
