"""From float rows to integers, scales and biases: the one seam where a better fit can be put in.

A quantizer is a function (weights, bits, group_size) -> QuantizedMatrix; QUANTIZERS names them for the command line.
Its result means what layout/quantized.py says. Scale and bias are rounded to bf16 first and the integers are chosen
for the rounded values, so that the rounding costs nothing twice. The same input gives the same bytes on every machine.

    quantized = quantize_minmax(weights, bits=4, group_size=64)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moepack.layout.quantized import bf16_to_float32, float32_to_bf16, pack_integers


@dataclass(frozen=True)
class QuantizedMatrix:
    """w_q uint32 [N, K*bits/32], scales and biases uint16 [N, K/group_size] (bf16 bit patterns)."""

    w_q: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


Quantizer = Callable[[np.ndarray, int, int], QuantizedMatrix]


def quantize_minmax(weights: np.ndarray, bits: int, group_size: int) -> QuantizedMatrix:
    """The plain fit: each group's smallest weight becomes 0, its largest 2**bits - 1.

    weights   float32 [N, K], finite, K a multiple of group_size
    """
    rows, columns = weights.shape
    groups = weights.reshape(rows, columns // group_size, group_size)
    low, high = groups.min(axis=-1), groups.max(axis=-1)  # [N, G]
    top = np.float32(2**bits - 1)
    scales = float32_to_bf16((high - low) / top)
    biases = float32_to_bf16(low)
    scale, bias = bf16_to_float32(scales)[:, :, None], bf16_to_float32(biases)[:, :, None]
    # A group of equal weights has scale 0: every integer means the bias, 0 is written.
    steps = np.divide(groups - bias, scale, out=np.zeros_like(groups), where=scale > 0)
    integers = np.clip(np.rint(steps), 0, top).astype(np.uint8)
    return QuantizedMatrix(pack_integers(integers.reshape(rows, columns), bits), scales, biases)


QUANTIZERS: dict[str, Quantizer] = {"minmax": quantize_minmax}
AUTO_QUANTIZER = "minmax"  # what `--quantizer auto` takes
