"""Metal kernels between the matrices, run on the CPU executor, against reference.py: odd sizes, lane orders.

Tolerances are shares of the largest expected value, or of 1 if that is smaller; the reference computes in float64.
ROUNDING: a few float32 operations on each element. SUMS: float32 sums in another order, and what follows from them.
"""

from __future__ import annotations

import pytest
import torch

from kernel_devices import Runner, default_runner
from kernel_memory import bytes_tensor
from moepack.kernels import launches, reference
from moepack.kernels.forms import pack_places

ROUNDING, SUMS = 1e-6, 3e-6
RUNNER = default_runner()
SMALL_TO_LARGE = [(1, 3, 3), (2, 37, 5), (1, 48, 6), (2, 512, 10), (1, 1024, 16)]
EPS = 1e-6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    assert difference <= allowed, f"max difference {difference}, allowed {allowed}"  # a NaN fails too


@pytest.mark.parametrize(("rows", "width"), [(3, 4096), (2, 37), (1, 1), (5, 1056)])
def test_rms_norm(executor: Runner, rows: int, width: int) -> None:
    x, weight, out = 3 * torch.randn(rows, width), torch.randn(width), torch.zeros(rows, width)
    executor.run(launches.rms_norm(x, weight, out, EPS))
    close(out, reference.rms_norm(x.double(), weight.double(), EPS), SUMS)


@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 4, 128), (3, 2, 37)])
def test_gated_rms_norm_with_gates_inside_longer_rows(executor: Runner, tokens: int, heads: int, width: int) -> None:
    x, weight, out = torch.randn(tokens, heads, width), torch.randn(width), torch.zeros(tokens, heads, width)
    rows = torch.randn(tokens, heads * width + 12)
    gates = rows[:, 4 : 4 + heads * width].reshape(tokens, heads, width)
    executor.run(launches.gated_rms_norm(x, rows.view(-1)[4:], weight, out, EPS, rows.shape[1]))
    close(out, reference.gated_rms_norm(x.double(), gates.double(), weight.double(), EPS), SUMS)


@pytest.mark.parametrize(("tokens", "channels", "taps"), [(1, 300, 4), (7, 513, 4), (2, 5, 2), (3, 40, 8), (39, 33, 4)])
def test_causal_conv(executor: Runner, tokens: int, channels: int, taps: int) -> None:
    x, weight = torch.randn(tokens, channels + 3), torch.randn(channels, taps)
    state, out = torch.randn(taps - 1, channels), torch.zeros(tokens, channels)
    expected_state = state.double()
    expected = reference.causal_conv(x[:, :channels].double(), weight.double(), expected_state)
    executor.run(launches.causal_conv(x, weight, state, out))
    close(out, expected, ROUNDING)
    assert torch.equal(state.double(), expected_state)


