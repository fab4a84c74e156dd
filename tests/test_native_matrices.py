"""Native products with weights against reference.py: every instruction set here, every storage, odd sizes.

Tolerances, as shares of what a result of random signs would be, |x| |w| / sqrt(K), so that a row whose terms cancel is
not held to more than its terms. Exact: 2e-5, float32 sums in another order. int8 activations: 4 %; rounding to 1/127 of
a group's peak has a standard deviation of 0.6 % for normal values, and thousands of results are looked at. Experts are
compared by the norm of all their results: 2e-6 and 2.4 %.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from conftest import INSTRUCTION_SETS
from moepack.kernels import native_library, reference
from moepack.kernels.matrix import Expert, Matrix
from moepack.kernels.native_ops import NativeOps, read_stream

EXACT, INT8 = 2e-5, 0.04
EXPERT_EXACT, EXPERT_INT8 = 2e-6, 0.024  # int8: rounded twice, before gate and up and before down
SCHEMES = [*itertools.product((2, 3, 4, 8), (32, 64, 128))]


def quantized(rows: int, columns: int, bits: int, group_size: int, seed: int = 0) -> Matrix:
    """Random integers over their whole range; scales of either sign, as a checkpoint's may be."""
    chance = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8, generator=chance)
    scales, biases = (torch.randn(rows, columns // group_size, generator=chance) * spread for spread in (0.01, 0.05))
    return Matrix(rows, columns, bits, data, scales.bfloat16(), biases.bfloat16())


def quantized_expert(hidden: int, width: int, bits: int, group_size: int, down_bits: int | None = None) -> Expert:
    return Expert(
        quantized(width, hidden, bits, group_size, 1),
        quantized(width, hidden, bits, group_size, 2),
        quantized(hidden, width, down_bits or bits, group_size, 3),
    )


def random_input(tokens: int, columns: int) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))


def check_linear(found: torch.Tensor, x: torch.Tensor, matrix: Matrix, tolerance: float) -> None:
    expected = reference.linear(x, matrix)
    rows = reference.dequantize(matrix, 0, matrix.out_features)
    scale = x.norm(dim=1, keepdim=True) * rows.norm(dim=1) / matrix.in_features**0.5
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= tolerance * scale).all(), ((found - expected).abs() / scale).max()


def check_experts(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert ((found - expected).norm() / expected.norm()).item() < tolerance


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 13])
def test_linear_on_quantized_weights(isa: str, bits: int, group_size: int, tokens: int) -> None:
    for rows, columns in ((75, 128), (1, 384), (33, 640), (64, 2048 + 128)):
        matrix, x = quantized(rows, columns, bits, group_size), random_input(tokens, columns)
        check_linear(NativeOps(exact=True).linear(x, matrix), x, matrix, EXACT)
        check_linear(NativeOps(exact=False).linear(x, matrix), x, matrix, INT8)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 32), (4, 32), (8, 32), (2, 64), (4, 64), (3, 64)])
