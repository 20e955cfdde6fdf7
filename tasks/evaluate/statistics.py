"""How certain a number is: paired bootstrap intervals, McNemar's test. Pure, numpy only."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
Array = NDArray[np.float64]


def interval(
    values: Array, point: float, seed: int, statistic: Callable[[Array], Array] = lambda means: means
) -> tuple[float, float] | None:
    """A percentile bootstrap interval, 95 %, of `statistic(mean of values)`; None for fewer than two values.

    `values` [n], or [n, k] for a statistic of k means, are of independent units, windows or items; what is paired is subtracted
    before, or in one row, so that the same units are drawn for both. The interval always holds `point`, which a percentile
    interval of a few skewed values may miss.
    """
    if len(values) < 2:
        return None
    draws = np.random.default_rng(seed)
    means = np.empty((RESAMPLES, *values.shape[1:]))
    for i in range(0, RESAMPLES, 100):  # in parts, so that a long text takes no gigabytes
        means[i : i + 100] = values[draws.integers(0, len(values), (100, len(values)))].mean(axis=1)
    low, high = np.quantile(statistic(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return min(float(low), point), max(float(high), point)


def recovery(means: Array) -> Array:
    """The first of two means as a share of the second; of a resample in which that is 0, nothing is known, and it counts as 1."""
    ours, theirs = means[..., 0], means[..., 1]
    return np.divide(ours, theirs, out=np.ones_like(ours), where=theirs > 0)


def mcnemar(only_baseline: int, only_variant: int) -> float:
    """McNemar's exact two-sided p: how likely discordant items split at least so unevenly if neither model is better.

    Args:
        only_baseline: items that the baseline alone has right.
        only_variant: items that the variant alone has right.
    """
    flips = only_baseline + only_variant
    tail = sum(math.comb(flips, k) for k in range(min(only_baseline, only_variant) + 1))
    return min(1.0, float(2 * tail / 2**flips)) if flips < 1000 else _normal_tail(only_baseline, only_variant)


def _normal_tail(only_baseline: int, only_variant: int) -> float:
    # The binomial by its normal approximation with continuity correction: past a thousand flips they agree.
    difference = max(abs(only_baseline - only_variant) - 1, 0)
    return math.erfc(difference / math.sqrt(2 * (only_baseline + only_variant)))
