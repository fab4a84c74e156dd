"""From float rows to integers, scales and biases: the one seam where a better fit can be put in.

A quantizer is a function (weights, bits, group_size) -> QuantizedMatrix; QUANTIZERS names them for the command line.
Weights come as the source has them (float32, float16, or bf16 as its bit patterns in uint16); `widen` makes floats of
them. The result means what layout/quantized.py says. Scale and bias are rounded to bf16 first and the integers are
chosen for the rounded values, so that the rounding costs nothing twice. The same input gives the same bytes on every
machine.

    quantized = QUANTIZERS["minmax"](weights, bits=4, group_size=64)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moepack.kernels import native_quantize
from moepack.kernels.native_quantize import RoundingError
from moepack.layout.quantized import bf16_to_float32, float32_to_bf16, pack_integers


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
Quantizer = Callable[[np.ndarray, int, int], QuantizedMatrix]


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


def quantize_minmax(weights: np.ndarray, bits: int, group_size: int) -> QuantizedMatrix:
    """define_minmax in native code: the same bytes, and the error that they cost."""
    rows, columns = weights.shape
    w_q = np.empty((rows, columns * bits // 32), np.uint32)
    scales, biases = (np.empty((rows, columns // group_size), np.uint16) for _ in range(2))
    weights = np.ascontiguousarray(weights)
    error = native_quantize.quantize_minmax(weights, bits, group_size, w_q, scales, biases)
    return QuantizedMatrix(w_q, scales, biases, error)


QUANTIZERS: dict[str, Quantizer] = {"minmax": quantize_minmax}
AUTO_QUANTIZER = "minmax"  # what `--quantizer auto` takes
