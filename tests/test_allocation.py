"""Mixed bits: the choice against every other one, what it is chosen by, and what moe-convert makes of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from conftest import make_pack
from convert_command import problems_of, run_convert
from moepack.convert.allocation import allocate, list_candidates, measure_costs
from moepack.convert.plan import plan_conversion
from moepack.convert.quantizers import quantize_mse
from moepack.convert.recipe import Recipe
from moepack.layout.calibration import Calibration
from moepack.layout.errors import UsageError
from moepack.layout.geometry import Scheme
from moepack.layout.manifest import Manifest, ModelShape
from moepack.layout.quantized import dequantize
from moepack.layout.reader import Pack
from moepack.layout.spec import PROJECTIONS
from moepack.layout.summary import summarize
from moepack.runtime.calibrate import calibrate
from moepack.runtime.engine import Engine
from tiny_checkpoint import TinyModel, write_checkpoint

MODEL = TinyModel(layers=2, full_attention_interval=2, experts=5, moe_intermediate=192)  # blocks of several pages
WINDOW = np.random.default_rng(3).integers(0, 64, 90).tolist()
SHAPE = ModelShape(hidden_size=64, moe_intermediate_size=32, num_experts=2, num_hidden_layers=1)
OPTIONS = ("--bits", "mixed", "--resident-bits", 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mixed") / "source", MODEL)


@pytest.fixture(scope="module")
def known(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration file with whole second moments."""
    folder = tmp_path_factory.mktemp("known")
    with Engine.open(make_pack(source, folder / "pack16", 16, 32, 16), exact=True, threads=1) as engine:
        calibrate(engine, [WINDOW], folder / "file", full=True)
    return folder / "file"


def payload(scheme: Scheme, weights: int = 64 * 32) -> float:
    return weights * (scheme.bits + 32 / scheme.group_size) / 8


def test_candidates_divide_rows_and_are_ordered_by_size() -> None:
    found = list_candidates(SHAPE)
    assert {scheme.group_size for scheme in found} == {32, 64}
    assert [payload(scheme) for scheme in found] == sorted(payload(scheme) for scheme in found)
    assert {scheme.group_size for scheme in list_candidates(SHAPE, 32)} == {32}


def test_no_choice_of_the_same_size_costs_less() -> None:
    """Against all of them, at sizes where the greedy choice ends with nothing left over."""
    candidates = (Scheme(2, 32), Scheme(3, 32), Scheme(4, 32))
    costs = np.sort(np.random.default_rng(0).random((1, 2, 3, 3)) * 4.0 ** -np.arange(3))[..., ::-1]
    step = payload(candidates[1]) - payload(candidates[0])
    flat = costs.reshape(6, 3)
    exact = 0
    for steps in range(13):
        choices = allocate(costs, SHAPE, candidates, 6 * payload(candidates[0]) + steps * step).ravel()
        assert choices.sum() <= steps
        best = min(
            sum(row[place] for row, place in zip(flat, places))
            for places in itertools.product(range(3), repeat=6)
            if sum(places) == choices.sum()
        )
        found = float(sum(row[place] for row, place in zip(flat, choices)))
        exact += found == pytest.approx(best)
        assert found <= flat[:, 0].sum()
    assert exact >= 11  # a merged step of two widths may not fit


def test_a_size_below_the_narrowest_is_refused() -> None:
    candidates = list_candidates(SHAPE, 32)
    with pytest.raises(UsageError, match=r"3\.000 bits per weight"):
        allocate(np.ones((1, 2, 3, 3)), SHAPE, candidates, 2 * 3 * payload(candidates[0]) - 1)


