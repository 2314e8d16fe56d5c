"""Small models and plain training loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vanishing import Transition


def mlp() -> nn.Sequential:
    """8 -> 16 -> 4."""
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def batch(step: int = 0, features: int = 8) -> Tensor:
    """Five rows that depend on the step alone."""
    return torch.randn(5, features, generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module, transition: Transition | None, steps: int, optimizer: torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    """Train for some optimizer steps, with an optimizer made now if none is given."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        output: Any = model(batch(step))
        (output.float() - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if transition is not None:
            transition.step()
    return optimizer


def states_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two states have the same names in the same order and the same bits."""
    return list(left) == list(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        for a, b in zip(left.values(), right.values(), strict=True)
    )


def copied(state: dict[str, Any]) -> dict[str, Tensor]:
    """A copy of a model's state."""
    return {name: value.detach().clone() for name, value in state.items()}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
