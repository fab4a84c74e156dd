"""From float rows to integers, scales and biases: the one seam where a better fit can be put in.

A quantizer is a function (weights, bits, group_size, moments) -> QuantizedMatrix; QUANTIZERS names them for the command
line. `moments` are what calibration knows of the inputs: mean squares [K], second moments [K, K], or None.
Weights come as the source has them (float32, float16, or bf16 as its bit patterns in uint16); `widen` makes floats of
them. The result means what layout/quantized.py says. Scale and bias are rounded to bf16 first and the integers are
chosen for the rounded values, so that the rounding costs nothing twice.

    minmax   a group's extremes are its first and last integer
    mse      least squared error, weighted by the mean squares of the inputs where they are known
    gptq     error feedback in the norm of the inputs' second moments (error_feedback.py)

The same input gives the same bytes: for minmax and mse on every machine, for gptq with the same linear algebra
library.

    quantized = QUANTIZERS["minmax"](weights, bits=4, group_size=64)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moepack.convert.error_feedback import ErrorFeedback, column_importance
from moepack.kernels import native_quantize
from moepack.kernels.native_fit import fit_groups
from moepack.kernels.native_quantize import RoundingError
from moepack.layout.quantized import bf16_to_float32, float32_to_bf16, pack_integers

WEIGHTS_AT_ONCE = 2**17
LARGEST_WEIGHT = 2.0**60  # whose squares can still be summed


@dataclass(frozen=True)
class QuantizedMatrix:
    """w_q uint32 [N, K*bits/32], scales and biases uint16 [N, K/group_size] (bf16 bit patterns).

    error   what was lost, where the quantizer knows it
    """

    w_q: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    error: RoundingError | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The stored arrays by the names that blocks use."""
        return {"w_q": self.w_q, "scales": self.scales, "biases": self.biases}


# Raises ValueError if a weight is NaN or infinite.
Quantizer = Callable[[np.ndarray, int, int, "np.ndarray | None"], QuantizedMatrix]


def widen(weights: np.ndarray) -> np.ndarray:
    """float32 of the same shape, exact: from float32, float16, or uint16 that are bf16 bit patterns."""
    return bf16_to_float32(weights) if weights.dtype == np.uint16 else weights.astype(np.float32, copy=False)


def define_minmax(weights: np.ndarray, bits: int, group_size: int) -> QuantizedMatrix:
    """The plain fit: each group's smallest weight becomes 0, its largest 2**bits - 1. The definition, slow.

    weights   [N, K], K a multiple of group_size

    Raises ValueError if a weight is NaN or infinite, or a group's range is beyond bf16.
    """
    rows, columns = weights.shape
    groups = widen(weights).reshape(rows, columns // group_size, group_size)
    # -0 counts as 0: which of the two is the smallest would depend on the order in which they are looked at.
    low, high = groups.min(axis=-1) + np.float32(0), groups.max(axis=-1) + np.float32(0)  # [N, G]
    top = np.float32(2**bits - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = float32_to_bf16((high - low) / top)
        biases = float32_to_bf16(low)
    scale, bias = bf16_to_float32(scales)[:, :, None], bf16_to_float32(biases)[:, :, None]
    if not (np.isfinite(scale).all() and np.isfinite(bias).all()):
        raise ValueError("the weights hold NaN, infinity or a range beyond bf16")
    # A group of equal weights has scale 0: every integer means the bias, 0 is written.
    with np.errstate(over="ignore"):
        steps = np.divide(groups - bias, scale, out=np.zeros_like(groups), where=scale > 0)
    integers = np.rint(np.clip(steps, 0, top)).astype(np.uint8)
    return QuantizedMatrix(pack_integers(integers.reshape(rows, columns), bits), scales, biases)


def quantize_minmax(
    weights: np.ndarray, bits: int, group_size: int, moments: np.ndarray | None = None
) -> QuantizedMatrix:
    """define_minmax in native code: the same bytes, and the error that they cost."""
    rows, columns = weights.shape
    w_q = np.empty((rows, columns * bits // 32), np.uint32)
    scales, biases = (np.empty((rows, columns // group_size), np.uint16) for _ in range(2))
    weights = np.ascontiguousarray(weights)
    error = native_quantize.quantize_minmax(weights, bits, group_size, w_q, scales, biases)
    return QuantizedMatrix(w_q, scales, biases, error)


def quantize_mse(weights: np.ndarray, bits: int, group_size: int, moments: np.ndarray | None = None) -> QuantizedMatrix:
    """The least squared error of each group: kernels/native_fit.py. Of second moments the diagonal is used."""
    importance = None
    if moments is not None:
        importance = column_importance(np.diagonal(moments) if moments.ndim == 2 else moments)
    rows, columns = weights.shape
    step = max(1, WEIGHTS_AT_ONCE // columns)
    w_q = np.empty((rows, columns * bits // 32), np.uint32)
    scales, biases = (np.empty((rows, columns // group_size), np.uint16) for _ in range(2))
    total = RoundingError()
    for first in range(0, rows, step):  # what is in floats stays in the cache, and out of the memory budget
        part = slice(first, first + step)
        integers, scales[part], biases[part], error = fit_groups(
            widen_finite(weights[part]), bits, group_size, importance
        )
        w_q[part] = pack_integers(integers, bits)
        total += error
    return QuantizedMatrix(w_q, scales, biases, total)


def quantize_gptq(
    weights: np.ndarray, bits: int, group_size: int, moments: np.ndarray | None = None
) -> QuantizedMatrix:
    """The least change of what the matrix does to its inputs; quantize_mse where moments are not [K, K]."""
    if moments is None or moments.ndim != 2:
        return quantize_mse(weights, bits, group_size, moments)
    feedback = ErrorFeedback(widen_finite(weights), bits, group_size, moments)
    feedback.run()
    error = measure_error(feedback.weights, feedback.rounded)
    return QuantizedMatrix(pack_integers(feedback.integers, bits), feedback.scales, feedback.biases, error)


def measure_error(weights: np.ndarray, rounded: np.ndarray) -> RoundingError:
    """What rounding did to a matrix."""
    off = rounded - weights
    return RoundingError(float(np.vdot(off, off)), float(np.vdot(weights, weights)), float(np.abs(off).max()))


def widen_finite(weights: np.ndarray) -> np.ndarray:
    """widen, with a ValueError for NaN, infinity and what cannot be squared."""
    weights = widen(weights)
    if not np.abs(weights).max() < LARGEST_WEIGHT:  # a NaN is not below it
        raise ValueError("holds NaN, infinity or a range beyond bf16")
    return weights


QUANTIZERS: dict[str, Quantizer] = {"minmax": quantize_minmax, "mse": quantize_mse, "gptq": quantize_gptq}
AUTO_QUANTIZER = "mse"  # what `--quantizer auto` takes without calibration
