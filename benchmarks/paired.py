"""Two steps timed against each other in one process, so that a drift of the machine's speed falls on both."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Step = Callable[[], None]


@dataclass(frozen=True)
class Ratios:
    """Times of a step divided by those of the one that it is paired with, and the medians of both in milliseconds."""

    median_ratio: float
    lower_quartile: float
    upper_quartile: float
    total_ratio: float
    baseline_ms: float
    step_ms: float

    @staticmethod
    def titles(baseline: str, step: str) -> str:
        """Return what stands above the columns of `str`."""
        return f"{'median':>8}{'quartiles':>17}{'total':>8}{baseline:>10}{step:>9}"

    def __str__(self) -> str:
        quartiles = f"{self.lower_quartile:.3f} - {self.upper_quartile:.3f}"
        times = f"{self.baseline_ms:10.1f}{self.step_ms:9.1f}"
        return f"{self.median_ratio:8.3f}{quartiles:>17}{self.total_ratio:8.3f}{times}"


def time_pairs(baseline: Step, step: Step, *, pairs: int, device: str) -> Ratios:
    """Return the ratios of `pairs` pairs; the order within a pair alternates, and the garbage collector is off."""
    steps = (baseline, step)
    seconds: list[tuple[float, float]] = []
    gc.collect()
    gc.disable()
    for pair in range(pairs):
        first = pair % 2
        times = {which: seconds_of(steps[which], device) for which in (first, 1 - first)}
        seconds.append((times[0], times[1]))
    gc.enable()
    lower, median, upper = statistics.quantiles([b / a for a, b in seconds], n=4, method="inclusive")
    baseline_times, step_times = zip(*seconds, strict=True)
    return Ratios(
        median_ratio=median,
        lower_quartile=lower,
        upper_quartile=upper,
        total_ratio=sum(step_times) / sum(baseline_times),
        baseline_ms=1e3 * statistics.median(baseline_times),
        step_ms=1e3 * statistics.median(step_times),
    )


def seconds_of(step: Step, device: str) -> float:
    """Return how long a step takes, with what it left on the device's queue."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine(device: str) -> str:
    """Return what the times were taken on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def write_record(options: argparse.Namespace, results: dict[str, object]) -> None:
    """Write the results beside the settings and the machine, if `--json` names a file."""
    if options.json:
        record = {"settings": vars(options) | {"json": str(options.json)}, "machine": machine(options.device)}
        options.json.write_text(json.dumps(record | results, indent=2) + "\n")
