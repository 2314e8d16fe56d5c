"""One training for each technique in one process, or in several by DDP or FSDP2, on CPUs.

As a program, for each process: `python distributed_runs.py FOLDER WAY RANK PROCESSES`. The first one saves the finished
models to `FOLDER/WAY-TECHNIQUE` and writes the losses of every step to `FOLDER/WAY-TECHNIQUE.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vanishing
from vanishing import (
    ActivationQuantization,
    Adaptive,
    Binary,
    Compressor,
    Gradient,
    LinearSchedule,
    LocalLoss,
    LowRank,
    MagnitudePruning,
    Quantization,
    Range,
    Replace,
    Rule,
    Score,
    SkipBlock,
    Staggered,
    Teacher,
    TransitionError,
)
from vanishing.integrations.fsdp import finish_gathered

STEPS, BATCH = 10, 8
SCHEDULE = LinearSchedule(start=2, steps=4)
"""Beta is 1 for some steps, between, and 0 for some."""
RESUMED = (1, 3, 4, 8)
"""Before these steps: while beta is 1, where it begins to fall, between, and at 0."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        # One that writes into the output of what is compressed.
        self.feed_forward = nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.feed_forward(self.norm(x))
        out += x
        return out


def narrow(block: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 4), nn.GELU(), nn.Linear(4, 16))


TECHNIQUES: dict[str, dict[Any, Compressor | Rule]] = {
    "pruning": {"*": MagnitudePruning(0.5)},
    "drawn": {
        "*.feed_forward.0": MagnitudePruning(0.5, gradient=Gradient.DECAYING, decay=0.1),
        # Symmetric, the largest weight of a channel lies between two codes, and rounding of a sum decides.
        "*.feed_forward.2": LowRank(rank=2) | Quantization(bits=3, symmetric=False, damping=0.1),
        "*": Quantization(bits=3, symmetric=False, damping=0.1),
    },
    "binary": {"*": Binary()},
    "low_rank": {"*.feed_forward.*": LowRank(rank=2)},
    "calibrated": {
        "*.feed_forward.0": MagnitudePruning(0.5, score=Score.WANDA),
        "*.feed_forward.2": LowRank(rank=2, whitened=True),
    },
    "learned_inputs": {"*.feed_forward.*": ActivationQuantization(bits=8, range=Range.LEARNED)},
    "learned_inputs_in_turn": {
        "0.feed_forward.*": Rule(
            MagnitudePruning(0.5) | ActivationQuantization(bits=8, range=Range.LEARNED),
            schedules=(LinearSchedule(steps=2), LinearSchedule(start=4, steps=2)),
        ),
        "1.feed_forward.*": Rule(
            MagnitudePruning(0.5) | ActivationQuantization(bits=8, range=Range.LEARNED),
            schedules=(LinearSchedule(start=4, steps=2), LinearSchedule(steps=2)),
        ),
    },
    "replace": {"*.feed_forward": Replace(narrow, name="narrow of distributed runs")},
    "staggered": {"*": Rule(MagnitudePruning(0.5), schedule=Staggered(SCHEDULE))},
    "adaptive": {"*": Rule(Binary(), schedule=Adaptive(LinearSchedule(steps=3), limit=0.01, deadline=6, every=1))},
    "chain": {
        "*.feed_forward.*": Rule(
            LowRank(rank=2) | MagnitudePruning(0.5), schedules=(SCHEDULE, LinearSchedule(start=3, steps=3))
        )
    },
    "distilled": {
        "0.feed_forward": Replace(narrow, name="narrow of distributed runs"),
        "1.feed_forward.*": LowRank(rank=2),
        "*.attention": MagnitudePruning(0.5),
    },
    "skip": {"1": SkipBlock()},
}
DISTILLATION = [LocalLoss(weight=0.3, every=2), Teacher(features=("0", "1.feed_forward"))]


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(16, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 5, 16, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def prepared(way: str, technique: str) -> tuple[nn.Module, nn.Module, vanishing.Transition, torch.optim.Optimizer]:
    """Return the model, what a loop calls, the transition, and the optimizer."""
    model = build()
    distillation = DISTILLATION if technique == "distilled" else []
    recipe = vanishing.Recipe(TECHNIQUES[technique], schedule=SCHEDULE, distillation=distillation)
    calibration = batches()[:2] if recipe.match(model).observed() else None
    transition = vanishing.prepare(model, recipe, calibration=calibration)
    wrapped: nn.Module = model
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    elif way == "fsdp2":
        for block in model[:2]:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    return model, wrapped, transition, optimizer


def train(way: str, technique: str, folder: Path, rank: int, processes: int) -> tuple[nn.Module | None, list[float]]:
    """Return the finished model and the loss of every step over the whole batch.

    By FSDP2, the run is stopped before some steps and goes on in new objects from a file of each process.
    """
    model, wrapped, transition, optimizer = prepared(way, technique)
    losses = []
    if way == "fsdp2":
        with pytest.raises(TransitionError, match="6 of 6 optimizer steps remain"):
            finish_gathered(transition, build)
    for step, (inputs, labels) in enumerate(batches()):
        if way == "fsdp2" and step in RESUMED:
            checkpoint = folder / f"checkpoint-{rank}.pt"
            torch.save((model.state_dict(), optimizer.state_dict(), transition.state_dict()), checkpoint)
            model, wrapped, transition, optimizer = prepared(way, technique)
            weights, moments, clock = torch.load(checkpoint, weights_only=False)
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            transition.load_state_dict(clock)
        # One process alone takes both shares: a local loss is relative to what it is measured on.
        shares = [slice(rank, None, 2)] if processes > 1 else [slice(0, None, 2), slice(1, None, 2)]
        total = torch.zeros(())
        for share in shares:
            loss = nn.functional.cross_entropy(wrapped(inputs[share]).mean(1), labels[share])
            loss = (loss + transition.auxiliary_loss()) / len(shares)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
        transition.gap()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(total.item() / processes)
    if way != "fsdp2":
        return transition.finish(), losses
    with pytest.raises(TransitionError, match="spread over processes"):
        transition.finish()
    return finish_gathered(transition, build), losses


def refuse() -> None:
    """See that what cannot be compared is refused."""
    model = build()
    rules = TECHNIQUES["learned_inputs"]
    recipe = vanishing.Recipe(rules, schedule=LinearSchedule(steps=6), distillation=LocalLoss())
    transition = vanishing.prepare(model, recipe, calibration=batches()[:2])
    for block in model[:2]:
        fully_shard(block)
    fully_shard(model)
    model(batches()[0][0])
    with pytest.raises(TransitionError, match=r"'0.feed_forward.0' quantizes its input and its weight is spread"):
        transition.auxiliary_loss()


def main() -> None:
    folder, way = Path(sys.argv[1]), sys.argv[2]
    rank, processes = int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    if processes > 1:
        meeting = f"file://{folder.resolve() / way}-meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    for technique in TECHNIQUES:
        model, losses = train(way, technique, folder, rank, processes)
        assert (model is None) == (way == "fsdp2" and rank > 0)
        if model is not None and rank == 0:
            vanishing.save(model, folder / f"{way}-{technique}")
            (folder / f"{way}-{technique}.json").write_text(json.dumps(losses))
    if way == "fsdp2":
        refuse()
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
