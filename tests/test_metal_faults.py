"""Faults put into the Metal kernels on purpose: what runs them here must notice each, or it proves nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernel_memory import Host, bytes_tensor, lay_out
from moepack.kernels import launches, msl, prompt_launches, simt, token_launches
from moepack.kernels.forms import expert_form, matrix_form, pack_places
from moepack.kernels.launches import Launch
from moepack.kernels.matrix import Expert
from moepack.kernels.simt import Executor, KernelError, WatchedExecutor
from test_native_matrices import quantized

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def faulty(name: str, right: str, wrong: str, occurrence: int = 0) -> dict[str, msl.Source]:
    """A kernel file with one place of its text replaced."""
    parts = msl.load(name).text.split(right)
    assert len(parts) > occurrence + 1, f"{right} is not {occurrence + 1} times in {name}.metal"
    text = right.join(parts[: occurrence + 1]) + wrong + right.join(parts[occurrence + 1 :])
    return {name: msl.parse(name, text)}


def norm_launch(rows: int = 2) -> tuple[Launch, torch.Tensor]:
    out = torch.zeros(rows, 200)
    x = torch.randn(rows, 200, generator=torch.Generator().manual_seed(1))
    return launches.rms_norm(x, torch.zeros(200), out, 1e-6), out


def delta_launch() -> tuple[Launch, torch.Tensor]:
    chance = torch.Generator().manual_seed(2)
    mixed, projected, gates = (torch.randn(n, generator=chance) for n in (2 * 64 + 2 * 64, 2 * 64 + 4, 64))
    out = torch.zeros(2, 64)
    launch = launches.delta_step(
        mixed, projected, gates[:2], gates[2:4], gates, torch.ones(2, 64, 64), out, 1, 0, 128, 130, 1e-6
    )
    return launch, out


def linears_launch() -> tuple[Launch, torch.Tensor]:
    base, matrices = lay_out([quantized(37, 96, 3, 32)])
    x, out = torch.randn(1, 96, generator=torch.Generator().manual_seed(3)), torch.zeros(1, 37)
    return launches.linears(base, bytes_tensor(launches.matrix_forms(matrices, base)), matrices, x, out), out


def experts_launch() -> tuple[Launch, torch.Tensor]:
    experts, hidden = 3, 64
    base, matrices = lay_out([quantized(hidden, hidden, 4, 32, seed) for seed in range(3 * experts)])
    forms = b"".join(expert_form(Expert(*matrices[i : i + 3]), base, 0) for i in range(0, 3 * experts, 3))
    places = bytes_tensor(pack_places((0, rank, rank) for rank in range(experts)))
    products = torch.randn(experts, hidden, generator=torch.Generator().manual_seed(4))
    out = torch.zeros(1, hidden)
    launch = launches.experts_down([base] * 3, bytes_tensor(forms), places, products, torch.ones(experts), out)
    return launch, out


def vector_launch() -> tuple[Launch, torch.Tensor]:
    hidden = 256
    base, matrices = lay_out([quantized(hidden, hidden, 4, 32, seed) for seed in range(3)])
    forms, places = bytes_tensor(expert_form(Expert(*matrices), base, 0)), bytes_tensor(pack_places([(0, 0, 0)]))
    products = torch.zeros(1, token_launches.hidden_width(hidden))
    x = torch.randn(1, hidden, generator=torch.Generator().manual_seed(8))
    return token_launches.experts_gate_up([base] * 3, forms, places, x, products), products


def embed_launch() -> tuple[Launch, torch.Tensor]:
    base, (matrix,) = lay_out([quantized(4, 96, 3, 32)])
    form = bytes_tensor(matrix_form(matrix, base))
    out = torch.zeros(1, 96)
    return launches.embed(base, form, matrix, torch.tensor([3], dtype=torch.int32), out), out


def attention_launch() -> tuple[Launch, torch.Tensor]:
    chance = torch.Generator().manual_seed(5)
    q, caches = torch.randn(8, 64, generator=chance), torch.randn(2, 1, 90, 64, generator=chance)
    position, stats, partial = torch.tensor([89], dtype=torch.int32), torch.zeros(8, 1, 2), torch.zeros(8, 1, 64)
    return launches.attention_split(q, *caches, position, partial, stats), partial


def scan_launch() -> tuple[Launch, torch.Tensor]:
    chance = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(40, 1, 64, generator=chance) for _ in range(3))
    gates, out = torch.rand(2, 40, 1, generator=chance), torch.zeros(40, 1, 64)
    return launches.delta_scan(q, k, v, -gates[0], gates[1], torch.ones(1, 64, 64), out), out


def halves_launch() -> tuple[Launch, torch.Tensor]:
    base, matrices = lay_out([quantized(70, 128, 4, 32)])
    x, out = torch.randn(9, 128, generator=torch.Generator().manual_seed(7)), torch.zeros(9, 70)
    parts = prompt_launches.Parts.of(Host, *x.shape)
    Executor().run(prompt_launches.split_rows(x, parts))
    forms = bytes_tensor(prompt_launches.tile_forms(matrices, base))
    return prompt_launches.matmul(base, forms, matrices, parts, out), out


def argmax_launch() -> tuple[Launch, torch.Tensor]:
    parts = torch.zeros(2, 1, 1, dtype=torch.int32)
    return launches.argmax_parts(torch.arange(4000.0)[None], *parts), parts


Make = Callable[[], tuple[Launch, torch.Tensor]]


@pytest.mark.parametrize("order", [1, 7])
@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (norm_launch, ("norms", BARRIER, ";")),
        (delta_launch, ("delta_step", BARRIER, ";", 1)),  # before the state meets the key
        (delta_launch, ("delta_step", BARRIER, ";", 2)),  # before the parts of what is recalled are added
        (experts_launch, ("experts", BARRIER, ";")),
        (attention_launch, ("attention_step", BARRIER, ";", 1)),  # before the teams' largest scores meet
        (attention_launch, ("attention_step", BARRIER, ";", 2)),  # before their sums do
        (halves_launch, ("matmul_halves", BARRIER, ";")),  # before a block's copies of other lanes are read
        (halves_launch, ("matmul_halves", "wait_for_copies();", ";")),
    ],
)
def test_a_missing_barrier_changes_the_numbers(make: Make, fault: tuple, order: int) -> None:
    launch, out = make()
    Executor(order).run(launch)
    right = out.clone()
    launch, out = make()
    Executor(order, replaced=faulty(*fault)).run(launch)
    assert not torch.equal(out, right)


def test_a_copy_to_what_is_still_read_changes_the_numbers() -> None:
    """The next block's inputs in place of this one's: copies that come late would be just in time."""
    launch, out = halves_launch()
    Executor().run(launch)
    right, (launch, out) = out.clone(), halves_launch()
    text = msl.load("matmul_halves").text
    assert text.count("block % 2 * INPUT_QUADS") == 2
    replaced = {"matmul_halves": msl.parse("matmul_halves", text.replace("block % 2 * INPUT_QUADS", "0"))}
    Executor(1, replaced=replaced).run(launch)
    assert torch.equal(out, right)
    Executor(7, replaced=replaced).run(launch)
    assert not torch.equal(out, right)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (("norms", BARRIER, f"if (simdgroup == 0) {BARRIER}"), "lanes diverged .* at threadgroup_barrier"),
        (
            ("norms", "const float sum = simd_sum(value);", "float sum = 0; if (lane < 7) sum = simd_sum(value);"),
            "simd_sum",
        ),
        (
            ("norms", "const float sum = simd_sum(value);", "if (lane == 3) return 0; float sum = simd_sum(value);"),
            "finished",
        ),
        (("norms", "threadgroup float partial[32];", "threadgroup float partial[9000];"), "36000 bytes of threadgroup"),
    ],
)
def test_the_executor_names_what_lanes_must_not_do(fault: tuple, complaint: str) -> None:
    launch, _ = norm_launch()
    with pytest.raises(KernelError, match=complaint):
        Executor(replaced=faulty(*fault)).run(launch)


def test_an_executor_works_on_after_a_fault() -> None:
    launch, out = norm_launch()
    broken = Executor(replaced=faulty("norms", BARRIER, f"if (simdgroup == 0) {BARRIER}"))
    for _ in range(2):
        with pytest.raises(KernelError, match="diverged"):
            broken.run(launch)
    Executor().run(launch)
    assert out.abs().sum() > 0


def test_threadgroup_memory_starts_as_nan() -> None:
    """What a kernel reads before anyone wrote it is not a lucky zero of the last threadgroup."""
    launch, out = norm_launch()
    Executor(replaced=faulty("norms", "if (lane == 0) partial[simdgroup] = sum;", "")).run(launch)
    assert out.isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "sanitizer", "fault", "complaint"),
    [
        # The bound of a write, of a read of weights, of threadgroup memory.
        (linears_launch, "address", ("linears", "row + r < w.rows)", "row + r < w.rows + 8)"), "heap-buffer-overflow"),
        (linears_launch, "address", ("linears", "min(row + r, w[m].rows - 1)", "(row + r)"), "heap-buffer-overflow"),
        (
            embed_launch,
            "address",
            ("embed", "widen_bf16(w.biases[group])", "widen_bf16(w.biases[group + 1])"),
            "heap-buffer-overflow",
        ),
        (norm_launch, "address", ("norms", "partial[32];", "partial[6];"), "heap-buffer-overflow"),
        # The bound of a context, of a prompt.
        (attention_launch, "address", ("attention_step", "min(s + p, end - 1)", "(s + p)"), "heap-buffer-overflow"),
        (scan_launch, "address", ("delta_scan", "token < tokens && d <", "d <"), "heap-buffer-overflow"),
        (
            halves_launch,  # of an asynchronous copy
            "address",
            ("matmul_halves", "min(place.row, tile.w.rows - 1) * (blocks", "place.row * (blocks"),
            "heap-buffer-overflow",
        ),
        # Vectors of the device's memory that are not aligned.
        (
            vector_launch,
            "address",
            ("experts_vector", "(BITS * 4);\n  tile.data[1]", "(BITS * 4) + 8;\n  tile.data[1]"),
            "misaligned",
        ),
        (vector_launch, "address", ("experts_vector", "min(first, tile.groups - 8)", "(first + 4) % 8"), "misaligned"),
        # Barriers that order nothing, whatever the numbers say.
        (norm_launch, "thread", ("norms", BARRIER, ";"), "data race"),
        (norm_launch, "thread", ("norms", BARRIER, "threadgroup_barrier(mem_flags::mem_none);"), "data race"),
        (delta_launch, "thread", ("delta_step", BARRIER, ";", 1), "data race"),
        (delta_launch, "thread", ("delta_step", BARRIER, ";", 3), "data race"),
        (experts_launch, "thread", ("experts", BARRIER, ";"), "data race"),
        (attention_launch, "thread", ("attention_step", BARRIER, ";", 3), "data race"),  # the sums of the next head
        (scan_launch, "thread", ("delta_scan", BARRIER, ";", 0), "data race"),  # the next tokens replace the last
        (scan_launch, "thread", ("delta_scan", BARRIER, ";", 1), "data race"),  # they are read
        (argmax_launch, "thread", ("argmax", BARRIER, ";"), "data race"),
        (
            halves_launch,
            "thread",
            ("matmul_halves", f"wait_for_copies();\n    {BARRIER}", "wait_for_copies();"),
            "data race",
        ),
        # Two threadgroups that write the same place.
        (
            norm_launch,
            "thread",
            ("norms", "ulong(group.x) * shape.width", "ulong(group.x) * (shape.width / 2)"),
            "data race",
        ),
    ],
)
def test_sanitizers_report_seeded_faults(make: Make, sanitizer: str, fault: tuple, complaint: str) -> None:
    launch, _ = make()
    with pytest.raises(KernelError, match=complaint):
        WatchedExecutor(sanitizer, replaced=faulty(*fault)).run(launch)
    WatchedExecutor(sanitizer).run(make()[0])  # and have nothing against the right text


@pytest.mark.slow
def test_an_early_copy_to_what_others_still_read_is_a_race() -> None:
    """One requested before the barrier that ends the reading, not behind it: late copies would hide that."""
    request = "    if (block + 1 < blocks) copy_inputs(parts, at, block + 1, count, index);\n"
    text = msl.load("matmul_halves").text
    before, barrier, behind = text.partition(f"    wait_for_copies();\n    {BARRIER}\n")
    assert request in behind
    wait, _, rest = barrier.partition("\n")
    moved = f"{before}{wait}\n{request}{rest}{behind.replace(request, '')}"
    launch, _ = halves_launch()
    with pytest.raises(KernelError, match="data race"):
        WatchedExecutor("thread", 7, replaced={"matmul_halves": msl.parse("matmul_halves", moved)}).run(launch)
    WatchedExecutor("thread", 7).run(halves_launch()[0])


def test_fibers_where_the_switch_has_not_been_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors other than x86-64 switch lanes through the C library: the same numbers."""
    launch, out = delta_launch()
    Executor(7).run(launch)
    expected = out.clone()
    monkeypatch.setattr(simt, "FLAGS", (*simt.FLAGS, "-DSIMT_PORTABLE"))
    launch, out = delta_launch()
    Executor(7).run(launch)
    assert torch.equal(out, expected)
