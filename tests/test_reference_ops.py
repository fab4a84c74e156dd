"""The reference operations against their definitions, in numpy float64: odd sizes, one row, uneven tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moepack.convert.quantizers import quantize_minmax
from moepack.kernels import reference as ops
from moepack.kernels.matrix import Expert, Matrix
from moepack.layout.geometry import BlockGeometry, MatrixGeometry, Scheme
from moepack.layout.quantized import dequantize, float32_to_bf16
from moepack.layout.writer import assemble_block

FLOAT32_SUMS = 1e-5  # relative to the largest value: sums of a few hundred terms in float32
RNG = np.random.default_rng(5)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    difference = np.abs(found.numpy() - expected).max()
    assert difference <= FLOAT32_SUMS * max(1.0, np.abs(expected).max()), f"max difference {difference}"


def quantized_matrix(rows: int, columns: int, bits: int, group_size: int) -> tuple[Matrix, np.ndarray]:
    """A matrix as the model gets it, and its float32 values by the format's definition."""
    q = quantize_minmax(normal(rows, columns), bits, group_size)
    arrays = [torch.from_numpy(array.view(np.uint8).reshape(-1).copy()) for array in (q.w_q, q.scales, q.biases)]
    matrix = Matrix.from_arrays(MatrixGeometry(rows, columns, Scheme(bits, group_size)), arrays)
    return matrix, dequantize(q.w_q, q.scales, q.biases, bits=bits, group_size=group_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(1, 32, 32), (7, 96, 32), (5, 128, 64), (3, 384, 128)])
def test_dequantize_is_the_definition_bit_for_bit(bits: int, rows: int, columns: int, group_size: int) -> None:
    matrix, expected = quantized_matrix(rows, columns, bits, group_size)
    assert np.array_equal(ops.dequantize(matrix, 0, rows).numpy(), expected)
    assert np.array_equal(ops.dequantize(matrix, rows - 1, 1).numpy(), expected[rows - 1 :])


@pytest.mark.parametrize("tokens", [1, 3])
def test_linear_over_uneven_tiles(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    matrix, weights = quantized_matrix(11, 96, 4, 32)
    x = normal(tokens, 96)
    close(ops.linear(torch.from_numpy(x), matrix), x.astype(np.float64) @ weights.T)
    monkeypatch.setattr(ops, "TILE_WEIGHTS", 4 * 96)  # tiles of 4, 4 and 3 rows
    close(ops.linear(torch.from_numpy(x), matrix), x.astype(np.float64) @ weights.T)


def test_embed_takes_rows() -> None:
    matrix, weights = quantized_matrix(9, 64, 8, 64)
    assert np.array_equal(ops.embed(matrix, torch.tensor([8, 0, 8])).numpy(), weights[[8, 0, 8]])
    plain = Matrix.from_floats(torch.from_numpy(weights).bfloat16())
    assert torch.equal(ops.embed(plain, torch.tensor([2])), plain.data[2:3].float())


def test_norms() -> None:
    x, gate, weight = normal(3, 2, 16), normal(3, 2, 16), normal(16)
    scale = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    tensors = [torch.from_numpy(array) for array in (x, gate, weight)]
    close(ops.rms_norm(tensors[0], tensors[2], 1e-6), x * scale * (1 + weight))
    silu = gate / (1 + np.exp(-gate.astype(np.float64)))
    close(ops.gated_rms_norm(*tensors, 1e-6), x * scale * weight * silu)


def test_gates() -> None:
    x, gate = normal(3, 16), normal(3, 16)
    sigmoid = 1 / (1 + np.exp(-gate.astype(np.float64)))
    close(ops.gated(torch.from_numpy(x), torch.from_numpy(gate)), x * sigmoid)
    close(ops.silu_mul(torch.from_numpy(gate), torch.from_numpy(x)), gate * sigmoid * x)


@pytest.mark.parametrize("width", [2, 4])
def test_causal_conv_carries_its_state(width: int) -> None:
    x, weight = normal(7, 5), normal(5, width)
    padded = np.concatenate([np.zeros((width - 1, 5)), x.astype(np.float64)])
    sums = np.array([sum(padded[t + tap] * weight[:, tap] for tap in range(width)) for t in range(7)])
    expected = sums / (1 + np.exp(-sums))
    for cuts in ([7], [1, 6], [3, 1, 3]):
        state, parts, done = torch.zeros(width - 1, 5), [], 0
        for count in cuts:
            parts.append(ops.causal_conv(torch.from_numpy(x[done : done + count]), torch.from_numpy(weight), state))
            done += count
        close(torch.cat(parts), expected)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 150])
