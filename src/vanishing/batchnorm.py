"""Statistics of batch normalization, estimated anew for a model whose weights have changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics of every BatchNorm by the averages over some batches.

    Args:
        model: the model; it stays in its mode.
        batches: inputs, each a tensor, a tuple or list whose first item is the input, or a mapping of keywords.

    Raises:
        ValueError: no batch was given.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        # Without a momentum PyTorch keeps the plain average of all batches.
        norm.momentum = None
        norm.train()
    count = 0
    try:
        for batch in batches:
            count += 1
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch if isinstance(batch, Tensor) else batch[0])
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise ValueError("recalibrate: at least one batch is needed to estimate BatchNorm's statistics, got none.")
