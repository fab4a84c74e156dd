"""Between which values a measured one lies in 95 of 100 draws of other texts or prompts of the same kind.

A share of prompts has Wilson's interval, which stays honest at none and at all of them. Anything else is a bootstrap
with a fixed seed over what was drawn on its own: windows, whose tokens hang together, and prompts. Two models that
answered the same prompts are compared prompt by prompt: what is hard for both is no difference between them, so the
interval of their ratio is far narrower than those of the two rates.

    share_interval(57, 60)
    compare_rates(own, reference)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES, SEED, CONFIDENCE = 2000, 0, 0.95
Interval = tuple[float, float]


def bootstrap(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval | None:
    """The interval of a statistic of summed rows [n, C], over draws of n rows with replacement.

    statistic   sums [draws, C] -> [draws]; draws that give NaN are left out

    The same rows give the same interval. None of a single row, which says nothing of how others would be.
    """
    if len(rows) < 2:
        return None
    picks = np.random.default_rng(SEED).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES)
    low, high = np.nanquantile(statistic(picks @ rows), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def share_interval(count: float, of: int) -> Interval:
    """Wilson's interval of a share of `of` independent draws, at least one, that `count` of them have."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = count / of, z * z / of
    middle, half = share + spread / 2, z * math.sqrt(share * (1 - share) / of + spread / of / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def compare_rates(own: Sequence[float], reference: Sequence[float]) -> tuple[float, Interval | None] | None:
    """What share of the reference's rate one's own is, and its interval, over the same prompts in pairs.

    own, reference   how many things are right in each prompt, for a prompt that is right or not 1 or 0

    None if the reference has none right; no interval of a single prompt. Raises ValueError if the two are not equally
    long.
    """
    rows = np.array([own, reference], dtype=float).T
    if not rows[:, 1].any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        interval = bootstrap(rows, lambda total: np.where(total[..., 1] > 0, total[..., 0] / total[..., 1], np.nan))
    return float(rows[:, 0].sum() / rows[:, 1].sum()), interval
