"""The native quantizer against its definition in numpy, bit for bit: every instruction set here, type, width and group.

The errors that it reports are compared with those of the dequantized result, summed in float64: 1e-5 of relative
difference, for sums of a row in float32.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from moepack.convert.quantizers import QuantizedMatrix, define_minmax, quantize_minmax, widen
from moepack.kernels import native_library
from moepack.kernels.native_quantize import RoundingError
from moepack.kernels.native_quantize import quantize_minmax as quantize_into
from moepack.layout.quantized import dequantize, float32_to_bf16

SCHEMES = [*itertools.product((2, 3, 4, 8), (32, 64, 128))]
SHAPES = ((1, 128), (5, 384), (33, 640))  # rows of one, three and five groups of 128
INSTRUCTION_SETS = [name for name in ("amx", "avx512", "avx2", "neon", "portable") if native_library.set_isa(name)]
BEST = INSTRUCTION_SETS[0]
native_library.set_isa(BEST)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert native_library.set_isa(request.param)
    yield request.param
    native_library.set_isa(BEST)


def stored(weights: np.ndarray, dtype: str) -> np.ndarray:
    """Weights as a checkpoint would have them."""
    return float32_to_bf16(weights) if dtype == "bf16" else weights.astype(dtype)


def assert_same(found: QuantizedMatrix, expected: QuantizedMatrix) -> None:
    for name, array in expected.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert np.array_equal(found.arrays[name], array), name


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
@pytest.mark.parametrize("dtype", ["bf16", "float16", "float32"])
def test_it_gives_the_bytes_of_the_definition(isa: str, bits: int, group_size: int, dtype: str) -> None:
    chance = np.random.default_rng(bits * group_size)
    for shape in SHAPES:
        # Groups of very different spread and centre, as outliers and offsets make them.
        spread = np.exp(chance.normal(0, 3, (shape[0], 1))) * 0.02
        weights = stored((chance.standard_normal(shape) + chance.normal(0, 2, (shape[0], 1))) * spread, dtype)
        assert_same(quantize_minmax(weights, bits, group_size), define_minmax(weights, bits, group_size))


def edge_rows() -> np.ndarray:
    """Groups that a fast path is likely to get wrong, one to a row of 128."""
    chance, rows = np.random.default_rng(1), []
    rows.append(np.zeros(128))
    rows.append(np.where(np.arange(128) % 2, 0.0, -0.0))  # zeros of both signs
    rows.append(np.full(128, -0.0))
    rows.append(np.abs(chance.standard_normal(128)) * (np.arange(128) % 3 > 0))  # a smallest weight of zero
    rows.append(np.full(128, 1.003))  # a bias that bf16 rounds, and no spread
    rows.append(1 + chance.uniform(0, 1e-6, 128))  # a spread far below the rounding of the bias: every step is clipped
    rows.append(-1 - chance.uniform(0, 2e-3, 128))
    rows.append(chance.standard_normal(128) * 1e-39)  # subnormal in float32 and bf16
    rows.append(np.where(np.arange(128) == 77, 1e-45, 0.0))  # a range whose scale rounds to zero
    rows.append(chance.standard_normal(128) * 1e30)
    rows.append(np.where(np.arange(128) == 5, 1000.0, chance.standard_normal(128)))  # one outlier
    rows.append(np.linspace(-7.5, 7.5, 128))  # ties of the rounding
    rows.append(np.arange(128) % 16 + 0.5)
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
def test_edges_give_the_bytes_of_the_definition(isa: str, bits: int, group_size: int) -> None:
    for weights in (edge_rows(), float32_to_bf16(edge_rows())):
        assert_same(quantize_minmax(weights, bits, group_size), define_minmax(weights, bits, group_size))
    with np.errstate(over="ignore"):
        half = np.clip(edge_rows(), -60000, 60000).astype(np.float16)
    assert_same(quantize_minmax(half, bits, group_size), define_minmax(half, bits, group_size))


def test_signs_of_zero_do_not_reach_the_bytes() -> None:
    """Whichever zero a group is searched to have as its smallest, its bias is +0."""
    for first in (0.0, -0.0):
        weights = np.full((1, 64), 0.0, dtype=np.float32)
        weights[0, 0], weights[0, 1:] = first, -first
        for quantized in (define_minmax(weights, 4, 64), quantize_minmax(weights, 4, 64)):
            assert not quantized.biases.any()
            assert not quantized.scales.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.39e38])
@pytest.mark.parametrize("column", [0, 17, 63])
def test_what_cannot_be_stored_is_refused(isa: str, value: float, column: int) -> None:
    """3.39e38 is finite; with its negative in the group the range is not."""
    weights = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    weights[1, 64 + column] = value
    if np.isfinite(value):
        weights[1, 64 + (column + 1) % 64] = -value
    for quantize in (define_minmax, quantize_minmax):
        with pytest.raises(ValueError, match="NaN, infinity or a range beyond bf16"):
            quantize(weights, 4, 64)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_tells_the_error_that_rounding_costs(isa: str, bits: int) -> None:
    weights = float32_to_bf16(np.random.default_rng(2).standard_normal((40, 640)).astype(np.float32))
    quantized = quantize_minmax(weights, bits, 64)
    restored = dequantize(*quantized.arrays.values(), bits=bits, group_size=64)
    floats = widen(weights).astype(np.float64)
    miss = floats - restored
    assert quantized.error is not None
    assert quantized.error.squared_error == pytest.approx((miss**2).sum(), rel=1e-5)
    assert quantized.error.squared_weight == pytest.approx((floats**2).sum(), rel=1e-5)
    assert quantized.error.largest == pytest.approx(np.abs(miss).max(), rel=1e-5)
    assert quantized.error.relative == pytest.approx(np.linalg.norm(miss) / np.linalg.norm(floats), rel=1e-5)


def test_errors_add_up() -> None:
    total = RoundingError(1.0, 4.0, 0.5) + RoundingError(2.0, 8.0, 0.25)
    assert (total, total.relative) == (RoundingError(3.0, 12.0, 0.5), 0.5)
    assert RoundingError().relative == 0.0


def test_rows_at_any_address(isa: str) -> None:
    """A tensor starts where its shard's header ends, which may be an odd byte."""
    values = float32_to_bf16(np.random.default_rng(3).standard_normal((7, 192)).astype(np.float32))
    expected = define_minmax(values, 4, 64)
    for shift in (1, 2, 3, 33):
        raw = np.zeros(values.nbytes + shift, np.uint8)
        raw[shift:] = values.view(np.uint8).ravel()
        assert_same(quantize_minmax(np.frombuffer(raw, "<u2", values.size, shift).reshape(7, 192), 4, 64), expected)


