"""Metal kernels that read weights, run on the CPU executor, against reference.py: storages, odd sizes, lane orders.

Tolerances, as shares of what a result of random signs would be, |x| |w| / sqrt(K): 1.5e-5. A product is float32
throughout; the integer in the mantissa costs five roundings of a term instead of one, sixteen at 2 bits, thirty at 4
(metal/matrix.h). Experts are compared by the norm of their results: 3e-6, two products after each other.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from kernel_devices import CHOSEN, Runner, default_runner
from kernel_memory import bytes_tensor, gather, lay_out, spread
from moepack.kernels import launches, reference, token_launches
from moepack.kernels.forms import RESIDENT_BANK, expert_form, matrix_form, pack_places
from moepack.kernels.matrix import Expert, Matrix
from moepack.kernels.simt import WatchedExecutor
from moepack.layout.geometry import BlockGeometry, Scheme
from moepack.layout.spec import PROJECTIONS
from test_native_matrices import check_experts, check_linear, quantized, random_input

PRODUCT, EXPERT = 1.5e-5, 3e-6
SCHEMES = [*itertools.product((2, 3, 4, 8), (32, 64, 128))]
PLAIN = [torch.bfloat16, torch.float16, torch.float32]
RUNNER = default_runner()
CALLS = [launches] if CHOSEN == "metal" else [launches, token_launches]  # metal/'s kernels, and NVIDIA's own


@pytest.fixture(params=CALLS, ids=lambda chosen_launches: chosen_launches.__name__.rpartition(".")[2])
def chosen_launches(request: pytest.FixtureRequest) -> Any:
    return request.param


def run_linears(
    executor: Runner, chosen_launches: Any, x: torch.Tensor, matrices: list[Matrix], **options: torch.Tensor
) -> torch.Tensor:
    base, matrices = lay_out(matrices)
    out = torch.full((len(x), sum(matrix.out_features for matrix in matrices)), 0.5)
    forms = bytes_tensor(chosen_launches.matrix_forms(matrices, base))
    executor.run(chosen_launches.linears(base, forms, matrices, x, out, eps=1e-6, **options))
    return out


def plain(rows: int, columns: int, dtype: torch.dtype) -> Matrix:
    return Matrix.from_floats(random_input(rows, columns).to(dtype))


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
def test_linears_on_quantized_weights(chosen_launches: Any, bits: int, group_size: int) -> None:
    """Row lengths that take 4 to 32 lanes, no whole number of steps, two parts of inputs; memory ends with a row."""
    for rows, columns in ((75, 128), (1, 384), (33, 640), (70, 1024 + 128), (3, 4096 + 128)):
        matrix = quantized(rows, columns, bits, group_size)
        for tokens in (1, 3):
            x = random_input(tokens, columns)
            check_linear(run_linears(RUNNER, chosen_launches, x, [matrix]), x, matrix, PRODUCT)


@pytest.mark.parametrize("dtype", PLAIN)
def test_linears_on_plain_weights(chosen_launches: Any, dtype: torch.dtype) -> None:
    for rows, columns in ((75, 131), (3, 16), (34, 544), (1, 1), (5, 20)):
        matrix = plain(rows, columns, dtype)
        for tokens in (1, 2):
            x = random_input(tokens, columns)
            check_linear(run_linears(RUNNER, chosen_launches, x, [matrix]), x, matrix, PRODUCT)


def test_linears_of_several_matrices(executor: Runner, chosen_launches: Any) -> None:
    """Side by side in one result, whatever their storages and sizes."""
    matrices = [quantized(70, 256, 4, 64), plain(3, 256, torch.bfloat16), quantized(1, 256, 8, 32)]
    matrices.append(quantized(129, 256, 2, 128))
    x = random_input(2, 256)
    parts = run_linears(executor, chosen_launches, x, matrices).split(
        [matrix.out_features for matrix in matrices], dim=1
    )
    for part, matrix in zip(parts, matrices):
        check_linear(part, x, matrix, PRODUCT)


def test_linears_of_a_norm(executor: Runner, chosen_launches: Any) -> None:
    """The norm and the product in one dispatch, and the normed input kept beside."""
    matrices, x = [quantized(40, 320, 4, 64), plain(5, 320, torch.float32)], 3 * random_input(2, 320)
    norm, normed = random_input(1, 320)[0], torch.zeros(2, 320)
    expected = reference.rms_norm(x, norm, 1e-6)
    out = run_linears(executor, chosen_launches, x, matrices, norm=norm, normed=normed)
    torch.testing.assert_close(gather(normed, 320), expected, rtol=2e-6, atol=2e-6)
    for part, matrix in zip(out.split([40, 5], dim=1), matrices):
        check_linear(part, expected, matrix, PRODUCT)


@pytest.mark.parametrize("columns", [8, 320, 1032, 2048, 4096, 4104])
def test_linears_of_a_router(chosen_launches: Any, columns: int) -> None:
    """A few plain rows and a single one, of two tokens, with the norm and without, the last ones beyond all kernels."""
    matrices, x = [plain(rows, columns, torch.bfloat16) for rows in (9, 1, 6)], 3 * random_input(2, columns)
    norm, normed = random_input(1, columns)[0], torch.zeros(2, launches.spread_width(columns))
    expected = reference.rms_norm(x, norm, 1e-6)
    for inputs, options in ((expected, {"norm": norm, "normed": normed}), (expected, {"norm": norm}), (x, {})):
        out = run_linears(RUNNER, chosen_launches, x, matrices, **options)
        for part, matrix in zip(out.split([9, 1, 6], dim=1), matrices):
            check_linear(part, inputs, matrix, PRODUCT)
    torch.testing.assert_close(gather(normed, columns), expected, rtol=2e-6, atol=2e-6)


def test_a_few_plain_rows(executor: Runner, chosen_launches: Any) -> None:
    """As a router has them, added to what is there, and the normed input beside."""
    matrices, x = [plain(5, 320, torch.bfloat16), plain(2, 320, torch.bfloat16)], random_input(1, 320)
    norm, normed = random_input(1, 320)[0], torch.zeros(1, 320)
    out = run_linears(executor, chosen_launches, x, matrices, norm=norm, normed=normed, accumulate=True) - 0.5
    expected = reference.rms_norm(x, norm, 1e-6)
    for part, matrix in zip(out.split([5, 2], dim=1), matrices):
        check_linear(part, expected, matrix, PRODUCT)
    torch.testing.assert_close(gather(normed, 320), expected, rtol=2e-6, atol=2e-6)


def test_linears_add_to_what_is_there(executor: Runner, chosen_launches: Any) -> None:
    matrix, x = quantized(40, 320, 8, 32), random_input(2, 320)
    check_linear(run_linears(executor, chosen_launches, x, [matrix], accumulate=True) - 0.5, x, matrix, PRODUCT)


@pytest.mark.skipif(CHOSEN == "metal", reason="needs an NVIDIA GPU or the CPU executor")
@pytest.mark.parametrize("bits", [3, 8])
def test_a_threadgroup_of_bytes_takes_several_tiles(
    executor: Runner, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a large GPU has them: the last one of a matrix reaches beyond its rows, or is wholly outside."""
    monkeypatch.setattr(token_launches, "GROUPS", 2)
    for wanted, columns in ((1, 640), (20, 1024 + 64)):
        monkeypatch.setattr(token_launches, "WANTED", wanted)
        matrices, x = [quantized(70, columns, bits, 64), quantized(20, columns, bits, 32)], random_input(1, columns)
        out = run_linears(executor, token_launches, x, matrices)
        for part, matrix in zip(out.split([70, 20], dim=1), matrices):
            check_linear(part, x, matrix, PRODUCT)


