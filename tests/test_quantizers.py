"""Fits of quantization groups: against exhaustive search, against each other, and in the norm they are made for."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from moepack.convert.error_feedback import ErrorFeedback, column_importance
from moepack.convert.quantizers import QUANTIZERS, QuantizedMatrix, quantize_gptq, quantize_minmax, quantize_mse
from moepack.kernels.native_fit import fit_groups
from moepack.layout.quantized import bf16_to_float32, dequantize, float32_to_bf16

BITS, GROUP_SIZES = (2, 3, 4, 8), (32, 64, 128)


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.05).astype(np.float32)


def correlated_moments(columns: int, seed: int = 1) -> np.ndarray:
    """Second moments of inputs with a common part, as hidden states have one."""
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((3 * columns, columns)) * np.exp(-np.arange(columns) / columns * 3)
    inputs = inputs @ generator.standard_normal((columns, columns)) / columns**0.5 + 0.3
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def restore(matrix: QuantizedMatrix, bits: int, group_size: int) -> np.ndarray:
    return dequantize(matrix.w_q, matrix.scales, matrix.biases, bits=bits, group_size=group_size)


def error_of(matrix: QuantizedMatrix, weights: np.ndarray, bits: int, group_size: int, moments: np.ndarray) -> float:
    change = (restore(matrix, bits, group_size) - weights).astype(np.float64)
    return float(((change @ moments) * change).sum())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_mse_loses_less_than_minmax_and_stores_what_it_says(bits: int, group_size: int) -> None:
    weights = normal(7, 3 * group_size)
    fitted, plain = (quantize(weights, bits, group_size, None) for quantize in (quantize_mse, quantize_minmax))
    assert [array.dtype for array in fitted.arrays.values()] == [np.uint32, np.uint16, np.uint16]
    assert [array.shape for array in fitted.arrays.values()] == [array.shape for array in plain.arrays.values()]
    own, other = (np.square(restore(matrix, bits, group_size) - weights).sum() for matrix in (fitted, plain))
    assert fitted.error is not None
    np.testing.assert_allclose(fitted.error.squared_error, own, rtol=1e-4)
    np.testing.assert_allclose(fitted.error.squared_weight, np.square(weights).sum(), rtol=1e-4)
    assert own < {2: 0.65, 3: 0.8, 4: 0.95, 8: 1}[bits] * other


def test_mse_gives_these_bytes_on_every_machine() -> None:
    """Whatever the registers' width: the starts of a search run side by side, of two groups where there is AVX-512."""
    numbers = np.cumsum(np.arange(5 * 352, dtype=np.uint64) * np.uint64(2654435761)) >> np.uint64(7)
    weights = ((numbers % np.uint64(2001)).astype(np.float32) - np.float32(1000)) / np.float32(8192)
    importance = 1 + (numbers[:352] % np.uint64(5)).astype(np.float32)
    digest = hashlib.sha256()
    for bits in (2, 3, 4, 8):
        for given in (None, importance):  # five rows of eleven groups: an odd number of them
            for array in fit_groups(weights.reshape(5, 352), bits, 32, given)[:3]:
                digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == "421e994885c7231a"


def test_mse_is_near_the_best_line_of_all() -> None:
    """Against a search over 90,000 pairs of scale and bias: within 2 % of its error, summed over groups."""
    weights = normal(12, 32, seed=3)
    integers, scales, biases, _ = fit_groups(weights, 2, 32)
    found = np.square(integers * bf16_to_float32(scales) + bf16_to_float32(biases) - weights).sum()
    best = 0.0
    for row in weights:
        spread = row.max() - row.min()
        scale, bias = np.meshgrid(np.linspace(0.1, 0.4, 300) * spread, row.min() + np.linspace(-0.1, 0.5, 300) * spread)
        scale, bias = scale.reshape(-1, 1), bias.reshape(-1, 1)
        off = np.clip(np.rint((row - bias) / scale), 0, 3) * scale + bias - row
        best += np.square(off).sum(-1).min()
    assert found < 1.02 * best


def test_the_integers_are_the_nearest_for_the_stored_line() -> None:
    weights = normal(5, 128, seed=4)
    integers, scales, biases, _ = fit_groups(weights, 3, 64)
    scale, bias = (np.repeat(bf16_to_float32(part), 64, axis=1) for part in (scales, biases))
    off = np.abs(integers * scale + bias - weights)
    for step in (-1, 1):
        other = np.clip(integers.astype(int) + step, 0, 7)
        assert (off <= np.abs(other * scale + bias - weights) * (1 + 1e-4) + 1e-9).all()


