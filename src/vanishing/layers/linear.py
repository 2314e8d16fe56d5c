"""Fully connected layers: `nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from vanishing.layers.base import Factored, LayerKind, Layout, register_kind, row_layout


def factored_linear(weight: Tensor, inputs: int, outputs: int, rank: int, bias: bool, **keywords: Any) -> Factored:
    """Return two `nn.Linear` of the given rank on the device and in the type of a weight."""
    place = {"device": weight.device, "dtype": weight.dtype}
    first = skip_init(nn.Linear, inputs, rank, bias=False, **place)
    second = skip_init(nn.Linear, rank, outputs, bias=bias, **place)
    return Factored(first, second, **keywords)


@register_kind
class LinearKind(LayerKind):
    name = "Linear"
    multiplies_rows = True
    takes_activations = True

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight",)

    def layout(self, module: nn.Module, shape: tuple[int, ...]) -> Layout:
        return row_layout(shape)

    def base_forward(self, module: nn.Module) -> Callable[..., Any]:
        return nn.Linear.forward

    def input_rows(self, module: nn.Module, input: Tensor) -> Tensor:
        return input.reshape(1, -1, input.shape[-1])

    def probe_input(self, module: nn.Module) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return torch.randn(2, weight.shape[1], device=weight.device, dtype=weight.dtype)

    def factor(self, module: nn.Module, rank: int) -> Factored:
        assert isinstance(module, nn.Linear)
        outputs, inputs = module.weight.shape
        sizes = {"in_features": inputs, "out_features": outputs}
        layout = row_layout((outputs, inputs))
        bias = module.bias is not None
        return factored_linear(module.weight, inputs, outputs, rank, bias, layout=layout, sizes=sizes)


@register_kind
class TransposedLinearKind(LayerKind):
    """transformers' `Conv1D`, GPT-2's linear layer with its weight as (in, out)."""

    name = "Conv1D"
    multiplies_rows = True
    takes_activations = True

    def owns(self, module: nn.Module) -> bool:
        # A model with such a layer has imported transformers; nobody else pays for the import.
        library = sys.modules.get("transformers.pytorch_utils")
        return library is not None and isinstance(module, library.Conv1D)

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight",)

    def layout(self, module: nn.Module, shape: tuple[int, ...]) -> Layout:
        return Layout(shape=shape, view=shape, order=(1, 0), rows=shape[1])

    def base_forward(self, module: nn.Module) -> Callable[..., Any]:
        forward: Callable[..., Any] = sys.modules["transformers.pytorch_utils"].Conv1D.forward
        return forward

    def input_rows(self, module: nn.Module, input: Tensor) -> Tensor:
        return input.reshape(1, -1, input.shape[-1])

    def probe_input(self, module: nn.Module) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return torch.randn(2, weight.shape[0], device=weight.device, dtype=weight.dtype)

    def factor(self, module: nn.Module, rank: int) -> Factored:
        weight: Tensor = module.weight  # type: ignore[assignment]
        inputs, outputs = weight.shape
        layout = self.layout(module, (inputs, outputs))
        sizes = {"nx": inputs, "nf": outputs}
        return factored_linear(weight, inputs, outputs, rank, bias=True, layout=layout, sizes=sizes)
