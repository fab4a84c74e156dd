"""Tuning: the operations for learning against the reference's gradients, a real run, what convert makes of it."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_pack
from convert_command import problems_of, run_convert
from moepack.kernels import reference
from moepack.kernels.differentiable import DifferentiableOps
from moepack.kernels.matrix import Expert, Matrix
from moepack.layout.calibration import Calibration
from moepack.layout.errors import CalibrationError, MemoryBudgetError, UsageError, WriteError
from moepack.layout.manifest import Manifest
from moepack.layout.reader import Pack
from moepack.runtime import tune
from moepack.runtime.calibrate import ANSWERED_SUFFIX, SAMPLED_SUFFIX, answer_windows, calibrate, sample_windows
from moepack.runtime.cli import main
from moepack.runtime.engine import Engine
from moepack.runtime.evaluate import ToolPrompt, answer_prompt, render_prompt
from moepack.runtime.learner import Learner
from moepack.runtime.tune import KEPT_APART, PIECE_TOKENS, Tuning, TuningPlan, check_memory, cut_window
from tiny_checkpoint import TinyModel, write_checkpoint

MODEL = TinyModel(layers=2, full_attention_interval=2, experts=5, max_positions=128)
WINDOWS = [np.random.default_rng(seed).integers(0, 64, 70).tolist() for seed in range(KEPT_APART)]
PLAN = TuningPlan(steps=30, level_rate=5e-3)
OPTIONS = ("--bits", 2, "--group-size", 32, "--resident-bits", 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tune") / "source", MODEL)


@pytest.fixture(scope="module")
def engine(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.open(make_pack(source, tmp_path_factory.mktemp("pack16") / "pack", 16, 32, 16), exact=True, threads=1)


@pytest.fixture(scope="module")
def start(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start") / "pack"
    assert run_convert(source, out, *OPTIONS).code == 0
    return out


def run_tuning(engine: Engine, start: Path, out: Path, on_step: Callable[[int], object] = lambda steps: None) -> Any:
    """A short run at a rate at which integers move nevertheless."""
    with Pack.open(start) as pack:
        return Tuning(engine, pack, WINDOWS, out, PLAN).run(on_step)


@pytest.fixture(scope="module")
def tuned(engine: Engine, start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, float]:
    out = tmp_path_factory.mktemp("tuned") / "file"
    return out, *run_tuning(engine, start, out)


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def assert_same_gradients(
    one: Callable[..., torch.Tensor], other: Callable[..., torch.Tensor], inputs: list[torch.Tensor]
) -> None:
    """Equal results, and equal gradients of a random mixture of them."""
    found = []
    for function in (one, other):
        out = function(*inputs)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found.append([out.detach(), *torch.autograd.grad((out * direction).sum(), inputs)])
    for mine, expected in zip(*found):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def each_window(
    count: int, run: Callable[..., torch.Tensor], dimensions: tuple[int, ...]
) -> Callable[..., torch.Tensor]:
    """A function of one window, of several of equal length; the windows follow each other in these dimensions."""

    def run_each(*inputs: torch.Tensor) -> torch.Tensor:
        parts = (x.chunk(count, dim=dimension) for x, dimension in zip(inputs, dimensions, strict=True))
        return torch.cat([run(*window) for window in zip(*parts)])

    return run_each


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("tokens", [2, 64, 150])
def test_the_delta_rule_and_its_gradient(tokens: int, windows: int) -> None:
    def run(ops: Any) -> Callable[..., torch.Tensor]:
        return lambda q, k, v, decay, beta: ops.gated_delta(
            q, k, v, -decay.square(), beta.sigmoid(), torch.zeros(4, 8, 16)
        )

    rows = windows * tokens
    inputs = leaves((rows, 2, 8), (rows, 2, 8), (rows, 4, 16), (rows, 4), (rows, 4))
    one_by_one = each_window(windows, run(reference), (0,) * 5)
    assert_same_gradients(run(DifferentiableOps(windows=windows)), one_by_one, inputs)


def test_attention_rope_and_convolution_and_their_gradients() -> None:
    ops = DifferentiableOps(windows=2)
    inputs = leaves((140, 4, 16), (2, 140, 16), (2, 140, 16))
    assert_same_gradients(ops.attention, each_window(2, reference.attention, (0, 1, 1)), inputs)

    def turn(ops: Any) -> Callable[..., torch.Tensor]:
        return lambda x: ops.rope(x, 0, 1e4, 8)

    assert_same_gradients(turn(ops), each_window(2, turn(reference), (0,)), inputs[:1])
    x, weight = leaves((140, 12), (12, 4))

    def convolve(ops: Any) -> Callable[..., torch.Tensor]:
        return lambda x: ops.causal_conv(x, weight, torch.zeros(3, 12))

    assert_same_gradients(convolve(ops), each_window(2, convolve(reference), (0,)), [x])


def test_chosen_experts_and_their_gradient() -> None:
    router = torch.randn(7, 32)
    router[6] = 0  # an expert that nobody chooses is among them

    def add_one_by_one(x: torch.Tensor, scores: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
        ids, weights = reference.choose_experts(scores, 2)
        out = torch.zeros_like(x)
        for expert in range(7):
            tokens, places = (ids == expert).nonzero(as_tuple=True)
            one = Expert(*(Matrix.from_floats(matrix[expert]) for matrix in matrices))
            reference.add_expert(out, x, one, tokens, weights[tokens, places])
        return out

    def run_chosen(x: torch.Tensor, scores: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
        return DifferentiableOps().run_chosen(x, *reference.choose_experts(scores, 2), *matrices)

    x, scores, *matrices = leaves((40, 32), (40, 7), (7, 16, 32), (7, 16, 32), (7, 32, 16))
    scores.data[:, 6] = -100
    assert_same_gradients(run_chosen, add_one_by_one, [x, scores, *matrices])


def test_the_rounded_model_is_the_one_that_runs(engine: Engine, start: Path, tmp_path: Path) -> None:
    with Pack.open(start) as pack, Engine.open(start, exact=True, threads=1) as rounded:
        learner = Learner(engine, pack, torch.device("cpu"))
        for windows in (WINDOWS[:2], [WINDOWS[2][:5]]):  # two at once, which do not see each other; a short one
            token_ids = torch.tensor(windows)
            for states, one in (
                (learner.hidden(token_ids, is_final=True).detach(), rounded),
                (learner.target(token_ids), engine),
            ):
                expected = torch.cat([one.logits(window) for window in windows])
                found = states @ learner.head.T
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_the_answers_come_nearer(engine: Engine, tuned: tuple[Path, float, float]) -> None:
    out, before, after = tuned
    assert after < 0.98 * before
    assert Calibration.open(out).facts["tuned"]["kl"] == [before, after]


def test_convert_writes_what_was_tuned(
    source: Path, engine: Engine, start: Path, tuned: tuple[Path, float, float], tmp_path: Path
) -> None:
    out, known = tmp_path / "pack", Calibration.open(tuned[0])
    assert run_convert(source, out, "--resident-bits", 16, "--calibration", tuned[0]).code == 0
    assert problems_of(out) == []
    manifest, origin = Manifest.read(out), Manifest.read(start)
    assert manifest.provenance["settings"]["arguments"] == origin.provenance["settings"]["arguments"]
    assert manifest.provenance["settings"]["calibration"]["tuned"]["steps"] == PLAN.steps
    assert manifest.expert_files[-1].sha256 == origin.expert_files[-1].sha256  # the MTP layer is as it was
    moved = 0
    with Engine.open(out, threads=1) as converted, Engine.open(start, threads=1) as first:
        for layer, expert in ((0, 0), (1, 4)):
            one, other = (
                next(found for batch in e.store.fetch(layer, [expert]) for _, found in batch)
                for e in (converted, first)
            )
            arrays = known.tuned_matrix(layer, expert, "down_proj")
            np.testing.assert_array_equal(one.down_proj.data.numpy(), arrays["w_q"].view(np.uint8))
            np.testing.assert_array_equal(
                one.down_proj.scales.view(torch.int16).numpy(), arrays["scales"].view(np.int16)
            )
            moved += int((one.down_proj.data != other.down_proj.data).sum())
    assert moved
    block = run_convert(source, out, "--redo", "1:2", "--calibration", tuned[0])
    assert (block.code, problems_of(out)) == (0, [])


def test_a_stopped_run_goes_on_to_the_same_bytes(
    engine: Engine, start: Path, tuned: tuple[Path, float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "SAVE_EVERY", 8)
    out, done = tmp_path / "file", []

    def stop(steps: int) -> None:
        done.append(steps)
        if sum(done) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tuning(engine, start, out, stop)
    assert not out.exists()
    rest: list[int] = []
    run_tuning(engine, start, out, rest.append)
    assert rest == [16] + [1] * 14
    assert out.read_bytes() == tuned[0].read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_goes_on_with_the_same_packs_alone(
    source: Path, engine: Engine, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps towards a pack of 8 bits are none towards one of 16, nor is a folder that was being removed half a run."""
    monkeypatch.setattr(tune, "SAVE_EVERY", 8)
    out = tmp_path / "file"

    def stop_after(count: int) -> Callable[[int], object]:
        done: list[int] = []

        def note(steps: int) -> None:
            done.append(steps)
            if sum(done) >= count:
                raise KeyboardInterrupt

        return note

    pack8 = make_pack(source, tmp_path / "pack8", 8, 32, 16)
    with Engine.open(pack8, exact=True, threads=1) as other, pytest.raises(KeyboardInterrupt):
        run_tuning(other, start, out, stop_after(9))
    begun: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run_tuning(engine, start, out, lambda steps: begun.append(steps) or stop_after(1)(steps))
    assert begun == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        run_tuning(engine, start, out, stop_after(9))
    assert (out.with_name("file.unfinished") / "state.pt").exists()
    (out.with_name("file.unfinished") / "progress.json").unlink()
    begun.clear()
    with pytest.raises(KeyboardInterrupt):
        run_tuning(engine, start, out, lambda steps: begun.append(steps) or stop_after(1)(steps))
    assert begun == [0, 1]


