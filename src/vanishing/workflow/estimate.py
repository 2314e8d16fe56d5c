"""What a run would do and take, without training anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vanishing.memory import MemoryEstimate, estimate_memory
from vanishing.plan import Plan
from vanishing.summary import summary
from vanishing.workflow.disk import check_places, work_folder
from vanishing.workflow.encoding import batch_of
from vanishing.workflow.job import Job, check_device, read_job
from vanishing.workflow.measuring import resident_bytes
from vanishing.workflow.settings import Settings


@dataclass(frozen=True)
class Estimate:
    """A run that was not made.

    Args:
        job: the run.
        plan: which layer gets what.
        dense_bytes: of the original's weights.
        small_bytes: of the small model's, as they would be saved now.
        fade: the optimizer step at which the original's share is 0.
        memory: what the tensors of the training hold at once.
        process_bytes: what the process takes without them; 0 where they are on a device of their own.
    """

    job: Job
    plan: Plan
    dense_bytes: int
    small_bytes: int
    fade: int
    memory: MemoryEstimate
    process_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        rows = [{"module": r.name, "layer": r.module, "outcome": r.outcome, "detail": r.detail} for r in self.plan.rows]
        return {
            "task": self.job.task.name.value,
            "new_head": self.job.new_head,
            "train_examples": len(self.job.encoded.train),
            "held_out_examples": len(self.job.encoded.test),
            "held_out": self.job.encoded.held_out,
            "notes": list(self.job.encoded.notes),
            "steps": self.job.steps,
            "fade_ends_at": self.fade,
            "bytes": {"original": self.dense_bytes, "compressed": self.small_bytes},
            "peak_memory_bytes": self.memory.peak + self.process_bytes,
            "memory_of": "the process" if self.process_bytes else "the device",
            "plan": rows,
        }


def estimate(settings: Settings, output: Path) -> Estimate:
    """Read and check everything, try two small batches, and change nothing.

    Raises:
        InputProblem: something about the input is wrong.
        RecipeError: the recipe does not fit the model.
    """
    output = output.absolute()
    check_places(output, work_folder(output), resume=False)
    job = read_job(settings)
    check_device(job)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    process_bytes = 0 if device.type == "cuda" else resident_bytes()
    model = job.build()
    plan = job.recipe(model).match(model)
    dense_bytes = job.dense_bytes(model)
    transition = job.prepare(model)
    # The types that weights are saved in; what was read in them loses nothing.
    small_bytes = summary(model.to(job.dtype)).after.bytes
    model.float().to(device)
    if settings.recompute:
        model.activation_checkpointing_enable()

    def loss(size: int) -> torch.Tensor:
        batch = {name: values.to(device) for name, values in batch_of(job.encoded, size).items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bf16):
            value: torch.Tensor = model(**batch).loss
            return value + transition.auxiliary_loss()

    memory = estimate_memory(transition, loss, settings.batch_size, accumulate=settings.accumulate > 1)
    return Estimate(job, plan, dense_bytes, small_bytes, transition.end, memory, process_bytes)