@pytest.mark.parametrize(
    ("key_heads", "heads", "key_width", "value_width"),
    [(2, 4, 64, 64), (1, 3, 128, 128), (2, 2, 37, 45), (1, 2, 96, 33), (1, 1, 128, 256), (1, 1, 1, 1)],
)
def test_delta_step(executor: Runner, key_heads: int, heads: int, key_width: int, value_width: int) -> None:
    keys, values = key_heads * key_width, heads * value_width
    mixed, projected = torch.randn(2 * keys + values), torch.randn(5 + values + 2 * heads)
    a_log, dt_bias, norm = torch.randn(heads), torch.randn(heads), torch.randn(value_width)
    state, out = torch.randn(heads, key_width, value_width), torch.zeros(heads, value_width)

    expected_state = state.double()
    _, z, a, b = projected.double().split([5, values, heads, heads])
    decay, beta = reference.decay_and_strength(a[None], b[None], a_log.double(), dt_bias.double())
    q, k, v = mixed.double().split([keys, keys, values])
    q, k = q.view(1, key_heads, -1), k.view(1, key_heads, -1)
    read = reference.gated_delta(q, k, v.view(1, heads, -1), decay, beta, expected_state)
    expected = reference.gated_rms_norm(read, z.view(1, heads, -1), norm.double(), EPS)[0]

    offsets = {"z_offset": 5, "a_offset": 5 + values, "b_offset": 5 + values + heads}
    executor.run(launches.delta_step(mixed, projected, a_log, dt_bias, norm, state, out, key_heads, **offsets, eps=EPS))
    close(state, expected_state, SUMS)
    close(out, expected, SUMS)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width", "rotary", "position"),
    [(1, 4, 2, 256, 64, 0), (3, 4, 1, 64, 16, 5), (2, 2, 2, 37, 10, 3), (1, 1, 1, 8, 8, 200_000)],
)
def test_rope_cache(tokens: int, heads: int, kv_heads: int, width: int, rotary: int, position: int) -> None:
    """The caches' other rows stay as they are. Far out, an angle is large and rounded as the reference rounds it."""
    projected = torch.randn(tokens, (2 * heads + 2 * kv_heads) * width)
    q_norm, k_norm = torch.randn(2, width)
    queries, _ = projected[:, : 2 * heads * width].view(tokens, heads, 2, width).unbind(2)
    keys, values = projected[:, 2 * heads * width :].view(tokens, 2, kv_heads, width).unbind(1)
    frequencies = launches.rope_frequencies(10.0, rotary)
    q, caches = torch.zeros(tokens, heads, width), torch.full((2, kv_heads, position + tokens + 3, width), 7.0)
    at = torch.tensor([position], dtype=torch.int32)
    RUNNER.run(launches.rope_cache(projected, q_norm, k_norm, frequencies, at, q, *caches, EPS))
    close(q, reference.rope(reference.rms_norm(queries, q_norm, EPS), position, 10.0, rotary), SUMS)
    expected = reference.rope(reference.rms_norm(keys, k_norm, EPS), position, 10.0, rotary)
    written = slice(position, position + tokens)
    close(caches[0][:, written], expected.transpose(0, 1), SUMS)
    assert torch.equal(caches[1][:, written], values.transpose(0, 1))
    caches[:, :, written] = 7.0
    assert (caches == 7).all()


@pytest.mark.parametrize(("rows", "experts", "chosen"), SMALL_TO_LARGE)
def test_choose_experts(executor: Runner, rows: int, experts: int, chosen: int) -> None:
    logits = torch.randn(rows, experts + 1)
    logits[0, [1, 2, experts - 1]] = 5.0  # equal ones: the lower id first
    ids, weights = torch.zeros(rows, chosen, dtype=torch.int32), torch.zeros(rows, chosen + 1)
    table = bytes_tensor(pack_places((expert * 2**33, expert % 3, 77) for expert in range(experts + 1)))
    places = torch.zeros(16 * (chosen + 1), dtype=torch.uint8)
    executor.run(launches.choose_experts(logits, ids, weights, table, places))
    expected_ids, expected_weights = reference.choose_experts(logits[:, :experts], chosen)
    assert torch.equal(ids.long(), expected_ids)
    close(weights[:, :chosen], expected_weights, ROUNDING)
    close(weights[:, chosen], logits[:, experts].sigmoid(), ROUNDING)
    picked = [*ids[0].tolist(), experts]
    wanted = pack_places((expert * 2**33, expert % 3, rank) for rank, expert in enumerate(picked))
    assert places.numpy().tobytes() == wanted