def test_numbers_that_became_none_are_no_gain(
    source: Path,
    engine: Engine,
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tune, "LINE_RATE", float("nan"))
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("in the of and the fox " * 300)
    options = ("--tune", start, "--text", text, "--threads", 1, "-o", out, "--steps", 2)
    monkeypatch.setattr(sys, "argv", [str(part) for part in ("moe-run", "calibrate", engine.pack.directory, *options)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert f"note: that is no gain, so the file holds the experts of {start}" in capsys.readouterr().err
    assert Calibration.open(out).facts["tuned"]["kl"][1] is None
    assert run_convert(source, tmp_path / "pack", "--resident-bits", 16, "--calibration", out).code == 0
    found, expected = (Manifest.read(pack).expert_files for pack in (tmp_path / "pack", start))
    assert [file.sha256 for file in found] == [file.sha256 for file in expected]


def test_what_is_no_better_is_not_written(source: Path, engine: Engine, start: Path, tmp_path: Path) -> None:
    out, pack = tmp_path / "file", tmp_path / "pack"
    with Pack.open(start) as opened:
        plan = TuningPlan(steps=3, level_rate=1.0)  # breaks every integer
        before, after = Tuning(engine, opened, WINDOWS, out, plan).run()
    assert after > before
    assert Calibration.open(out).facts["tuned"]["kl"] == [before, after]
    assert run_convert(source, pack, "--resident-bits", 16, "--calibration", out).code == 0
    for one, other in zip(Manifest.read(pack).expert_files, Manifest.read(start).expert_files):
        assert one.sha256 == other.sha256


def test_mixed_bits_are_tuned_as_they_are(source: Path, engine: Engine, tmp_path: Path) -> None:
    known, start, out = (tmp_path / name for name in ("known", "start", "tuned"))
    calibrate(engine, WINDOWS, known, full=True)
    mixed = ("--bits", "mixed", "--bpw", 3.5, "--resident-bits", 16, "--calibration", known)
    assert run_convert(source, start, *mixed).code == 0
    assert len(Manifest.read(start).expert_files[0].tiers) > 1
    run_tuning(engine, start, out)
    assert run_convert(source, tmp_path / "pack", "--resident-bits", 16, "--calibration", out).code == 0
    for one, other in zip(Manifest.read(tmp_path / "pack").expert_files, Manifest.read(start).expert_files):
        assert (one.tiers, one.expert_tiers) == (other.tiers, other.expert_tiers)


def test_a_tuned_file_settles_bits_and_groups(source: Path, tuned: tuple[Path, float, float], tmp_path: Path) -> None:
    for given in (("--bits", 4), ("--group-size", 64), ("--quantizer", "mse"), ("--bpw", 3)):
        result = run_convert(source, tmp_path / "pack", *given, "--calibration", tuned[0])
        assert (result.code, list(tmp_path.iterdir())) == (2, [])
        assert "leave out" in result.err
    result = run_convert(source, tmp_path / "pack", "--resident-bits", 5, "--calibration", tuned[0])
    assert (result.code, list(tmp_path.iterdir())) == (2, [])
    assert "--resident-bits 5: expected one of 4, 8, 16" in result.err


def test_a_tuned_file_that_is_not_whole_is_refused(
    source: Path, engine: Engine, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = tune.write_calibration

    def leave_out(out: Path, facts: Any, arrays: list[Any], read: Any) -> None:
        write(out, facts, arrays[:-1], read)

    monkeypatch.setattr(tune, "write_calibration", leave_out)
    run_tuning(engine, start, tmp_path / "tuned")
    result = run_convert(source, tmp_path / "pack", "--calibration", tmp_path / "tuned")
    assert (result.code, (tmp_path / "pack").exists()) == (1, False)
    assert "tuned.1.4.down_proj.biases: expected ['BF16'" in result.err
    known = Calibration.open(tmp_path / "tuned")
    monkeypatch.setattr(known, "read", lambda name: np.full((1, 1), 0x7FC0, np.uint16))
    with pytest.raises(CalibrationError, match="NaN"):
        known.tuned_matrix(0, 0, "up_proj")


def test_what_cannot_be_tuned(engine: Engine, start: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", replace(MODEL, seed=9))
    for pack, windows, expected in (
        (make_pack(other, tmp_path / "pack", 2), WINDOWS, "another checkpoint"),
        (engine.pack.directory, WINDOWS, "16 bits"),
        (start, WINDOWS[1:], "15 windows of text, expected at least 16: of 128 tokens each they are 2,048 tokens"),
    ):
        with Pack.open(pack) as opened, pytest.raises(UsageError, match=expected):
            Tuning(engine, opened, windows, tmp_path / "out", PLAN)
    weights = 3 * 2 * 5 * engine.architecture.hidden_size * engine.architecture.moe_intermediate_size
    with Pack.open(start) as opened:
        assert check_memory(opened, 2**30, 512) > 24 * weights
        with pytest.raises(MemoryBudgetError, match="tune a smaller model"):
            check_memory(opened, 24 * weights, 512)


def test_text_of_its_own_is_kept_beside_the_pack(engine: Engine) -> None:
    path = engine.pack.directory.with_name(engine.pack.directory.name + SAMPLED_SUFFIX)
    windows = sample_windows(engine, 100, 40)
    assert [len(window) for window in windows] == [40, 40, 40]
    assert len({tuple(window) for window in windows}) == 3
    kept = json.loads(path.read_text())
    counted: list[int] = []
    assert sample_windows(engine, 60, 40, counted.append) == windows[:2]
    assert (counted, list(kept["windows"].values())) == ([80], windows)
    assert sample_windows(engine, 60, 30) != windows[:2]  # windows of another size: beside those
    assert sample_windows(engine, 60, 40, counted.append) == windows[:2]
    assert counted == [80, 80]
    for other in ({"manifest": "of another"}, {"windows": [[1, 2]]}):
        path.write_text(json.dumps({**kept, **other}))
        assert sample_windows(engine, 100, 40) == windows


def test_text_of_a_pack_that_is_named_by_a_dot(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = engine.pack.directory.with_name(engine.pack.directory.name + SAMPLED_SUFFIX)
    path.unlink(missing_ok=True)
    monkeypatch.chdir(engine.pack.directory)
    with Engine.open(Path(), exact=True, threads=1) as here:
        sample_windows(here, 10, 10)
    path.unlink()


@pytest.mark.parametrize(("seconds", "writes"), [(0, [1, 2, 3, 4]), (1e9, [4])])
def test_text_of_its_own_is_kept_when_it_is_stopped(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: float, writes: list[int]
) -> None:
    path = engine.pack.directory.with_name(engine.pack.directory.name + SAMPLED_SUFFIX)
    path.unlink(missing_ok=True)
    windows, written, counted = sample_windows(engine, 60, 10), [], []
    path.unlink()
    write = "moepack.runtime.calibrate.write_json"
    monkeypatch.setattr(write, lambda path, value: written.append(list(value["windows"].values())))
    monkeypatch.setattr("moepack.runtime.calibrate.KEEP_SECONDS", seconds)

    def stop(tokens: int) -> None:
        counted.append(tokens)
        if counted == [0, 10, 10, 10, 10]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_windows(engine, 60, 10, stop)
    assert written == [windows[:count] for count in writes]


def test_the_end_of_a_window_is_learned_with_what_stood_before_it() -> None:
    assert cut_window([]) == []
    assert cut_window([7]) == [[7]]
    for tokens in (PIECE_TOKENS - 1, PIECE_TOKENS, PIECE_TOKENS + 1, 2 * PIECE_TOKENS, 2 * PIECE_TOKENS + 3):
        window = list(range(tokens))
        pieces = cut_window(window)
        assert [token for piece in pieces for token in piece] == window
        assert all(len(piece) == PIECE_TOKENS for piece in pieces[1:])
        assert len(pieces[-1]) == min(tokens, PIECE_TOKENS)


def test_answers_of_its_own_are_kept_beside_the_pack(engine: Engine) -> None:
    path = engine.pack.directory.with_name(engine.pack.directory.name + ANSWERED_SUFFIX)
    prompts = [ToolPrompt([{"role": "user", "content": text}], [], []) for text in ("of the fox", "and")]
    windows = answer_windows(engine, prompts)
    for prompt, window in zip(prompts, windows, strict=True):
        assert window == [*render_prompt(engine, prompt), *answer_prompt(engine, prompt)]
    kept = path.read_bytes()
    counted: list[int] = []
    assert answer_windows(engine, prompts, counted.append) == windows
    assert (counted, path.read_bytes()) == ([2], kept)
    assert answer_windows(engine, prompts[1:]) == windows[1:]
    again = [prompts[1], prompts[1], ToolPrompt([{"role": "user", "content": "in the"}], [], []), prompts[0]]
    answers = answer_windows(engine, again, counted.append)  # those that are new are made, and no other is lost
    assert (answers[:2], answers[3], counted[1:]) == ([windows[1]] * 2, windows[0], [3, 1])
    assert len(json.loads(path.read_text())["windows"]) == 3
    path.unlink()


@pytest.mark.parametrize(("more", "code", "said"), [
    (("--sample", 100, "--steps", 3), 0, "on text kept apart"),
    (("--tools", "TOOLS", "--steps", 2, "--step-tokens", 1024), 0, "on text kept apart"),
    (("--tools", "nothing.jsonl"), 2, "nothing.jsonl"),
    (("--device", "cuda"), 2, "finds no GPU"),
    (("--full",), 2, "expected one of them"),
    (("--step-tokens", 700), 2, "--step-tokens 700: expected 512 or a multiple of it"),
    (("--level-rate", 1.5), 2, "--level-rate 1.5: expected a number from 0 to 1"),
    (("--memory", "1MiB"), 1, "tune a smaller model"),
    (("--device", "metal-emulated"), 2, "on the processor"),
])  # fmt: skip
def test_the_command(
    engine: Engine,
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[Any, ...],
    code: int,
    said: str,
) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("in the of and the fox " * 300)
    tools = tmp_path / "tools.jsonl"
    tools.write_text(json.dumps({"messages": [{"role": "user", "content": "fox"}], "tools": [], "expected_calls": []}))
    more = tuple(tools if option == "TOOLS" else option for option in more)
    options = ("--tune", start, "--text", text, "--threads", 1, "-o", out, *more)
    monkeypatch.setattr(sys, "argv", [str(part) for part in ("moe-run", "calibrate", engine.pack.directory, *options)])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code or 0, out.exists()) == (code, code == 0)
    assert said in capsys.readouterr().err


def test_what_cannot_be_tuned_is_refused_before_text_is_sampled(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moepack.runtime.calibrate.sample_windows", None)
    pack = str(engine.pack.directory)
    options = ("--tune", pack, "--sample", "100", "--threads", "1", "-o", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["moe-run", "calibrate", pack, *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "experts of 16 bits" in capsys.readouterr().err


def test_a_directory_is_no_file_to_write(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (".", str(tmp_path)):
        monkeypatch.setattr(sys, "argv", ["moe-run", "calibrate", str(engine.pack.directory), "-o", out])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        assert f"error: {out}: is a directory: give the name of a file in it" in capsys.readouterr().err


def test_what_is_of_tuning_alone_is_refused_without_it(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", "5", "-o", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["moe-run", "calibrate", str(engine.pack.directory), *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "--step-tokens, --level-rate and --seed are of --tune PACK: give it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_tuning_in_one_line_and_keeps_what_was_saved(
    engine: Engine, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "SAVE_EVERY", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"state\.pt\.new: cannot be written .*run the same command again"):
            run_tuning(engine, start, tmp_path / "tuned")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.rglob("*.new"))
    run_tuning(engine, start, tmp_path / "tuned")
    assert Calibration.open(tmp_path / "tuned").tuned
