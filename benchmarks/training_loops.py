"""The same compression through four training loops: beta must be the same after every optimizer step of each.

MiniLM-L6 is fine-tuned on Reuters R8 while 90 % of the weights of its encoder's linear layers vanish over 40 % of the
optimizer steps: in a plain PyTorch loop, with transformers' Trainer, with Lightning and with Accelerate, each with
batches of 32 and with 4 micro-batches of 8, and with the Trainer in two processes of 16. Head, order of the data,
AdamW, learning rates and the loss (the mean over the examples of an optimizer step) are the same. The plain loop is
told the length of the fade in steps; the others are told "40%" and find it out.

The program fails where a loop's beta is not `max(1 - t / Q, 0)` after optimizer step t. It also shows how far the
losses are from those of the first loop, and the test accuracy of the finished, saved and reloaded models. What differs
there is rounding, which grows as a training goes on; and in two processes the last batch of an epoch has examples of
the first one besides, as processes need equal shares.

    python benchmarks/training_loops.py
    python benchmarks/training_loops.py --steps 12 --only plain trainer trainer-two-processes
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from accelerate import Accelerator
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import vanishing
from vanishing.integrations.lightning import TransitionCallback as LightningTransition
from vanishing.integrations.transformers import TransitionCallback as TrainerTransition

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from common import FADE_SHARE, Task, accuracy
from text_classification import make_task

SEED = 0
PROCESSES = 2
ACCUMULATION = 4
FIRST_PROCESS = 0
SHOWN_OF_AN_ERROR = 2_000
"""Characters at its end."""


@dataclass(frozen=True)
class Setup:
    """What every loop trains, and in how many micro-batches an optimizer step.

    Args:
        task: model, data and learning rates.
        steps: optimizer steps.
        accumulation: micro-batches an optimizer step.
        processes: how many share a micro-batch.
    """

    task: Task
    steps: int
    accumulation: int = 1
    processes: int = 1

    @property
    def micro_batch(self) -> int:
        """Examples in a forward pass of one process."""
        return self.task.batch_size // (self.accumulation * self.processes)

    @property
    def fade(self) -> int:
        """Optimizer steps after which beta is 0."""
        return round(FADE_SHARE * self.steps)

    @property
    def max_steps(self) -> int:
        """The end for a framework, -1 where that is the end of the last epoch."""
        return -1 if self.steps == self.task.steps else self.steps

    def prepared(self, fade: int | str) -> vanishing.Transition:
        """Return the transition of a new model, which is the same every time."""
        torch.manual_seed(SEED)
        pruning = vanishing.MagnitudePruning(sparsity=0.9)
        recipe = vanishing.Recipe(
            rules=dict.fromkeys(self.task.scope, pruning), schedule=vanishing.LinearSchedule(steps=fade)
        )
        return vanishing.prepare(self.task.pretrained().train(), recipe)

    def optimizer(self, model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Return the optimizer of all parameters alike, and its learning rates."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.task.learning_rate, fused=True)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.task.rate(step, self.steps))

    def rows(self) -> list[dict[str, Tensor]]:
        """Return the training examples as frameworks want them."""
        columns = self.task.train.inputs | {"labels": self.task.train.labels}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def loader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the micro-batches of an epoch."""
        return DataLoader(self.rows(), batch_size=self.micro_batch, sampler=EpochOrder(self.task))  # type: ignore[arg-type]

    def examples_in(self, step: int) -> int:
        """Return how many examples an optimizer step has; the last one of an epoch has fewer."""
        first = step * self.task.batch_size % (self.task.steps // self.task.epochs * self.task.batch_size)
        return min(self.task.batch_size, len(self.task.train.labels) - first)


class EpochOrder(Sampler[int]):
    """The order of `Task.training_batches`, for a data loader that is told of its epoch."""

    def __init__(self, task: Task) -> None:
        generator = torch.Generator().manual_seed(SEED)
        count = len(task.train.labels)
        self.orders: list[list[int]] = [torch.randperm(count, generator=generator).tolist() for _ in range(task.epochs)]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.orders[self.epoch])

    def __len__(self) -> int:
        return len(self.orders[self.epoch])


@dataclass
class Record:
    """What was seen of a training: loss of each optimizer step, and beta after it."""

    betas: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    pending: float = 0.0

    def add_loss(self, share: Tensor) -> None:
        """Add a micro-batch's part of the loss of the optimizer step that it belongs to."""
        self.pending += share.item()

    def close_step(self, beta: float) -> None:
        """Note that an optimizer step is done."""
        self.losses.append(self.pending)
        self.betas.append(beta)
        self.pending = 0.0


Loop = Callable[[Setup, Record], vanishing.Transition]


