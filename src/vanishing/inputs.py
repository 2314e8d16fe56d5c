"""Calling a model with whatever a user gives as one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def call(model: nn.Module, example_inputs: Any) -> Any:
    """Return what the model computes in evaluation mode, without gradients.

    Args:
        model: any model; it keeps its mode.
        example_inputs: a tensor, a tuple of arguments or a mapping of keywords.
    """
    with evaluation(model):
        if isinstance(example_inputs, Mapping):
            return model(**example_inputs)
        return model(*example_inputs) if isinstance(example_inputs, tuple) else model(example_inputs)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Return what the model computes for a batch of data.

    Args:
        model: any model, in the mode in which it is.
        batch: a tensor, a tuple or list whose first item is the input, or a mapping of keywords.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch if isinstance(batch, Tensor) else batch[0])


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and every module of it back in its own mode at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
