"""Parameters that join an optimizer when a transition begins, and those that leave it at the end."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

_NAMES = "param_names"
"""The key under which an optimizer that was made from `named_parameters()` keeps the names of a group."""


class OptimizerWatch:
    """Knows every optimizer that has made a step since it was made, without keeping it alive.

    Args:
        before: called with any optimizer before a step of it, when the gradients are there; must not hold what would
            hold the watch.
    """

    def __init__(self, before: Callable[[Optimizer], None]) -> None:
        self.seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.before = before
        _watches.add(self)
        if not _hooks:
            _hooks.extend(
                (register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step))
            )

    def close(self) -> None:
        """Stop watching."""
        _watches.discard(self)
        if not _watches:
            for hook in _hooks:
                hook.remove()
            _hooks.clear()


_watches: weakref.WeakSet[OptimizerWatch] = weakref.WeakSet()
_hooks: list[RemovableHandle] = []
"""Of all watches: the garbage collector may take one while PyTorch goes through its hooks, which must stay then."""


def _before_step(
    optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call all watches, after the closure where one computes the gradients."""
    watches = list(_watches)
    # As a method's: the first of the arguments is the optimizer.
    closure = keywords.get("closure", arguments[1] if len(arguments) > 1 else None)
    if not watches or not callable(closure):
        for watch in watches:
            watch.before(optimizer)
        return None

    def gradients_and_more() -> Any:
        loss = closure()
        for watch in watches:
            watch.before(optimizer)
        return loss

    if "closure" in keywords:
        return arguments, keywords | {"closure": gradients_and_more}
    return (arguments[0], gradients_and_more, *arguments[2:]), keywords


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for watch in list(_watches):
        watch.seen.add(optimizer)


def held_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    """Return the identities of all parameters that the optimizers hold."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def unheld_problems(optimizer: Optimizer, places: Sequence[tuple[str, Sequence[Tensor]]]) -> list[str]:
    """Return a problem if an optimizer does not hold what is to be compressed, else nothing.

    Args:
        optimizer: the optimizer.
        places: names and the parameters there, of which it must hold one.

    Raises:
        TypeError: it is no optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"prepare: optimizer must be a torch.optim.Optimizer, got {optimizer!r}.")
    held = held_ids([optimizer])
    missing = [name for name, parameters in places if parameters and not any(id(p) in held for p in parameters)]
    if not missing:
        return []
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return [
        f"the optimizer does not hold the weights of {', '.join(map(repr, missing[:3]))}{more}. Make it from "
        f"model.parameters(), or leave `optimizer` out and make it after prepare."
    ]


def join(optimizer: Optimizer, beside: Iterable[nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> None:
    """Add parameters to the group that holds one of others, so that they train with its settings.

    Args:
        optimizer: the optimizer.
        beside: the others; if it holds none of them, the first group is taken. Where they are spread over groups, a
            matrix joins a group of matrices and a vector one of vectors: weight decay is for the former.
        parameters: by name, which an optimizer that was made from named parameters keeps.
    """
    neighbors = {id(p) for p in beside}
    # By whether it holds a matrix: the first group that holds such a neighbor.
    near: dict[bool, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for neighbor in group["params"]:
            if id(neighbor) in neighbors:
                near.setdefault(neighbor.ndim > 1, group)
    others = [*near.values(), optimizer.param_groups[0]]
    held = held_ids([optimizer])
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            group = near.get(parameter.ndim > 1, others[0])
            group["params"].append(parameter)
            if _NAMES in group:
                group[_NAMES].append(name)


def leave(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters and their state out of every optimizer."""
    gone = {id(p) for p in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            stays = [id(p) not in gone for p in group["params"]]
            for key in {"params", _NAMES} & set(group):
                # In place: some optimizers keep the list itself.
                group[key][:] = itertools.compress(group[key], stays)
        for parameter in [p for p in optimizer.state if id(p) in gone]:
            del optimizer.state[parameter]


def exchange(optimizers: Iterable[Optimizer], pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Put other parameters in the places of some; their state, which has the shape of the old ones, begins anew."""
    new = {id(old): parameter for old, parameter in pairs}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [new.get(id(parameter), parameter) for parameter in group["params"]]
        for parameter in [p for p in optimizer.state if id(p) in new]:
            del optimizer.state[parameter]
