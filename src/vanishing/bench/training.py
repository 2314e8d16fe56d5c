"""The one training loop of the benchmark, and what a run of it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vanishing.bench.arms import Arm
from vanishing.bench.tasks import Task
from vanishing.calibration import Calibration
from vanishing.compressors import Compressor
from vanishing.preparation import prepare
from vanishing.serialization import load, save
from vanishing.transition import Transition


@dataclass(frozen=True)
class Budget:
    """What every strategy may spend: the same steps at the same learning rate.

    Args:
        steps: optimizer steps in all.
        fade_steps: the length Q of the fade. The learning rate stays high through it, and falls linearly to 0 after it.
        learning_rate: AdamW's, while it is high.
        evaluations: times that a model is evaluated on its way.
    """

    steps: int
    fade_steps: int
    learning_rate: float
    evaluations: int = 10

    def rate(self, step: int) -> float:
        """Return the share of the learning rate for the step after `step` optimizer steps."""
        return min(1.0, (self.steps - step) / (self.steps - self.fade_steps))

    def evaluates(self, step: int) -> bool:
        """Return whether a model is evaluated after `step` optimizer steps."""
        return step * self.evaluations // self.steps != (step - 1) * self.evaluations // self.steps


@dataclass(frozen=True)
class Point:
    """A model on its way.

    Args:
        step: optimizer steps done.
        beta: the original's share.
        blend: test accuracy of the model as it is trained.
        shipped: test accuracy with beta = 0, of what would be shipped now.
    """

    step: int
    beta: float
    blend: float
    shipped: float


@dataclass(frozen=True)
class Outcome:
    """A model that was saved and loaded again.

    Args:
        seed: the seed of its task.
        accuracy: test accuracy of the loaded model.
        file_bytes: size of everything that was saved.
    """

    seed: int
    accuracy: float
    file_bytes: int


@dataclass(frozen=True)
class Run:
    """One technique by one strategy with one seed.

    Args:
        technique: name of the technique.
        arm: name of the strategy.
        outcome: the finished model.
        curve: the way to it.
    """

    technique: str
    arm: str
    outcome: Outcome
    curve: tuple[Point, ...]


def train_dense(
    task: Task, budget: Budget, folder: Path, on_step: Callable[[], None]
) -> tuple[dict[str, Tensor], Outcome]:
    """Train the original from random weights; return its state and how good and how large it is."""
    torch.manual_seed(task.seed)
    model = task.make_model()
    _train(task, model, budget, on_step)
    return model.state_dict(), _outcome(task, model, folder)


def fine_tune(
    task: Task,
    dense: dict[str, Tensor],
    technique: Compressor | Mapping[str, Compressor],
    arm: Arm,
    budget: Budget,
    folder: Path,
    on_step: Callable[[], None],
    calibration: Calibration | None = None,
) -> tuple[Outcome, tuple[Point, ...]]:
    """Compress a trained original by one strategy.

    Args:
        task: the task.
        dense: the state of the original.
        technique: one for all of the task's layers, or the rules of a recipe.
        arm: the strategy.
        budget: steps and learning rate.
        folder: where the finished model is saved.
        on_step: called after every optimizer step.
        calibration: what the technique looks at before it starts.

    Returns:
        The finished model's outcome, and the way to it.
    """
    torch.manual_seed(task.seed)
    model = task.make_model()
    model.load_state_dict(dense)
    rules = technique if isinstance(technique, Mapping) else {task.layers: technique}
    transition = prepare(model, arm.recipe(rules, budget.fade_steps), calibration=calibration)

    def evaluate() -> Point:
        blend = task.accuracy(model)
        shipped = blend
        if transition.beta > 0.0:
            with transition.compressed():
                shipped = task.accuracy(model)
        return Point(transition.steps_done, transition.beta, blend, shipped)

    curve = [evaluate()]

    def after_step() -> None:
        transition.step()
        if budget.evaluates(transition.steps_done):
            curve.append(evaluate())
        on_step()

    _train(task, model, budget, after_step, transition)
    transition.finish()
    return _outcome(task, model, folder), tuple(curve)


def _train(
    task: Task, model: nn.Module, budget: Budget, after_step: Callable[[], None], transition: Transition | None = None
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.learning_rate, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, budget.rate)
    for batch in task.batches(budget.steps):
        loss = task.loss(model, batch)
        if transition is not None:
            loss = loss + transition.auxiliary_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        after_step()


def _outcome(task: Task, model: nn.Module, folder: Path) -> Outcome:
    save(model, folder)
    loaded = load(folder, task.make_model())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Outcome(task.seed, task.accuracy(loaded), size)
