"""Layers with fewer features: how each type of layer is cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Exchanged = list[tuple[nn.Parameter, nn.Parameter]]
"""Parameters that were cut, and what is left of each."""


def is_convolution(module: nn.Module | None) -> bool:
    """Whether a module is a convolution that is not transposed."""
    return isinstance(module, _ConvNd) and not module.transposed


def is_depthwise(module: nn.Module | None) -> bool:
    """Whether a module is a convolution of every channel by itself."""
    return (
        isinstance(module, _ConvNd)
        and not module.transposed
        and 1 < module.groups == module.in_channels == module.out_channels
    )


def is_narrowable(module: nn.Module) -> bool:
    """Whether a layer can be cut: linear, convolution with no groups or one for each channel, batch normalization."""
    if isinstance(module, _ConvNd):
        return not module.transposed and (module.groups == 1 or is_depthwise(module))
    return isinstance(module, (nn.Linear, _BatchNorm))


def features_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight; of a normalization without one, that which it would have."""
    weight = module._parameters.get("weight")
    if weight is not None:
        return tuple(weight.shape)
    assert isinstance(module, _BatchNorm)
    return (module.num_features,)


@torch.no_grad()
def cut_outputs(layer: nn.Module, kept: Tensor) -> Exchanged:
    """Take output features out of a layer, of a normalization with their statistics.

    Args:
        layer: a layer that can be cut, not parametrized.
        kept: (count,), positions of the features that stay, in rising order.
    """
    exchanged = [_cut(layer, name, 0, kept) for name in ("weight", "bias") if layer._parameters.get(name) is not None]
    for name, buffer in layer._buffers.items():
        if isinstance(layer, _BatchNorm) and buffer is not None and buffer.dim():
            layer._buffers[name] = buffer.index_select(0, kept)
    _set_sizes(layer)
    return exchanged


@torch.no_grad()
def cut_inputs(layer: nn.Module, kept: Tensor) -> Exchanged:
    """Take input features out of a linear layer or a convolution without groups, which is not parametrized.

    Args:
        layer: the layer.
        kept: (count,), positions of the features that stay, in rising order.
    """
    exchanged = [_cut(layer, "weight", 1, kept)]
    _set_sizes(layer)
    return exchanged


def _cut(layer: nn.Module, name: str, dimension: int, kept: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    old = layer.get_parameter(name)
    new = nn.Parameter(old.detach().index_select(dimension, kept), requires_grad=old.requires_grad)
    layer._parameters[name] = new
    return old, new


def narrowed(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of a layer with parameters and buffers of smaller shapes and of no meaning; the rest is shared.

    Args:
        module: the layer.
        shapes: by the name of the parameter or buffer.

    Raises:
        ValueError: it is a layer that cannot be cut, or a shape is no smaller one.
    """
    if not is_narrowable(module):
        raise ValueError(f"a {type(module).__name__} cannot be narrowed.")
    result = copy.copy(module)
    result._parameters, result._buffers = dict(module._parameters), dict(module._buffers)
    for name, shape in shapes.items():
        old = module._parameters.get(name, module._buffers.get(name))
        if old is None or len(shape) != old.ndim or any(a > b for a, b in zip(shape, old.shape, strict=True)):
            raise ValueError(f"its {name} cannot have the shape {list(shape)}.")
        new = old.new_empty(shape)
        if isinstance(old, nn.Parameter):
            result._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            result._buffers[name] = new
    _set_sizes(result)
    return result


def _set_sizes(layer: Any) -> None:
    """Tell a layer, which says what it was, the sizes of its tensors."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _ConvNd):
        depthwise = is_depthwise(layer)
        layer.out_channels = layer.weight.shape[0]
        if depthwise:
            layer.in_channels = layer.groups = layer.out_channels
        else:
            layer.in_channels = layer.weight.shape[1] * layer.groups
    else:
        held = layer.running_mean if layer.weight is None else layer.weight
        if held is not None:
            layer.num_features = len(held)
