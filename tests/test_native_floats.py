"""Native operations on activations and states against reference.py: every instruction set here, odd sizes, views.

Tolerances are shares of the largest expected value, or of 1 if that is smaller; the reference computes in float64.
ROUNDING: a few float32 operations on each element, with the native exponential (2e-7). SUMS: float32 sums of up to some
hundred terms in another order, through a softmax or through the 150 dependent updates of the delta rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from moepack.kernels import native_library, reference
from moepack.kernels.native_floats import FloatOps

ROUNDING, SUMS = 1e-6, 5e-6
OPS = FloatOps()

every_isa = pytest.mark.usefixtures("isa")
every_thread_count = pytest.mark.usefixtures("threads")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (found.dtype, found.shape, found.is_contiguous()) == (torch.float32, expected.shape, True)
    difference = (found.double() - expected.double()).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    assert difference <= allowed, f"max difference {difference}, allowed {allowed}"  # a NaN fails too


def on_each_thread_count(compute: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    before, results = native_library.count_threads(), []
    for threads in (1, 2, 3):
        native_library.set_threads(threads)
        results.append(compute())
    native_library.set_threads(before)
    return results


@every_isa
@every_thread_count
@pytest.mark.parametrize("width", [1, 5, 16, 37, 256])
@pytest.mark.parametrize("rows", [1, 7, 600])
def test_norms_and_gates(width: int, rows: int) -> None:
    """Operands as halves of wider rows: views are read where they lie."""
    x, gate = (3 * torch.randn(rows, 3, 2 * width)).chunk(2, dim=-1)
    weight = torch.randn(width)
    wide_x, wide_gate, wide_weight = x.double(), gate.double(), weight.double()
    close(OPS.rms_norm(x, weight, 1e-6), reference.rms_norm(wide_x, wide_weight, 1e-6), SUMS)
    close(
        OPS.gated_rms_norm(x, gate, weight, 1e-6),
        reference.gated_rms_norm(wide_x, wide_gate, wide_weight, 1e-6),
        SUMS,
    )
    close(OPS.gated(x, gate), reference.gated(wide_x, wide_gate), ROUNDING)
    close(OPS.silu_mul(gate, x), reference.silu_mul(wide_gate, wide_x), ROUNDING)


@every_isa
def test_gates_far_from_zero_are_finite() -> None:
    gate = torch.tensor([[-3e38, -1e4, -100.0, -88.5, -20.0, 0.0, 20.0, 88.5, 100.0, 1e4]])
    x = torch.full_like(gate, 2.0)
    close(OPS.gated(x, gate), reference.gated(x, gate), ROUNDING)
    close(OPS.silu_mul(gate[:, 1:], x[:, 1:]), reference.silu_mul(gate[:, 1:], x[:, 1:]), ROUNDING)


def test_rows_of_any_layout() -> None:
    weight, wide = torch.randn(8), torch.randn(6, 5, 16)
    views = [wide[:, 2, 4:12], wide[:, 1:3, 4:12], wide.transpose(0, 1)[..., :8], wide[:1, :1, :8].expand(3, 2, 8)]
    for x in views:
        close(OPS.rms_norm(x, weight, 1e-6), reference.rms_norm(x.double(), weight.double(), 1e-6), SUMS)
    with pytest.raises(TypeError, match="float32"):
        OPS.rms_norm(wide.double(), weight, 1e-6)


@every_isa
@every_thread_count
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1, 32), (9, 5), (700, 3)])
def test_decay_and_strength(tokens: int, heads: int) -> None:
    a, b = 15 * torch.randn(tokens, heads), 15 * torch.randn(tokens, heads)  # softplus from its tail to its line
    a_log, dt_bias = torch.randn(heads), torch.randn(heads)
    found = OPS.decay_and_strength(a, b, a_log, dt_bias)
    expected = reference.decay_and_strength(a.double(), b.double(), a_log.double(), dt_bias.double())
    for result, definition in zip(found, expected):
        close(result, definition, ROUNDING)
    small = expected[0].abs() < 1e-3
    assert torch.allclose(found[0][small].double(), expected[0][small], rtol=1e-5, atol=0)  # the tail too


@every_isa
@every_thread_count
@pytest.mark.parametrize("channels", [5, 37, 600])
@pytest.mark.parametrize("taps", [2, 4])
def test_causal_conv_carries_its_state(channels: int, taps: int) -> None:
    x, weight = torch.randn(9, channels + 8)[:, 3 : 3 + channels], torch.randn(channels, taps)
    start = torch.randn(taps - 1, channels)
    expected_state = start.double()
    expected = reference.causal_conv(x.double(), weight.double(), expected_state)
    results = []
    for cuts in ([9], [1, 8], [2, 1, 1, 5]):
        state = start.clone()
        results.append(torch.cat([OPS.causal_conv(part, weight, state) for part in x.split(cuts)]))
        close(results[-1], expected, SUMS)
        close(state, expected_state, 1e-7)  # copied
    assert all(torch.equal(results[0], other) for other in results[1:])


DELTA_SHAPES = [(2, 6, 8, 12), (1, 2, 128, 128), (1, 1, 32, 48), (3, 3, 5, 3)]  # key heads, heads, Dk, Dv


def delta_inputs(tokens: int, key_heads: int, heads: int, key: int, value: int) -> list[torch.Tensor]:
    """q, k and v as views of one row per token, as the convolution leaves them; decay, beta, state."""
    mixed = torch.randn(tokens, 2 * key_heads * key + heads * value)
    q, k, v = mixed.split([key_heads * key, key_heads * key, heads * value], dim=-1)
    views = [q.unflatten(1, (key_heads, key)), k.unflatten(1, (key_heads, key)), v.unflatten(1, (heads, value))]
    decay, beta = -torch.randn(tokens, heads).abs(), torch.randn(tokens, heads).sigmoid()
    return [*views, decay, beta, torch.randn(heads, key, value)]


def by_recurrence(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token in float64: the outputs and the state after them."""
    *tensors, state = (tensor.double() for tensor in inputs)
    tokens = tensors[0].shape[0]
    steps = [reference.gated_delta(*(tensor[t : t + 1] for tensor in tensors), state) for t in range(tokens)]
    return torch.cat(steps), state


