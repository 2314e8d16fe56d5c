"""One training with transformers' Trainer: what it shows, where it stops, and what it leaves behind."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from vanishing.integrations.common import take_no_step
from vanishing.integrations.transformers import TransitionCallback, last_complete_checkpoint
from vanishing.transition import Transition
from vanishing.workflow.encoding import Encoded, classes
from vanishing.workflow.problems import Interrupted, RunProblem
from vanishing.workflow.settings import Settings

_WARM_UP_SHARE = 0.05
_CHECKPOINTS = 10
_MOST_STEPS_UNSAVED = 500


class Display(Protocol):
    """Where a run shows how far it is."""

    def begin(self, what: str, steps: int, done: int) -> None:
        """Begin a stage of so many steps, some of which may have been done in an earlier run."""

    def advance(self, done: int, figures: dict[str, float]) -> None:
        """Show that so many steps of the stage are done, with the last known loss and beta."""

    def end(self) -> None:
        """End the stage."""

    def say(self, text: str) -> None:
        """Show a line."""


@dataclass
class Stage:
    """A training, and what it logged.

    Args:
        steps: optimizer steps of all of it.
        log: what the Trainer logged, in its order.
    """

    steps: int
    log: list[dict[str, float]]


class _Watcher(TrainerCallback):  # type: ignore[misc]
    """Shows every step, stops where a signal says so, and refuses to go on without a loss."""

    def __init__(self, what: str, display: Display, stop: _Stop) -> None:
        self.what, self.display, self.stop = what, display, stop
        self.figures: dict[str, float] = {}
        self.trainer: Any = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            take_no_step(self.trainer, control)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.display.begin(self.what, state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.display.advance(state.global_step, self.figures)
        if self.stop.wanted() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            # What was measured on the way is for the end of a run.
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stop.agreed and state.global_step < state.max_steps:
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        known = logs or {}
        self.figures = {name: known[name] for name in ("loss", "beta") if name in known} or self.figures
        if not math.isfinite(known.get("loss", 0.0)):
            raise RunProblem(
                f"{self.what}: the loss at step {state.global_step} is {known['loss']}. Lower --learning-rate."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.display.end()


class _Stop:
    """The signal that asks a training to stop, the same one in all processes."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.agreed = False

    def wanted(self) -> bool:
        if dist.is_initialized() and dist.get_world_size() > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            asked = torch.tensor(self.signal or 0, device=device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            self.signal = int(asked) or None
        self.agreed = self.signal is not None
        return self.agreed

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first SIGINT or SIGTERM; a second one ends the process at once."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, signal.SIG_DFL)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def arguments(settings: Settings, encoded: Encoded, folder: Path) -> Any:
    """Return the Trainer's arguments for a run whose checkpoints are in a folder."""
    steps = step_count(settings, len(encoded.train))
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        warmup_steps=round(_WARM_UP_SHARE * steps),
        seed=settings.seed,
        bf16=settings.bf16,
        save_strategy="steps",
        save_steps=min(_MOST_STEPS_UNSAVED, math.ceil(steps / _CHECKPOINTS)),
        save_total_limit=1,
        eval_strategy="epoch",
        logging_strategy="steps",
        logging_steps=max(1, steps // 100),
        # A loss that is no number must be seen.
        logging_nan_inf_filter=False,
        # Images are read as they are needed, from columns that the model does not know.
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        prediction_loss_only=encoded.metrics is None,
        disable_tqdm=True,
        report_to="none",
    )
    if args.n_gpu > 1:
        # Without torchrun the Trainer would spread a batch over all devices, which no transition follows.
        args._n_gpu = 1
    return args


def step_count(settings: Settings, examples: int) -> int:
    """Return the optimizer steps of a run."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    batches = math.ceil(examples / (settings.batch_size * processes))
    return math.ceil(settings.epochs * math.ceil(batches / settings.accumulate))


def make_trainer(model: Any, args: Any, encoded: Encoded, callbacks: list[Any]) -> Any:
    """Return a Trainer that prints nothing by itself."""
    trainer = Trainer(
        model,
        args,
        data_collator=encoded.collate,
        train_dataset=encoded.train,
        eval_dataset=encoded.test,
        compute_metrics=encoded.metrics,
        preprocess_logits_for_metrics=None if encoded.metrics is None else classes,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(
    what: str,
    model: Any,
    transition: Transition | None,
    settings: Settings,
    encoded: Encoded,
    folder: Path,
    display: Display,
) -> Stage:
    """Train a model, from the last checkpoint in a folder if there is one.

    Args:
        what: name of the training, for the display.
        model: a model of transformers.
        transition: of the model; None to train it as it is.
        settings: of the run.
        encoded: the examples.
        folder: where checkpoints are.
        display: where to show the progress.

    Raises:
        Interrupted: a signal came; where the training stands is saved.
        RunProblem: the loss is no number, or the disk is full.
    """
    stop = _Stop()
    callbacks = [] if transition is None else [TransitionCallback(transition)]
    args = arguments(settings, encoded, folder)
    if settings.recompute:
        model.activation_checkpointing_enable()
    watcher = _Watcher(what, display, stop)
    trainer = watcher.trainer = make_trainer(model, args, encoded, [*callbacks, watcher])
    with stop.listening():
        try:
            trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        finally:
            display.end()
    if settings.recompute:
        model.activation_checkpointing_disable()
    state = trainer.state
    if stop.wanted():
        assert stop.signal is not None
        raise Interrupted(f"stopped at step {state.global_step} of {state.max_steps}", stop.signal)
    return Stage(state.max_steps, state.log_history)