def choose(logits: torch.Tensor, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of one token's experts, and places that were not wanted."""
    ids, places = torch.full((1, chosen), -1, dtype=torch.int32), torch.full((16,), 9, dtype=torch.uint8)
    RUNNER.run(launches.choose_experts(logits, ids, torch.zeros(1, chosen + 1), places, places, places_wanted=False))
    return ids, places


def test_choose_experts_without_places() -> None:
    logits = torch.randn(1, 9)
    ids, places = choose(logits, 2)
    assert ids[0].tolist() == logits[0, :8].topk(2).indices.tolist()
    assert (places == 9).all()


@pytest.mark.parametrize("fill", [float("nan"), -float("inf")])
def test_ids_are_experts_whatever_the_logits(fill: float) -> None:
    """An id out of range would be read through."""
    ids, _ = choose(torch.full((1, 38), fill), 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]


def test_choose_experts_takes_numbers_before_nan() -> None:
    logits = torch.full((1, 301), torch.nan)
    logits[0, [250, 40, 7]] = torch.tensor([-torch.inf, -0.0, 0.0])
    ids, _ = choose(logits, 5)
    assert ids.tolist() == [[7, 40, 250, 0, 1]]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "context", "splits"),
    [
        *[(4, 2, 256, 70, 3), (16, 1, 64, 1, 4), (6, 2, 37, 33, 1), (4, 2, 64, 5, 8), (32, 1, 16, 40, 5)],
        *[(3, 1, 256, 300, 2), (12, 2, 128, 171, 1), (5, 1, 20, 97, 3)],
    ],
)
def test_attention_step(executor: Runner, heads: int, kv_heads: int, width: int, context: int, splits: int) -> None:
    """Beyond the context lie NaN, which nothing may read; some splits may be empty."""
    q, projected = torch.randn(heads, width), torch.randn(heads, 2 * width)
    keys, values = torch.full((2, kv_heads, context + 5, width), torch.nan)
    keys[:, :context], values[:, :context] = torch.randn(2, kv_heads, context, width)
    partial, stats, out = torch.zeros(heads, splits, width), torch.zeros(heads, splits, 2), torch.zeros(heads, width)
    position = torch.tensor([context - 1], dtype=torch.int32)
    executor.run(launches.attention_split(q, keys, values, position, partial, stats))
    executor.run(launches.attention_combine(partial, stats, keys, position, projected, out))
    seen_keys, seen_values = keys[:, :context].double(), values[:, :context].double()
    expected = reference.attention(q[None].double(), seen_keys, seen_values)[0]
    close(out, reference.gated(expected, projected[:, width:].double()), SUMS)


def test_attention_does_not_depend_on_the_length_of_the_cache() -> None:
    """To the last bit: a context planned longer has more splits, of which more stay empty."""
    heads, width, context = 4, 64, 100
    q, gate = torch.randn(heads, width), torch.randn(heads, 2 * width)
    row, results = torch.randn(2, 1, context, width), []
    position = torch.tensor([context - 1], dtype=torch.int32)
    for max_positions in (context, 1000, 9000):
        keys, values = torch.nn.functional.pad(row, (0, 0, 0, max_positions - context), value=torch.nan)
        splits = launches.count_splits(max_positions)
        partial, stats = (torch.zeros(heads, splits, numbers) for numbers in (width, 2))
        out = torch.zeros(heads, width)
        RUNNER.run(launches.attention_split(q, keys, values, position, partial, stats))
        RUNNER.run(launches.attention_combine(partial, stats, keys, position, gate, out))
        results.append(out)
    assert splits == launches.MAX_SPLITS
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("width", [1, 37, 2500, 9001])
def test_argmax(executor: Runner, width: int) -> None:
    """The lowest of equal ones, also where one thread, two or two threadgroups hold them; NaN is seen."""
    logits = torch.randn(4, width).round(decimals=1)
    logits[1, [width // 2, width - 1]] = 9.0
    logits[2] = -torch.inf
    logits[3, width // 3] = torch.nan
    ids, largest = torch.full((4,), -1, dtype=torch.int32), torch.zeros(4)
    parts = torch.full((2, 4, launches.count_parts(width)), -1, dtype=torch.int32)
    executor.run(launches.argmax_parts(logits, *parts))
    executor.run(launches.argmax(*parts, ids, largest, width))
    expected = [int((row == row.max()).nonzero()[0]) for row in logits[:3]]
    assert ids.tolist() == [*expected, width // 3]
    assert torch.equal(largest[:3], logits[:3].max(dim=1).values)
    assert largest[3].isnan()


def test_argmax_takes_both_zeros_for_one() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -torch.inf]])
    parts, ids, largest = torch.zeros(2, 1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.ones(1)
    RUNNER.run(launches.argmax_parts(logits, *parts))
    RUNNER.run(launches.argmax(*parts, ids, largest, 4))
    assert (ids.tolist(), largest.tolist()) == ([1], [0.0])
