"""The tasks that a model can be compressed for, and how one is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vanishing.workflow.problems import InputProblem


class TaskName(StrEnum):
    """The tasks, under the names that the Hugging Face hub gives them."""

    IMAGE_CLASSIFICATION = "image-classification"
    TEXT_CLASSIFICATION = "text-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    CAUSAL_LM = "causal-lm"


@dataclass(frozen=True)
class Task:
    """What differs between tasks.

    Args:
        name: its name.
        ending: how the class names of its models end.
        auto_class: the class of transformers that builds its models.
        metric: the measure that a reader looks at first.
        lower_is_better: whether a small value of it is a good one.
        classifies: whether there are labels.
    """

    name: TaskName
    ending: str
    auto_class: str
    metric: str
    lower_is_better: bool = False
    classifies: bool = True


TASKS = {
    task.name: task
    for task in (
        Task(
            TaskName.IMAGE_CLASSIFICATION,
            "ForImageClassification",
            "AutoModelForImageClassification",
            metric="accuracy",
        ),
        Task(
            TaskName.TEXT_CLASSIFICATION,
            "ForSequenceClassification",
            "AutoModelForSequenceClassification",
            metric="accuracy",
        ),
        Task(
            TaskName.TOKEN_CLASSIFICATION,
            "ForTokenClassification",
            "AutoModelForTokenClassification",
            metric="token_accuracy",
        ),
        Task(
            TaskName.CAUSAL_LM,
            "ForCausalLM",
            "AutoModelForCausalLM",
            metric="perplexity",
            lower_is_better=True,
            classifies=False,
        ),
    )
}


def task_of_architecture(names: Sequence[str]) -> Task | None:
    """Return the task of a model's class, None where it has none of these."""
    return next((task for task in TASKS.values() for name in names if name.endswith(task.ending)), None)


def task_of_data(features: Any) -> Task | None:
    """Return the task that columns are made for, None where they leave it open.

    Args:
        features: of a `datasets.Dataset`, by column.
    """
    import datasets

    kinds = list(features.values())
    if any(isinstance(kind, datasets.Image) for kind in kinds):
        return TASKS[TaskName.IMAGE_CLASSIFICATION]
    if any(isinstance(kind, datasets.List) for kind in kinds):
        return TASKS[TaskName.TOKEN_CLASSIFICATION]
    # One column of texts may be a language model's data, or a table that was read with the wrong separator.
    return TASKS[TaskName.TEXT_CLASSIFICATION] if len(kinds) > 1 else None


def _columns(features: Any) -> str:
    names = [name if len(name) <= 40 else f"{name[:40]}..." for name in features]
    return f"the column {names[0]!r}" if len(names) == 1 else f"the columns {', '.join(names)}"


def choose_task(requested: TaskName | None, architectures: Sequence[str], features: Any) -> Task:
    """Return the task: the one that is asked for, else the model's, else the data's.

    Raises:
        InputProblem: none of them tells.
    """
    if requested is not None:
        return TASKS[requested]
    task = task_of_architecture(architectures) or task_of_data(features)
    if task is None:
        names = ", ".join(TaskName)
        raise InputProblem(
            f"neither the model nor the data, with {_columns(features)}, tells the task. Name it with --task: {names}."
        )
    return task
