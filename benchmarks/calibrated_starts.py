"""Starts that look at calibration batches against the same techniques without them, before and after fine-tuning.

One original; from its weights every start is compressed and trained, at once and gradually, with the same batches,
steps and learning rates, once for each seed. Reported is the test accuracy of the compressed model before any training,
and of the finished model, saved and loaded again.

    python benchmarks/calibrated_starts.py
    python benchmarks/calibrated_starts.py --task fashion --seeds 1 2 3 4 5
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from paired import write_record
from real_tasks import TASKS, RealTask, accuracies_of, training_options
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vanishing import Calibration, Compressor, LowRank, MagnitudePruning, PerChannel, Score
from vanishing.bench.arms import POST_SHOT, VCON, Arm
from vanishing.bench.statistics import summarize
from vanishing.bench.training import Outcome, Point, fine_tune, train_dense
from vanishing.bench.wording import percent

ARMS = {arm.name: arm for arm in (POST_SHOT, VCON)}
BATCHES = 8


@dataclass(frozen=True)
class Start:
    """A technique, and whether it looks at calibration batches."""

    technique: Compressor
    calibrated: bool = False


def starts(sparsity: float, rank: int) -> dict[str, Start]:
    """Return the starts by their names."""
    channels = PerChannel()
    return {
        "pruned, magnitude": Start(MagnitudePruning(sparsity)),
        "pruned, first order": Start(MagnitudePruning(sparsity, score=Score.FIRST_ORDER), calibrated=True),
        "pruned by channel, magnitude": Start(MagnitudePruning(sparsity, granularity=channels)),
        "pruned by channel, Wanda": Start(
            MagnitudePruning(sparsity, granularity=channels, score=Score.WANDA), calibrated=True
        ),
        "low rank": Start(LowRank(rank=rank)),
        "low rank, whitened": Start(LowRank(rank=rank, whitened=True), calibrated=True),
    }


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    real = TASKS[options.task]()
    record: dict[str, object] = {}
    with Progress(console=Console(stderr=True)) as progress, tempfile.TemporaryDirectory() as folder:
        bar = progress.add_task("training")

        def on_step() -> None:
            progress.update(bar, advance=1)

        state, dense = train_dense(real.at(0), real.dense_budget, Path(folder) / "dense", on_step)
        print(f"{options.task}: dense {100 * dense.accuracy:.2f} %", flush=True)
        for name, arm in itertools.product(options.starts, [ARMS[arm] for arm in options.arms]):
            start = starts(options.sparsity, options.rank)[name]
            runs = [_run(real, seed, state, start, arm, Path(folder) / "small", on_step) for seed in options.seeds]
            before = summarize([curve[0].shipped for _, curve in runs])
            after = accuracies_of([outcome for outcome, _ in runs])
            print(f"{name:30} {arm.name:10} {percent(before):>12} -> {after}", flush=True)
            record[f"{name}, {arm.name}"] = [[asdict(outcome), [asdict(p) for p in curve]] for outcome, curve in runs]
    write_record(options, {"dense": asdict(dense), "runs": record})


def _run(
    real: RealTask,
    seed: int,
    state: dict[str, Tensor],
    start: Start,
    arm: Arm,
    folder: Path,
    on_step: Callable[[], None],
) -> tuple[Outcome, tuple[Point, ...]]:
    task = real.at(seed)
    calibration = Calibration(batches=list(task.batches(BATCHES)), loss=task.loss) if start.calibrated else None
    return fine_tune(task, state, start.technique, arm, real.budget, folder, on_step, calibration)


def _options() -> argparse.Namespace:
    parser = training_options(__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="r8")
    names = list(starts(0.9, 16))
    parser.add_argument("--starts", nargs="+", choices=names, default=names, metavar="START", help=", ".join(names))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="strategies (default: both)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of zeros (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the factors (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
