"""A pack's experts tuned until the model with them answers as its 16-bit self does: calibrate --tune.

Rounding matrix by matrix keeps what each of them does; what the model says is another matter. Here the integers, scales
and biases of all routed experts move together, down the gradient of the KL between the next-token distributions of the
16-bit model and of the rounded one. An integer is the rounding of a level that moves freely (straight-through), and
starts where the weight lay between two of them; scales and biases move as floats and become bf16 at the end. Routers
and all other weights stay. Adam, its rates falling to zero along a cosine; the order of the windows is the seed's.

Every 16th window is kept apart: the KL there, before and after, is the honest one.

It learns on the processor, or by the same operations on a GPU that torch knows (`--device cuda`).

Limits: all experts are in memory as floats, with gradients and Adam's moments: BYTES_PER_WEIGHT each. That is for
models of up to a few billion weights; a larger one is refused, and calibrate without --tune takes any. On the processor
learning takes one core, whatever --threads says: torch's other threads would fight with the native ones. The answer is
that of one machine: sums are in the order of the linear algebra library at hand.

    Tuning(engine, Pack.open("demo2.moepack"), windows, Path("demo2.tuned"), TuningPlan(steps=1000)).run()
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moepack.layout.calibration import describe_model, tuned_arrays, write_calibration
from moepack.layout.errors import MemoryBudgetError, UsageError, WriteError
from moepack.layout.reader import Pack
from moepack.layout.sizes import format_size
from moepack.layout.spec import UNQUANTIZED_BITS
from moepack.runtime.calibrate import UNFINISHED, digest_windows, model_of, write_json
from moepack.runtime.engine import Engine, hash_manifest
from moepack.runtime.evaluate import WINDOW
from moepack.runtime.learner import Learner, RoundedMatrices, read_expert, stored_arrays
from moepack.runtime.resident import ResidentWeights

LINE_RATE = 1e-3  # Adam's largest step of scales and biases, as a share of the mean scale
LINE_TOP = 3  # the largest integer at which a scale moves at that rate: the ends of all lines move alike
MOMENTS = (0.9, 0.99)
WARM_UP = 20  # steps in which the rates rise
PIECE_TOKENS = 512  # that learn together, without what stood before them
LOGIT_ROWS = 512  # positions whose distributions exist at the same time
KEPT_APART = 16  # one window in so many is scored and never learned from
BYTES_PER_WEIGHT = 32  # weight, level, gradient, two moments, the rounded weight and its gradient, one copy in passing
PADDED = 2  # rows of experts that run together, over those that a token asks for
SAVE_EVERY = 100  # steps


@dataclass(frozen=True)
class TuningPlan:
    """steps of so many tokens each; seed of their order.

    level_rate   Adam's largest step of a level, in levels: steps of more tokens bear a larger one

    Raises UsageError for tokens that are no whole pieces, or a rate that is no share of a level.
    """

    steps: int
    seed: int = 0
    step_tokens: int = 2 * PIECE_TOKENS
    level_rate: float = 3e-4

    def __post_init__(self) -> None:
        if not 0 <= self.level_rate <= 1:
            raise UsageError(f"--level-rate {self.level_rate:g}: expected a number from 0 to 1")
        if self.step_tokens < 1 or self.step_tokens % PIECE_TOKENS:
            raise UsageError(f"--step-tokens {self.step_tokens}: expected {PIECE_TOKENS} or a multiple of it")


class Tuning:
    """One run: what learns, what it is compared with, and where it is written.

    engine    of a pack of 8 or 16 bits of the model, exact
    start     a quantized pack of the same model: its experts are the start
    windows   token ids to learn from
    device    one of torch's, to learn on

    Raises UsageError if the packs do not fit each other or there are fewer windows than can be kept apart.
    """

    def __init__(
        self,
        engine: Engine,
        start: Pack,
        windows: Sequence[Sequence[int]],
        out: Path,
        plan: TuningPlan,
        device: torch.device = torch.device("cpu"),
    ):
        self.out, self.plan, self.device, self.folder = out, plan, device, out.with_name(out.name + UNFINISHED)
        self.start, self.arguments = start, check_start(engine, start)
        self.schemes = [file.as_json() for file in start.manifest.expert_files]
        self.kept = [list(window) for window in windows[KEPT_APART - 1 :: KEPT_APART]]
        learned = [list(window) for place, window in enumerate(windows) if (place + 1) % KEPT_APART]
        self.pieces = [piece for window in learned for piece in cut_window(window)]
        if not self.kept:
            size = min(WINDOW, engine.max_context)
            raise UsageError(
                f"--tune: {len(windows)} windows of text, expected at least {KEPT_APART}: of {size:,} tokens each they "
                f"are {KEPT_APART * size:,} tokens: give more --text or --sample"
            )
        self.facts = {
            "model": model_of(engine),
            "tokens": sum(map(len, windows)),
            "text_sha256": digest_windows(windows),
            "full": False,
        }
        packs = {"pack": hash_manifest(engine.pack), "start": [file["sha256"] for file in self.schemes]}
        self.identity = {**self.facts, **vars(plan), **packs}
        self.learner = Learner(engine, start, device)
        self.optimizer = torch.optim.Adam(self._parameter_groups(), betas=MOMENTS, fused=True)

    def run(self, on_step: Callable[[int], object] = lambda steps: None) -> tuple[float, float]:
        """Tune and write the file; the mean KL over the windows kept apart, before and after.

        on_step   called with the steps done, those of an earlier run at once

        If the KL is no less than before, what is written is the start. Stopped at any time, the same call goes on from
        the last SAVE_EVERY steps. Raises NotEnoughSpace.
        """
        done, before = self._resume()
        on_step(done)
        for step in range(done, self.plan.steps):
            self._step(step)
            on_step(1)
            if (step + 1) % SAVE_EVERY == 0 and step + 1 < self.plan.steps:
                self._save(step + 1, before)
        after = self.score()
        self._write(before, after)
        shutil.rmtree(self.folder)
        return before, after

    def _step(self, step: int) -> None:
        share = min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / self.plan.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["first_rate"]
        self.optimizer.zero_grad()
        token_ids, is_real = _stack(self._pieces_of(step), self.device)
        target, hidden = self.learner.target(token_ids), self.learner.hidden(token_ids)
        grad_hidden, head = torch.empty_like(target), self.learner.head
        for rows in torch.arange(len(target), device=self.device).split(LOGIT_ROWS):
            p, r = ((states.detach()[rows] @ head.T).softmax(-1) for states in (hidden, target))
            grad_hidden[rows] = (p - r) @ head  # of the KL, in closed form
        hidden.backward(grad_hidden * (is_real / is_real.sum())[:, None])
        self.optimizer.step()

    def _pieces_of(self, step: int) -> list[list[int]]:
        """What a step learns from: round after round through all pieces, each in an order of its own."""
        found, count = [], self.plan.step_tokens // PIECE_TOKENS
        for number in range(step * count, (step + 1) * count):
            epoch, place = divmod(number, len(self.pieces))
            order = np.random.default_rng([self.plan.seed, epoch]).permutation(len(self.pieces))
            found.append(self.pieces[order[place]])
        return found

    @torch.no_grad()
    def score(self) -> float:
        """Mean KL over the windows kept apart, of what would be written now."""
        total = 0.0
        for window in self.kept:
            token_ids, _ = _stack([window], self.device)
            target, hidden = self.learner.target(token_ids), self.learner.hidden(token_ids, is_final=True)
            for states in zip(target.split(LOGIT_ROWS), hidden.split(LOGIT_ROWS)):
                log_r, log_p = ((rows @ self.learner.head.T).log_softmax(-1) for rows in states)
                total += float((log_r.exp() * (log_r - log_p)).sum(dtype=torch.float64))
        return total / sum(map(len, self.kept))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for _, _, part in self.learner.parts:
            rate = LINE_RATE * float(part.scales.detach().abs().mean())
            groups += [{"params": [part.levels], "first_rate": self.plan.level_rate}]
            groups += [{"params": [part.scales], "first_rate": rate * LINE_TOP / part.top}]
            groups += [{"params": [part.biases], "first_rate": rate}]
        return groups

    def _resume(self) -> tuple[int, float]:
        """Steps done by an earlier run with the same packs and facts, and the KL before all of them."""
        progress, state = self.folder / "progress.json", self.folder / "state.pt"
        is_there = state.exists() and progress.exists()
        if is_there and json.loads(progress.read_text()) == json.loads(json.dumps({"facts": self.identity})):
            kept = torch.load(state, weights_only=True, map_location=self.device)
            with torch.no_grad():
                for (_, _, part), values in zip(self.learner.parts, kept["parts"]):
                    for own, value in zip(part.parameters, values):
                        own.copy_(value)
            self.optimizer.load_state_dict(kept["optimizer"])
            return kept["steps"], kept["before"]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_json(progress, {"facts": self.identity})
        return 0, self.score()

    def _save(self, steps: int, before: float) -> None:
        parts = [[t.detach() for t in part.parameters] for _, _, part in self.learner.parts]
        state = {"steps": steps, "before": before, "parts": parts, "optimizer": self.optimizer.state_dict()}
        partial = self.folder / "state.pt.new"
        try:
            torch.save(state, partial)
        except (OSError, RuntimeError) as error:  # torch's own writer tells a full disk by the latter
            partial.unlink(missing_ok=True)
            raise WriteError(
                f"{partial}: cannot be written ({str(error).splitlines()[0]}): make space, check the disk, then "
                "run the same command again to go on from here"
            ) from None
        os.replace(partial, self.folder / "state.pt")

    def _write(self, before: float, after: float) -> None:
        places: dict[str, tuple[RoundedMatrices, int]] = {}
        arrays = []
        for layer, projection, part in self.learner.parts:
            for index, expert in enumerate(part.experts.tolist()):
                places[f"tuned.{layer}.{expert}.{projection}"] = part, index
                arrays += tuned_arrays(layer, expert, projection, part.geometry)

        def read(name: str) -> np.ndarray:
            stem, _, array = name.rpartition(".")
            part, index = places[stem]
            return part.arrays(index)[array]

        def read_start(name: str) -> np.ndarray:
            _, layer, expert, projection, array = name.split(".")
            return stored_arrays(getattr(read_expert(self.start, int(layer), int(expert)), projection))[array]

        schemes = [{key: file[key] for key in ("tiers", "expert_tiers")} for file in self.schemes]
        kl = [value if math.isfinite(value) else None for value in (before, after)]  # JSON has no NaN
        tuned = {**vars(self.plan), "arguments": self.arguments, "kl": kl, "schemes": schemes}
        is_better = after < before
        write_calibration(self.out, {**self.facts, "tuned": tuned}, arrays, read if is_better else read_start)


def check_start(engine: Engine, start: Pack) -> dict[str, Any]:
    """The arguments that the pack to start from was converted with. Raises UsageError if it is not fit for it."""
    manifest, where = start.manifest, start.directory
    settings = manifest.provenance.get("settings", {})
    if describe_model(manifest.shape, settings.get("source", {})) != model_of(engine):
        raise UsageError(f"--tune {where}: is of another checkpoint than {engine.pack.directory}: convert the same one")
    widths = {scheme.bits for file in manifest.expert_files for tier in file.tiers for scheme in tier.values()}
    if UNQUANTIZED_BITS in widths:
        raise UsageError(f"--tune {where}: has experts of 16 bits, there is nothing to tune: give a quantized pack")
    arguments: dict[str, Any] = settings["arguments"]
    return arguments


def choose_device(name: str) -> torch.device:
    """Where to learn, by what --device says. Raises UsageError."""
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    if name != "cuda":
        raise UsageError(f"--device {name}: --tune learns on the processor or a GPU of NVIDIA's: give cpu or cuda")
    if not torch.cuda.is_available():
        raise UsageError(
            f"--device cuda: torch {torch.__version__} finds no GPU: leave it out, or install the CUDA build"
        )
    return torch.device("cuda")


def check_memory(pack: Pack, budget_bytes: int, step_tokens: int, device: torch.device = torch.device("cpu")) -> int:
    """Bytes of a budget that tuning takes beside the engine. Raises MemoryBudgetError if that is too much.

    With a GPU, what it takes there is compared with what is free there, and nothing is taken of the budget.
    """
    shape = pack.manifest.shape
    weights = 3 * shape.hidden_size * shape.moe_intermediate_size * shape.num_experts * shape.num_hidden_layers
    config = pack.manifest.model["text_config"]
    # Floats kept for the way back. Experts' inputs and answers are padded to the busiest one's: PADDED times as many.
    chosen = PADDED * config["num_experts_per_tok"] * (3 * shape.hidden_size + 5 * shape.moe_intermediate_size)
    position = shape.num_hidden_layers * (chosen + 32 * shape.hidden_size)
    needed = BYTES_PER_WEIGHT * weights + 4 * step_tokens * position
    needed += 4 * 6 * LOGIT_ROWS * config["vocab_size"]
    needed += 3 * ResidentWeights.size_bytes(pack)  # once more as they are, and widened
    own = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    budget = budget_bytes if own is None else own
    if needed > budget:
        raise MemoryBudgetError(
            f"--tune holds {weights:,} weights of experts with their gradients and moments: {format_size(needed)}, the "
            f"budget is {format_size(budget)}: tune a smaller model, or calibrate without --tune"
        )
    return needed if own is None else 0


def cut_window(window: list[int]) -> list[list[int]]:
    """A window in pieces that follow each other, of PIECE_TOKENS but for the first, which has what is left over.

    A conversation ends with its answer, which is to be learned with as much before it as a piece holds.
    """
    lacking = -len(window) % PIECE_TOKENS
    return [window[max(0, first) : first + PIECE_TOKENS] for first in range(-lacking, len(window), PIECE_TOKENS)]


def _stack(pieces: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces as windows of equal length [B, L], and which of their B * L tokens are no filling (which comes last)."""
    width = max(map(len, pieces))
    ids = [[*piece, *[0] * (width - len(piece))] for piece in pieces]
    is_real = [[place < len(piece) for place in range(width)] for piece in pieces]
    return torch.tensor(ids, device=device), torch.tensor(is_real, device=device).flatten()
