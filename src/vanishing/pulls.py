"""What techniques add to the gradients of latent weights, once an optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from vanishing.blended_weight import BlendedWeight
from vanishing.distributed import spread_like, whole
from vanishing.optimizers import held_ids


class PulledWeight(NamedTuple):
    """A latent weight at which techniques pull.

    Args:
        weight: the parameter.
        blends: what acts on it in turn.
        share: the part that all of them have in what the layer computes.
    """

    weight: Tensor
    blends: Sequence[BlendedWeight]
    share: float


@torch.no_grad()
def add_pulls(weights: Iterable[PulledWeight], optimizer: Optimizer) -> None:
    """Add `(1 - beta) * pull(W)` to the gradient of every latent weight that an optimizer is about to change.

    Not in a backward pass: an optimizer step may have several of them, each with a part of the loss, and one may read a
    weight several times. So the term is neither accumulated nor averaged over processes nor scaled with the loss.

    Args:
        weights: at which techniques pull.
        optimizer: before its step, when the gradients are there.
    """
    weights = list(weights)
    if not weights:
        return
    held = held_ids([optimizer])
    # Set by a `GradScaler` for an optimizer that divides by its scale itself.
    scale = getattr(optimizer, "grad_scale", None)
    for weight, blends, share in weights:
        if not share or id(weight) not in held or weight.grad is None:
            continue
        pull = _pull(blends, whole(weight.detach()))
        if pull is not None:
            pull = pull.mul_(share if scale is None else share * scale)
            weight.grad.add_(spread_like(pull, weight.grad))


def _pull(blends: Sequence[BlendedWeight], weight: Tensor) -> Tensor | None:
    """Return what all blends add; at what the one before leaves, a later one pulls through its gradient."""
    value = weight.requires_grad_()
    result = None
    for number, blend in enumerate(blends):
        pull = blend.form.pull(value.detach()) if blend.form.pulls and blend.beta < 1.0 else None
        if pull is not None:
            pull = pull.mul_(1.0 - blend.beta)
            if value is not weight:
                (pull,) = torch.autograd.grad(value, weight, pull, retain_graph=True)
            result = pull if result is None else result + pull
        if any(later.form.pulls for later in blends[number + 1 :]):
            with torch.enable_grad():
                value = blend(value)
    return result
