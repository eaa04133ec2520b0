"""Medians, quartiles and intervals of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.common.seeds import SEED


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def bootstrap(samples: np.ndarray, statistic: Callable[[np.ndarray], Any], draws: int = 1000) -> tuple[float, float]:
    """95 % interval of a statistic by resampling the rows of `samples`."""
    rng = np.random.default_rng(SEED)
    found = [statistic(samples[rng.integers(len(samples), size=len(samples))]) for _ in range(draws)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median, from order statistics."""
    ranked, count = sorted(values), len(values)
    half = 0.98 * count**0.5
    low, high = max(0, int(count / 2 - half)), min(count - 1, int(count / 2 + half))
    return ranked[low], ranked[high]
