"""Calibration: sums against an ordinary run watched from outside, the file's checks, what moe-convert makes of it."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fake_cuda
from conftest import make_pack
from convert_command import problems_of, run_convert
from moepack.convert.quantizers import quantize_gptq
from moepack.kernels import reference
from moepack.layout.calibration import PRIOR_TOKENS, Calibration
from moepack.layout.errors import CalibrationError, NotEnoughSpace, UnsupportedVersion, UsageError
from moepack.layout.manifest import Manifest
from moepack.layout.quantized import bf16_to_float32
from moepack.layout.tensor_file import layout_tensors
from moepack.runtime.calibrate import UNFINISHED, LayerStatistics, calibrate, read_default_text, write_json
from moepack.runtime.engine import Engine
from tiny_checkpoint import TinyModel, write_checkpoint

MODEL = TinyModel(layers=2, full_attention_interval=2, experts=5)
STATISTICS_TOLERANCE = 1e-5  # of the largest value of their kind in a layer
WINDOWS = [np.random.default_rng(seed).integers(0, 64, size).tolist() for seed, size in enumerate((70, 33))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("calibrate") / "source", MODEL)


@pytest.fixture(scope="module")
def engine(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.open(make_pack(source, tmp_path_factory.mktemp("pack16") / "pack", 16, 32, 16), exact=True, threads=1)


@pytest.fixture(scope="module")
def files(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file with diagonals and one with whole second moments."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("diagonal", "full"):
        calibrate(engine, WINDOWS, folder / name, full=name == "full")
    return {name: folder / name for name in ("diagonal", "full")}


class WatchedOps:
    """A backend that keeps what each expert is given."""

    def __init__(self, ops: Any):
        self.ops, self.calls = ops, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def add_experts(self, out, x, experts, counts, tokens, weights):
        for expert, at, some in zip(experts, tokens.split(counts), weights.split(counts)):
            self.calls.append((x[at].clone(), some.clone(), expert))
        self.ops.add_experts(out, x, experts, counts, tokens, weights)


def watch(engine: Engine) -> list[list[tuple[torch.Tensor, torch.Tensor, Any]]]:
    """For each layer inputs, weights and expert of every call of a routed expert in an ordinary run."""
    found = []
    for layer in engine.model.layers:
        layer.experts.ops = WatchedOps(layer.experts.ops)
    try:
        for window in WINDOWS:
            list(engine.iter_logits(window))
    finally:
        for layer in engine.model.layers:
            moe = layer.experts
            found.append([call for call in moe.ops.calls if call[2] is not moe.shared_expert])
            moe.ops = moe.ops.ops
    return found


def test_sums_are_those_of_an_ordinary_run(engine: Engine, files: dict[str, Path]) -> None:
    full, diagonal = (Calibration.open(files[name]) for name in ("full", "diagonal"))
    for layer, calls in enumerate(watch(engine)):
        total = sum(x.T @ (x * w[:, None] ** 2) for x, w, _ in calls)
        products = [
            reference.silu_mul(reference.linear(x, e.gate_proj), reference.linear(x, e.up_proj)) * w[:, None]
            for x, w, e in calls
        ]
        inner_total = sum(product.T @ product for product in products)
        values = full.layer(layer)
        assert (
            values["tokens"].sum() == 103 * engine.architecture.num_experts_per_tok == sum(len(x) for x, _, _ in calls)
        )
        np.testing.assert_allclose(values["inputs"].sum(0), total, rtol=1e-3, atol=1e-4 * float(total.abs().max()))
        np.testing.assert_allclose(
            values["inner"].sum(0), inner_total, rtol=1e-3, atol=1e-4 * float(inner_total.abs().max())
        )
        for name in ("inputs", "inner"):
            squares = np.diagonal(values[name], axis1=1, axis2=2)
            np.testing.assert_allclose(diagonal.layer(layer)[name], squares, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("device", ["metal-emulated", "cuda"])
def test_statistics_of_a_gpu_are_those_of_the_cpu(
    engine: Engine, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """In another order of float32 sums; through a part of the experts at a time, tokens in two parts."""
    if device == "cuda":
        fake_cuda.install(monkeypatch)
    monkeypatch.setattr("moepack.runtime.calibrate.TOKENS_AT_ONCE", 64)
    pack, context = engine.pack.directory, 64
    with Engine.open(pack, exact=True, max_context=context) as plain:
        plan = plain.memory_plan
    options = {"memory": plan.total_bytes - 4 * plan.slot_bytes, "process_bytes": plan.process_bytes}
    with Engine.open(pack, device=device, exact=True, max_context=context, **options) as other:
        assert other.store.num_slots == plan.num_slots - 4
        for name in files:
            calibrate(other, WINDOWS, tmp_path / name, full=name == "full")
    for name, path in files.items():
        expected, found = Calibration.open(path), Calibration.open(tmp_path / name)
        for layer in range(MODEL.layers):
            values = found.layer(layer)
            for key, array in expected.layer(layer).items():
                largest = np.abs(array.astype(np.float64)).max()
                np.testing.assert_allclose(values[key], array, rtol=0, atol=STATISTICS_TOLERANCE * largest, err_msg=key)
            assert (values["tokens"] == expected.layer(layer)["tokens"]).all()


def test_an_expert_nobody_chose_takes_its_layers_mean(files: dict[str, Path]) -> None:
    full = Calibration.open(files["full"])
    values = {name: array.copy() for name, array in full.layer(0).items()}
    mean = values["inner"].sum(0) / values["weights"].sum()
    own = values["inner"][1] / values["weights"][1]
    share = PRIOR_TOKENS * values["weights"].sum() / values["tokens"].sum()
    expected = (values["inner"][1] + share * mean) / (values["weights"][1] + share)
    np.testing.assert_allclose(full.moments(0, 1, "down_proj"), expected, rtol=1e-4)
    assert np.abs(full.moments(0, 1, "down_proj") - mean).sum() < np.abs(own - mean).sum()
    for name in ("tokens", "weights", "inputs", "inner"):
        values[name][1] = 0
    full._layer = (0, values)
    np.testing.assert_allclose(
        full.moments(0, 1, "down_proj"), values["inner"].sum(0) / values["weights"].sum(), rtol=1e-4
    )
    assert full.moments(MODEL.layers, 0, "up_proj") is None  # the MTP layer


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    engine: Engine, files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "calibration"

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(engine, WINDOWS, out, full=True, on_layer=stop)
    assert not out.exists()
    layers = []
    calibrate(engine, WINDOWS, out, full=True, on_layer=layers.append)
    assert layers == [1, 1]  # the first of them was done before
    assert out.read_bytes() == files["full"].read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_goes_on_with_the_same_pack_alone(
    source: Path, engine: Engine, files: dict[str, Path], tmp_path: Path
) -> None:
    """The layers that a pack of 8 bits was read for are none of the pack of 16 bits."""
    out = tmp_path / "calibration"

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    pack8 = make_pack(source, tmp_path / "pack8", 8, 32, 16)
    with Engine.open(pack8, exact=True, threads=1) as other, pytest.raises(KeyboardInterrupt):
        calibrate(other, WINDOWS, out, full=True, on_layer=stop)
    calibrate(engine, WINDOWS, out, full=True)
    assert out.read_bytes() == files["full"].read_bytes()


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(NotEnoughSpace, match="File too large"):
            write_json(tmp_path / "windows.json", [0] * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("limit", "name"), [(2**12, "hidden_0.npy"), (2**16, "layer_0.npz")])
def test_a_full_disk_is_named_and_the_run_goes_on_later(
    engine: Engine, files: dict[str, Path], tmp_path: Path, limit: int, name: str
) -> None:
    out, limits = tmp_path / "calibration", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(NotEnoughSpace, match=re.escape(f"{name}: File too large")):
            calibrate(engine, WINDOWS, out, full=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    calibrate(engine, WINDOWS, out, full=True)
    assert out.read_bytes() == files["full"].read_bytes()


class Killed(BaseException):
    """The end of a process at a place of its own: nothing of ours catches it."""


def test_a_run_that_was_killed_before_its_first_layer_goes_on(
    engine: Engine, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "calibration"

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moepack.runtime.calibrate.embed_windows", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(engine, WINDOWS, out, full=True)
    monkeypatch.undo()
    calibrate(engine, WINDOWS, out, full=True)
    assert out.read_bytes() == files["full"].read_bytes()


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
def test_a_run_that_was_killed_at_any_rename_goes_on(
    engine: Engine, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    """A file gets its name when it is whole: what a kill before or after leaves are all the states there are."""
    rename = os.replace
    for place in itertools.count():
        left, out = [place], tmp_path / f"calibration{place}"

        def kill(source: Path, target: Path, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] >= 0 or is_done:
                rename(source, target)
            if left[0] < 0:
                raise Killed

        monkeypatch.setattr(os, "replace", kill)
        try:
            calibrate(engine, WINDOWS, out, full=True)
            break
        except Killed:
            monkeypatch.undo()
        calibrate(engine, WINDOWS, out, full=True)
        assert out.read_bytes() == files["full"].read_bytes(), place
        assert not out.with_name(out.name + UNFINISHED).exists()
    assert place == 2 + 3 * MODEL.layers + 1  # the start, three files of each layer, the calibration file


@pytest.mark.parametrize("missing", ["hidden_1.npy", "layer_0.npz"])
def test_a_folder_that_lacks_a_file_is_begun_anew(
    engine: Engine, files: dict[str, Path], tmp_path: Path, missing: str
) -> None:
    """As one is left by a kill while it was removed, or before the first layer by an earlier version."""
    out, layers = tmp_path / "calibration", []

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(engine, WINDOWS, out, full=True, on_layer=stop)
    (out.with_name(out.name + UNFINISHED) / missing).unlink()
    calibrate(engine, WINDOWS, out, full=True, on_layer=layers.append)
    assert layers == [1, 1]
    assert out.read_bytes() == files["full"].read_bytes()


@pytest.mark.parametrize("full", [False, True])
def test_the_bytes_are_those_of_all_layers_at_once(
    engine: Engine, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """The file, put together from whole layers in memory."""
    monkeypatch.setattr(shutil, "rmtree", lambda folder: None)
    out = tmp_path / "calibration"
    calibrate(engine, WINDOWS, out, full=full)
    folder = out.with_name(out.name + UNFINISHED)
    tensors = {
        f"layers.{layer}.{name}": array
        for layer in range(MODEL.layers)
        for name, array in dict(np.load(folder / f"layer_{layer}.npz")).items()
    }
    facts = Calibration.open(out).facts | {
        "sha256": {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in tensors.items()}
    }
    raw = json.dumps(facts, sort_keys=True).encode()
    own = {"facts": raw, "facts_sha256": hashlib.sha256(raw).digest()}
    listed = [(name, "U32" if name.endswith("tokens") else "F32", array.shape) for name, array in tensors.items()]
    header, specs = layout_tensors([*listed, *((name, "U8", (len(data),)) for name, data in own.items())])
    data = [own[spec.name] if spec.name in own else tensors[spec.name].tobytes() for spec in specs]
    assert out.read_bytes() == b"".join([header, *data]) == files["full" if full else "diagonal"].read_bytes()


def test_one_layers_statistics_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While layers are run, and while the file is put together from all of them."""
    model = TinyModel(layers=6, experts=32)
    one_layer = 4 * model.experts * (model.hidden**2 + model.moe_intermediate**2)
    living: weakref.WeakSet[LayerStatistics] = weakref.WeakSet()
    most = [0]

    class Counted(LayerStatistics):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            living.add(self)
            most[0] = max(most[0], len(living))

    monkeypatch.setattr("moepack.runtime.calibrate.LayerStatistics", Counted)
    pack = make_pack(write_checkpoint(tmp_path / "source", model), tmp_path / "pack", 16, 32, 16)
    out, layers = tmp_path / "calibration", []

    def stop_at_the_last(count: int) -> None:
        layers.append(count)
        if len(layers) == model.layers:
            raise KeyboardInterrupt

    gc.disable()  # what goes by itself is gone at once
    try:
        with Engine.open(pack, exact=True, threads=1) as engine:
            with pytest.raises(KeyboardInterrupt):
                calibrate(engine, WINDOWS, out, full=True, on_layer=stop_at_the_last)
            assert most == [1]
            tracemalloc.start()
            calibrate(engine, WINDOWS, out, full=True)
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert sum(Calibration.open(out).layer(5)[name].nbytes for name in ("inputs", "inner")) == one_layer
    assert peak < 1.2 * one_layer, f"{peak / one_layer:.2f} layers"