def test_rows_that_are_no_multiple_of_the_vector(isa: str, bits: int, group_size: int) -> None:
    """The last row of a matrix ends where its memory ends: nothing beyond it may be read."""
    for columns in (group_size, 3 * group_size, 5 * group_size):
        matrix = quantized(5, columns, bits, group_size)
        for tokens in (1, 3):
            x = random_input(tokens, columns)
            check_linear(NativeOps().linear(x, matrix), x, matrix, INT8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_linear_on_plain_weights_is_float32(isa: str, dtype: torch.dtype, tokens: int) -> None:
    for rows, columns in ((75, 131), (3, 16), (32, 2048), (1, 1)):
        matrix = Matrix.from_floats(random_input(rows, columns).to(dtype))
        x = random_input(tokens, columns)
        check_linear(NativeOps().linear(x, matrix), x, matrix, EXACT)


def test_plain_weights_at_the_ends_of_their_range(isa: str) -> None:
    values = torch.tensor([[0.0, -0.0, 6e-8, 6.1e-5, 65504.0, float("inf"), -float("inf")]])
    ids = torch.tensor([0])
    for dtype in (torch.float16, torch.bfloat16):
        matrix = Matrix.from_floats(values.to(dtype))
        assert torch.equal(NativeOps().embed(matrix, ids), values.to(dtype).float())
    assert NativeOps().embed(Matrix.from_floats(torch.tensor([[float("nan")]]).half()), ids).isnan().all()


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
def test_embed_gives_the_formats_own_numbers(isa: str, bits: int, group_size: int) -> None:
    matrix, ids = quantized(50, 384, bits, group_size), torch.tensor([3, 49, 0, 3])
    assert torch.equal(NativeOps().embed(matrix, ids), reference.embed(matrix, ids))


def test_linears_mixes_storages_and_small_matrices(isa: str, threads: int) -> None:
    x = random_input(4, 256)
    matrices = [
        quantized(70, 256, 4, 64),
        Matrix.from_floats(random_input(3, 256).bfloat16()),
        quantized(1, 256, 8, 32),
        quantized(129, 256, 4, 128),
    ]
    for rows in (x, x[:1]):
        for found, matrix in zip(NativeOps().linears(rows, matrices), matrices):
            check_linear(found, rows, matrix, INT8)


@pytest.mark.parametrize(("bits", "down_bits"), [(4, 4), (2, 4), (3, 8), (8, 2)])
@pytest.mark.parametrize("exact", [False, True])
def test_experts_of_one_token(isa: str, threads: int, bits: int, down_bits: int, exact: bool) -> None:
    experts = [quantized_expert(256, 96, bits, 32, down_bits), quantized_expert(256, 160, 4, 32)]
    x, out, expected = random_input(1, 256), torch.zeros(3, 256), torch.zeros(3, 256)
    NativeOps(exact).run_experts(x, experts, out, [2, 0])
    reference.run_experts(x, experts, expected, [2, 0])
    assert not out[1].any()
    check_experts(out, expected, EXPERT_EXACT if exact else EXPERT_INT8)


@pytest.mark.parametrize("count", [1, 2, 40, 700])
@pytest.mark.parametrize("exact", [False, True])
def test_an_expert_of_several_tokens(threads: int, count: int, exact: bool) -> None:
    expert = quantized_expert(128, 96, 4, 32)
    x, out = random_input(701, 128), random_input(701, 128).flip(0)
    tokens = torch.randperm(701, generator=torch.Generator().manual_seed(1))[:count]
    weights = torch.rand(count, generator=torch.Generator().manual_seed(2))
    expected = out.clone()
    reference.add_expert(expected, x, expert, tokens, weights)
    NativeOps(exact).add_expert(out, x, expert, tokens, weights)
    check_experts(out, expected, EXPERT_EXACT if exact else EXPERT_INT8)


def test_an_expert_in_bf16_is_float32(isa: str) -> None:
    shapes = ((48, 64), (48, 64), (64, 48))
    expert = Expert(*(Matrix.from_floats(random_input(*shape).bfloat16()) for shape in shapes))
    x, out, expected = random_input(5, 64), torch.zeros(5, 64), torch.zeros(5, 64)
    everyone, weights = torch.arange(5), torch.ones(5)
    NativeOps().add_expert(out, x, expert, everyone, weights)
    reference.add_expert(expected, x, expert, everyone, weights)
    check_experts(out, expected, EXPERT_EXACT)


@pytest.mark.parametrize("exact", [False, True])
def test_a_tokens_result_depends_on_nothing_else(isa: str, exact: bool) -> None:
    """Not on the other tokens of the call, nor on the number of threads: equal bit for bit."""
    ops, matrix, expert = NativeOps(exact), quantized(100, 256, 4, 64), quantized_expert(256, 96, 2, 32)
    x = random_input(23, 256)
    everyone, weights = torch.arange(23), torch.rand(23, generator=torch.Generator().manual_seed(0))
    whole, mixed = ops.linear(x, matrix), torch.zeros(23, 256)
    ops.add_expert(mixed, x, expert, everyone, weights)
    for threads in (1, 2, 3):
        native_library.set_threads(threads)
        for first, last in ((0, 2), (5, 16), (21, 23), (0, 23)):
            part = torch.zeros(23, 256)
            ops.add_expert(part, x, expert, everyone[first:last], weights[first:last])
            assert torch.equal(part[first:last], mixed[first:last])
            assert torch.equal(ops.linear(x[first:last], matrix), whole[first:last])
    native_library.set_threads(1)


def test_amx_gives_the_bits_of_avx512() -> None:
    """Integer sums are exact and meet the scales in the same order, so a machine's tiles never change an answer."""
    if "amx" not in INSTRUCTION_SETS:
        pytest.skip("needs a processor with AMX and a system that permits it")
    for bits, group_size in SCHEMES:
        matrix, x = quantized(75, 640, bits, group_size), random_input(37, 640)
        results = []
        for name in ("amx", "avx512"):
            native_library.set_isa(name)
            results.append(NativeOps().linear(x, matrix))
        native_library.set_isa(INSTRUCTION_SETS[0])
        assert torch.equal(*results)


@pytest.mark.parametrize("value", [0.0, 1e-38, 3e38, float("nan"), float("inf")])
def test_extreme_activations_neither_crash_nor_spread(isa: str, value: float) -> None:
    matrix, x = quantized(40, 128, 4, 64), random_input(3, 128)
    x[1] = value
    found = NativeOps().linear(x, matrix)
    check_linear(found[[0, 2]], x[[0, 2]], matrix, INT8)
    if value < 1:
        assert found[1].isfinite().all()
        assert found[1].abs().max() <= 1e-30


def test_large_outliers_stay_in_their_group(isa: str) -> None:
    """One value of 1000 in a group costs that group its small values, and no other."""
    matrix, x = quantized(64, 256, 8, 64), random_input(1, 256)
    x[0, 70] = 1000.0
    check_linear(NativeOps().linear(x, matrix), x, matrix, INT8)
    without = x.clone()
    without[0, 64:128] = 0.0
    check_linear(NativeOps().linear(without, matrix), without, matrix, INT8)


def test_a_matrix_must_be_contiguous() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        NativeOps().linear(random_input(1, 8), Matrix.from_floats(random_input(8, 16)[:, ::2]))


def test_activations_must_be_float32() -> None:
    with pytest.raises(TypeError, match="float32"):
        NativeOps().linear(random_input(1, 8).double(), Matrix.from_floats(random_input(8, 8)))


def test_many_calls_from_several_python_threads() -> None:
    """One piece of work at a time, whoever asks."""
    from concurrent.futures import ThreadPoolExecutor

    native_library.set_threads(2)
    ops, matrix = NativeOps(), quantized(96, 256, 4, 64)
    inputs = [random_input(1 + seed % 5, 256) for seed in range(40)]
    expected = [ops.linear(x, matrix) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: ops.linear(x, matrix), inputs * 5))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 5))
    native_library.set_threads(1)


def test_read_stream_reads_all_of_it() -> None:
    memory = torch.randint(0, 2**10, (2**18,), dtype=torch.int32)
    for threads in (1, 2):
        native_library.set_threads(threads)
        assert read_stream(memory) == int(memory.sum())
    native_library.set_threads(1)
