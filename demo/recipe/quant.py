"""The quantization study: what the routed experts lose at 4, 3 and 2 bits under three quantizers.

Weights are rounded to w ≈ q*scale + bias per group of 64 along the input dimension, scale and bias in
bfloat16, and put back as floats: this measures the loss and stores nothing. `minmax` takes the range of a
group, `least_squares` fits scale and bias to it, `gptq` also lets later columns make up for the rounding of
earlier ones, weighted by what the experts read (calibration). Only experts of the main layers are touched.
The quantizers of convert/ are other code.

    statistics, originals = calibrate(model, rows), take_experts(model)
    apply_variant(model, originals, statistics, VARIANTS["2bit g64 GPTQ"])
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model import LanguageModel, Routing

GROUP = 64
RARE = 64  # an expert that read fewer rows than this takes the statistics of its whole layer
_DAMPING = 0.02  # share of the mean diagonal added to the second moments, so that they can be inverted
_SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # first guesses of the range, as a share of the full one
_FIT_STEPS = 8

ExpertKey = tuple[int, str]  # layer, gate_up_proj or down_proj
Quantizer = Callable[[Tensor, int, Tensor], Tensor]


@dataclass
class ExpertStatistics:
    """Second moments of what the experts of one layer read, summed over rows."""

    gate_up_proj: Tensor  # [E, D, D]
    down_proj: Tensor  # [E, I, I]
    rows: Tensor  # [E]

    def moments(self, name: str) -> Tensor:
        """Return mean second moments [E, in, in]; rare experts get the mean of the layer."""
        total: Tensor = getattr(self, name)
        mean = total / self.rows.clamp_min(1)[:, None, None]
        layer_mean = total.sum(0, keepdim=True) / self.rows.sum()
        return torch.where((self.rows < RARE)[:, None, None], layer_mean, mean)


def _bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _grouped(weight: Tensor) -> Tensor:
    """[..., in] -> [..., in / GROUP, GROUP], float32"""
    return weight.float().reshape(*weight.shape[:-1], -1, GROUP)


def _levels(x: Tensor, scale: Tensor, bias: Tensor, bits: int) -> Tensor:
    """Return the integers that x is rounded to, as floats."""
    return ((x - bias) / scale).round().clamp(0, 2**bits - 1)


def minmax(weight: Tensor, bits: int, moments: Tensor) -> Tensor:
    """Round between the extremes of each group. weight [E, out, in], returned rounded"""
    x = _grouped(weight)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, bias = _bfloat16(((high - low) / (2**bits - 1)).clamp_min(1e-8)), _bfloat16(low)
    return (_levels(x, scale, bias, bits) * scale + bias).reshape(weight.shape)


def _fit(x: Tensor, bits: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return scale and bias per group [..., 1] with the least squared error, weighted by importance if given.

    From several ranges, rounding and a linear fit of the rounded integers take turns; the best end wins.
    """
    w = torch.ones_like(x) if importance is None else importance
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    total = w.sum(-1, keepdim=True)
    best = torch.full_like(total, torch.inf), torch.ones_like(low), low  # error, scale, bias
    for shrink in _SHRINKS:
        half = (high - low) / 2 * shrink
        scale, bias = (2 * half / (2**bits - 1)).clamp_min(1e-8), (low + high) / 2 - half
        for _ in range(_FIT_STEPS):
            q = _levels(x, scale, bias, bits)
            mean_q, mean_x = (w * q).sum(-1, keepdim=True) / total, (w * x).sum(-1, keepdim=True) / total
            variance = (w * (q - mean_q) ** 2).sum(-1, keepdim=True)
            slope = (w * (q - mean_q) * (x - mean_x)).sum(-1, keepdim=True) / variance.clamp_min(1e-12)
            usable = (variance > 1e-12) & (slope > 0)
            scale = torch.where(usable, slope, scale)
            bias = torch.where(usable, mean_x - scale * mean_q, bias)
        scale, bias = _bfloat16(scale).clamp_min(1e-8), _bfloat16(bias)
        rounded = _levels(x, scale, bias, bits) * scale + bias
        error = (w * (rounded - x) ** 2).sum(-1, keepdim=True)
        better, found = error < best[0], (error, scale, bias)
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    return best[1], best[2]


