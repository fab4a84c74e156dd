"""Quantizers in C++: the arrays of a pack straight from bf16, f16 or float32 rows. numpy only, no torch.

The definition, bit for bit, is quantize_minmax of convert/quantizers.py. A call computes on the caller's thread with
the GIL released, so several threads quantize side by side.

    error = quantize_minmax(values, 4, 64, w_q, scales, biases)
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from moepack.kernels.native_library import ADDRESS, INT, declare

STORAGES = {np.dtype(np.uint16): 1, np.dtype(np.float16): 2, np.dtype(np.float32): 3}  # uint16: bf16 bit patterns
INT32 = ctypes.c_int32


@dataclass(frozen=True)
class RoundingError:
    """What rounding did to some weights: sums of squares of the errors and of the weights, the largest error."""

    squared_error: float = 0.0
    squared_weight: float = 0.0
    largest: float = 0.0

    def __add__(self, other: RoundingError) -> RoundingError:
        return RoundingError(
            self.squared_error + other.squared_error,
            self.squared_weight + other.squared_weight,
            max(self.largest, other.largest),
        )

    @property
    def relative(self) -> float:
        """Norm of the errors as a share of the norm of the weights."""
        return float(np.sqrt(self.squared_error / self.squared_weight)) if self.squared_weight else 0.0


class _RoundingError(ctypes.Structure):
    """struct RoundingError of native/quantize_kernels.h."""

    _fields_ = [(name, ctypes.c_double) for name in ("squared_error", "squared_weight", "largest")]


def quantize_minmax(
    values: np.ndarray, bits: int, group_size: int, w_q: np.ndarray, scales: np.ndarray, biases: np.ndarray
) -> RoundingError:
    """Quantize rows into arrays that are there already, such as views into a block.

    values           uint16 (bf16 bit patterns), float16 or float32 [N, K], contiguous, at any address
    w_q              uint32 [N, K*bits/32], contiguous
    scales, biases   uint16 (bf16 bit patterns) [N, K/group_size], contiguous

    Raises ValueError if a weight is NaN or infinite, or a group's range is beyond bf16.
    """
    (rows, columns), groups = values.shape, values.shape[1] // group_size
    shapes = ((rows, columns * bits // 32), (rows, groups), (rows, groups))
    arrays = (w_q, scales, biases)
    if tuple(array.shape for array in arrays) != shapes or columns % group_size:
        raise ValueError(f"rows of {columns} at {bits} bits need arrays of {shapes}, got {[a.shape for a in arrays]}")
    if not all(array.flags.c_contiguous for array in (values, *arrays)):
        raise ValueError("arrays must be contiguous")
    run = declare("quantize_minmax", *[ADDRESS] * 5, INT32, INT, INT, INT32, INT32, returns=INT)
    error = _RoundingError()
    places = [array.ctypes.data for array in arrays]
    bad_row = run(
        *(*places, ctypes.addressof(error), values.ctypes.data, STORAGES[values.dtype]),
        *(rows, columns, bits, group_size),
    )
    if bad_row >= 0:
        raise ValueError(f"row {bad_row} holds NaN, infinity or a range beyond bf16")
    return RoundingError(error.squared_error, error.squared_weight, error.largest)


def dequantize_bf16(
    w_q: np.ndarray, scales: np.ndarray, biases: np.ndarray, *, bits: int, group_size: int
) -> np.ndarray:
    """The bf16 (bit patterns in uint16) nearest to layout.quantized.dequantize of the same arrays: [N, K]."""
    rows, columns = w_q.shape[0], w_q.shape[1] * 32 // bits
    if scales.shape != (rows, columns // group_size) or biases.shape != scales.shape:
        raise ValueError(f"w_q {w_q.shape} at {bits} bits: got scales {scales.shape} and biases {biases.shape}")
    arrays = [np.ascontiguousarray(array) for array in (w_q, scales, biases)]
    out = np.empty((rows, columns), np.uint16)
    run = declare("dequantize_bf16", *[ADDRESS] * 4, INT, INT, INT32, INT32)
    run(out.ctypes.data, *[array.ctypes.data for array in arrays], rows, columns, bits, group_size)
    return out