def test_gated_delta_is_the_recurrence(tokens: int) -> None:
    heads, key_heads, key, value = 4, 2, 8, 12
    q, k = normal(tokens, key_heads, key), normal(tokens, key_heads, key)
    v, decay, beta = (
        normal(tokens, heads, value),
        -np.abs(normal(tokens, heads)),
        1 / (1 + np.exp(-normal(tokens, heads))),
    )
    start = normal(heads, key, value)
    memory, expected = start.astype(np.float64), np.empty((tokens, heads, value))
    for t in range(tokens):
        for h in range(heads):
            head_q, head_k = q[t, h // 2], k[t, h // 2]
            unit_q = head_q / np.sqrt((head_q**2).sum() + 1e-6) / np.sqrt(key)
            unit_k = head_k / np.sqrt((head_k**2).sum() + 1e-6)
            memory[h] *= np.exp(decay[t, h])
            memory[h] += np.outer(unit_k, beta[t, h] * (v[t, h] - memory[h].T @ unit_k))
            expected[t, h] = memory[h].T @ unit_q
    state = torch.from_numpy(start.copy())
    arguments = [torch.from_numpy(array.astype(np.float32)) for array in (q, k, v, decay, beta)]
    close(ops.gated_delta(*arguments, state), expected)
    close(state, memory)


def test_rope_turns_pairs_by_position() -> None:
    x, theta, rotary = normal(3, 2, 16), 1e4, 8
    expected = x.astype(np.float64)
    for t in range(3):
        for i in range(4):
            angle = (t + 5) * theta ** (-2 * i / rotary)
            first, second = x[t, :, i].astype(np.float64), x[t, :, i + 4].astype(np.float64)
            expected[t, :, i] = first * np.cos(angle) - second * np.sin(angle)
            expected[t, :, i + 4] = second * np.cos(angle) + first * np.sin(angle)
    close(ops.rope(torch.from_numpy(x), 5, theta, rotary), expected)


@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 9), (4, 4), (5, 11)])
def test_attention_is_causal_and_grouped(monkeypatch: pytest.MonkeyPatch, tokens: int, context: int) -> None:
    q, keys, values = normal(tokens, 6, 8), normal(2, context, 8), normal(2, context, 8)
    expected = np.empty((tokens, 6, 8))
    for t in range(tokens):
        seen = context - tokens + t + 1
        for head in range(6):
            scores = keys[head // 3, :seen].astype(np.float64) @ q[t, head] / np.sqrt(8)
            weights = np.exp(scores - scores.max())
            expected[t, head] = weights / weights.sum() @ values[head // 3, :seen]
    tensors = [torch.from_numpy(array) for array in (q, keys, values)]
    close(ops.attention(*tensors), expected)
    monkeypatch.setattr(ops, "SCORE_TILE", 2 * 6 * context)  # two queries at a time
    close(ops.attention(*tensors), expected)


def test_route_takes_the_best_and_their_weights_sum_to_one() -> None:
    x, router = normal(4, 16), normal(10, 16)
    ids, weights = ops.route(torch.from_numpy(x), Matrix.from_floats(torch.from_numpy(router)), 3)
    logits = x.astype(np.float64) @ router.T
    order = np.argsort(-logits)[:, :3]
    assert np.array_equal(ids.numpy(), order)
    chosen = np.exp(np.take_along_axis(logits, order, 1))
    close(weights, chosen / chosen.sum(1, keepdims=True))


def test_a_tie_goes_to_the_lower_expert() -> None:
    ids, weights = ops.choose_experts(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), 3)
    assert ids.tolist() == [[1, 3, 0]]
    close(weights, np.exp([[2.0, 2.0, 1.0]]) / np.exp([2.0, 2.0, 1.0]).sum())


def test_an_expert_is_read_from_its_block_where_it_lies() -> None:
    """Three schemes in one block, 16 bits among them; the views share the block's memory."""
    schemes = {"gate_proj": Scheme(3, 32), "up_proj": Scheme(16, None), "down_proj": Scheme(8, 64)}
    geometry = BlockGeometry.of(96, 64, schemes)
    arrays: dict[str, bytes] = {}
    weights: dict[str, np.ndarray] = {}
    for projection, matrix in geometry.matrices:
        values = normal(matrix.out_features, matrix.in_features)
        if matrix.scheme.group_size is None:
            patterns = float32_to_bf16(values)
            arrays[f"{projection}.weight"] = patterns.tobytes()
            weights[projection] = (patterns.astype(np.uint32) << 16).view(np.float32)
        else:
            q = quantize_minmax(values, matrix.scheme.bits, matrix.scheme.group_size)
            arrays |= {f"{projection}.{part}": getattr(q, part).tobytes() for part in ("w_q", "scales", "biases")}
            weights[projection] = dequantize(
                q.w_q, q.scales, q.biases, bits=matrix.scheme.bits, group_size=matrix.scheme.group_size
            )
    block = torch.frombuffer(assemble_block(geometry, arrays), dtype=torch.uint8)
    expert, x = Expert.from_block(geometry, block), normal(2, 96)
    gate, up = (x.astype(np.float64) @ weights[name].T for name in ("gate_proj", "up_proj"))
    close(ops.run_expert(torch.from_numpy(x), expert), (gate / (1 + np.exp(-gate)) * up) @ weights["down_proj"].T)
    assert expert.up_proj.data.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
