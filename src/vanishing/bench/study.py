"""A study: techniques by strategies by seeds at one budget, and what comes out of it."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import vanishing
from vanishing.bench.arms import VCON, Arm
from vanishing.bench.statistics import PairedDifference, Summary, lead_over_best, summarize
from vanishing.bench.tasks import Task
from vanishing.bench.training import Budget, Outcome, Run, fine_tune, train_dense
from vanishing.compressors import Compressor


@dataclass(frozen=True)
class Design:
    """What is compared.

    Args:
        tasks: one task for each seed.
        techniques: name -> technique.
        arms: the strategies, VCON among them.
        dense_budget: what the original is trained with.
        budget: what each strategy may spend.
    """

    tasks: Sequence[Task]
    techniques: Mapping[str, Compressor]
    arms: Sequence[Arm]
    dense_budget: Budget
    budget: Budget

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        runs = len(self.techniques) * len(self.arms)
        return len(self.tasks) * (self.dense_budget.steps + runs * self.budget.steps)


@dataclass(frozen=True)
class Study:
    """What a design gave.

    Args:
        design: what was compared.
        dense: the originals, one for each seed.
        runs: one for each seed, technique and strategy.
    """

    design: Design
    dense: tuple[Outcome, ...]
    runs: tuple[Run, ...]

    def of(self, technique: str, arm: str) -> list[Run]:
        """Return the runs of one technique by one strategy, in the order of the seeds."""
        return [run for run in self.runs if (run.technique, run.arm) == (technique, arm)]

    def accuracy(self, technique: str, arm: str) -> Summary:
        """Return the test accuracy of the finished models."""
        return summarize([run.outcome.accuracy for run in self.of(technique, arm)])

    def file_bytes(self, technique: str, arm: str) -> int:
        """Return the mean size on disk of the finished models."""
        return round(summarize([run.outcome.file_bytes for run in self.of(technique, arm)]).mean)

    @property
    def dense_accuracy(self) -> Summary:
        """The test accuracy of the originals."""
        return summarize([outcome.accuracy for outcome in self.dense])

    @property
    def dense_bytes(self) -> int:
        """The mean size on disk of the originals."""
        return round(summarize([outcome.file_bytes for outcome in self.dense]).mean)

    def lead(self, technique: str) -> PairedDifference:
        """Return how far VCON is ahead of the best of the other strategies, seed by seed."""
        accuracies = {
            arm.name: [run.outcome.accuracy for run in self.of(technique, arm.name)] for arm in self.design.arms
        }
        return lead_over_best(accuracies.pop(VCON.name), accuracies)

    def to_json(self) -> str:
        """Return everything that was measured, and what it was measured with."""
        design = self.design
        data: dict[str, Any] = {
            "task": design.tasks[0].name,
            "versions": {
                "vanishing": vanishing.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "techniques": {name: technique.to_dict() for name, technique in design.techniques.items()},
            "arms": {arm.name: arm.meaning for arm in design.arms},
            "dense_budget": dataclasses.asdict(design.dense_budget),
            "budget": dataclasses.asdict(design.budget),
            "dense": [dataclasses.asdict(outcome) for outcome in self.dense],
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "lead_of_vcon": {name: dataclasses.asdict(self.lead(name)) for name in design.techniques},
        }
        return json.dumps(data, indent=1)


def run_study(design: Design, folder: Path, on_step: Callable[[str], None]) -> Study:
    """Train, compress, save, load and judge every model of a design.

    Args:
        design: what is compared.
        folder: where the models are saved.
        on_step: called with what is being trained after every optimizer step.
    """
    dense: list[Outcome] = []
    runs: list[Run] = []
    for number, task in enumerate(design.tasks, start=1):
        seed = f"seed {number} of {len(design.tasks)}"
        seed_folder = folder / f"seed-{task.seed}"
        on_dense_step = partial(on_step, f"{seed}: the original")
        state, original = train_dense(task, design.dense_budget, seed_folder / "original", on_dense_step)
        dense.append(original)
        for technique, compressor in design.techniques.items():
            for arm in design.arms:
                target = seed_folder / re.sub(r"\W+", "-", f"{technique} {arm.name}")
                on_arm_step = partial(on_step, f"{seed}: {technique}, {arm.name}")
                outcome, curve = fine_tune(task, state, compressor, arm, design.budget, target, on_arm_step)
                runs.append(Run(technique, arm.name, outcome, curve))
    return Study(design, tuple(dense), tuple(runs))
