"""A loop with Accelerate, as the README tells it: the clock, accumulation, and its checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vanishing
from vanishing import LowRank, MagnitudePruning, Recipe, Transition
from vanishing.schedules import LinearSchedule

BATCHES, FADE = 24, 4


def loader() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * BATCHES, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=4)


class Run:
    """A training with Accelerate."""

    def __init__(self, accumulation: int = 1) -> None:
        set_seed(1)
        model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 2))
        recipe = Recipe({"0": LowRank(rank=3), "3": MagnitudePruning(0.5)}, schedule=LinearSchedule(steps=FADE))
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        self.transition: Transition = vanishing.prepare(model, recipe)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.model, self.optimizer, self.batches = self.accelerator.prepare(model, optimizer, loader())
        self.accelerator.register_for_checkpointing(self.transition)
        self.betas: list[float] = []

    def train(self, first: int, last: int) -> Run:
        """Train on the batches from `first` to before `last`."""
        for inputs, labels in list(self.batches)[first:last]:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(nn.functional.cross_entropy(self.model(inputs), labels))
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.transition.step()
                    self.betas.append(self.transition.beta)
        return self


@pytest.mark.parametrize("accumulation", [1, 4])
def test_beta_follows_optimizer_steps_whatever_is_accumulated(accumulation: int) -> None:
    run = Run(accumulation).train(0, BATCHES)
    assert len(run.betas) == BATCHES // accumulation
    assert run.betas[:5] == [0.75, 0.5, 0.25, 0.0, 0.0]
    run.transition.finish()


@pytest.mark.parametrize("stop", [2, 4, 10])
def test_a_run_continued_from_accelerates_checkpoint_ends_with_the_same_bits(stop: int, tmp_path: Path) -> None:
    whole = Run().train(0, stop)
    whole.accelerator.save_state(str(tmp_path))
    whole.train(stop, BATCHES).transition.finish()
    resumed = Run()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(stop, BATCHES).transition.finish()
    expected = whole.model.state_dict()
    assert resumed.model.state_dict().keys() == expected.keys()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