def test_it_writes_no_byte_beyond_its_arrays(isa: str) -> None:
    values = np.random.default_rng(4).standard_normal((3, 96)).astype(np.float32)
    for bits in (2, 3, 4, 8):
        shapes = ((3, 96 * bits // 32), (3, 3), (3, 3))
        types = (np.uint32, np.uint16, np.uint16)
        room = [np.full(shape[0] * shape[1] + 16, 0xAB, dtype) for shape, dtype in zip(shapes, types)]
        quantize_into(values, bits, 32, *(a[8:-8].reshape(shape) for a, shape in zip(room, shapes)))
        assert all((array[:8] == 0xAB).all() and (array[-8:] == 0xAB).all() for array in room)


def test_arrays_of_the_wrong_shape_are_refused() -> None:
    values = np.zeros((4, 128), np.float32)
    w_q, scales, biases = np.zeros((4, 16), np.uint32), np.zeros((4, 2), np.uint16), np.zeros((4, 2), np.uint16)
    with pytest.raises(ValueError, match="rows of 128 at 8 bits need arrays of"):
        quantize_into(values, 8, 64, w_q, scales, biases)
    with pytest.raises(ValueError, match="contiguous"):
        quantize_into(np.zeros((128, 4), np.float32).T, 4, 64, w_q, scales, biases)


def test_several_threads_quantize_side_by_side() -> None:
    inputs = [np.random.default_rng(seed).standard_normal((16, 256)).astype(np.float32) for seed in range(6)]
    results: dict[int, QuantizedMatrix] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.__setitem__(i, quantize_minmax(inputs[i], 3, 64))) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, weights in enumerate(inputs):
        assert_same(results[i], define_minmax(weights, 3, 64))
