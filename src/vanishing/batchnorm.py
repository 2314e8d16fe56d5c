"""Statistics of batch normalization, estimated anew for a model whose weights have changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from vanishing.errors import TransitionError
from vanishing.inputs import evaluation, run_batch


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics of every BatchNorm by the averages over some batches.

    Args:
        model: the model; it stays in its mode.
        batches: inputs, each a tensor, a tuple or list whose first item is the input, or a mapping of keywords.

    Raises:
        TransitionError: no batch was given; the statistics are as they were, as after any error.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    batches = at_least_one(batches)
    momenta = {norm: norm.momentum for norm in norms}
    statistics = {buffer: buffer.clone() for norm in norms for buffer in norm.buffers(recurse=False)}
    with evaluation(model):
        for norm in norms:
            norm.reset_running_stats()
            # Without a momentum PyTorch keeps the plain average of all batches.
            norm.momentum = None
            norm.train()
        try:
            for batch in batches:
                run_batch(model, batch)
        except BaseException:
            for buffer, value in statistics.items():
                buffer.copy_(value)
            raise
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum


@torch.no_grad()
def tried_out(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """Return the same batches, of which the first one was given to the model, in evaluation mode.

    Raises:
        TransitionError: there is none.
    """
    batches = at_least_one(batches)
    first = next(batches)
    with evaluation(model):
        run_batch(model, first)
    return itertools.chain([first], batches)


def at_least_one(batches: Iterable[Any]) -> Iterator[Any]:
    """Return the same batches.

    Raises:
        TransitionError: there is none.
    """
    iterator = iter(batches)
    for first in iterator:
        return itertools.chain([first], iterator)
    raise TransitionError("recalibrate: at least one batch is needed to estimate BatchNorm's statistics, got none.")
