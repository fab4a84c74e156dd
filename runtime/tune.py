"""A pack's experts tuned until the model with them answers as its 16-bit self does: calibrate --tune.

Rounding matrix by matrix keeps what each of them does; what the model says is another matter. Here the integers, scales
and biases of all routed experts move together, down the gradient of the KL between the next-token distributions of the
16-bit model and of the rounded one. An integer is the rounding of a level that moves freely (straight-through), and
starts where the weight lay between two of them; scales and biases move as floats and become bf16 at the end. Routers
and all other weights stay. Adam, its rates falling to zero along a cosine; the order of the windows is the seed's.

Every 16th window is kept apart: the KL there, before and after, is the honest one.

Limits: all experts are in memory as floats, with gradients and Adam's moments: BYTES_PER_WEIGHT each. That is for
models of up to a few billion weights; a larger one is refused, and calibrate without --tune takes any. Learning takes
one core, whatever --threads says: torch's other threads would fight with the native ones. The answer is that of one
machine: sums are in the order of the linear algebra library at hand.

    Tuning(engine, Pack.open("demo2.moepack"), windows, Path("demo2.tuned"), TuningPlan(steps=1000)).run()
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moepack.kernels import reference
from moepack.kernels.differentiable import DifferentiableOps
from moepack.kernels.matrix import Expert, Matrix
from moepack.layout.calibration import describe_model, tuned_arrays, write_calibration
from moepack.layout.errors import MemoryBudgetError, UsageError, WriteError
from moepack.layout.geometry import MatrixGeometry
from moepack.layout.quantized import float32_to_bf16, pack_integers
from moepack.layout.reader import Pack
from moepack.layout.sizes import format_size
from moepack.layout.spec import PROJECTIONS, UNQUANTIZED_BITS
from moepack.runtime.calibrate import UNFINISHED, digest_windows, mix, model_of, write_json
from moepack.runtime.engine import Engine
from moepack.runtime.qwen35 import Qwen35, SparseMoe
from moepack.runtime.resident import ResidentWeights

LEVEL_RATE, LINE_RATE = 5e-4, 2e-3  # Adam's largest steps: in levels; of scales and biases, as shares of the mean scale
MOMENTS = (0.9, 0.99)
WARM_UP = 20  # steps in which the rates rise
STEP_TOKENS = 512  # that one step learns from
KEPT_APART = 16  # one window in so many is scored and never learned from
EDGE = 0.49  # how far from its integer a level starts at most
BYTES_PER_WEIGHT = 28  # level, gradient, two moments, the dequantized weight and its gradient, and one copy in passing
SAVE_EVERY = 100  # steps


@dataclass(frozen=True)
class TuningPlan:
    """steps of STEP_TOKENS each; seed of their order."""

    steps: int
    seed: int = 0


@dataclass
class RoundedMatrices:
    """The matrices of one projection of a layer that share a scheme: n of E experts.

    experts          int64 [n]
    levels           float32 [n, N, K]; rounded they are the integers
    scales, biases   float32 [n, N, G]
    """

    geometry: MatrixGeometry
    experts: torch.Tensor
    levels: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor

    @classmethod
    def of(cls, geometry: MatrixGeometry, rounded: dict[int, Matrix], originals: dict[int, Matrix]) -> RoundedMatrices:
        """From the matrices of both packs by expert."""
        scales, biases = (
            torch.stack([getattr(matrix, name).float() for matrix in rounded.values()]) for name in ("scales", "biases")
        )
        integers = torch.stack([reference.unpack(matrix.data, matrix.bits) for matrix in rounded.values()]).float()
        weights = torch.stack([reference.dequantize(originals[expert], 0, geometry.out_features) for expert in rounded])
        off = weights.view(*scales.shape, -1) - biases.unsqueeze(-1)
        exact = torch.where(scales.unsqueeze(-1) == 0, 0, off / scales.unsqueeze(-1)).view(integers.shape)
        levels = integers + (exact - integers).clamp(-EDGE, EDGE)
        return cls(geometry, torch.tensor(list(rounded)), *(t.requires_grad_() for t in (levels, scales, biases)))

    @property
    def top(self) -> int:
        return 2**self.geometry.scheme.bits - 1

    def weights(self, scales: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
        """What the integers mean with these scales and biases: [n, N, K]."""
        return _Dequantize.apply(self.levels, scales, biases, self.top)  # type: ignore[no-untyped-call,no-any-return]

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """The matrix of the expert at a place, as a pack stores it."""
        integers = self.levels[index].detach().round().clamp(0, self.top).to(torch.uint8).numpy()
        lines = {name: getattr(self, name)[index].detach().numpy() for name in ("scales", "biases")}
        packed = {"w_q": pack_integers(integers, self.geometry.scheme.bits)}
        return packed | {name: float32_to_bf16(values) for name, values in lines.items()}


class _Dequantize(torch.autograd.Function):
    """round(levels) * scales + biases; levels take the gradient of what they would be without rounding."""

    @staticmethod
    def forward(ctx: Any, levels: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, top: int) -> Any:
        integers = levels.round().clamp_(0, top)
        ctx.save_for_backward(levels, scales, integers)
        ctx.top = top
        grouped = integers.view(*scales.shape, -1)
        return torch.addcmul(biases.unsqueeze(-1), grouped, scales.unsqueeze(-1)).view(levels.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        levels, scales, integers = ctx.saved_tensors
        grouped = gradients[0].view(*scales.shape, -1)
        of_scales, of_biases = (grouped * integers.view(grouped.shape)).sum(-1), grouped.sum(-1)
        of_levels = (grouped * scales.unsqueeze(-1)).view(levels.shape)
        of_levels *= (levels > -0.5) & (levels < ctx.top + 0.5)  # beyond the ends nothing changes
        return of_levels, of_scales, of_biases, None


class Tuning:
    """One run: what learns, what it is compared with, and where it is written.

    engine    of a pack of 8 or 16 bits of the model, exact
    start     a quantized pack of the same model: its experts are the start
    windows   token ids to learn from

    Raises UsageError if the packs do not fit each other or there are fewer windows than can be kept apart.
    """

    def __init__(self, engine: Engine, start: Pack, windows: Sequence[Sequence[int]], out: Path, plan: TuningPlan):
        self.engine, self.out, self.plan, self.folder = engine, out, plan, out.with_name(out.name + UNFINISHED)
        self.arguments = check_start(engine, start)
        self.schemes = [file.as_json() for file in start.manifest.expert_files]
        self.kept = [list(window) for window in windows[KEPT_APART - 1 :: KEPT_APART]]
        learned = [list(window) for place, window in enumerate(windows) if (place + 1) % KEPT_APART]
        self.pieces = [
            window[first : first + STEP_TOKENS] for window in learned for first in range(0, len(window), STEP_TOKENS)
        ]
        if not self.kept:
            raise UsageError(f"--tune: {len(windows)} windows of text, expected at least {KEPT_APART}: give more")
        self.facts = {
            "model": model_of(engine),
            "tokens": sum(map(len, windows)),
            "text_sha256": digest_windows(windows),
            "full": False,
        }
        self.identity = {**self.facts, **vars(plan), "start": [file["sha256"] for file in self.schemes]}
        self.ops = DifferentiableOps()
        weights = ResidentWeights.load(engine.pack, engine.architecture, self.ops)
        self.model = Qwen35(engine.architecture, weights, engine.store, self.ops)
        self.head = reference.dequantize(self.model.head, 0, self.model.head.out_features)
        self.layers = [self._read_layer(start, layer) for layer in range(engine.architecture.num_hidden_layers)]
        self.optimizer = torch.optim.Adam(self._parameter_groups(), betas=MOMENTS, fused=True)

    def run(self, on_step: Callable[[int], object] = lambda steps: None) -> tuple[float, float]:
        """Tune and write the file; the mean KL over the windows kept apart, before and after.

        on_step   called with the steps done, those of an earlier run at once

        Stopped at any time, the same call goes on from the last SAVE_EVERY steps. Raises NotEnoughSpace.
        """
        done, before = self._resume()
        on_step(done)
        for step in range(done, self.plan.steps):
            self._step(step)
            on_step(1)
            if (step + 1) % SAVE_EVERY == 0 and step + 1 < self.plan.steps:
                self._save(step + 1, before)
        after = self._score()
        self._write(before, after)
        shutil.rmtree(self.folder)
        return before, after

    def hidden(self, token_ids: Sequence[int], is_final: bool = False) -> torch.Tensor:
        """The normed hidden states [T, D] of a window with the rounded experts.

        is_final   with scales and biases in bf16, as they are written
        """
        a, x = self.engine.architecture, self.ops.embed(self.model.embedding, torch.tensor(token_ids))
        for layer, block in enumerate(self.model.layers):
            mixed = mix(self.engine, block, layer, x)
            matrices = [self._stack(parts, is_final) for parts in self.layers[layer].values()]
            x = self._add_experts(block.experts, mixed, matrices)
        return self.ops.rms_norm(x, self.model.norm, a.rms_norm_eps)

    def _step(self, step: int) -> None:
        epoch, place = divmod(step, len(self.pieces))
        piece = self.pieces[np.random.default_rng([self.plan.seed, epoch]).permutation(len(self.pieces))[place]]
        share = min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / self.plan.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["first_rate"]
        self.optimizer.zero_grad()
        target, hidden = self._target(piece), self.hidden(piece)
        p, r = ((states.detach() @ self.head.T).softmax(-1) for states in (hidden, target))
        hidden.backward((p - r) @ self.head / len(piece))  # of the mean KL, in closed form
        self.optimizer.step()

    @torch.no_grad()
    def _score(self) -> float:
        """Mean KL over the windows kept apart, of what would be written now."""
        total = 0.0
        for window in self.kept:
            target, hidden = self._target(window), self.hidden(window, is_final=True)
            for rows in torch.arange(len(window)).split(STEP_TOKENS):
                log_p, log_r = ((states[rows] @ self.head.T).log_softmax(-1) for states in (hidden, target))
                total += float((log_r.exp() * (log_r - log_p)).sum(dtype=torch.float64))
        return total / sum(map(len, self.kept))

    @torch.no_grad()
    def _target(self, window: Sequence[int]) -> torch.Tensor:
        """The normed hidden states of the 16-bit model."""
        return torch.cat(list(self.engine.prefill(window, self.engine.new_state(len(window)))))

    def _add_experts(self, block: SparseMoe, x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        a, ops = self.engine.architecture, self.ops
        normed = ops.rms_norm(x, block.norm, a.rms_norm_eps)
        expert_ids, expert_weights = ops.route(normed, block.router, a.num_experts_per_tok)
        shared = ops.run_expert(normed, block.shared_expert) * ops.linear(normed, block.shared_expert_gate).sigmoid()
        return x + shared + ops.run_chosen(normed, expert_ids, expert_weights, *matrices)

    def _stack(self, parts: Sequence[RoundedMatrices], is_final: bool) -> torch.Tensor:
        """A projection's matrices of all experts: [E, N, K]."""
        found = []
        for part in parts:
            lines = (part.scales, part.biases)
            found.append(part.weights(*((line.bfloat16().float() for line in lines) if is_final else lines)))
        places = torch.cat([part.experts for part in parts]).argsort()
        return found[0] if len(found) == 1 else torch.cat(found)[places]

    def _read_layer(self, start: Pack, layer: int) -> dict[str, list[RoundedMatrices]]:
        """By projection, matrices of the same scheme together."""
        geometry = start.geometry(layer)
        experts, originals = (
            {i: _read_expert(pack, layer, i) for i in range(geometry.num_experts)} for pack in (start, self.engine.pack)
        )
        layer_parts = {}
        for number, projection in enumerate(PROJECTIONS):
            groups: dict[MatrixGeometry, list[int]] = {}
            for expert in experts:
                groups.setdefault(geometry.block(expert).matrices[number][1], []).append(expert)
            layer_parts[projection] = [
                RoundedMatrices.of(
                    matrix, *({i: getattr(by_id[i], projection) for i in members} for by_id in (experts, originals))
                )
                for matrix, members in groups.items()
            ]
        return layer_parts

    def _parts(self) -> Iterator[tuple[int, str, RoundedMatrices]]:
        for layer, projections in enumerate(self.layers):
            for projection, parts in projections.items():
                yield from ((layer, projection, part) for part in parts)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for _, _, part in self._parts():
            rate = LINE_RATE * float(part.scales.detach().abs().mean())
            groups += [{"params": [part.levels], "first_rate": LEVEL_RATE}]
            groups += [{"params": [part.scales, part.biases], "first_rate": rate}]
        return groups

    def _resume(self) -> tuple[int, float]:
        """Steps done by an earlier run with the same facts, and the KL before all of them."""
        progress, state = self.folder / "progress.json", self.folder / "state.pt"
        if state.exists() and json.loads(progress.read_text()) == json.loads(json.dumps({"facts": self.identity})):
            kept = torch.load(state, weights_only=True)
            with torch.no_grad():
                for (_, _, part), values in zip(self._parts(), kept["parts"]):
                    for own, value in zip((part.levels, part.scales, part.biases), values):
                        own.copy_(value)
            self.optimizer.load_state_dict(kept["optimizer"])
            return kept["steps"], kept["before"]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_json(progress, {"facts": self.identity})
        return 0, self._score()

    def _save(self, steps: int, before: float) -> None:
        parts = [[t.detach() for t in (part.levels, part.scales, part.biases)] for _, _, part in self._parts()]
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
        for layer, projection, part in self._parts():
            for index, expert in enumerate(part.experts.tolist()):
                places[f"tuned.{layer}.{expert}.{projection}"] = part, index
                arrays += tuned_arrays(layer, expert, projection, part.geometry)

        def read(name: str) -> np.ndarray:
            stem, _, array = name.rpartition(".")
            part, index = places[stem]
            return part.arrays(index)[array]

        schemes = [{key: file[key] for key in ("tiers", "expert_tiers")} for file in self.schemes]
        tuned = {**vars(self.plan), "arguments": self.arguments, "kl": [before, after], "schemes": schemes}
        write_calibration(self.out, {**self.facts, "tuned": tuned}, arrays, read)


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


