"""Figures of a study in words, the same in the terminal and in the report."""

from __future__ import annotations

from vanishing.bench.statistics import PairedDifference, Summary
from vanishing.bench.study import Study


def percent(summary: Summary, *, signed: bool = False) -> str:
    """Return mean and spread of a share in percent.

    >>> percent(Summary(0.943, 0.006))
    '94.3 ± 0.6'
    """
    mean = f"{100 * summary.mean:{'+' if signed else ''}.1f}"
    return mean if summary.spread is None else f"{mean} ± {100 * summary.spread:.1f}"


def kilobytes(size: int) -> str:
    """Return a size in kB (1,000 bytes).

    >>> kilobytes(77663)
    '77.7 kB'
    """
    return f"{size / 1000:,.1f} kB"


def cells(study: Study, technique: str, arm: str) -> tuple[str, str, str]:
    """Return test accuracy in percent, size on disk, and how many times smaller than the original that is."""
    size = study.file_bytes(technique, arm)
    return percent(study.accuracy(technique, arm)), kilobytes(size), f"{study.dense_bytes / size:.1f}×"


def verdict(lead: PairedDifference, seeds: int) -> str:
    """Return a sentence on VCON and the best other strategy that claims no more than the seeds show.

    >>> verdict(PairedDifference("iterative", Summary(0.02, 0.01), ahead=3, behind=0), seeds=3)
    'VCON is ahead of the best other way, iterative, in each of 3 seeds: +2.0 ± 1.0 points.'
    """
    points = f"{percent(lead.difference, signed=True)} points"
    other = f"the best other way, {lead.other}"
    if seeds == 1:
        return f"VCON against {other}: {points}. One seed says little."
    if seeds in (lead.ahead, lead.behind):
        place = "ahead of" if lead.ahead else "behind"
        return f"VCON is {place} {other}, in each of {seeds} seeds: {points}."
    return (
        f"VCON and {other}, do not differ clearly: {points}, "
        f"ahead in {lead.ahead} of {seeds} seeds and behind in {lead.behind}."
    )
