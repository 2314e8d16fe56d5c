"""A layer whose input is rounded to integer codes before it multiplies, as integer kernels do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""Below this, a range is taken for empty, as by torchao's kernels."""


def code_range(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest code; codes are signed, with a zero point as well."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def scale_of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Return the scale of the codes of a range, in at least single precision, and their zero point (None: 0).

    Args:
        low: smallest value, of any shape; a range always holds 0.
        high: largest value, of the same shape.
        bits: width of a code.
        symmetric: whether the range is widened until it is the same on both sides of 0.
    """
    first, last = code_range(bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    # In the type of the input, in which torchao computes it.
    if symmetric:
        scale, zero_point = (torch.maximum(high, -low) / ((last - first) / 2)).clamp(min=SMALLEST_SCALE), None
    else:
        scale = ((high - low) / (last - first)).clamp(min=SMALLEST_SCALE)
        zero_point = (first - (low / scale).round()).clamp(first, last)
    wide = torch.promote_types(scale.dtype, torch.float32)
    return scale.to(wide), None if zero_point is None else zero_point.to(wide)


def to_steps(x: Tensor, scale: Tensor) -> Tensor:
    """Return the input in steps of the scale, in the scale's type and in memory of its own."""
    # A product and not a quotient, as in torchao, whose codes would else differ now and then.
    return x.to(scale.dtype) * (1.0 / scale)


class _Rounded(torch.autograd.Function):
    """The input rounded to its codes; the gradient is straight-through, where wanted for what was not clipped alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, codes: tuple[int, int], clipped: bool
    ) -> Tensor:
        steps = to_steps(x, scale).round_()
        if zero_point is not None:
            steps.add_(zero_point)
        ctx.clipped = clipped
        if clipped:
            ctx.save_for_backward((steps >= codes[0]) & (steps <= codes[1]))
        steps.clamp_(*codes)
        if zero_point is not None:
            steps.sub_(zero_point)
        return steps.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.clipped:
            gradient = gradient * ctx.saved_tensors[0]
        return gradient, None, None, None, None


class InputQuantizer(nn.Module, ABC):
    """What a layer's input goes through: floating in, floating out, on as many values as there are codes.

    Args:
        bits: width of a code.
        symmetric: whether the codes have no zero point.
    """

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return the values of the input's codes, in the input's type."""

    @abstractmethod
    def plain(self) -> InputQuantizer:
        """Return what stays of it in a finished model."""

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}"


class TokenQuantizer(InputQuantizer):
    """Each token, or each example of a convolution, has the range of its own values.

    Args:
        bits: width of a code.
        symmetric: whether the codes have no zero point.
        dimensions: how many of the last dimensions of the input share a range.
    """

    def __init__(self, bits: int, symmetric: bool, dimensions: int) -> None:
        super().__init__(bits, symmetric)
        self.dimensions = dimensions

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.detach().flatten(-self.dimensions).aminmax(dim=-1, keepdim=True)
        shape = (*low.shape[:-1], *[1] * self.dimensions)
        scale, zero_point = scale_of_range(low.reshape(shape), high.reshape(shape), self.bits, self.symmetric)
        rounded: Tensor = _Rounded.apply(x, scale, zero_point, code_range(self.bits), False)
        return rounded

    def plain(self) -> InputQuantizer:
        return self


class TensorQuantizer(InputQuantizer):
    """All inputs have one range, which stays.

    Args:
        bits: width of a code.
        scale: (1,), the distance of two values.
        zero_point: (1,), the code of 0; None where that is 0.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, bits: int, scale: Tensor, zero_point: Tensor | None) -> None:
        super().__init__(bits, zero_point is None)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", None if zero_point is None else zero_point.to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.to(torch.promote_types(x.dtype, torch.float32))
        zero_point = None if self.zero_point is None else self.zero_point.to(scale.dtype)
        rounded: Tensor = _Rounded.apply(x, scale, zero_point, code_range(self.bits), True)
        return rounded

    def plain(self) -> InputQuantizer:
        return self


class QuantizedInput(nn.Module):
    """A layer with what its input goes through before.

    It answers to the attributes of the layer, `.weight` among them, for code that looks at them.

    Args:
        quantizer: what the input goes through.
        layer: a linear or convolution layer.
    """

    def __init__(self, quantizer: InputQuantizer, layer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.layer = layer
        self.training = layer.training

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        """Return the layer's output for the quantized first argument."""
        arguments, keywords = with_first(self.quantizer, arguments, keywords)
        output: Tensor = self.layer(*arguments, **keywords)
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Copying and unpickling look for special methods, which are this module's own, as is being parametrized.
            if name in ("quantizer", "layer", "parametrizations") or name.startswith("__"):
                raise
        return getattr(self.layer, name)


def with_first(
    function: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer with a function of the first one, which is its input, in its place."""
    if arguments:
        return (function(arguments[0]), *arguments[1:]), keywords
    name = next(iter(keywords))
    return arguments, keywords | {name: function(keywords[name])}


def quantized_dimensions(module: nn.Module) -> int:
    """Return how many of the last dimensions of a layer's input one example or token has."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.dim() - 1
