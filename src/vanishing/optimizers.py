"""Parameters that join an optimizer when a transition begins, and those that leave it at the end."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class OptimizerWatch:
    """Knows every optimizer that has made a step since it was made, without keeping it alive."""

    def __init__(self) -> None:
        seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()

        def remember(optimizer: Optimizer, *_: Any) -> None:
            seen.add(optimizer)

        self.seen = seen
        self._handle = register_optimizer_step_post_hook(remember)
        weakref.finalize(self, self._handle.remove)

    def close(self) -> None:
        """Stop watching."""
        self._handle.remove()


def held_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    """Return the identities of all parameters that the optimizers hold."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def join(optimizer: Optimizer, beside: nn.Parameter, parameters: Iterable[nn.Parameter]) -> None:
    """Add parameters to the group that holds another one, so that they train with its settings."""
    group = next(g for g in optimizer.param_groups if any(p is beside for p in g["params"]))
    held = held_ids([optimizer])
    group["params"].extend(p for p in parameters if id(p) not in held)


def leave(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters and their state out of every optimizer."""
    gone = {id(p) for p in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in [p for p in optimizer.state if id(p) in gone]:
            del optimizer.state[parameter]
