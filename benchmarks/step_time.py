"""Time of a training step during the fade, against the dense step, ViT-Tiny/16.

Each arm's step is paired with a dense step in the same process, and the order within a pair alternates, so that a
drift of the machine's speed falls on both. Reported are the median and the quartiles of the ratios of the pairs, and
the ratio of the total times, in which work that is done only every few steps shows as well.

    python benchmarks/step_time.py --size 224 --pairs 40
    python benchmarks/step_time.py --size 64 --pairs 150 --arms binary "pruning 90 %"
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from paired import machine, time_pairs
from workload import ARMS, Workload, dense, make_step


@dataclass(frozen=True)
class Timing:
    """An arm against the dense step: ratios without a unit, times in milliseconds."""

    arm: str
    pairs: int
    median_ratio: float
    lower_quartile: float
    upper_quartile: float
    total_ratio: float
    dense_ms: float
    arm_ms: float


def main() -> None:
    options = _options()
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    autocast = None if options.dtype == "float32" else getattr(torch, options.dtype)
    workload = Workload(size=options.size, batch=options.batch, device=options.device, autocast=autocast)
    print(f"ViT-Tiny/16 at {options.size} px, batch {options.batch}, {options.dtype}, {machine(options.device)}")
    print(f"{'arm':34}{'median':>8}{'quartiles':>17}{'total':>8}{'dense ms':>10}{'arm ms':>9}")
    timings = []
    for arm in options.arms:
        timing = compare(workload, arm, pairs=options.pairs, warm_up=options.warm_up)
        timings.append(timing)
        quartiles = f"{timing.lower_quartile:.3f} - {timing.upper_quartile:.3f}"
        times = f"{timing.dense_ms:10.1f}{timing.arm_ms:9.1f}"
        print(f"{arm:34}{timing.median_ratio:8.3f}{quartiles:>17}{timing.total_ratio:8.3f}{times}", flush=True)
    if options.json:
        record = {"settings": vars(options) | {"json": str(options.json)}, "machine": machine(options.device)}
        options.json.write_text(json.dumps(record | {"arms": [asdict(t) for t in timings]}, indent=2) + "\n")


def compare(workload: Workload, arm: str, *, pairs: int, warm_up: int) -> Timing:
    """Return the timing of `pairs` pairs of a dense step and a step of the arm, after `warm_up` pairs."""
    steps = (make_step(workload, dense), make_step(workload, ARMS[arm]))
    for _ in range(warm_up):
        for step in steps:
            step()
    ratios = time_pairs(*steps, pairs=pairs, device=workload.device)
    return Timing(
        arm=arm,
        pairs=pairs,
        median_ratio=ratios.median_ratio,
        lower_quartile=ratios.lower_quartile,
        upper_quartile=ratios.upper_quartile,
        total_ratio=ratios.total_ratio,
        dense_ms=ratios.baseline_ms,
        arm_ms=ratios.step_ms,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels, a multiple of 16")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--pairs", type=int, default=40, help="measured pairs of steps per arm")
    parser.add_argument("--warm-up", type=int, default=5, help="pairs of steps before the measurement")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), metavar="ARM")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
