"""Half the heads and half the hidden units taken out, gradually against at once, on two real tasks.

One original for each task; from its weights every strategy is trained with the same batches, steps and learning rates,
once for each seed. Reported is the test accuracy of the finished models, saved and loaded again.

    python benchmarks/structured_accuracy.py
    python benchmarks/structured_accuracy.py --tasks fashion --seeds 1 2 3 4 5
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from paired import write_record
from real_tasks import TASKS, accuracies_of, training_options
from rich.console import Console
from rich.progress import Progress

from vanishing import HeadPruning, WidthPruning
from vanishing.bench.arms import POST_SHOT, VCON
from vanishing.bench.training import fine_tune, train_dense

ARMS = (POST_SHOT, VCON)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    records = {}
    for name in options.tasks:
        with Progress(console=Console(stderr=True)) as progress, tempfile.TemporaryDirectory() as folder:
            bar = progress.add_task(name)
            records[name] = measure(name, options, Path(folder), lambda step=bar: progress.update(step, advance=1))
    write_record(options, {"tasks": records})


def measure(name: str, options: argparse.Namespace, folder: Path, on_step: Callable[[], None]) -> dict[str, object]:
    """Print a line for the original and each strategy of a task, and return their figures."""
    real = TASKS[name]()
    rules = {real.heads: HeadPruning(options.share), real.at(0).layers: WidthPruning(options.share)}
    state, dense = train_dense(real.at(0), real.dense_budget, folder / "dense", on_step)
    print(f"{name}: dense {100 * dense.accuracy:.2f} %, {dense.file_bytes / 1e6:.2f} MB", flush=True)
    record: dict[str, object] = {"dense": asdict(dense)}
    for arm in ARMS:
        tasks = [real.at(seed) for seed in options.seeds]
        runs = [fine_tune(task, state, rules, arm, real.budget, folder / arm.name, on_step) for task in tasks]
        print(f"{name}: {arm.name:10} {accuracies_of([outcome for outcome, _ in runs])}   ", end="")
        print(f"{runs[0][0].file_bytes / 1e6:.2f} MB, without training {100 * runs[0][1][0].shipped:.2f} %", flush=True)
        record[arm.name] = [{"outcome": asdict(run), "curve": [asdict(point) for point in way]} for run, way in runs]
    return record


def _options() -> argparse.Namespace:
    parser = training_options(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--share", type=float, default=0.5, help="of heads and hidden units (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