def least_squares(weight: Tensor, bits: int, moments: Tensor) -> Tensor:
    """Round with the scale and bias that fit each group best. weight [E, out, in], returned rounded"""
    x = _grouped(weight)
    scale, bias = _fit(x, bits)
    return (_levels(x, scale, bias, bits) * scale + bias).reshape(weight.shape)


def gptq(weight: Tensor, bits: int, moments: Tensor) -> Tensor:
    """Round column by column; what a column loses is made up for by those after it (GPTQ).

    weight [E, out, in], moments [E, in, in]; returns the rounded weights. Scale and bias of a group are
    fitted when its first column is reached, weighted by the diagonal of the moments.
    """
    work, rounded = weight.float().clone(), torch.zeros_like(weight, dtype=torch.float32)
    E, rows, columns = work.shape
    moments = moments.float().clone()
    importance = moments.diagonal(dim1=-2, dim2=-1).clone()  # [E, in], before damping
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(_DAMPING * diagonal.mean(-1, keepdim=True) + 1e-9)
    inverse = torch.linalg.inv(moments.double())
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    for start in range(0, columns, GROUP):
        w = _grouped(importance[:, start : start + GROUP])[:, None].expand(E, rows, 1, GROUP)
        group = _grouped(work[..., start : start + GROUP])
        scale, bias = (part[..., 0, 0] for part in _fit(group, bits, w + 1e-6 * importance.mean()))
        for j in range(start, start + GROUP):
            rounded[..., j] = _levels(work[..., j], scale, bias, bits) * scale + bias
            error = (work[..., j] - rounded[..., j]) / factor[:, j, j][:, None]
            work[..., j + 1 :] -= error[..., None] * factor[:, j, j + 1 :][:, None]
    return rounded


VARIANTS: dict[str, tuple[Quantizer, int]] = {
    "4bit g64 minmax": (minmax, 4),
    "3bit g64 minmax": (minmax, 3),
    "2bit g64 minmax": (minmax, 2),
    "2bit g64 MSE": (least_squares, 2),
    "2bit g64 GPTQ": (gptq, 2),
    "3bit g64 GPTQ": (gptq, 3),
    "4bit g64 GPTQ": (gptq, 4),
}


@torch.no_grad()
def calibrate(model: LanguageModel, token_ids: Tensor, batch: int = 16) -> list[ExpertStatistics]:
    """Run the rows of ids [rows, T] through the model and return what the experts of each layer read."""
    config, device = model.config, token_ids.device
    E, D, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    statistics = []
    for layer in model.layers:
        entry = ExpertStatistics(
            torch.zeros(E, D, D, device=device),
            torch.zeros(E, inner, inner, device=device),
            torch.zeros(E, device=device),
        )
        layer.mlp.recorder = _moment_recorder(entry)
        statistics.append(entry)
    for start in range(0, len(token_ids), batch):
        model(token_ids[start : start + batch])
    for layer in model.layers:
        layer.mlp.recorder = None
    return statistics


def _moment_recorder(statistics: ExpertStatistics) -> Callable[[Routing], None]:
    def record(routing: Routing) -> None:
        bounds = [0, *routing.ends.tolist()]
        for e in range(len(statistics.rows)):
            part = slice(bounds[e], bounds[e + 1])
            inputs, inner = routing.inputs[part].float(), routing.inner[part].float()
            statistics.gate_up_proj[e] += inputs.T @ inputs
            statistics.down_proj[e] += inner.T @ inner
            statistics.rows[e] += len(inputs)

    return record


def take_experts(model: LanguageModel) -> dict[ExpertKey, Tensor]:
    """Return copies of the expert weights of the main layers."""
    names = ("gate_up_proj", "down_proj")
    return {
        (i, name): getattr(layer.mlp.experts, name).detach().clone()
        for i, layer in enumerate(model.layers)
        for name in names
    }


@torch.no_grad()
def apply_variant(
    model: LanguageModel,
    originals: dict[ExpertKey, Tensor],
    statistics: list[ExpertStatistics],
    variant: tuple[Quantizer, int],
) -> None:
    """Put the rounded weights of a variant in the model, made from the originals."""
    quantize, bits = variant
    for (i, name), weight in originals.items():
        rounded = quantize(weight, bits, statistics[i].moments(name))
        getattr(model.layers[i].mlp.experts, name).copy_(rounded)