def test_importance_moves_the_error_to_columns_that_do_not_matter() -> None:
    weights, importance = normal(9, 64, seed=5), np.ones(64, np.float32)
    importance[:8] = 100
    plain, weighted = (restore(quantize_mse(weights, 2, 64, given), 2, 64) for given in (None, importance))
    assert np.square(weighted - weights)[:, :8].sum() < 0.6 * np.square(plain - weights)[:, :8].sum()
    squares = (np.square(w - weights) @ importance for w in (weighted, plain))
    assert next(squares).sum() < next(squares).sum()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_equal_weights_and_zeros_are_kept(name: str) -> None:
    for value in (0.0, 0.5, -3.0):
        weights = np.full((3, 64), value, np.float32)
        matrix = QUANTIZERS[name](weights, 2, 32, correlated_moments(64))
        np.testing.assert_array_equal(restore(matrix, 2, 32), weights)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_weights_that_are_not_finite_are_refused(name: str) -> None:
    for value in (np.nan, np.inf, -np.inf):
        weights = normal(3, 64)
        weights[1, 40] = value
        with pytest.raises(ValueError, match="NaN, infinity"):
            QUANTIZERS[name](weights, 4, 32, None)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bf16_patterns_mean_their_values(name: str) -> None:
    patterns = float32_to_bf16(normal(4, 96))
    given = [QUANTIZERS[name](values, 3, 32, None).arrays for values in (patterns, bf16_to_float32(patterns))]
    for part, array in given[0].items():
        np.testing.assert_array_equal(array, given[1][part])


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (2, 64), (3, 32), (4, 64)])
def test_error_feedback_changes_the_outputs_least(bits: int, group_size: int) -> None:
    weights, moments = normal(24, 192, seed=6), correlated_moments(192)
    losses = [error_of(q(weights, bits, group_size, moments), weights, bits, group_size, moments)
              for q in (quantize_minmax, quantize_mse, quantize_gptq)]  # fmt: skip
    assert losses[2] < 0.6 * losses[1] < 0.6 * losses[0]


def test_every_turn_after_the_feedback_takes_error_off() -> None:
    weights, moments = normal(16, 128, seed=7), correlated_moments(128)
    feedback = ErrorFeedback(weights, 2, 64, moments)
    losses = []
    for step in (feedback.round_columns, *[feedback.refit_groups, feedback.move_integers] * 3):
        step()
        change = feedback.rounded - weights
        losses.append(float(((change @ feedback.moments) * change).sum()))
        stored = QuantizedMatrix(np.zeros(0), feedback.scales, feedback.biases)
        scale, bias = (np.repeat(bf16_to_float32(part), 64, axis=1) for part in (stored.scales, stored.biases))
        np.testing.assert_allclose(feedback.rounded, feedback.integers * scale + bias, rtol=1e-4, atol=1e-6)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_moments_that_say_nothing_still_give_a_matrix() -> None:
    weights = normal(4, 64)
    matrix = quantize_gptq(weights, 4, 32, np.zeros((64, 64), np.float32))
    assert (
        np.square(restore(matrix, 4, 32) - weights).sum()
        < 1.1 * np.square(restore(quantize_mse(weights, 4, 32), 4, 32) - weights).sum()
    )
    np.testing.assert_array_equal(column_importance(np.zeros(3)), np.ones(3))


def test_the_same_input_gives_the_same_bytes() -> None:
    weights, moments = normal(6, 128), correlated_moments(128)
    for name in QUANTIZERS:
        first, second = (QUANTIZERS[name](np.asfortranarray(weights) if again else weights, 2, 64, moments).arrays
                         for again in (False, True))  # fmt: skip
        for part, array in first.items():
            np.testing.assert_array_equal(array, second[part])


def test_fit_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="groups of 48"):
        fit_groups(normal(2, 96), 4, 48)
    with pytest.raises(ValueError, match="groups of 64"):
        fit_groups(normal(2, 96), 4, 64)
    with pytest.raises(ValueError, match="96 positive numbers"):
        fit_groups(normal(2, 96), 4, 32, np.zeros(96, np.float32))
