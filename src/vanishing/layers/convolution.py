"""Convolutions and transposed convolutions of one to three dimensions, with groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from vanishing.layers.base import Factored, LayerKind, Layout, Split, register_kind, row_layout, transposed_layout

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


def _spatial(module: nn.modules.conv._ConvNd, rank: int, *, layout: Layout) -> Factored:
    place = {"device": module.weight.device, "dtype": module.weight.dtype}
    shared = {"groups": module.groups, "padding_mode": module.padding_mode} | place
    between = rank * module.groups

    def along(dimension: int) -> dict[str, Any]:
        # What belongs to the other dimension does nothing.
        settings: dict[str, Any] = {}
        for name, nothing in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(module, name)
            pair = [nothing, nothing]
            if not isinstance(value, str):
                pair[dimension] = value[dimension]
            settings[name] = value if isinstance(value, str) else tuple(pair)
        return settings

    first = skip_init(nn.Conv2d, module.in_channels, between, bias=False, **along(0), **shared)
    second = skip_init(nn.Conv2d, between, module.out_channels, bias=module.bias is not None, **along(1), **shared)
    sizes = {name: getattr(module, name) for name in _SIZES}
    return Factored(
        first,
        second,
        layout=layout,
        groups=module.groups,
        second_order=(0, 3, 2, 1),
        split=Split.SPATIAL,
        sizes=sizes,
    )


def _tucker(module: nn.modules.conv._ConvNd, rank: int, inner_rank: int) -> Factored:
    place = {"device": module.weight.device, "dtype": module.weight.dtype}
    sizes = {name: getattr(module, name) for name in _SIZES}
    kind = _CONVOLUTIONS[_dimensions(module)]
    first = skip_init(kind, module.in_channels, inner_rank, 1, bias=False, **place)
    settings = {name: sizes[name] for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    core = skip_init(kind, inner_rank, rank, bias=False, **settings, **place)
    last = skip_init(kind, rank, module.out_channels, 1, bias=module.bias is not None, **place)
    # The first two layers are a convolution of `rank` channels, split between its input channels and the rest.
    shape = (rank, module.in_channels, *module.kernel_size)
    order = (0, *range(2, len(shape)), 1)
    layout = Layout(shape=shape, view=shape, order=order, rows=math.prod(shape) // module.in_channels)
    inner = Factored(first, core, layout=layout, second_order=order, sizes=sizes | {"out_channels": rank})
    shape = tuple(module.weight.shape)
    return Factored(inner, last, layout=row_layout(shape), split=Split.TUCKER, sizes=sizes)


@register_kind
class ConvolutionKind(LayerKind):
    name = "Conv"
    multiplies_rows = True
    takes_activations = True

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

    def split(self, module: nn.Module, wanted: Split) -> Split:
        assert isinstance(module, nn.modules.conv._ConvNd)
        flat = isinstance(module, nn.Conv2d) and min(module.kernel_size) > 1
        dense = module.groups == 1 and math.prod(module.kernel_size) > 1
        fits = {Split.SPATIAL: flat, Split.TUCKER: dense}.get(wanted, True)
        return wanted if fits else Split.CHANNELS

    def split_layout(self, module: nn.Module, split: Split) -> Layout:
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        if split is not Split.SPATIAL:
            return row_layout(shape)
        # A row for each output channel and column of the kernel.
        return Layout(shape=shape, view=shape, order=(0, 3, 1, 2), rows=shape[0] * shape[3])

    def factor(self, module: nn.Module, rank: int) -> Factored:
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        return _factored(module, _CONVOLUTIONS[_dimensions(module)], rank, row_layout(shape))

    def factor_split(self, module: nn.Module, ranks: Sequence[int], split: Split) -> Factored:
        assert isinstance(module, nn.modules.conv._ConvNd)
        if split is Split.SPATIAL:
            return _spatial(module, *ranks, layout=self.split_layout(module, split))
        return _tucker(module, *ranks) if split is Split.TUCKER else self.factor(module, *ranks)


@register_kind
class TransposedConvolutionKind(LayerKind):
    name = "ConvTranspose"
    takes_activations = True

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