def plain(setup: Setup, record: Record) -> vanishing.Transition:
    """Train as the examples do, with the fade's length in steps: what the other loops are compared with."""
    transition = setup.prepared(setup.fade)
    model: nn.Module = transition.model
    optimizer, scheduler = setup.optimizer(model)
    for inputs, labels in itertools.islice(setup.task.training_batches(SEED), setup.steps):
        for rows in torch.arange(len(labels)).split(setup.micro_batch):
            scores = setup.task.logits(model, {name: values[rows] for name, values in inputs.items()})
            loss = cross_entropy(scores, labels[rows], reduction="sum") / len(labels)
            loss.backward()
            record.add_loss(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        transition.step()
        record.close_step(transition.beta)
    return transition


class _OrderedTrainer(Trainer):  # type: ignore[misc]
    """The Trainer with the order of the examples given."""

    def __init__(self, order: EpochOrder, **settings: Any) -> None:
        super().__init__(**settings)
        self.order = order

    def _get_train_sampler(self, *_: Any) -> EpochOrder:
        return self.order


class _TrainerRecorder(TrainerCallback):  # type: ignore[misc]
    def __init__(self, transition: vanishing.Transition, record: Record) -> None:
        self.transition = transition
        self.record = record

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.record.close_step(self.transition.beta)


def trainer(setup: Setup, record: Record) -> vanishing.Transition:
    """Train with transformers' Trainer."""
    transition = setup.prepared(f"{FADE_SHARE:.0%}")

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        loss = cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
        record.add_loss(loss)
        return loss

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=setup.micro_batch,
            gradient_accumulation_steps=setup.accumulation,
            num_train_epochs=setup.task.epochs,
            max_steps=setup.max_steps,
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo" if setup.processes > 1 else None,
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=False,
        )
        run = _OrderedTrainer(
            EpochOrder(setup.task),
            model=transition.model,
            args=arguments,
            train_dataset=setup.rows(),
            compute_loss_func=loss_of,
            optimizers=setup.optimizer(transition.model),
            callbacks=[TrainerTransition(transition), _TrainerRecorder(transition, record)],
        )
        run.remove_callback(PrinterCallback)
        run.train()
    return transition


class _Module(pl.LightningModule):
    def __init__(self, setup: Setup, transition: vanishing.Transition, record: Record) -> None:
        super().__init__()
        self.model = transition.model
        self.setup_of_run = setup
        self.record = record

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return _scaled_loss(self.setup_of_run, self.record, self.model, batch)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.setup_of_run.optimizer(self.model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _LightningRecorder(pl.Callback):
    def __init__(self, transition: vanishing.Transition, record: Record) -> None:
        self.transition = transition
        self.record = record

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        # It is called after every micro-batch.
        if trainer.global_step > len(self.record.betas):
            self.record.close_step(self.transition.beta)


def lightning(setup: Setup, record: Record) -> vanishing.Transition:
    """Train with Lightning."""
    transition = setup.prepared(f"{FADE_SHARE:.0%}")
    run = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=setup.task.epochs,
        max_steps=setup.max_steps,
        accumulate_grad_batches=setup.accumulation,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LightningTransition(transition), _LightningRecorder(transition, record)],
    )
    run.fit(_Module(setup, transition, record), setup.loader())
    return transition