def test_linears_by_bytes_pass_on_what_they_cannot_take() -> None:
    """Rows too long for threadgroup memory, and matrices that are mostly plain, are metal/linears.metal's."""
    for matrices in ([quantized(2, 4096 + 64, 4, 64)], [plain(9, 64, torch.bfloat16), quantized(3, 64, 8, 64)]):
        x = random_input(1, matrices[0].in_features)
        out = run_linears(RUNNER, token_launches, x, matrices)
        for part, matrix in zip(out.split([m.out_features for m in matrices], dim=1), matrices):
            check_linear(part, x, matrix, PRODUCT)


def test_linears_by_bytes_pass_on_what_is_not_a_number() -> None:
    """A vector with one that is not, and one beyond all numbers, gives neither zero nor anything that looks well."""
    matrix = quantized(20, 256, 4, 64)
    for bad in (float("nan"), float("inf")):
        x = random_input(1, 256)
        x[0, 100] = bad
        assert not run_linears(RUNNER, token_launches, x, [matrix]).isfinite().any()


def test_linears_read_the_front_of_longer_rows(chosen_launches: Any) -> None:
    matrix, wide = quantized(9, 64, 4, 32), random_input(3, 80)
    check_linear(run_linears(RUNNER, chosen_launches, wide, [matrix]), wide[:, :64], matrix, PRODUCT)


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
def test_embed_gives_the_formats_own_numbers(bits: int, group_size: int) -> None:
    check_embed(quantized(50, 384, bits, group_size))


