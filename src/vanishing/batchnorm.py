"""Statistics of batch normalization, estimated anew for a model whose weights have changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vanishing.inputs import evaluation


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
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("recalibrate: at least one batch is needed to estimate BatchNorm's statistics, got none.")
    momenta = {norm: norm.momentum for norm in norms}
    with evaluation(model):
        for norm in norms:
            norm.reset_running_stats()
            # Without a momentum PyTorch keeps the plain average of all batches.
            norm.momentum = None
            norm.train()
        try:
            for batch in itertools.chain([first], iterator):
                if isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(batch if isinstance(batch, Tensor) else batch[0])
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
