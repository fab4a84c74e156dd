"""The fit of quantization groups: scales, biases and integers with the least squared error, natively.

For each group, from several shares of its range, rounding and a least-squares line through the rounded integers take
turns; scale and bias are then rounded to bf16, the integers chosen for the rounded values, and the start with the
least squared error wins. With the importance of each column (the mean square of what the column is multiplied with)
the squares are weighted by it. The same input gives the same bytes on every machine and instruction set.

    integers, scales, biases, error = fit_groups(weights, bits=2, group_size=64)
"""

from __future__ import annotations

import numpy as np

from moepack.kernels.native_library import ADDRESS, INT, declare
from moepack.kernels.native_quantize import RoundingError


def fit_groups(
    weights: np.ndarray, bits: int, group_size: int, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, RoundingError]:
    """Fit every group of a matrix: integers uint8 [N, K], scales and biases uint16 [N, K/group_size] (bf16 patterns).

    The error is plain, whatever the importance.

    weights      float32 [N, K], finite, K a multiple of group_size (32, 64 or 128)
    importance   float32 [K], positive; None weighs all columns alike
    """
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    rows, columns = weights.shape
    if group_size not in (32, 64, 128) or columns % group_size:
        raise ValueError(
            f"rows of {columns} weights in groups of {group_size}: expected 32, 64 or 128, dividing the row"
        )
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != (columns,) or not (importance > 0).all():
            raise ValueError(f"importance: expected {columns} positive numbers, got shape {importance.shape}")
    integers = np.empty((rows, columns), dtype=np.uint8)
    scales, biases = (np.empty((rows, columns // group_size), dtype=np.uint16) for _ in range(2))
    loss = np.zeros(3)
    fit = declare("fit_groups", ADDRESS, ADDRESS, *[INT] * 4, *[ADDRESS] * 4)
    given = None if importance is None else importance.ctypes.data
    outputs = [array.ctypes.data for array in (scales, biases, integers, loss)]
    fit(weights.ctypes.data, given, rows, columns, group_size, bits, *outputs)
    return integers, scales, biases, RoundingError(*loss.tolist())
