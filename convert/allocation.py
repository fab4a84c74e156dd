"""Bits and groups for each projection of each expert under a size target: `--bits mixed`.

What a scheme costs is measured. A few rows of every matrix are quantized by each of them, and the error of what they do
to their inputs is taken as a share of what they do; times the energy that the expert adds to the stream (how large its
answers are and how much the router makes of them), over the energy of the stream after its layer, for every layer
answers to a norm of its own. Inputs, use and stream are a calibration file's. The bytes then go where each takes the
most error away, until the target is reached: a greedy choice over the lower hull of each matrix's costs.

The sum is what independent errors would make: it ranks choices and is no forecast of a KL. Layers without
calibration (MTP) get one scheme throughout, the widest that the target allows.

    costs = measure_costs(checkpoint, source, shape, calibration, list_candidates(shape))
    choices = allocate(costs, shape, list_candidates(shape), budget_bytes=160e9)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from moepack.convert.checkpoint import Checkpoint
from moepack.convert.error_feedback import column_importance
from moepack.convert.names import MatrixPlace, SourceMap
from moepack.convert.quantizers import widen_finite
from moepack.convert.recipe import LayerSchemes
from moepack.kernels.native_fit import fit_groups
from moepack.layout.calibration import Calibration
from moepack.layout.errors import UsageError
from moepack.layout.geometry import MatrixGeometry, Scheme, uniform_schemes
from moepack.layout.manifest import ModelShape, block_geometry
from moepack.layout.quantized import bf16_to_float32
from moepack.layout.spec import GROUP_SIZES, PROJECTIONS, UNQUANTIZED_BITS

WIDTHS = (2, 3, 4)
SAMPLE_PIECES, SAMPLE_ROWS = 4, 8  # of each matrix: runs of rows, spread evenly
LEAST_USE = 0.01  # of the mean expert's: one that the calibration's text never chose may be chosen yet
NEVER = np.inf  # cost of a scheme whose groups do not divide a projection's rows


@dataclass(frozen=True)
class Allocation:
    """What was chosen, and the costs that it was chosen by.

    costs        float64 [L, E, P, C]: expected error of each trunk layer, expert, projection (in the order of
                 PROJECTIONS) and candidate, a share of the stream's energy
    candidates   the schemes to choose from, narrowest first
    choices      int [L, E, P]: places in candidates
    schemes      of every layer of the source
    """

    costs: np.ndarray
    candidates: tuple[Scheme, ...]
    choices: np.ndarray
    schemes: tuple[LayerSchemes, ...]

    def describe(self) -> list[dict[str, Any]]:
        """For each layer the mean bits of each projection's integers, and its error as chosen and at one width."""
        chosen = np.take_along_axis(self.costs, self.choices[..., None], axis=-1)[..., 0]  # [L, E, P]
        bits = np.array([scheme.bits for scheme in self.candidates])[self.choices].mean(1)  # [L, P]
        by_candidate = self.costs.sum((1, 2)).tolist()  # [L, C]
        return [
            {
                "layer": layer,
                "bits": dict(zip(PROJECTIONS, bits[layer].tolist())),
                "error": float(chosen[layer].sum()),
                "error_by_projection": dict(zip(PROJECTIONS, chosen[layer].sum(0).tolist())),
                "error_at": {
                    f"{scheme.bits}/{scheme.group_size}": error
                    for scheme, error in zip(self.candidates, by_candidate[layer])
                    if np.isfinite(error)
                },
            }
            for layer in range(len(self.costs))
        ]


def list_candidates(shape: ModelShape, group_size: int | None = None) -> tuple[Scheme, ...]:
    """The schemes that may be chosen, by bits per weight; with groups of any size, or of the given one."""
    groups = GROUP_SIZES if group_size is None else (group_size,)
    schemes = [Scheme(width, size) for width in WIDTHS for size in groups]
    sizes = _payload_bytes(shape, schemes)
    usable = [(row, scheme) for row, scheme in zip(sizes.T.tolist(), schemes) if max(row) > 0]
    return tuple(scheme for _, scheme in sorted(usable, key=lambda entry: max(entry[0])))