@pytest.mark.skipif(sys.platform != "linux", reason="needs the system's count of a process's largest memory")
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("characters", [16_000, pytest.param(40_000, marks=pytest.mark.slow)])  # two windows, and five
def test_the_command_stays_within_its_memory(
    demo_pack: Callable[[int], Path], tmp_path: Path, characters: int, full: bool
) -> None:
    code = (
        "import atexit, sys; from moepack.layout.process import peak_rss_bytes; from moepack.runtime.cli import main; "
        "atexit.register(lambda: print('peak', peak_rss_bytes(), file=sys.stderr)); main()"
    )
    text = tmp_path / "text"
    text.write_text(read_default_text()[:characters])

    def run(memory: str) -> subprocess.CompletedProcess[str]:
        options = ("--text", text, "-o", tmp_path / "out", "--threads", 1, "--memory", memory, *["--full"] * full)
        command = [sys.executable, "-c", code, "calibrate", *map(str, (demo_pack(16), *options))]
        return subprocess.run(command, capture_output=True, text=True)

    refused = run("1MiB")
    assert refused.returncode == 1
    assert "tokens of text take: give less" in refused.stderr
    needed = re.search(r"([\d,]+) MiB are needed", refused.stderr)
    assert needed, refused.stderr
    mib = int(needed[1].replace(",", "")) + 4
    found = run(f"{mib}MiB")
    assert found.returncode == 0, found.stderr
    peak = int(re.findall(r"peak (\d+)", found.stderr)[-1])
    assert peak <= mib * 2**20, f"{peak / 2**20:.0f} MiB of {mib}"


