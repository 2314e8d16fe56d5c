"""Reproducible training runs, and a process that continues one that another process began.

As a program: `python resume_worker.py FOLDER JOB...` reads `FOLDER/JOB.before`, trains to the end and writes
`FOLDER/JOB.after`. A job is `architecture-technique`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vanishing
from architectures import ARCHITECTURES, Architecture, loss_of, tensors_of
from vanishing import (
    ActivationQuantization,
    ChannelPruning,
    Compressor,
    HeadPruning,
    LinearSchedule,
    LowRank,
    MagnitudePruning,
    Quantization,
    WidthPruning,
)

FADE, SPLIT, END = 4, 3, 6

# By kind of unit, and for each the architectures that have such units in a form that is known.
UNITS: dict[str, tuple[Compressor, set[str]]] = {
    "*": (HeadPruning(0.5), {"vit", "bert", "distilbert", "llama", "mixtral", "whisper", "opt", "bart", "timm_vit"}),
    "**": (
        WidthPruning(0.5),
        {
            *("vit", "swin", "bert", "distilbert", "llama", "whisper", "opt", "bart", "gemma"),
            *("timm_vit", "timm_swin", "encoder"),
        },
    ),
    "***": (
        ChannelPruning(0.5),
        {"timm_convnext", "timm_resnet", "timm_efficientnet", "timm_efficientnet_lite0"},
    ),
}

TECHNIQUES: dict[str, Compressor] = {
    "pruned": MagnitudePruning(sparsity=0.5),
    "quantized": Quantization(bits=4),
    "low_rank": LowRank(ratio=0.25),
    "pruned_quantized": MagnitudePruning(sparsity=0.5) | Quantization(bits=4),
    "quantized_inputs": Quantization(bits=4) | ActivationQuantization(bits=8),
}

JOBS = (*TECHNIQUES, "structured")


def rules(architecture: str, technique: str) -> dict[Any, Compressor]:
    """Return the rules of a job; none where the technique does not fit the architecture."""
    if technique == "structured":
        return {key: each for key, (each, known) in UNITS.items() if architecture in known}
    if technique == "low_rank" and ARCHITECTURES[architecture].own_forward:
        return {}
    return {"*": TECHNIQUES[technique]}


class Run:
    """A model in transition and its optimizer; everything random in it is a function of the step.

    Args:
        job: `architecture-technique`, of `ARCHITECTURES` and `JOBS`.
    """

    def __init__(self, job: str) -> None:
        name, technique = job.split("-")
        self.architecture: Architecture = ARCHITECTURES[name]
        self.model = self.architecture.build()
        self.recipe = vanishing.Recipe(rules=rules(name, technique), schedule=LinearSchedule(steps=FADE))
        self.plan = self.recipe.match(self.model)
        self.transition = vanishing.prepare(self.model, self.recipe)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)

    def train(self, until: int) -> Run:
        """Train to an optimizer step."""
        for step in range(self.transition.steps_done, until):
            batch = self.architecture.batch(step)
            loss_of(self.model(**batch), step).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.transition.step()
        return self

    def outputs(self) -> list[Tensor]:
        """Return every floating output in evaluation mode for a batch that is not trained on."""
        return evaluate(self.model, self.architecture)

    def state(self) -> dict[str, Any]:
        """Return what a user saves to continue later."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "transition": self.transition.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> Run:
        """Continue where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.transition.load_state_dict(state["transition"])
        return self


def evaluate(model: torch.nn.Module, architecture: Architecture) -> list[Tensor]:
    """Return every floating output in evaluation mode for a batch that is not trained on."""
    training = model.training
    model.eval()
    with torch.no_grad():
        outputs = tensors_of(model(**architecture.batch(99)))
    model.train(training)
    return outputs


def main(folder: Path, jobs: list[str]) -> None:
    """Continue every job to its end."""
    torch.set_num_threads(1)
    for job in jobs:
        run = Run(job).load(torch.load(folder / f"{job}.before"))
        run.train(END)
        torch.save(run.state() | {"outputs": run.outputs()}, folder / f"{job}.after")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
