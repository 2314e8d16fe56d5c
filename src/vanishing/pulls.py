"""What techniques add to the gradients of latent weights, once an optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim import Optimizer

from vanishing.distributed import spread_like, whole
from vanishing.optimizers import held_ids
from vanishing.sites import Site


@torch.no_grad()
def add_pulls(sites: Iterable[Site], optimizer: Optimizer) -> None:
    """Add `(1 - beta) * pull(W)` to the gradient of every latent weight that an optimizer is about to change.

    Not in a backward pass: an optimizer step may have several of them, each with a part of the loss, and one may read a
    weight several times. So the term is neither accumulated nor averaged over processes nor scaled with the loss.

    Args:
        sites: the places of the transition.
        optimizer: before its step, when the gradients are there.
    """
    pulled = [each for site in sites for each in site.pulled_weights()]
    if not pulled:
        return
    held = held_ids([optimizer])
    # Set by a `GradScaler` for an optimizer that divides by its scale itself.
    scale = getattr(optimizer, "grad_scale", None)
    for share, weight, pull in pulled:
        if id(weight) not in held or weight.grad is None:
            continue
        term = pull(whole(weight))
        if term is not None:
            term = term.mul_(share if scale is None else share * scale)
            weight.grad.add_(spread_like(term, weight.grad))