def accelerate(setup: Setup, record: Record) -> vanishing.Transition:
    """Train with Accelerate, which leaves the clock and the length of the training to the loop."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=setup.accumulation)
    transition = setup.prepared(f"{FADE_SHARE:.0%}")
    transition.set_length(setup.steps)
    model, optimizer, scheduler, batches = accelerator.prepare(
        transition.model, *setup.optimizer(transition.model), setup.loader()
    )
    for epoch in range(setup.task.epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            if len(record.betas) == setup.steps:
                return transition
            with accelerator.accumulate(model):
                accelerator.backward(_scaled_loss(setup, record, model, batch))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    transition.step()
                    record.close_step(transition.beta)
    return transition


def _scaled_loss(setup: Setup, record: Record, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return a micro-batch's loss for a framework that will divide it by the number of micro-batches."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    share = cross_entropy(setup.task.logits(model, inputs), batch["labels"], reduction="sum")
    share = share / setup.examples_in(len(record.betas))
    record.add_loss(share)
    return share * setup.accumulation


def run_here(loop: Loop, setup: Setup, folder: Path) -> Record:
    """Train in this process, and save the finished model to a folder."""
    record = Record()
    vanishing.save(loop(setup, record).finish(), folder / "model")
    return record


def run_in_processes(setup: Setup, folder: Path) -> Record:
    """Train with the Trainer in several processes; return what they saw together."""
    threads = max(torch.get_num_threads() // PROCESSES, 1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command = [*launcher, __file__, f"--process-of={folder}", f"--steps={setup.steps}", f"--threads={threads}"]
    finished = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stderr=subprocess.PIPE)
    if finished.returncode:
        raise SystemExit(f"trainer-two-processes failed:\n{finished.stderr.decode()[-SHOWN_OF_AN_ERROR:]}")
    records = [Record(**json.loads(_file_of_process(folder, rank).read_text())) for rank in range(PROCESSES)]
    if any(record.betas != records[0].betas for record in records):
        raise SystemExit("trainer-two-processes: beta is not the same in both processes.")
    return Record(records[0].betas, [sum(shares) for shares in zip(*(r.losses for r in records), strict=True)])


def run_as_process(setup: Setup, folder: Path) -> None:
    """Be one of the processes that `run_in_processes` started."""
    record = Record()
    model = trainer(setup, record).finish()
    rank = distributed.get_rank()
    if rank == FIRST_PROCESS:
        vanishing.save(model, folder / "model")
    _file_of_process(folder, rank).write_text(json.dumps(asdict(record)))
    distributed.destroy_process_group()


def _file_of_process(folder: Path, rank: int) -> Path:
    return folder / f"process-{rank}.json"


LOOPS: dict[str, Loop] = {"plain": plain, "trainer": trainer, "lightning": lightning, "accelerate": accelerate}
RUNS: dict[str, tuple[Loop | None, int]] = {name: (loop, 1) for name, loop in LOOPS.items()}
RUNS |= {f"{name}-accumulated": (loop, ACCUMULATION) for name, loop in LOOPS.items()}
RUNS |= {"trainer-two-processes": (None, 1)}
"""The loop of every run, None for several processes, and its micro-batches an optimizer step."""


@dataclass(frozen=True)
class Result:
    """One run: beta after each optimizer step, the loss of each, and what came out."""

    run: str
    betas: list[float]
    losses: list[float]
    test_accuracy: float
    seconds: float

    @property
    def gone(self) -> int | None:
        """The optimizer step after which beta is 0."""
        return next((step for step, beta in enumerate(self.betas, 1) if beta == 0.0), None)

    def largest_loss_difference(self, other: Result) -> float:
        return max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=False))


def main() -> None:
    options = _options()
    _be_quiet()
    torch.set_num_threads(options.threads)
    task = make_task()
    steps = task.steps if options.steps is None else options.steps
    if not 3 <= steps <= task.steps:
        raise SystemExit(f"--steps {steps}: a run has a fade and something after it. Give 3 to {task.steps}.")
    if options.process_of:
        run_as_process(Setup(task, steps, processes=PROCESSES), options.process_of)
        return
    console = Console()
    results: list[Result] = []
    for name in options.only:
        results.append(measure(name, task, steps))
        console.print(f"{name}: {results[-1].test_accuracy:.2%} in {results[-1].seconds:.0f} s")
    console.print(table(results))
    differences = deviations(results, steps)
    write(options.output, results, differences, {"steps": steps, "threads": options.threads})
    console.print(f"Written to {options.output}")
    if differences:
        raise SystemExit("\n".join(differences))
    console.print(f"beta is the same after each of {steps} optimizer steps in every loop.")


def measure(name: str, task: Task, steps: int) -> Result:
    """Return what a run saw, and the test accuracy of the model that it saved."""
    loop, accumulation = RUNS[name]
    setup = Setup(task, steps, accumulation)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        record = run_in_processes(setup, Path(folder)) if loop is None else run_here(loop, setup, Path(folder))
        seconds = time.perf_counter() - started
        shipped = vanishing.load(Path(folder) / "model", task.blank())
    return Result(name, record.betas, record.losses, accuracy(task, shipped), seconds)


def deviations(results: Sequence[Result], steps: int) -> list[str]:
    """Return a sentence for every run whose betas are not those of the paper's schedule."""
    fade = round(FADE_SHARE * steps)
    expected = [max(1 - step / fade, 0.0) for step in range(1, steps + 1)]
    found = []
    for result in results:
        if len(result.betas) != steps:
            found.append(f"{result.run}: made {len(result.betas)} optimizer steps, expected {steps}.")
        pairs = enumerate(zip(result.betas, expected, strict=False), 1)
        different = next((f"step {t} is {got}, expected {due}" for t, (got, due) in pairs if got != due), None)
        if different:
            found.append(f"{result.run}: beta after optimizer {different}.")
    return found


def table(results: Sequence[Result]) -> Table:
    """Return the runs as a table."""
    caption = (
        f"beta 0: the optimizer step after which beta is 0. loss: the largest difference of a step's loss from "
        f"{results[0].run}'s. test %: of the reloaded model."
    )
    shown = Table("run", caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("optimizer steps", "beta 0", "loss", "test %", "s"):
        shown.add_column(column, justify="right")
    for result in results:
        shown.add_row(
            result.run,
            str(len(result.betas)),
            "never" if result.gone is None else str(result.gone),
            f"{result.largest_loss_difference(results[0]):.1e}",
            f"{100 * result.test_accuracy:.2f}",
            f"{result.seconds:.0f}",
        )
    return shown


def write(path: Path, results: Sequence[Result], differences: Sequence[str], settings: dict[str, int]) -> None:
    """Write all runs with their betas and losses to a JSON file."""
    spread = max(one.largest_loss_difference(other) for one, other in itertools.product(results, repeat=2))
    record = {
        "settings": settings | {"torch": torch.__version__},
        "betas_equal": not differences,
        "largest_loss_difference": spread,
        "runs": [asdict(result) | {"step_of_beta_0": result.gone} for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def _be_quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Of missing workers for data that is in memory.
    warnings.filterwarnings("ignore", module="lightning")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), default=tuple(RUNS), metavar="NAME")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: two epochs; at least 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of all processes (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results/training_loops.json"), metavar="JSON")
    parser.add_argument("--process-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