def measure_costs(
    checkpoint: Checkpoint,
    source: SourceMap,
    shape: ModelShape,
    calibration: Calibration,
    candidates: Sequence[Scheme],
) -> np.ndarray:
    """The costs of Allocation, [L, E, P, C], from samples of the source's rows.

    Raises CalibrationError if the file lacks what this needs; CheckpointError, UsageError.
    """
    costs = np.zeros((shape.num_hidden_layers, shape.num_experts, len(PROJECTIONS), len(candidates)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for layer in range(shape.num_hidden_layers):
            weights, stream = calibration.layer(layer)["weights"], calibration.stream(layer)
            use = np.maximum(weights, LEAST_USE * weights.mean()).astype(np.float64)
            use /= calibration.facts["tokens"] * shape.hidden_size * stream
            fixed = (checkpoint, source.experts[layer], shape, calibration, candidates, layer)
            shares = np.array(list(pool.map(partial(_measure_expert, *fixed), range(shape.num_experts))))
            costs[layer] = use[:, None, None] * shares
    return costs


def allocate(costs: np.ndarray, shape: ModelShape, candidates: Sequence[Scheme], budget_bytes: float) -> np.ndarray:
    """Places in candidates [L, E, P] with the least cost whose payload is within budget_bytes.

    Raises UsageError if even the narrowest are beyond the budget.
    """
    sizes = _payload_bytes(shape, candidates)
    layers, experts, projections, _ = costs.shape
    first = [int(np.flatnonzero(row)[0]) for row in sizes]  # the narrowest of each projection
    least = sum(int(row[place]) for row, place in zip(sizes, first))
    left = budget_bytes - layers * experts * least
    if left < 0:
        raise UsageError(
            f"--bits mixed: the target is below the {8 * least / num_weights(shape):.3f} bits per weight that "
            "the narrowest scheme takes: aim higher"
        )
    steps: list[tuple[float, int, int, int, int]] = []  # (-gain per byte, matrix, from, to, bytes)
    for matrix, cost in enumerate(costs.reshape(-1, len(candidates)).tolist()):
        size, place = sizes[matrix % projections].tolist(), first[matrix % projections]
        while True:  # on to the scheme with the steepest gain: the lower hull
            slopes = [
                ((cost[place] - cost[further]) / (size[further] - size[place]), -further)
                for further in range(place + 1, len(candidates))
                if cost[further] < cost[place]
            ]
            if not slopes:
                break
            slope, further = max(slopes)[0], -max(slopes)[1]
            steps.append((-slope, matrix, place, further, size[further] - size[place]))
            place = further
    choices = np.tile(first, layers * experts)
    for _, matrix, place, further, step_bytes in sorted(steps):
        if step_bytes <= left and choices[matrix] == place:
            choices[matrix] = further
            left -= step_bytes
    return choices.reshape(costs.shape[:3])


def make_schemes(
    choices: np.ndarray, candidates: Sequence[Scheme], num_layers: int, rest: Scheme
) -> tuple[LayerSchemes, ...]:
    """The schemes of every layer: those of choices [L, E, P], then layers of one scheme."""
    chosen = tuple(
        LayerSchemes.of({name: candidates[place] for name, place in zip(PROJECTIONS, places)} for places in layer)
        for layer in choices.tolist()
    )
    uniform = LayerSchemes.uniform(dict.fromkeys(PROJECTIONS, rest), choices.shape[1])
    return chosen + (uniform,) * (num_layers - len(chosen))


def widest_uniform(shape: ModelShape, candidates: Sequence[Scheme], bits_per_weight: float) -> Scheme:
    """The widest candidate for whole experts within a target, the narrowest one if there is none."""
    sizes = _payload_bytes(shape, candidates)
    whole = [place for place, row in enumerate(sizes.T) if row.all()]
    fitting = [place for place in whole if 8 * sizes[:, place].sum() <= bits_per_weight * num_weights(shape)]
    return candidates[max(fitting, default=whole[0])]


def num_weights(shape: ModelShape) -> int:
    """Of one expert."""
    return block_geometry(shape, uniform_schemes(UNQUANTIZED_BITS, 0)).num_weights


def _measure_expert(
    checkpoint: Checkpoint,
    experts: Sequence[Mapping[str, MatrixPlace]],
    shape: ModelShape,
    calibration: Calibration,
    candidates: Sequence[Scheme],
    layer: int,
    expert: int,
) -> np.ndarray:
    """Squared error of an expert's answer to a token of squared router weight 1, by projection and candidate: [P, C].

    A projection's share of error passes on to the answer: what silu and the product do to it is left out.
    """
    block = block_geometry(shape, uniform_schemes(UNQUANTIZED_BITS, 0))
    shares, energy = [], 0.0
    for projection, matrix in block.matrices:
        place = experts[expert][projection]
        rows = widen_finite(_sample_rows(checkpoint, place, matrix.out_features))
        moments = calibration.moments(layer, expert, projection)
        assert moments is not None  # the file has this layer
        importance = column_importance(np.diagonal(moments) if moments.ndim == 2 else moments)
        energy = _energy(rows, moments)
        lost = [
            _energy(_round(rows, scheme, importance) - rows, moments) if _divides(scheme, matrix) else NEVER
            for scheme in candidates
        ]
        shares.append(np.array(lost) / max(energy, np.finfo(np.float64).tiny))
        energy *= matrix.out_features / len(rows)  # of the last projection it is that of the answer
    return np.array(shares) * energy


def _sample_rows(checkpoint: Checkpoint, place: MatrixPlace, num_rows: int) -> np.ndarray:
    """Some runs of a matrix's rows, or all of them where they are few: float32 [n, K]."""
    if num_rows <= SAMPLE_PIECES * SAMPLE_ROWS:
        pieces = [(0, num_rows)]
    else:
        last = num_rows - SAMPLE_ROWS
        pieces = [(last * piece // (SAMPLE_PIECES - 1), SAMPLE_ROWS) for piece in range(SAMPLE_PIECES)]
    read = [place.weight.read_rows(checkpoint, place.first_row + first, count) for first, count in pieces]
    return np.concatenate([rows.to_float32() for rows in read])


def _round(rows: np.ndarray, scheme: Scheme, importance: np.ndarray) -> np.ndarray:
    assert scheme.group_size is not None
    integers, scales, biases, _ = fit_groups(rows, scheme.bits, scheme.group_size, importance)
    grouped = integers.reshape(*scales.shape, scheme.group_size) * bf16_to_float32(scales)[..., None]
    return (grouped + bf16_to_float32(biases)[..., None]).reshape(rows.shape)


def _energy(rows: np.ndarray, moments: np.ndarray) -> float:
    """Mean square of what rows [n, K] make of inputs with second moments [K, K] or mean squares [K], all rows added."""
    moved = rows @ moments if moments.ndim == 2 else rows * moments
    return float((moved * rows).sum(dtype=np.float64))


def _divides(scheme: Scheme, matrix: MatrixGeometry) -> bool:
    return scheme.group_size is not None and matrix.in_features % scheme.group_size == 0


def _payload_bytes(shape: ModelShape, candidates: Sequence[Scheme]) -> np.ndarray:
    """Bytes of each projection by each candidate: [P, C]; 0 where its groups do not divide the rows."""
    block = block_geometry(shape, uniform_schemes(UNQUANTIZED_BITS, 0))
    return np.array(
        [
            [
                MatrixGeometry(matrix.out_features, matrix.in_features, scheme).payload_bytes
                if _divides(scheme, matrix)
                else 0
                for scheme in candidates
            ]
            for _, matrix in block.matrices
        ]
    )