def read_all(path: Path) -> None:
    opened = Calibration.open(path)
    for layer in range(MODEL.layers):
        opened.layer(layer)


def test_a_changed_byte_is_found(files: dict[str, Path], tmp_path: Path) -> None:
    raw = files["diagonal"].read_bytes()
    path = tmp_path / "changed"
    for place in range(9, len(raw), len(raw) // 60):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(CalibrationError):
            read_all(path)
    for cut in (raw[:-1], raw + b"x", raw[:5], b""):
        path.write_bytes(cut)
        with pytest.raises(CalibrationError, match="make it again"):
            Calibration.open(path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.open(tmp_path / "missing")


def test_a_later_version_is_refused(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moepack.layout.calibration.CALIBRATION_VERSION", 3)
    calibrate(engine, WINDOWS[1:], tmp_path / "later")
    monkeypatch.undo()
    with pytest.raises(UnsupportedVersion, match="version 3"):
        Calibration.open(tmp_path / "later")


def test_packs_of_few_bits_are_no_source(source: Path, tmp_path: Path) -> None:
    with (
        Engine.open(make_pack(source, tmp_path / "pack", 4, 32), threads=1) as poor,
        pytest.raises(UsageError, match="16 bits"),
    ):
        calibrate(poor, WINDOWS, tmp_path / "out")


def fetch_expert(engine: Engine, layer: int, expert: int) -> Any:
    return next(found for batch in engine.store.fetch(layer, [expert]) for _, found in batch)


def test_moe_convert_quantizes_by_it(source: Path, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "pack"
    options = ("--bits", 2, "--group-size", 32, "--resident-bits", 16)
    result = run_convert(source, out, *options, "--calibration", files["full"], "--json")
    assert (result.code, json.loads(result.out)["quantizer"]) == (0, "gptq")
    assert Manifest.read(out).provenance["settings"]["arguments"]["quantizer"] == "gptq"
    assert problems_of(out) == []
    with (
        Engine.open(out, threads=1) as engine,
        Engine.open(make_pack(source, tmp_path / "p16", 16, 32, 16), threads=1) as original,
    ):
        stored, weights = (fetch_expert(e, 1, 3).up_proj for e in (engine, original))
        moments = Calibration.open(files["full"]).moments(1, 3, "up_proj")
        expected = quantize_gptq(weights.data.float().numpy(), 2, 32, moments)
        np.testing.assert_array_equal(stored.scales.float().numpy(), bf16_to_float32(expected.scales))
    assert "mse" in run_convert(source, tmp_path / "mse", *options, "--calibration", files["diagonal"], "--json").out
    again = run_convert(source, out, *options, "--calibration", files["diagonal"], "--quantizer", "mse")
    assert again.code == 2  # another pack is there


@pytest.mark.parametrize(("options", "expected"), [
    (("--quantizer", "gptq"), "--calibration FILE of moe-run calibrate --full"),
])  # fmt: skip
def test_a_quantizer_without_what_it_needs(
    source: Path, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    result = run_convert(source, tmp_path / "pack", "--group-size", 32, *options)
    assert (result.code, list(tmp_path.iterdir())) == (2, [])
    assert expected in result.err


def test_another_models_file_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    for model, differing in (
        (TinyModel(layers=2, full_attention_interval=2, experts=6), "num_experts"),
        (replace(MODEL, seed=9), "shards"),
    ):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        other = write_checkpoint(tmp_path / "other", model)
        result = run_convert(other, tmp_path / "pack", "--group-size", 32, "--calibration", files["full"])
        assert result.code == 1
        assert f"belongs to another model: {differing}" in result.err


def test_the_bundled_text_is_there() -> None:
    text = read_default_text()
    assert len(text) > 200_000
    assert all(mark in text for mark in ("<|im_start|>", "<tool_call>", "def "))
