"""What a handful of seeds says: means, spreads and paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Values of one quantity over seeds.

    Args:
        mean: their mean.
        spread: their sample standard deviation; None for a single value, which has none.
    """

    mean: float
    spread: float | None


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and sample standard deviation of at least one value.

    >>> summarize([0.25, 0.75]).mean
    0.5
    """
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class PairedDifference:
    """How far one strategy is ahead of another, seed by seed.

    Args:
        other: name of the other strategy.
        difference: summary of the differences.
        ahead: number of seeds in which the difference is above 0.
        behind: number of seeds in which it is below 0.
    """

    other: str
    difference: Summary
    ahead: int
    behind: int


def lead_over_best(values: Sequence[float], others: Mapping[str, Sequence[float]]) -> PairedDifference:
    """Return the paired difference to the strategy with the highest mean among the others.

    Args:
        values: one value for each seed.
        others: name -> values of another strategy, for the same seeds in the same order.
    """
    best = max(others, key=lambda name: statistics.fmean(others[name]))
    differences = [a - b for a, b in zip(values, others[best], strict=True)]
    ahead, behind = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return PairedDifference(best, summarize(differences), ahead, behind)