@every_isa
@every_thread_count
@pytest.mark.parametrize("shape", DELTA_SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 150])
def test_gated_delta_is_the_recurrence(tokens: int, shape: tuple[int, int, int, int]) -> None:
    inputs = delta_inputs(tokens, *shape)
    expected, expected_state = by_recurrence(inputs)
    close(OPS.gated_delta(*inputs), expected, SUMS)
    close(inputs[-1], expected_state, SUMS)


@every_isa
@pytest.mark.parametrize("shape", DELTA_SHAPES)
def test_gated_delta_does_not_depend_on_cuts_between_chunks(shape: tuple[int, int, int, int]) -> None:
    """A chunk of one token at the end included: by itself it is a step."""
    *inputs, start = delta_inputs(193, *shape)
    results = []
    for cuts in ([193], [64, 129], [128, 65], [64, 64, 64, 1]):
        state = start.clone()
        parts = zip(*(tensor.split(cuts) for tensor in inputs))
        outputs = [OPS.gated_delta(*part, state).flatten() for part in parts]
        results.append(torch.cat([*outputs, state.flatten()]))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_gated_delta_does_not_depend_on_threads() -> None:
    *inputs, start = delta_inputs(70, 5, 10, 16, 32)

    def compute() -> torch.Tensor:
        state = start.clone()
        return torch.cat([OPS.gated_delta(*inputs, state).flatten(), state.flatten()])

    first, *others = on_each_thread_count(compute)
    assert all(torch.equal(first, other) for other in others)


@every_isa
@pytest.mark.parametrize("tokens", [1, 70])
def test_gated_delta_forgets_and_keeps(tokens: int) -> None:
    """Decays that underflow, and none at all."""
    for decay in (-1000.0, -60.0, 0.0):
        inputs = delta_inputs(tokens, 1, 2, 16, 16)
        inputs[3].fill_(decay)
        expected, expected_state = by_recurrence(inputs)
        close(OPS.gated_delta(*inputs), expected, SUMS)
        close(inputs[-1], expected_state, SUMS)


def test_a_state_is_updated_in_place_or_refused() -> None:
    *inputs, state = delta_inputs(2, 1, 2, 8, 8)
    with pytest.raises(TypeError, match="contiguous float32 state"):
        OPS.gated_delta(*inputs, state.transpose(1, 2))
    with pytest.raises(TypeError, match="contiguous float32 state"):
        OPS.causal_conv(torch.randn(2, 8), torch.randn(8, 4), torch.zeros(8, 3).T)
    with pytest.raises(ValueError, match="at most 8 taps, got 9"):
        OPS.causal_conv(torch.randn(2, 8), torch.randn(8, 9), torch.zeros(8, 8))