def test_costs_are_the_error_of_an_experts_answers(source: Path, known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moepack.convert.allocation.SAMPLE_ROWS", 64)  # every row
    plan = plan_conversion(source, source.parent / "pack", Recipe(4, 32, 16, "mse"))
    calibration = Calibration.open(known)
    candidates = list_candidates(plan.shape, 32)
    costs = measure_costs(plan.checkpoint, plan.source, plan.shape, calibration, candidates)
    layer, expert = 1, 3
    weights = {
        name: place.weight.read_rows(plan.checkpoint, place.first_row, rows).to_float32()
        for (name, place), rows in zip(
            plan.source.experts[layer][expert].items(),
            [plan.shape.moe_intermediate_size] * 2 + [plan.shape.hidden_size],
        )
    }
    moments = {name: calibration.moments(layer, expert, name).astype(np.float64) for name in PROJECTIONS}
    energy = {name: np.einsum("nk,kl,nl", w, moments[name], w) for name, w in weights.items()}
    use = calibration.layer(layer)["weights"][expert] / len(WINDOW)
    scale = use * energy["down_proj"] / (calibration.stream(layer) * plan.shape.hidden_size)
    for place, name in enumerate(PROJECTIONS):
        for width, scheme in enumerate(candidates):
            fitted = quantize_mse(weights[name], scheme.bits, 32, np.diagonal(moments[name]).astype(np.float32))
            w_q, scales, biases = fitted.w_q, fitted.scales, fitted.biases
            off = dequantize(w_q, scales, biases, bits=scheme.bits, group_size=32) - weights[name]
            lost = np.einsum("nk,kl,nl", off, moments[name], off) / energy[name]
            assert costs[layer, expert, place, width] == pytest.approx(lost * scale, rel=1e-3)
    assert (np.diff(costs, axis=-1) < 0).all()


@pytest.mark.parametrize("bpw", [3.2, 4.1])
def test_a_mixed_pack_meets_its_target_and_runs(source: Path, known: Path, tmp_path: Path, bpw: float) -> None:
    out = tmp_path / "pack"
    result = run_convert(source, out, *OPTIONS, "--bpw", bpw, "--calibration", known, "--json")
    facts = json.loads(result.out)
    assert (result.code, facts["bits"], problems_of(out)) == (0, "mixed", [])
    manifest = Manifest.read(out)
    assert manifest.provenance["settings"]["arguments"]["bits"] == "mixed"
    assert any(len(file.tiers) > 1 for file in manifest.expert_files)
    with Pack.open(out) as pack:
        assert bpw - 0.3 < summarize(pack)["experts"]["bits_per_weight"] <= bpw
    errors = [(layer["error"], layer["error_at"].values()) for layer in facts["sensitivity"]]
    assert all(min(uniform) <= error <= max(uniform) for error, uniform in errors)
    with (
        Engine.open(out, exact=True, threads=1) as engine,
        Engine.open(out, exact=True, threads=1, device="reference") as plain,
    ):
        ours, theirs = engine.logits(WINDOW), plain.logits(WINDOW)
        assert float((ours - theirs).abs().max()) < 1e-3 * float(theirs.abs().max())
        assert list(engine.generate(WINDOW[:20])) == list(engine.generate(WINDOW[:20]))


def test_a_target_size_bounds_the_whole_pack(source: Path, known: Path, tmp_path: Path) -> None:
    options = (*OPTIONS, "--calibration", known, "--json", "--dry-run")
    largest = json.loads(run_convert(source, tmp_path / "pack", *options, "--bpw", 5).out)["total_bytes"]
    smallest = json.loads(run_convert(source, tmp_path / "pack", *options, "--bpw", 3).out)["total_bytes"]
    assert smallest < largest
    for target in (largest, (smallest + largest) // 2, smallest):
        facts = json.loads(run_convert(source, tmp_path / "pack", *options, "--target-size", target).out)
        assert smallest <= facts["total_bytes"] <= target
    refused = run_convert(source, tmp_path / "pack", *options, "--target-size", smallest // 2)
    assert refused.code == 2
    assert "aim higher" in refused.err


def test_a_block_is_redone_and_a_stacked_export_refused(source: Path, known: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    assert run_convert(source, out, *OPTIONS, "--bpw", 3.5, "--calibration", known).code == 0
    path = out / Manifest.read(out).expert_files[1].file
    whole = path.read_bytes()
    offset = Manifest.read(out).layer_geometry(1).offsets[2]
    path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 255]) + whole[offset + 1 :])
    assert problems_of(out)
    again = run_convert(source, out, "--redo", "1:2", "--calibration", known)
    assert (again.code, path.read_bytes() == whole) == (0, True)
    assert run_convert(out, tmp_path / "mlx", "--to", "mlx").code == 2


@pytest.mark.parametrize(("options", "expected"), [
    (("--bits", "mixed"), "one of --bpw and --target-size"),
    (("--bits", "mixed", "--bpw", "3", "--target-size", "1GB"), "one of --bpw and --target-size"),
    (("--bits", "4", "--bpw", "3"), "none of --bpw and --target-size"),
    (("--bits", "mixed", "--bpw", "3"), "--calibration FILE of moe-run calibrate"),
    *((("--bits", "mixed", "--bpw", n), f"--bpw {n}: expected a number") for n in ("nan", "inf", "0", "17")),
    (("--bits", "5"), "expected one of 2, 3, 4, 8, 16, mixed"),
])  # fmt: skip
def test_options_that_do_not_go_together(source: Path, tmp_path: Path, options: tuple[str, ...], expected: str) -> None:
    result = run_convert(source, tmp_path / "pack", *options)
    assert (result.code, list(tmp_path.iterdir())) == (2, [])
    assert expected in result.err
