"""Everything that decides the result of a run; kept beside its checkpoints, so that a run goes on as it began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vanishing.workflow.problems import InputProblem
from vanishing.workflow.tasks import TaskName


class Settings(BaseModel):
    """A run of `vanishing compress`.

    Args:
        model: folder of a model, or its name on the hub.
        data: file, folder or name on the hub.
        test_data: the same for what is measured on; None for a part of `data`.
        task: None to find it.
        recipe: as `Recipe.to_dict` writes it.
        keep_head: whether the recipe leaves out the classifier or output embeddings of any model.
        input_columns: names of the columns of the input; empty to find them.
        label_column: None to find it.
        new_head: whether the classifier is trained anew.
        epochs: passes over the data.
        batch_size: examples of a step on each device at a time.
        accumulate: batches in an optimizer step.
        learning_rate: its peak; it rises from 0 over a twentieth of the run, then falls to 0 in a line.
        max_length: tokens of an example at most; None for 256, or what the model takes.
        seed: of the order of the examples, of dropout and of a new head.
        bf16: whether products are computed in bfloat16.
        recompute: whether activations are computed again in the backward pass, to save memory.
        processes: that train together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: str
    test_data: str | None
    task: TaskName | None
    recipe: dict[str, Any]
    keep_head: bool
    input_columns: tuple[str, ...]
    label_column: str | None
    new_head: bool
    epochs: float
    batch_size: int
    accumulate: int
    learning_rate: float
    max_length: int | None
    seed: int
    bf16: bool
    recompute: bool
    processes: int

    def check_same(self, file: Path) -> None:
        """Raise `InputProblem` if a run began with other settings."""
        try:
            before = Settings.model_validate(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError):
            raise InputProblem(f"{file} cannot be read, so the run cannot go on. Remove {file.parent}.") from None
        for name in type(self).model_fields:
            was, now = getattr(before, name), getattr(self, name)
            if was != now:
                raise InputProblem(
                    f"the run began with {name.replace('_', ' ')} {was!r}, not {now!r}. Go on with the same command, "
                    f"or remove {file.parent} to start anew."
                )
