"""What the bytes of a quantized matrix mean, against slow definitions of our own, torch's bf16, and MLX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_packs import GOLDEN
from moepack.convert.quantizers import define_minmax
from moepack.layout.quantized import (
    bf16_to_float32,
    dequantize,
    float32_to_bf16,
    pack_integers,
    unpack_integers,
)
from moepack.layout.reader import Pack

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
FLOAT32_STEP = 2.0**-23
BF16_ROUNDING = 2.0**-8  # bf16 has 8 significant bits: rounding moves a number by at most 2**-8 of it
BF16_SUBNORMAL = 2.0**-134  # half the distance of neighbours around zero
FINITE_LIMIT = 2.0**100  # far inside bf16's range, so that neither high - low nor its rounding overflows

bounded = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def random_integers(seed: int, rows: int, columns: int, bits: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)


def random_matrix(seed: int, rows: int, columns: int, bits: int, group_size: int) -> tuple[np.ndarray, ...]:
    """Integers, scales and biases (bf16 bit patterns, normal numbers of moderate size, both signs)."""
    generator = np.random.default_rng(seed)
    groups = (rows, columns // group_size)
    scales, biases = (float32_to_bf16(generator.normal(size=groups).astype(np.float32)) for _ in range(2))
    return random_integers(seed, rows, columns, bits), scales, biases


@bounded
@given(seeds, st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 9))
def test_f18_unpack_inverts_pack(seed: int, bits: int, rows: int, words: int) -> None:
    integers = random_integers(seed, rows, 32 * words, bits)
    packed = pack_integers(integers, bits)
    assert (packed.dtype, packed.shape) == (np.dtype("<u4"), (rows, words * bits))
    np.testing.assert_array_equal(unpack_integers(packed, bits), integers)


@bounded
@given(seeds, st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 5))
def test_f18_element_j_is_bits_from_j_times_b(seed: int, bits: int, rows: int, words: int) -> None:
    integers = random_integers(seed, rows, 32 * words, bits)
    for row, packed in zip(integers.tolist(), pack_integers(integers, bits)):
        stream = sum(value << (index * bits) for index, value in enumerate(row))  # one long integer, low bits first
        assert packed.tobytes() == stream.to_bytes(4 * words * bits, "little")


def test_f18_worked_example_of_the_format() -> None:
    raw = (GOLDEN / "minimal" / "experts" / "layer_00.bin").read_bytes()
    w_q = np.frombuffer(raw, "<u4", 15).reshape(5, 3)
    assert raw[:3] == b"\x98\x09\x36"
    assert unpack_integers(w_q, 3)[0, :8].tolist() == [0, 3, 6, 4, 0, 4, 5, 1]


@pytest.mark.parametrize("bits", [-1, 0, 1, 5, 6, 16, 32])
def test_f17_other_widths_are_refused(bits: int) -> None:
    for call in (lambda: pack_integers(np.zeros((1, 32), np.uint8), bits),
                 lambda: unpack_integers(np.zeros((1, 12), np.uint32), bits)):  # fmt: skip
        with pytest.raises(ValueError, match=rf"bits must be one of \(2, 3, 4, 8\), got {bits}"):
            call()


def test_f17_rows_that_fill_no_word_are_refused() -> None:
    with pytest.raises(ValueError, match="a row of 40 elements"):
        pack_integers(np.zeros((1, 40), np.uint8), 4)
    with pytest.raises(ValueError, match="does not fill whole 32-bit words"):
        unpack_integers(np.zeros((1, 4), np.uint32), 3)


def test_f19_shapes_that_disagree_are_refused() -> None:
    w_q, scales = pack_integers(np.zeros((2, 64), np.uint8), 4), np.zeros((2, 2), np.uint16)
    for bad_scales, bad_biases, group_size in ((scales, scales[:1], 32), (scales, scales, 64), (scales, scales, 48)):
        with pytest.raises(ValueError, match=r"w_q \(2, 8\) at 4 bits needs scales and biases"):
            dequantize(w_q, bad_scales, bad_biases, bits=4, group_size=group_size)


@bounded
@given(seeds, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.integers(1, 3), st.integers(1, 3))
def test_f20_dequantize_is_its_definition(seed: int, bits: int, group_size: int, rows: int, groups: int) -> None:
    integers, scales, biases = random_matrix(seed, rows, groups * group_size, bits, group_size)
    found = dequantize(pack_integers(integers, bits), scales, biases, bits=bits, group_size=group_size)
    group = np.arange(groups * group_size) // group_size
    # In float64 product and sum of these numbers are exact but for the last bits of very unequal terms: one rounding.
    exact = integers.astype(np.float64) * bf16_to_float32(scales)[:, group] + bf16_to_float32(biases)[:, group]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, exact.astype(np.float32))


@bounded
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_f19_bf16_rounds_as_torch_does(patterns: list[int]) -> None:
    edges = [0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0x3F808001, 1, 0x8000, 0x80008000]
    values = np.array(patterns + edges, dtype=np.uint32).view(np.float32)
    found = float32_to_bf16(values)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    nan = np.isnan(values)
    np.testing.assert_array_equal(found[~nan], expected[~nan])
    assert np.isnan(bf16_to_float32(found[nan])).all()


def test_f19_every_bf16_widens_and_comes_back() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    values = bf16_to_float32(patterns)
    expected = torch.from_numpy(patterns).view(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(values, expected)  # NaN where NaN
    quiet = ~np.isnan(values) | (patterns & 0x40 != 0)  # a signalling NaN comes back as a quiet one
    np.testing.assert_array_equal(float32_to_bf16(values)[quiet], patterns[quiet])


def minmax_bound(weights: np.ndarray, scales: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """How far a weight may be from its dequantized one, per weight.

    With scale s and bias b as stored, the representable points b + q*s are s apart. A weight between the outer two is
    within s/2 of one. Rounding to bf16 moves b from the group's smallest weight by at most 2**-8 |low|, and the
    largest point by that and (2**bits - 1) times the error of s, 2**-8 (high - low): a weight outside the points is
    no farther from the nearest than the two together. A few float32 roundings of numbers of these sizes come on top.
    """
    groups = weights.reshape(weights.shape[0], -1, group_size).astype(np.float64)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    outside = BF16_ROUNDING * (np.abs(low) + (high - low)) + 2**bits * BF16_SUBNORMAL
    slack = 4 * FLOAT32_STEP * (np.abs(low) + np.abs(high))
    return np.repeat(bf16_to_float32(scales) / 2 + outside + slack, group_size, axis=-1)


@st.composite
def weight_matrices(draw: st.DrawFn, group_size: int) -> np.ndarray:
    """Two rows of two groups: any finite floats, equal ones, tiny ones, far from zero ones."""
    finite = st.floats(-FINITE_LIMIT, FINITE_LIMIT, width=32, allow_nan=False)
    values = draw(st.lists(finite, min_size=1, max_size=12))
    seed, spread, centre = draw(seeds), draw(st.sampled_from([0.0, 1e-38, 1e-3, 1.0, 1e4])), draw(finite)
    noise = np.random.default_rng(seed).normal(size=(2, 2 * group_size)) * spread
    weights = noise + (centre if draw(st.booleans()) else 0.0)
    if draw(st.booleans()):
        weights.reshape(-1)[: len(values)] = values
    return weights.astype(np.float32)


@bounded
@given(st.data(), st.sampled_from(BITS), st.sampled_from(GROUP_SIZES))
def test_minmax_stays_within_its_bound(data: st.DataObject, bits: int, group_size: int) -> None:
    weights = data.draw(weight_matrices(group_size))
    result = define_minmax(weights, bits, group_size)
    again = dequantize(result.w_q, result.scales, result.biases, bits=bits, group_size=group_size)
    error = np.abs(weights.astype(np.float64) - again)
    bound = minmax_bound(weights, result.scales, bits, group_size)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), f"at {worst}: error {error[worst]}, bound {bound[worst]}, mean {error.mean()}"


@bounded
@given(seeds, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES))
def test_minmax_error_is_half_a_step_on_ordinary_weights(seed: int, bits: int, group_size: int) -> None:
    """The bound is not slack: at 2 bits nearly all of it is the step, and some weight comes close to it."""
    weights = np.random.default_rng(seed).normal(size=(4, 4 * group_size)).astype(np.float32)
    result = define_minmax(weights, bits, group_size)
    again = dequantize(result.w_q, result.scales, result.biases, bits=bits, group_size=group_size)
    step = np.repeat(bf16_to_float32(result.scales), group_size, axis=-1)
    assert 0.8 <= np.max(np.abs(weights - again) / (step / 2)) <= 1 + 2 * 2**bits * 2 * BF16_ROUNDING


def test_minmax_is_deterministic_and_reads_only() -> None:
    weights = np.random.default_rng(5).normal(size=(7, 256)).astype(np.float32)
    weights[3, :64] = 0.25
    before = weights.copy()
    first, second = (define_minmax(values, 3, 64) for values in (weights, np.asfortranarray(weights)))
    for name, array in first.arrays.items():
        assert array.tobytes() == second.arrays[name].tobytes()
    np.testing.assert_array_equal(weights, before)
    assert (first.scales[3, 0], first.biases[3, 0]) == (0, 0x3E80)  # equal weights: no step, the bias is the weight


@pytest.mark.parity
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_dequantizes_our_bytes_to_the_same_floats(bits: int, group_size: int) -> None:
    """In float32, the precision of F20: MLX computes in the type of scales and biases, so they are widened first."""
    mx = pytest.importorskip("mlx.core", reason="needs the package mlx (extra: parity)")
    integers, scales, biases = random_matrix(11, 48, 3 * 128, bits, group_size)
    w_q = pack_integers(integers, bits)
    ours = dequantize(w_q, scales, biases, bits=bits, group_size=group_size)
    wide = [mx.array(array).view(mx.bfloat16).astype(mx.float32) for array in (scales, biases)]
    theirs = mx.dequantize(mx.array(w_q), *wide, group_size=group_size, bits=bits)
    np.testing.assert_array_equal(np.array(theirs), ours)


@pytest.mark.parity
@pytest.mark.parametrize("bits", BITS)
def test_bytes_of_mlx_mean_the_same_here(bits: int) -> None:
    """The other direction: what MLX quantizes from bf16 has our shapes and dequantizes here as there."""
    mx = pytest.importorskip("mlx.core", reason="needs the package mlx (extra: parity)")
    weights = np.random.default_rng(12).normal(size=(48, 256)).astype(np.float32)
    w_q, scales, biases = mx.quantize(mx.array(weights).astype(mx.bfloat16), group_size=64, bits=bits)
    theirs = mx.dequantize(w_q, scales.astype(mx.float32), biases.astype(mx.float32), group_size=64, bits=bits)
    patterns = [np.array(array.view(mx.uint16)) for array in (scales, biases)]
    ours = dequantize(np.array(w_q), *patterns, bits=bits, group_size=64)
    np.testing.assert_array_equal(np.array(theirs), ours)


@pytest.mark.parity
def test_mlx_reads_the_resident_matrices_of_a_golden_pack(tmp_path: Path) -> None:
    """MLX opens resident.safetensors as it is and makes the same floats of it."""
    mx = pytest.importorskip("mlx.core", reason="needs the package mlx (extra: parity)")
    arrays = mx.load(str(GOLDEN / "mixed" / "resident.safetensors"))
    with Pack.open(GOLDEN / "mixed") as pack:
        for name, scheme in pack.manifest.resident.quantized.items():
            wide = [arrays[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases")]
            theirs = mx.dequantize(arrays[f"{name}.weight"], *wide, group_size=scheme.group_size, bits=scheme.bits)
            np.testing.assert_array_equal(np.array(theirs), pack.read_resident_matrix(name))