@pytest.mark.parametrize("dtype", PLAIN)
def test_embed_widens_plain_rows(dtype: torch.dtype) -> None:
    check_embed(plain(50, 37, dtype))


def test_half_precision_at_the_ends_of_its_range() -> None:
    values = torch.tensor([[0.0, -0.0, 6e-8, 6.1e-5, 65504.0, float("inf"), -float("inf"), 1 / 3]]).repeat(50, 1)
    check_embed(Matrix.from_floats(values.half()))


def check_embed(matrix: Matrix) -> None:
    base, (matrix,) = lay_out([matrix])
    ids, out = torch.tensor([3, 49, 0, 3], dtype=torch.int32), torch.zeros(4, matrix.in_features)
    RUNNER.run(launches.embed(base, bytes_tensor(matrix_form(matrix, base)), matrix, ids, out))
    assert torch.equal(out, reference.embed(matrix, ids.long()))


def block_geometry(hidden: int, width: int, bits: tuple[int, ...]) -> BlockGeometry:
    return BlockGeometry.of(hidden, width, {name: Scheme.of(b, 32) for name, b in zip(PROJECTIONS, bits)})


def random_blocks(geometries: list[BlockGeometry], slot_bytes: int) -> torch.Tensor:
    """A bank of slots with a block of each geometry: any bytes are weights; scales and biases are small."""
    bank = torch.zeros(len(geometries), slot_bytes, dtype=torch.uint8)
    for slot, geometry in zip(bank, geometries):
        chance = torch.Generator().manual_seed(geometry.block_bytes)
        for section in geometry.sections:
            part = slot[section.offset_bytes : section.offset_bytes + section.size_bytes]
            if section.dtype == "BF16":
                spread = 0.1 if section.name.endswith("weight") else 0.01
                part.view(torch.bfloat16).copy_(torch.randn(len(part) // 2, generator=chance) * spread)
            else:
                part.copy_(torch.randint(0, 256, (len(part),), dtype=torch.uint8, generator=chance))
    return bank


@pytest.mark.parametrize(("hidden", "width", "shared_width"), [(64, 32, 32), (256, 160, 96), (544, 64, 512)])
def test_experts_of_a_token(
    executor: Runner,
    chosen_launches: Any,
    hidden: int,
    width: int,
    shared_width: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of all bits in two banks of slots and a shared expert among the resident weights; run in two parts."""
    monkeypatch.setattr(launches, "DOWN_GROUPS", 2)  # several chunks of rows to a threadgroup
    if isinstance(executor, WatchedExecutor) and executor.sanitizer == "thread":
        if hidden > 512:
            pytest.skip("136 threadgroups of 224 lanes take ThreadSanitizer a minute; smaller ones show the same")
        if chosen_launches is token_launches:
            pytest.skip("28,672 lanes are more than ThreadSanitizer counts: the test of one expert is for it")
    schemes = [(4, 2, 8), (2, 3, 16), (8, 16, 4), (3, 4, 2), (16, 16, 16)]
    geometries = [block_geometry(hidden, width, bits) for bits in schemes]
    slot_bytes = max(geometry.block_stride for geometry in geometries)
    banks = [random_blocks(geometries, slot_bytes), random_blocks(geometries[::-1], slot_bytes)]
    sizes = [(shared_width, hidden), (shared_width, hidden), (hidden, shared_width)]
    resident, shared = lay_out([quantized(1, 32, 4, 32), *(quantized(*size, 8, 32) for size in sizes)])
    blocks = [torch.empty(geometry.block_bytes, dtype=torch.uint8) for geometry in geometries]
    in_slots = [(Expert.from_block(geometry, block), block) for geometry, block in zip(geometries, blocks)]
    forms = b"".join(expert_form(*expert_and_base, bank) for bank in (0, 1) for expert_and_base in in_slots)
    forms += expert_form(Expert(*shared[1:]), resident, RESIDENT_BANK)

    chosen = [(1, 3), (0, 1), (0, 4), (1, 0), (0, 0), (1, 1)]  # bank, slot
    geometry_of = [geometries, geometries[::-1]]
    experts = [Expert.from_block(geometry_of[bank][slot], banks[bank][slot]) for bank, slot in chosen]
    experts.append(Expert(*shared[1:]))
    places = [
        (slot * slot_bytes, bank * len(geometries) + geometries.index(geometry_of[bank][slot]), rank)
        for rank, (bank, slot) in enumerate(chosen)
    ]
    places.append((0, 2 * len(geometries), len(chosen)))

    x, weights = random_input(1, hidden), torch.rand(len(places), generator=torch.Generator().manual_seed(3))
    rows = torch.zeros(len(places), hidden)
    reference.run_experts(x, experts, rows, range(len(places)))
    expected = weights @ rows

    memories, forms_buffer = [*banks, resident], bytes_tensor(forms)
    products = torch.full((len(places), chosen_launches.hidden_width(max(width, shared_width))), float("nan"))
    out = torch.full((1, hidden), 0.5)
    for part in (places[2:], places[:2]):  # those in memory, then those that arrive
        some = bytes_tensor(pack_places(part))
        executor.run(chosen_launches.experts_gate_up(memories, forms_buffer, some, spread(x), products))
    everything = bytes_tensor(pack_places(places))
    executor.run(chosen_launches.experts_down(memories, forms_buffer, everything, products, weights, out))
    check_experts(out[0] - 0.5, expected, EXPERT)


def run_experts(
    executor: Runner, chosen_launches: Any, geometries: list[BlockGeometry], x: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the sum over experts of random weights, one of each geometry; what it should be)."""
    bank = random_blocks(geometries, max(geometry.block_stride for geometry in geometries))
    experts = [Expert.from_block(geometry, block) for geometry, block in zip(geometries, bank)]
    forms = bytes_tensor(b"".join(expert_form(expert, block, 0) for expert, block in zip(experts, bank)))
    places = bytes_tensor(pack_places((i * bank.stride(0), i, i) for i in range(len(bank))))
    width = chosen_launches.hidden_width(experts[0].gate_proj.out_features)
    hidden = torch.full((len(bank), width), float("nan"))
    out = torch.zeros_like(x)
    executor.run(chosen_launches.experts_gate_up([bank] * 3, forms, places, spread(x), hidden))
    executor.run(chosen_launches.experts_down([bank] * 3, forms, places, hidden, weights, out))
    rows = torch.zeros(len(bank), x.shape[1])
    reference.run_experts(x, experts, rows, range(len(bank)))
    return out[0], weights @ rows


def test_one_expert_of_a_token(executor: Runner, chosen_launches: Any) -> None:
    geometries = [block_geometry(96, 64, (4, 2, 3))]
    check_experts(*run_experts(executor, chosen_launches, geometries, random_input(1, 96), torch.ones(1)), EXPERT)


@pytest.mark.parametrize(
    ("hidden", "width", "group_size", "copies"),
    [
        (1152, 576, 64, 1),
        (1152, 640, 128, 1),
        (1536, 512, 64, 3),
        (4096, 64, 64, 1),
        (4096, 96, 32, 3),
        (4096, 128, 128, 1),
    ],
)
def test_experts_of_real_rows(chosen_launches: Any, hidden: int, width: int, group_size: int, copies: int) -> None:
    """Rows of several strips, whole ones or not, whose scales come by sixteen bytes or one by one.

    Three copies are twelve experts: more than FEW_PLACES, so the kernels for more. metal/'s add up 128 of 4,096 columns
    in a lane, which may lose twice the tolerance.
    """
    schemes = [dict(zip(PROJECTIONS, bits)) for bits in ((4, 4, 4), (2, 3, 8), (3, 8, 2), (8, 2, 3))] * copies
    geometries = [
        BlockGeometry.of(hidden, width, {name: Scheme.of(bits, group_size) for name, bits in scheme.items()})
        for scheme in schemes
    ]
    weights = torch.rand(len(schemes), generator=torch.Generator().manual_seed(4))
    tolerance = EXPERT if chosen_launches is token_launches else 2 * EXPERT
    check_experts(*run_experts(RUNNER, chosen_launches, geometries, random_input(1, hidden), weights), tolerance)


def test_more_experts_than_simdgroups_of_a_threadgroup(executor: Runner, chosen_launches: Any) -> None:
    """And more than FEW_PLACES."""
    if getattr(executor, "sanitizer", "") == "thread" and chosen_launches is token_launches:
        pytest.skip("53,248 lanes are more than ThreadSanitizer counts: the test of one expert is for it")
    schemes = [(4, 2, 3), (2, 8, 4), (3, 4, 2), (8, 3, 8)]
    geometries = [block_geometry(64, 32, schemes[i % 4]) for i in range(13)]
    weights = torch.linspace(0.1, 1, 13)
    check_experts(*run_experts(executor, chosen_launches, geometries, random_input(1, 64), weights), EXPERT)


def test_experts_of_what_is_not_a_number(chosen_launches: Any) -> None:
    """NaN or infinity in the input gives nothing that could pass for a result."""
    for bad in (float("nan"), float("inf")):
        x = random_input(1, 256)
        x[0, 100] = bad
        out, _ = run_experts(RUNNER, chosen_launches, [block_geometry(256, 64, (4, 2, 3))], x, torch.ones(1))
        assert not out.isfinite().any()


def test_scales_that_vectors_cannot_be_read_from_are_refused() -> None:
    base, (matrix,) = lay_out([quantized(4, 64, 4, 32)], spare_bytes=64)
    assert matrix.scales is not None
    shifted = dataclasses.replace(matrix, scales=matrix.scales.reshape(-1).as_strided((4, 1), (1, 1), 4))
    with pytest.raises(ValueError, match="multiples of 16"):
        matrix_form(shifted, base)


def test_token_launches_take_experts_that_fit_and_gain() -> None:
    assert token_launches.takes_experts(4096, 1024, {2, 3, 4, 8, 16})
    assert token_launches.takes_experts(2048, 512, {2, 4, 8})
    for columns, width, bits in ((4128, 1024, 4), (4096, 1056, 4), (2048, 512, 3), (2048, 512, 16), (1024, 512, 4)):
        assert not token_launches.takes_experts(columns, width, {bits, 4})


@pytest.mark.parametrize(
    ("columns", "hidden_width", "message"),
    [
        (4096, 1024, "hidden has rows of 992 numbers, or a multiple, got 1024"),  # as launches.py has it
        (4128, 1984, "at most 4096 columns and 1024 rows, got 4128 and 1024"),
        (4096, 2976, "at most 4096 columns and 1024 rows, got 4096 and 1536"),
    ],
)
def test_token_launches_refuse_sizes_of_experts(columns: int, hidden_width: int, message: str) -> None:
    places = bytes_tensor(pack_places([(0, 0, 0)]))
    x, hidden = torch.zeros(1, columns), torch.zeros(1, hidden_width)
    with pytest.raises(ValueError, match=message):
        token_launches.experts_gate_up([places] * 3, places, places, x, hidden)
    with pytest.raises(ValueError, match=message):
        token_launches.experts_down([places] * 3, places, places, hidden, torch.ones(1), x)
