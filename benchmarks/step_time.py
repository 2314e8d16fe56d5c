"""Time of a training step during the fade, against the dense step, ViT-Tiny/16.

Each arm's step is paired with a dense step in the same process, and the order within a pair alternates, so that a
drift of the machine's speed falls on both. Reported are the median and the quartiles of the ratios of the pairs, and
the ratio of the total times, in which work that is done only every few steps shows as well.

    python benchmarks/step_time.py --size 224 --pairs 40
    python benchmarks/step_time.py --size 64 --pairs 150 --arms binary "pruning 90 %"
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from paired import Ratios, machine, time_pairs, write_record
from workload import ARMS, Workload, dense, make_step


def main() -> None:
    options = _options()
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    autocast = None if options.dtype == "float32" else getattr(torch, options.dtype)
    workload = Workload(size=options.size, batch=options.batch, device=options.device, autocast=autocast)
    print(f"ViT-Tiny/16 at {options.size} px, batch {options.batch}, {options.dtype}, {machine(options.device)}")
    print(f"{'arm':34}{Ratios.titles('dense ms', 'arm ms')}")
    arms = []
    for arm in options.arms:
        ratios = compare(workload, arm, pairs=options.pairs, warm_up=options.warm_up)
        arms.append({"arm": arm, "pairs": options.pairs, "arm_to_dense": asdict(ratios)})
        print(f"{arm:34}{ratios}", flush=True)
    write_record(options, {"arms": arms})


def compare(workload: Workload, arm: str, *, pairs: int, warm_up: int) -> Ratios:
    """Return the ratios of `pairs` pairs of a dense step and a step of the arm, after `warm_up` pairs."""
    steps = (make_step(workload, dense), make_step(workload, ARMS[arm]))
    for _ in range(warm_up):
        for step in steps:
            step()
    return time_pairs(*steps, pairs=pairs, device=workload.device)


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
