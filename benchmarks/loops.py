"""The same training in four loops: plain PyTorch, transformers' Trainer, Lightning and Accelerate."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import vanishing
from vanishing.integrations.lightning import TransitionCallback as LightningTransition
from vanishing.integrations.transformers import TransitionCallback as TrainerTransition

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from common import FADE_SHARE, Task

SEED = 0


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


LOOPS: dict[str, Loop] = {"plain": plain, "trainer": trainer, "lightning": lightning, "accelerate": accelerate}