def check_memory(pack: Pack, budget_bytes: int) -> int:
    """Bytes of a budget that tuning takes beside the engine. Raises MemoryBudgetError if that is too much."""
    shape = pack.manifest.shape
    weights = 3 * shape.hidden_size * shape.moe_intermediate_size * shape.num_experts * shape.num_hidden_layers
    config = pack.manifest.model["text_config"]
    chosen = config["num_experts_per_tok"] * (3 * shape.hidden_size + 5 * shape.moe_intermediate_size)
    position = shape.num_hidden_layers * (chosen + 32 * shape.hidden_size)  # floats kept for the way back
    needed = BYTES_PER_WEIGHT * weights + 4 * STEP_TOKENS * position + 4 * 6 * STEP_TOKENS * config["vocab_size"]
    needed += ResidentWeights.size_bytes(pack) + 4 * shape.hidden_size * config["vocab_size"]  # once more; the head
    if needed > budget_bytes:
        raise MemoryBudgetError(
            f"--tune holds {weights:,} weights of experts with their gradients and moments: {format_size(needed)}, the "
            f"budget is {format_size(budget_bytes)}: tune a smaller model, or calibrate without --tune"
        )
    return needed


def _read_expert(pack: Pack, layer: int, expert: int) -> Expert:
    """An expert, compared with its checksum, in memory of its own."""
    geometry = pack.geometry(layer).block(expert)
    block = np.empty(geometry.block_stride, np.uint8)
    pack.read_block(layer, expert, block.data)
    pack.check_block(layer, expert, block.data)
    return Expert.from_block(geometry, torch.from_numpy(block))