@every_isa
@every_thread_count
@pytest.mark.parametrize(("width", "rotary"), [(40, 16), (20, 10), (256, 64), (8, 8)])
@pytest.mark.parametrize("position", [0, 5, 262_144])
def test_rope(width: int, rotary: int, position: int) -> None:
    """Against angles in float64: the reference's are float32, which is not enough far into a context."""
    tokens, theta = 7, 1e7
    x = torch.randn(tokens, 3, width)
    frequencies = theta ** -(torch.arange(rotary // 2).double() / (rotary // 2))
    angles = torch.arange(position, position + tokens).double()[:, None, None] * frequencies
    first, second, rest = x.double().split([rotary // 2, rotary // 2, width - rotary], dim=-1)
    turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin(), rest]
    close(OPS.rope(x, position, theta, rotary), torch.cat(turned, dim=-1), ROUNDING)
    if position < 10:
        close(OPS.rope(x, position, theta, rotary), reference.rope(x, position, theta, rotary), ROUNDING)


ATTENTION_SHAPES = [(6, 2, 8), (4, 4, 20), (16, 2, 64), (3, 1, 5), (20, 1, 16)]  # heads, kv heads, Dh
CONTEXTS = [(1, 1), (1, 9), (1, 256), (1, 257), (1, 1500), (4, 300), (5, 11), (300, 300), (70, 700)]  # T, S


def attention_inputs(tokens: int, context: int, heads: int, kv_heads: int, width: int) -> list[torch.Tensor]:
    """Keys and values as the first positions of larger caches, the rest of which is never to be seen."""
    keys, values = torch.full((2, kv_heads, context + 9, width), torch.nan)
    keys[:, :context], values[:, :context] = torch.randn(2, kv_heads, context, width)
    return [torch.randn(tokens, heads, width), keys[:, :context], values[:, :context]]


@every_isa
@every_thread_count
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize(("tokens", "context"), CONTEXTS)
def test_attention(tokens: int, context: int, shape: tuple[int, int, int]) -> None:
    q, *caches = attention_inputs(tokens, context, *shape)
    for dtype in (torch.float32, torch.bfloat16):
        keys, values = (cache.to(dtype) for cache in caches)
        expected = reference.attention(q.double(), keys.double(), values.double())
        close(OPS.attention(q, keys, values), expected, SUMS)


@every_isa
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_depend_on_cuts_nor_threads(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """One call, chunks of any size, single tokens: bit for bit the same."""
    q, *caches = attention_inputs(330, 600, *shape)
    keys, values = (cache.to(dtype) for cache in caches)

    def compute(cuts: list[int]) -> torch.Tensor:
        seen, parts = 600 - 330, []
        for part in q.split(cuts):
            seen += len(part)
            parts.append(OPS.attention(part, keys[:, :seen], values[:, :seen]))
        return torch.cat(parts)

    whole = compute([330])
    for cuts in ([330], [1] * 330, [100, 1, 229], [7] * 47 + [1]):
        assert all(torch.equal(whole, result) for result in on_each_thread_count(functools.partial(compute, cuts)))


def test_attention_refuses_caches_of_other_kinds() -> None:
    q, keys, values = attention_inputs(1, 9, 4, 2, 16)
    with pytest.raises(TypeError, match="expected keys and values of one of"):
        OPS.attention(q, keys.half(), values.half())
    with pytest.raises(TypeError, match=r"got torch\.bfloat16 and torch\.float32"):
        OPS.attention(q, keys.bfloat16(), values)


@every_isa
def test_attention_with_scores_far_apart() -> None:
    q, keys, values = attention_inputs(40, 600, 4, 2, 16)
    q, keys = 100 * q, 10 * keys
    expected = reference.attention(q.double(), keys.double(), values.double())
    found = OPS.attention(q, keys, values)
    assert found.isfinite().all()
    # A score of some thousands is rounded by 2e-4, and a weight follows it.
    close(found, expected, 2e-3)


@every_isa
@every_thread_count
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 1, 1), (1, 256, 8), (9, 37, 37), (600, 64, 10)])
def test_choose_experts(tokens: int, experts: int, chosen: int) -> None:
    logits = (4 * torch.randn(tokens, experts + 3)).round()[:, 2 : 2 + experts] / 2  # many ties
    ids, weights = OPS.choose_experts(logits, chosen)
    expected_ids, expected_weights = reference.choose_experts(logits.double(), chosen)
    assert torch.equal(ids, expected_ids)
    close(weights, expected_weights, ROUNDING)
    close(weights.sum(-1), torch.ones(tokens), ROUNDING)


def test_choose_experts_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"1\.\.4 of 4 experts, got 5"):
        OPS.choose_experts(torch.randn(1, 4), 5)


@every_isa
def test_nan_neither_crashes_nor_disappears() -> None:
    nan = torch.full((3, 4, 20), torch.nan)
    ids, _ = OPS.choose_experts(nan[:, 0], 8)
    assert all(len(set(row)) == 8 and min(row) >= 0 and max(row) < 20 for row in ids.tolist())
    one = torch.ones(3, 4, 20)
    results = [
        OPS.rms_norm(nan, one[0, 0], 1e-6),
        OPS.gated_rms_norm(one, nan, one[0, 0], 1e-6),
        OPS.gated(one, nan),
        OPS.silu_mul(nan, one),
        *OPS.decay_and_strength(nan[0], nan[0], one[0, 0], one[0, 0]),
        OPS.causal_conv(nan[0], torch.ones(20, 4), torch.zeros(3, 20)),
        OPS.gated_delta(one, one, one, nan[..., 0], one[..., 0], torch.zeros(4, 20, 20)),
        OPS.attention(nan, torch.randn(2, 300, 20), torch.randn(2, 300, 20)),
    ]
    assert all(result.isnan().all() for result in results), "damage is not turned into plausible numbers"
