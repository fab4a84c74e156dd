"""A model whose routed experts are rounded and can learn: what a tuning run moves and what it compares with.

The integers are the rounding of levels that move freely: the way forward rounds, the way back does not (straight
through). Scales and biases are floats, and bf16 in what is written. The unrounded experts are beside them, so that the
same operations give the answers to come near to. Everything lies on one device of torch's, in float32.

    learner = Learner(engine, Pack.open("demo2.moepack"), torch.device("cuda"))
    rounded, exact = learner.hidden(token_ids), learner.target(token_ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moepack.kernels import reference
from moepack.kernels.differentiable import DifferentiableOps
from moepack.kernels.matrix import Expert, Matrix
from moepack.layout.geometry import MatrixGeometry
from moepack.layout.quantized import float32_to_bf16, pack_integers
from moepack.layout.reader import Pack
from moepack.layout.spec import PROJECTIONS
from moepack.runtime.engine import Engine
from moepack.runtime.qwen35 import Qwen35, SparseMoe
from moepack.runtime.resident import ResidentWeights

EDGE = 0.49  # how far from its integer a level starts at most


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
    def of(cls, geometry: MatrixGeometry, rounded: dict[int, Matrix], weights: torch.Tensor) -> RoundedMatrices:
        """From rounded matrices by expert, and what they were before, float32 [n, N, K], on the device to learn on."""
        scales, biases = (
            torch.stack([getattr(matrix, name).float() for matrix in rounded.values()]).to(weights.device)
            for name in ("scales", "biases")
        )
        integers = torch.stack([reference.unpack(matrix.data, matrix.bits) for matrix in rounded.values()])
        integers = integers.to(weights.device).float()
        off = weights.view(*scales.shape, -1) - biases.unsqueeze(-1)
        exact = torch.where(scales.unsqueeze(-1) == 0, 0, off / scales.unsqueeze(-1)).view(integers.shape)
        levels = integers + (exact - integers).clamp(-EDGE, EDGE)
        experts = torch.tensor(list(rounded), device=weights.device)
        return cls(geometry, experts, *(t.requires_grad_() for t in (levels, scales, biases)))

    @property
    def top(self) -> int:
        return 2**self.geometry.scheme.bits - 1

    @property
    def parameters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.levels, self.scales, self.biases

    def weights(self, is_final: bool = False) -> torch.Tensor:
        """What the integers mean with these scales and biases: [n, N, K].

        is_final   with scales and biases in bf16, as they are written
        """
        scales, biases = self.scales, self.biases
        if is_final:
            scales, biases = scales.bfloat16().float(), biases.bfloat16().float()
        return _Dequantize.apply(self.levels, scales, biases, self.top)  # type: ignore[no-untyped-call,no-any-return]

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """The matrix of the expert at a place, as a pack stores it."""
        integers = self.levels[index].detach().round().clamp(0, self.top).to(torch.uint8).cpu().numpy()
        lines = {name: getattr(self, name)[index].detach().cpu().numpy() for name in ("scales", "biases")}
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
        grouped = gradients[0].reshape(*scales.shape, -1)
        grad_scales, grad_biases = (grouped * integers.view(grouped.shape)).sum(-1), grouped.sum(-1)
        grad_levels = (grouped * scales.unsqueeze(-1)).view(levels.shape)
        grad_levels *= (levels > -0.5) & (levels < ctx.top + 0.5)  # beyond the ends nothing changes
        return grad_levels, grad_scales, grad_biases, None


class _FloatWeights(ResidentWeights):
    """The weights that stay as they are, widened once and not with every step."""

    def matrix(self, name: str) -> Matrix:
        matrix = super().matrix(name)
        return Matrix.from_floats(reference.dequantize(matrix, 0, matrix.out_features))


class _Window:
    """The state before a window, which the operations for learning take to be empty, of either kind of layer."""

    conv_state = recurrent_state = None
    position = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys.transpose(0, 1), values.transpose(0, 1)


class Learner:
    """The model of an engine's pack, on a device, with the rounded experts of another pack and its own.

    parts   (layer, projection, matrices of the same scheme): all that learns
    head    float32 [V, D]
    """

    def __init__(self, engine: Engine, start: Pack, device: torch.device):
        self.architecture, self.device, self.ops = engine.architecture, device, DifferentiableOps(device)
        weights = _FloatWeights.load(engine.pack, self.architecture, self.ops)
        self.model = Qwen35(self.architecture, weights, engine.store, self.ops)
        self.head = self.model.head.data
        self._originals: list[list[torch.Tensor]] = []  # by layer and projection: [E, N, K]
        self._rounded: list[list[list[RoundedMatrices]]] = []  # by layer, projection and scheme
        for layer in range(self.architecture.num_hidden_layers):
            self._read_layer(engine.pack, start, layer)

    @property
    def parts(self) -> Iterator[tuple[int, str, RoundedMatrices]]:
        for layer, projections in enumerate(self._rounded):
            for projection, parts in zip(PROJECTIONS, projections):
                yield from ((layer, projection, part) for part in parts)

    def hidden(self, token_ids: torch.Tensor, is_final: bool = False) -> torch.Tensor:
        """The normed hidden states [B * L, D] of windows [B, L] with the rounded experts.

        is_final   with scales and biases in bf16, as they are written
        """
        return self._run(token_ids, lambda layer: [_join(parts, is_final) for parts in self._rounded[layer]])

    @torch.no_grad()
    def target(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The same with the experts as they were."""
        return self._run(token_ids, lambda layer: self._originals[layer])

    def _run(self, token_ids: torch.Tensor, experts: Callable[[int], Sequence[torch.Tensor]]) -> torch.Tensor:
        a, self.ops.windows = self.architecture, len(token_ids)
        x = self.ops.embed(self.model.embedding, token_ids.flatten())
        for layer, block in enumerate(self.model.layers):
            x = self._add_experts(block.experts, block.mix(x, _Window()), experts(layer))  # type: ignore[arg-type]
        return self.ops.rms_norm(x, self.model.norm, a.rms_norm_eps)

    def _add_experts(self, block: SparseMoe, x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        a, ops = self.architecture, self.ops
        normed = ops.rms_norm(x, block.norm, a.rms_norm_eps)
        expert_ids, expert_weights = ops.route(normed, block.router, a.num_experts_per_tok)
        shared = ops.run_expert(normed, block.shared_expert) * ops.linear(normed, block.shared_expert_gate).sigmoid()
        return x + shared + ops.run_chosen(normed, expert_ids, expert_weights, *matrices)

    def _read_layer(self, source: Pack, start: Pack, layer: int) -> None:
        """A layer's experts of both packs, matrices of the same scheme together."""
        geometry = start.geometry(layer)
        rounded, originals = ([read_expert(p, layer, i) for i in range(geometry.num_experts)] for p in (start, source))
        self._originals.append([])
        self._rounded.append([])
        for number, projection in enumerate(PROJECTIONS):
            groups: dict[MatrixGeometry, list[int]] = {}
            for expert in range(geometry.num_experts):
                groups.setdefault(geometry.block(expert).matrices[number][1], []).append(expert)
            matrices = [getattr(expert, projection) for expert in originals]
            weights = torch.stack([reference.dequantize(m, 0, m.out_features) for m in matrices]).to(self.device)
            self._originals[-1].append(weights)
            self._rounded[-1].append([
                RoundedMatrices.of(matrix, {i: getattr(rounded[i], projection) for i in members}, weights[members])
                for matrix, members in groups.items()
            ])  # fmt: skip


def _join(parts: Sequence[RoundedMatrices], is_final: bool) -> torch.Tensor:
    """A projection's matrices of all experts: [E, N, K]."""
    found = [part.weights(is_final) for part in parts]
    if len(found) == 1:
        return found[0]
    return torch.cat(found).index_select(0, torch.cat([part.experts for part in parts]).argsort())


def read_expert(pack: Pack, layer: int, expert: int) -> Expert:
    """An expert, compared with its checksum, in memory of its own."""
    geometry = pack.geometry(layer).block(expert)
    block = np.empty(geometry.block_stride, np.uint8)
    pack.read_block(layer, expert, block.data)
    pack.check_block(layer, expert, block.data)
    return Expert.from_block(geometry, torch.from_numpy(block))


def stored_arrays(matrix: Matrix) -> dict[str, np.ndarray]:
    """A rounded matrix as a pack stores it: w_q, scales and biases."""
    arrays = {"w_q": matrix.data.contiguous().numpy().view(np.uint32)}
    for name, values in (("scales", matrix.scales), ("biases", matrix.biases)):
        assert values is not None
        arrays[name] = values.contiguous().view(torch.int16).numpy().view(np.uint16)
    return arrays
