"""Error feedback: rounding a matrix so that what it does to its inputs changes least, not the weights themselves.

For inputs with second moments H the error of a matrix W rounded to R is tr((W - R) H (W - R)ᵀ). Columns are rounded one
after the other, each with the errors of those before it taken off (GPTQ); then, in turns, every group's scale and bias
move to the best line through its integers and every integer to the best it can be, all others held. The turns take a
third off the error that GPTQ leaves.

All of it is float32 in numpy; sums are in the order of the linear algebra library at hand. Memory: a few times [K, K]
and [N, K].

    feedback = ErrorFeedback(weights, bits=2, group_size=64, moments=H)
    feedback.run()
"""

from __future__ import annotations

import numpy as np

from moepack.kernels.native_fit import fit_groups
from moepack.layout.quantized import bf16_to_float32, float32_to_bf16

DAMPING = 0.01  # share of the mean diagonal added to the second moments, so that they can be inverted
SMALLEST_IMPORTANCE = 1e-3  # of a column, as a share of the mean: one that calibration never saw still counts
REFINEMENTS = 3  # turns after the error feedback


class ErrorFeedback:
    """One matrix on its way to integers, in the norm of its inputs' second moments.

    rounded   float32 [N, K], what the integers, scales and biases mean now
    """

    def __init__(self, weights: np.ndarray, bits: int, group_size: int, moments: np.ndarray):
        self.weights, self.bits, self.group_size, self.top = weights, bits, group_size, np.float32(2**bits - 1)
        diagonal = np.diagonal(moments)
        self.importance = column_importance(diagonal)
        damping = DAMPING * float(diagonal.mean()) or 1.0  # inputs that are all zero: any rounding is as good
        self.moments = moments.astype(np.float32) + damping * np.eye(len(diagonal), dtype=np.float32)
        rows, columns = weights.shape
        self.integers = np.zeros((rows, columns), dtype=np.uint8)
        self.scales, self.biases = (np.zeros((rows, columns // group_size), dtype=np.uint16) for _ in range(2))
        self.rounded = np.zeros_like(weights)

    def run(self) -> None:
        """Find integers, scales and biases."""
        self.round_columns()
        for _ in range(REFINEMENTS):
            self.refit_groups()
            self.move_integers()

    def round_columns(self) -> None:
        """Round column by column; the error of each is taken off the columns after it."""
        inverse = np.linalg.inv(self.moments.astype(np.float64))
        factor = np.linalg.cholesky(inverse).T.astype(np.float32)  # upper: inverse = UᵀU
        work, size = self.weights.copy(), self.group_size
        for group, first in enumerate(range(0, work.shape[1], size)):
            part = slice(first, first + size)
            block = np.ascontiguousarray(work[:, part])
            _, scales, biases, _ = fit_groups(block, self.bits, size, self.importance[part])
            self.scales[:, group : group + 1], self.biases[:, group : group + 1] = scales, biases
            scale, bias, inverse_scale = self._line(group)
            errors = np.empty_like(block)
            for column in range(size):
                at = first + column
                integers = self._round(block[:, column], bias, inverse_scale)
                self.integers[:, at] = integers
                self.rounded[:, at] = integers * scale + bias
                errors[:, column] = (block[:, column] - self.rounded[:, at]) / factor[at, at]
                block[:, column + 1 :] -= np.outer(errors[:, column], factor[at, at + 1 : part.stop])
            work[:, part.stop :] -= errors @ factor[part, part.stop :]

    def refit_groups(self) -> None:
        """The best line through each group's integers, the other groups held; kept where it survives its rounding."""
        gradient = (self.weights - self.rounded) @ self.moments  # of half the error, negative: [N, K]
        for group, first in enumerate(range(0, self.weights.shape[1], self.group_size)):
            part = slice(first, first + self.group_size)
            inner = self.moments[part, part]
            steps = self.integers[:, part].astype(np.float32)
            moved = steps @ inner
            a, b, c = (moved * steps).sum(-1), moved.sum(-1), inner.sum()
            right = (gradient[:, part] * steps).sum(-1), gradient[:, part].sum(-1)
            determinant = a * c - b * b
            usable = determinant > 1e-6 * np.abs(a * c)
            safe = np.where(usable, determinant, 1)
            change_scale = np.where(usable, (c * right[0] - b * right[1]) / safe, 0)
            change_bias = np.where(usable, (a * right[1] - b * right[0]) / safe, right[1] / c)
            scale, bias, _ = self._line(group)
            scales, biases = float32_to_bf16(scale + change_scale), float32_to_bf16(bias + change_bias)
            new_scale, new_bias = bf16_to_float32(scales), bf16_to_float32(biases)
            change = steps * (new_scale - scale)[:, None] + (new_bias - bias)[:, None]
            gain = 2 * (change * gradient[:, part]).sum(-1) - ((change @ inner) * change).sum(-1)
            kept = (gain > 0) & (new_scale > 0)
            change[~kept] = 0
            self.scales[kept, group], self.biases[kept, group] = scales[kept], biases[kept]
            self.rounded[:, part] += change
            gradient -= change @ self.moments[part]

    def move_integers(self) -> None:
        """Each integer in turn to the best it can be, all others held."""
        size = self.group_size
        gradient = (self.weights - self.rounded) @ self.moments
        for group, first in enumerate(range(0, self.weights.shape[1], size)):
            part = slice(first, first + size)
            scale, bias, inverse_scale = self._line(group)
            block = np.ascontiguousarray(gradient[:, part])
            changes = np.zeros_like(block)
            for column in range(size):
                at = first + column
                wanted = self.rounded[:, at] + block[:, column] / self.moments[at, at]
                integers = self._round(wanted, bias, inverse_scale)
                value = integers * scale + bias
                changes[:, column] = value - self.rounded[:, at]
                self.integers[:, at], self.rounded[:, at] = integers, value
                block[:, column + 1 :] -= np.outer(changes[:, column], self.moments[at, at + 1 : part.stop])
            gradient -= changes @ self.moments[part]

    def _line(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scale, bias and 1 / scale of a group of every row: float32 [N] each; 1 / 0 is 0."""
        scale, bias = bf16_to_float32(self.scales[:, group]), bf16_to_float32(self.biases[:, group])
        return scale, bias, np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)

    def _round(self, values: np.ndarray, bias: np.ndarray, inverse_scale: np.ndarray) -> np.ndarray:
        return np.clip(np.rint((values - bias) * inverse_scale), 0, self.top)


def column_importance(mean_squares: np.ndarray) -> np.ndarray:
    """Weights of the columns: mean squares of the inputs, none below a thousandth of their mean. float32 [K]"""
    mean = float(mean_squares.mean())
    if not mean > 0:
        return np.ones(len(mean_squares), dtype=np.float32)
    return np.maximum(mean_squares / mean, SMALLEST_IMPORTANCE).astype(np.float32)
