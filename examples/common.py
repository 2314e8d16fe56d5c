"""What the examples share: the training loop, the arms to compare, the file of results and the table."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

import vanishing
from vanishing.schedules import Schedule

DENSE = "dense"
FADE_SHARE = 0.4
EVALUATION_BATCH = 128

# A strategy is nothing but a schedule of the original's share.
STRATEGIES: dict[str, Callable[[int], Schedule]] = {
    "post-shot": lambda fade: vanishing.StepSchedule(at=0),
    "dense-then-compress": lambda fade: vanishing.StepSchedule(at=fade),
    "vcon": lambda fade: vanishing.LinearSchedule(steps=fade),
}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Split:
    """Examples as keyword arguments of a model, with their labels."""

    inputs: Batch
    labels: Tensor

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the examples that `order` names, `size` at a time; the last batch may be smaller."""
        for rows in order.split(size):
            yield {name: values[rows] for name, values in self.inputs.items()}, self.labels[rows]


@dataclass(frozen=True)
class Task:
    """A pretrained model, a data set and how the one is fine-tuned on the other.

    Args:
        pretrained: makes the model with its pretrained body and a new head, drawn from torch's random state.
        blank: makes the same architecture with any weights, to load a saved model into.
        logits: runs a model on a batch.
        train: examples to learn from.
        test: examples to measure on.
        scope: globs of the modules to compress.
        epochs: passes over `train`.
        batch_size: examples in a step.
        learning_rate: its peak.
        warmup: steps over which the learning rate rises from 0; then it falls to 0 in a line.
        recalibration: batches to estimate BatchNorm's statistics from at the end.
    """

    pretrained: Callable[[], nn.Module]
    blank: Callable[[], nn.Module]
    logits: Callable[[nn.Module, Batch], Tensor]
    train: Split
    test: Split
    scope: tuple[str, ...]
    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 2e-4
    warmup: int = 30
    recalibration: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of a full run."""
        return self.epochs * -(-len(self.train.labels) // self.batch_size)

    def training_batches(self, seed: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yield shuffled batches without end, in an order that depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train.labels), generator=generator)
            yield from self.train.batches(order, self.batch_size)

    def rate(self, step: int, steps: int) -> float:
        """Return the share of the peak learning rate at a step."""
        warmup = min(self.warmup, steps // 2)
        return min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))


@dataclass(frozen=True)
class Arm:
    """One run: a technique, the way it is introduced, and everything that decides the result."""

    technique: str
    strategy: str
    seed: int
    steps: int
    compressor: Mapping[str, Any] | None


def train(
    task: Task,
    model: nn.Module,
    transition: vanishing.Transition | None,
    arm: Arm,
    report: Callable[[], None],
) -> list[float]:
    """Fine-tune a model in place and return the seconds of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: task.rate(step, arm.steps))
    # The same dropout in every arm, whatever was drawn from the random state while the model was prepared.
    torch.manual_seed(arm.seed)
    model.train()
    seconds = []
    for inputs, labels in itertools.islice(task.training_batches(arm.seed), arm.steps):
        started = time.perf_counter()
        loss = F.cross_entropy(task.logits(model, inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if transition is not None:
            transition.step()
        seconds.append(time.perf_counter() - started)
        scheduler.step()
        report()
    return seconds


@torch.inference_mode()
def accuracy(task: Task, model: nn.Module) -> float:
    """Return the share of test examples that a model puts into the right class."""
    model.eval()
    everything = torch.arange(len(task.test.labels))
    batches = task.test.batches(everything, EVALUATION_BATCH)
    hits = sum(int((task.logits(model, inputs).argmax(-1) == labels).sum()) for inputs, labels in batches)
    return hits / len(task.test.labels)


def run_arm(
    task: Task, arm: Arm, compressor: vanishing.Compressor | None, report: Callable[[], None]
) -> dict[str, Any]:
    """Train, finish, save, load into a fresh model, and measure that one."""
    torch.manual_seed(arm.seed)
    model = task.pretrained()
    fade = round(FADE_SHARE * arm.steps)
    transition = None
    if compressor is not None:
        schedule = STRATEGIES[arm.strategy](fade)
        recipe = vanishing.Recipe(rules=dict.fromkeys(task.scope, compressor), schedule=schedule)
        transition = vanishing.prepare(model, recipe)
    seconds = train(task, model, transition, arm, report)
    if transition is not None:
        transition.finish(recalibrate=recalibration_batches(task))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        if transition is None:
            save_model(model, str(file))
            shipped = task.blank()
            load_model(shipped, str(file))
        else:
            vanishing.save(model, folder)
            shipped = vanishing.load(folder, task.blank())
        size = file.stat().st_size
    return {
        "accuracy": accuracy(task, shipped),
        "bytes": size,
        "share_of_dense": share_of_dense(shipped),
        "seconds_per_step_in_fade": statistics.median(seconds[:fade]),
        "seconds_per_step_after_fade": statistics.median(seconds[fade:]),
        "seconds_of_training": sum(seconds),
    }


def share_of_dense(model: nn.Module) -> float:
    """Return what the compressed layers take in the file, as a share of what they took before; 1 without any."""
    rows = [row for row in vanishing.summary(model).rows if row.technique]
    return sum(row.after.bytes for row in rows) / sum(row.before.bytes for row in rows) if rows else 1.0


def recalibration_batches(task: Task) -> list[Batch] | None:
    """Return the batches for BatchNorm's statistics, None for a model without any."""
    if not task.recalibration:
        return None
    count = task.recalibration * task.batch_size
    order = torch.randperm(len(task.train.labels), generator=torch.Generator().manual_seed(0))[:count]
    return [inputs for inputs, _ in task.train.batches(order, task.batch_size)]


class Results:
    """A JSON file of finished arms; it is written after each of them, so that an interrupted run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def find(self, arm: Arm) -> dict[str, Any] | None:
        """Return what was measured for an arm, None where it was not run yet."""
        return next((row for row in self.rows if row["arm"] == dataclasses.asdict(arm)), None)

    def add(self, arm: Arm, measured: dict[str, Any]) -> None:
        """Append an arm's measurements and write the file at once."""
        self.rows.append({"arm": dataclasses.asdict(arm), **measured})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".partial")
        unfinished.write_text(json.dumps(self.rows, indent=2) + "\n")
        os.replace(unfinished, self.path)


def parser(
    description: str | None, techniques: Mapping[str, vanishing.Compressor], output: str
) -> argparse.ArgumentParser:
    """Return the command line that both examples have."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--technique", nargs="+", choices=[DENSE, *techniques], default=[DENSE, *techniques])
    arguments.add_argument("--strategy", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    arguments.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: a full run; at least 3)")
    arguments.add_argument("--output", type=Path, default=Path(output), metavar="JSON", help="default: %(default)s")
    arguments.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    return arguments


def compare(task: Task, techniques: Mapping[str, vanishing.Compressor], options: argparse.Namespace) -> None:
    """Run every arm that is asked for and not yet in the file of results, then print the table."""
    console = Console()
    torch.set_num_threads(options.threads)
    results = Results(options.output)
    arms = chosen_arms(task, techniques, options)
    with Progress(console=console, transient=True) as progress:
        for arm in arms:
            if results.find(arm) is not None:
                continue
            name = f"{arm.technique}, {arm.strategy}, seed {arm.seed}"
            bar: TaskID = progress.add_task(name, total=arm.steps)
            measured = run_arm(task, arm, techniques.get(arm.technique), partial(progress.advance, bar))
            progress.remove_task(bar)
            results.add(arm, measured)
            console.print(f"{name}: {measured['accuracy']:.2%} in {measured['seconds_of_training']:.0f} s")
    console.print(table(arms, results))
    console.print(f"Written to {options.output}")


def chosen_arms(task: Task, techniques: Mapping[str, vanishing.Compressor], options: argparse.Namespace) -> list[Arm]:
    """Return the arms that the command line asks for, dense first."""
    steps = options.steps or task.steps
    if steps < 3:
        raise SystemExit(f"--steps {steps}: a run has a fade and something after it. Give at least 3.")
    pairs = [(DENSE, DENSE)] if DENSE in options.technique else []
    pairs += [(name, how) for name in techniques if name in options.technique for how in options.strategy]
    settings = {name: compressor.to_dict() for name, compressor in techniques.items()}
    return [Arm(name, how, seed, steps, settings.get(name)) for name, how in pairs for seed in options.seeds]


def table(arms: Sequence[Arm], results: Results) -> Table:
    """Return the results as a table, one row for each technique and strategy, seeds averaged."""
    caption = (
        "test %: of the reloaded model. MB: its file. layers %: the compressed layers in the file, of their dense "
        "size. ms a step: median time of a training step, until 40 % of the steps were done / after."
    )
    shown = Table("technique", "strategy", caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("test %", "MB", "layers %", "ms a step"):
        shown.add_column(column, justify="right")
    for (technique, strategy), group in itertools.groupby(arms, lambda arm: (arm.technique, arm.strategy)):
        rows = [row for arm in group if (row := results.find(arm)) is not None]
        shown.add_row(
            technique,
            "" if technique == DENSE else strategy,
            percent([row["accuracy"] for row in rows]),
            f"{statistics.mean(row['bytes'] for row in rows) / 1e6:.2f}",
            f"{100 * statistics.mean(row['share_of_dense'] for row in rows):.1f}",
            f"{milliseconds(rows, 'seconds_per_step_in_fade')} / {milliseconds(rows, 'seconds_per_step_after_fade')}",
        )
    return shown


def milliseconds(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Return the median over seeds of a time in seconds."""
    return f"{1e3 * statistics.median(row[name] for row in rows):.0f}"


def percent(shares: Sequence[float]) -> str:
    """Return the mean in percent, with the standard deviation where there are several."""
    mean = f"{100 * statistics.mean(shares):.2f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else mean
