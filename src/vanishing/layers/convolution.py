"""Convolutions and transposed convolutions of one to three dimensions, with groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from vanishing.layers.base import Factored, LayerKind, Layout, register_kind, row_layout, transposed_layout

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def _dimensions(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.dim() - 2


def _probe_input(module: nn.Module, spatial: list[int]) -> Tensor:
    assert isinstance(module, nn.modules.conv._ConvNd)
    return torch.randn(2, module.in_channels, *spatial, device=module.weight.device, dtype=module.weight.dtype)


def _factored(module: nn.Module, first_type: type[nn.Module], rank: int, layout: Layout, **extra: Any) -> Factored:
    assert isinstance(module, nn.modules.conv._ConvNd)
    place = {"device": module.weight.device, "dtype": module.weight.dtype}
    between = rank * module.groups
    first = skip_init(
        first_type,
        module.in_channels,
        between,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        bias=False,
        padding_mode=module.padding_mode,
        **extra,
        **place,
    )
    pointwise = _CONVOLUTIONS[_dimensions(module)]
    bias = module.bias is not None
    second = skip_init(pointwise, between, module.out_channels, 1, groups=module.groups, bias=bias, **place)
    sizes = {name: getattr(module, name) for name in _SIZES}
    return Factored(first, second, layout=layout, groups=module.groups, sizes=sizes)


@register_kind
class ConvolutionKind(LayerKind):
    name = "Conv"

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, tuple(_CONVOLUTIONS.values()))

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight",)

    def layout(self, module: nn.Module, shape: tuple[int, ...]) -> Layout:
        return row_layout(shape)

    def groups(self, module: nn.Module) -> int:
        assert isinstance(module, nn.modules.conv._ConvNd)
        return module.groups

    def base_forward(self, module: nn.Module) -> Callable[..., Any]:
        return _CONVOLUTIONS[_dimensions(module)].forward

    def probe_input(self, module: nn.Module) -> Tensor:
        assert isinstance(module, nn.modules.conv._ConvNd)
        sizes = zip(module.kernel_size, module.dilation, module.stride, strict=True)
        return _probe_input(module, [d * (k - 1) + 1 + 2 * s for k, d, s in sizes])

    def input_rows(self, module: nn.Module, input: Tensor) -> Tensor:
        assert isinstance(module, nn.modules.conv._ConvNd)
        count = _dimensions(module)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        patches = functional.pad(input, module._reversed_padding_repeated_twice, mode=mode)
        if patches.dim() == count + 1:
            patches = patches.unsqueeze(0)
        settings = zip(module.kernel_size, module.dilation, module.stride, strict=True)
        for dimension, (size, dilation, stride) in enumerate(settings, start=2):
            patches = patches.unfold(dimension, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # (batch, channels, positions..., kernel...) -> (groups, batch and positions, channels a group and kernel)
        batch, channels, *rest = patches.shape
        split = patches.reshape(batch, module.groups, channels // module.groups, *rest)
        outside, kernel = range(3, 3 + count), range(3 + count, 3 + 2 * count)
        columns = module.weight.numel() // module.out_channels
        return split.permute(1, 0, *outside, 2, *kernel).reshape(module.groups, -1, columns)

    def factor(self, module: nn.Module, rank: int) -> Factored:
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        return _factored(module, _CONVOLUTIONS[_dimensions(module)], rank, row_layout(shape))


@register_kind
class TransposedConvolutionKind(LayerKind):
    name = "ConvTranspose"

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, tuple(_TRANSPOSED.values()))

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight",)

    def layout(self, module: nn.Module, shape: tuple[int, ...]) -> Layout:
        return transposed_layout(shape, self.groups(module))

    def groups(self, module: nn.Module) -> int:
        assert isinstance(module, nn.modules.conv._ConvNd)
        return module.groups

    def positions(self, module: nn.Module, input: Tensor, output: Tensor) -> int:
        assert isinstance(module, nn.modules.conv._ConvNd)
        return input.numel() // module.in_channels

    def base_forward(self, module: nn.Module) -> Callable[..., Any]:
        return _TRANSPOSED[_dimensions(module)].forward

    def probe_input(self, module: nn.Module) -> Tensor:
        return _probe_input(module, [4] * _dimensions(module))

    def factor(self, module: nn.Module, rank: int) -> Factored:
        assert isinstance(module, nn.modules.conv._ConvNd)
        layout = self.layout(module, tuple(module.weight.shape))
        kind = _TRANSPOSED[_dimensions(module)]
        return _factored(module, kind, rank, layout, output_padding=module.output_padding)
