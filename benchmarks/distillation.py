"""Learning from the original besides the task, or not: accuracy of the finished models, and the time of a step.

One original for each task; from its weights every way to learn is trained gradually (VCON) with the same batches,
steps and learning rates, once for each seed. Reported is the test accuracy of the finished models, saved and loaded
again, and the time of a training step in the middle of the fade and after it, beside one of the same technique without
distillation in the same process.

    python benchmarks/distillation.py
    python benchmarks/distillation.py --tasks r8 --seeds 1 2 3 4 5 --pairs 0
    python benchmarks/distillation.py --steps 8 --seeds 1 --pairs 2     # a short run, to see that it works
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from paired import Ratios, machine, time_pairs, write_record
from real_tasks import TASKS, RealTask, accuracies_of, training_options
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import vanishing
from vanishing import LocalLoss, LowRank, MagnitudePruning, Teacher
from vanishing.bench.arms import VCON, Arm
from vanishing.bench.tasks import Examples
from vanishing.bench.training import Budget, fine_tune, train_dense

FADE = 1_000_000
"""Optimizer steps of the fade in which steps are timed: beta hardly moves in it."""
TECHNIQUES = ["pruned", "low rank"]
WAYS = ["none", "local", "logits", "both"]
MOMENTS = {"in the fade": FADE // 2, "after it": FADE}


def arms(options: argparse.Namespace) -> dict[str, Arm]:
    """Return the ways to learn, by what they learn from besides the task."""
    local = LocalLoss(weight=options.local)
    teacher = Teacher(logits=options.logits, temperature=options.temperature)
    losses = {"none": (), "local": (local,), "logits": (teacher,), "both": (local, teacher)}
    return {name: replace(VCON, name=name, distillation=chosen) for name, chosen in losses.items()}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    print(machine("cpu"))
    records = {}
    for name in options.tasks:
        with Progress(console=Console(stderr=True)) as progress, tempfile.TemporaryDirectory() as folder:
            bar = progress.add_task(name)
            records[name] = measure(name, options, Path(folder), lambda step=bar: progress.update(step, advance=1))
    write_record(options, {"tasks": records})


def measure(name: str, options: argparse.Namespace, folder: Path, on_step: Callable[[], None]) -> dict[str, Any]:
    """Print a line for the original and for every technique and way to learn of a task, and return their figures."""
    real = TASKS[name]()
    if options.steps:
        real = replace(real, dense_budget=_short(real.dense_budget, options), budget=_short(real.budget, options))
    state, dense = train_dense(real.at(0), real.dense_budget, folder / "dense", on_step)
    print(f"{name}: dense {100 * dense.accuracy:.2f} %", flush=True)
    known = {"pruned": MagnitudePruning(options.sparsity), "low rank": LowRank(rank=options.rank)}
    techniques = {technique: known[technique] for technique in options.techniques}
    record: dict[str, Any] = {"dense": asdict(dense)}
    chosen = {learned: arm for learned, arm in arms(options).items() if learned in options.learn_from}
    for (technique, compressor), (learned, arm) in itertools.product(techniques.items(), chosen.items()):
        tasks = [real.at(seed) for seed in options.seeds]
        runs = [fine_tune(task, state, compressor, arm, real.budget, folder / "small", on_step) for task in tasks]
        print(f"{name}: {technique:9} {learned:7} {accuracies_of([outcome for outcome, _ in runs])}", flush=True)
        record[f"{technique}, {learned}"] = [asdict(outcome) for outcome, _ in runs]
    if options.pairs:
        print(f"{name}: {'step against one without':36}{Ratios.titles('none ms', 'this ms')}")
    for technique, compressor in techniques.items():
        for label, ratios in time_steps(real, state, compressor, options) if options.pairs else ():
            print(f"{name}: {technique + ', ' + label:36}{ratios}", flush=True)
            record[f"{technique}, {label}, step"] = asdict(ratios)
    return record


def time_steps(
    real: RealTask, state: dict[str, Tensor], compressor: vanishing.Compressor, options: argparse.Namespace
) -> Iterator[tuple[str, Ratios]]:
    """Yield what was timed, in words, and its ratios to the step without distillation."""
    chosen = arms(options)
    for (moment, at), learned in itertools.product(MOMENTS.items(), WAYS[1:]):
        if learned not in options.learn_from or (moment == "after it" and learned == "local"):
            continue
        steps = [_step(real, state, compressor, chosen[each], at) for each in ("none", learned)]
        for step in steps * options.warm_up:
            step()
        yield f"{learned} {moment}", time_pairs(*steps, pairs=options.pairs, device="cpu")


def _step(
    real: RealTask, state: dict[str, Tensor], compressor: vanishing.Compressor, arm: Arm, at: int
) -> Callable[[], None]:
    task = real.at(0)
    model = task.make_model()
    model.load_state_dict(state)
    transition = vanishing.prepare(model, arm.recipe({task.layers: compressor}, FADE))
    transition.seek(at)
    optimizer = torch.optim.AdamW(model.parameters(), lr=real.budget.learning_rate, fused=True)
    batches: Iterator[Examples] = itertools.cycle(list(task.batches(16)))

    def step() -> None:
        (task.loss(model, next(batches)) + transition.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()

    return step


def _short(budget: Budget, options: argparse.Namespace) -> Budget:
    return replace(budget, steps=options.steps, fade_steps=options.steps // 2)


def _options() -> argparse.Namespace:
    parser = training_options(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, default=TECHNIQUES)
    parser.add_argument("--learn-from", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of zeros (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the factors (default: %(default)s)")
    parser.add_argument("--local", type=float, default=1.0, help="weight of the local loss (default: %(default)s)")
    parser.add_argument("--logits", type=float, default=1.0, help="weight of the teacher's loss (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the teacher (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of every training, for a short run")
    parser.add_argument("--pairs", type=int, default=40, help="measured pairs of steps (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, help="pairs of steps before (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
