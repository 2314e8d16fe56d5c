"""Quantization of what goes into a layer, with or without that of its weight."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from vanishing.calibration import Observer
from vanishing.compressors.base import Beta, CompressedWeight, LayerView, WeightCompressor
from vanishing.input_range import InputRange
from vanishing.layers.base import LayerKind
from vanishing.layers.quantized_input import (
    SMALLEST_SCALE,
    InputQuantizer,
    TensorQuantizer,
    TokenQuantizer,
    code_range,
    quantized_dimensions,
    scale_of_range,
    to_steps,
)
from vanishing.receipt import Grid


class Range(Enum):
    """Which values of a layer's input the codes reach from and to."""

    TOKEN = "token"
    """Of each token (each example of a convolution) its own, found when it comes: dynamic quantization."""
    EXTREMES = "extremes"
    """One for all: from the smallest to the largest input in the calibration batches."""
    LEAST_ERROR = "least-error"
    """One for all: the part of that with the least squared error on the calibration batches."""
    LEARNED = "learned"
    """One for all, by a step size that is trained (LSQ, arXiv 1902.08153), from calibration batches on."""


@dataclass(frozen=True)
class ActivationQuantization(WeightCompressor):
    """Round what goes into a layer to one of `2**bits` equally spaced values, as integer kernels do.

    In a chain it comes last: `Quantization(bits=4) | ActivationQuantization(bits=8)` is W4A8. Alone it leaves the
    weight as it is. As the output is no longer a function of one blended weight, the layer runs twice while the
    original fades: with the original weight, and with the compressed one on the quantized input. The two share one
    latent weight.

    Symmetric: codes from `-2**(bits-1)` to `2**(bits-1) - 1`, times a scale of `max|x| / ((2**bits - 1) / 2)`.
    Asymmetric: a zero point that is a code itself, for inputs that lie mostly on one side of 0, as behind a ReLU. The
    gradient is straight-through; where one range serves all inputs, what it does not hold has none. A learned step has
    LSQ's gradient, scaled by `1 / sqrt(N Q)` with N the numbers of one example and Q the largest code.

    Args:
        bits: width of a code, 2 to 8.
        range: what decides which values the codes reach; all but `Range.TOKEN` need `prepare(calibration=...)`.
        symmetric: whether the codes have no zero point.

    Raises:
        ConfigError: a value is out of range.
    """

    bits: Annotated[int, Field(ge=2, le=8, description="the width of a code in bits, 2 to 8")]
    _: KW_ONLY
    range: Range = Range.TOKEN
    symmetric: bool = True

    stage: ClassVar[int] = 3

    @property
    def quantizes_input(self) -> bool:
        return True

    def refusal(self, kind: LayerKind) -> str | None:
        return None if kind.takes_activations else "it does more than multiply its one input with its weight"

    def observer(self, layer: LayerView) -> Observer | None:
        return None if self.range is Range.TOKEN else InputRange()

    def form(self, layer: LayerView, *, ramped: bool) -> CompressedWeight:
        return self.form_around(None, layer)

    def form_around(self, weights: CompressedWeight | None, layer: LayerView) -> CompressedWeight:
        """Return the compressed form of a layer whose weight has a compressed form of its own, or stays as it is."""
        return QuantizedInputWeight(weights, self._quantizer(layer).to(layer.weight.device))

    def _quantizer(self, layer: LayerView) -> InputQuantizer:
        if self.range is Range.TOKEN:
            return TokenQuantizer(self.bits, self.symmetric, quantized_dimensions(layer.module))
        observed = layer.observed
        assert isinstance(observed, InputRange)
        if self.range is Range.LEAST_ERROR:
            low, high = observed.least_error(self.bits, self.symmetric)
        else:
            low, high = observed.extremes
        scale, zero_point = scale_of_range(low, high, self.bits, self.symmetric)
        if self.range is Range.LEARNED:
            return LearnedQuantizer(self.bits, observed.mean_magnitude.to(layer.weight.dtype), zero_point)
        return TensorQuantizer(self.bits, scale, zero_point)


class QuantizedInputWeight(CompressedWeight):
    """The compressed form of a layer with a quantized input: that of its weight, and what the input goes through.

    Args:
        weights: the compressed form of the weight, None for the weight itself.
        quantizer: what the input goes through.
    """

    def __init__(self, weights: CompressedWeight | None, quantizer: InputQuantizer) -> None:
        super().__init__()
        self.weights = weights
        self.quantizer = quantizer
        self.keeps_weight = weights is None

    @property
    def input_quantizer(self) -> InputQuantizer:
        return self.quantizer

    def compress(self, weight: Tensor) -> Tensor:
        return weight if self.weights is None else self.weights.compress(weight)

    def blend(self, weight: Tensor, beta: Beta) -> Tensor:
        return weight if self.weights is None else self.weights.blend(weight, beta)

    def grid(self, weight: Tensor) -> Grid | None:
        return None if self.weights is None else self.weights.grid(weight)

    @property
    def pulls(self) -> bool:
        return self.weights is not None and self.weights.pulls

    def pull(self, weight: Tensor) -> Tensor | None:
        return None if self.weights is None else self.weights.pull(weight)


class LearnedQuantizer(InputQuantizer):
    """All inputs have one range, whose step size is trained (LSQ, arXiv 1902.08153); the zero point stays.

    Args:
        bits: width of a code.
        mean_magnitude: (1,), that of the inputs; the first step is `2 mean|x| / sqrt(Q)` (section 2.1).
        zero_point: (1,), the code of 0; None where that is 0.
    """

    zero_point: Tensor | None

    def __init__(self, bits: int, mean_magnitude: Tensor, zero_point: Tensor | None) -> None:
        super().__init__(bits, zero_point is None)
        self.register_buffer("zero_point", None if zero_point is None else zero_point.to(torch.int8))
        first = 2 * mean_magnitude * _largest(code_range(bits), zero_point) ** -0.5
        self.step = nn.Parameter(first.to(mean_magnitude.dtype).clamp(min=SMALLEST_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        zero_point = None if self.zero_point is None else self.zero_point.to(wide)
        rounded: Tensor = _LearnedStep.apply(x, self.step, zero_point, code_range(self.bits))
        return rounded

    def plain(self) -> InputQuantizer:
        zero_point = None if self.zero_point is None else self.zero_point.clone()
        return TensorQuantizer(self.bits, _scale(self.step.detach()), zero_point)


def _scale(step: Tensor) -> Tensor:
    # A step that an optimizer drives through 0 goes on with the other sign.
    return step.abs().clamp(min=SMALLEST_SCALE)


class _LearnedStep(torch.autograd.Function):
    """The input rounded to codes of a step; equations 1 to 3 and 5 of LSQ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor | None, codes: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, step, zero_point)
        ctx.codes = codes
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = _scale(step).to(wide)
        low, high = _reach(codes, zero_point)
        return to_steps(x, scale).round_().clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, step, zero_point = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = to_steps(x, _scale(step).to(wide))
        low, high = _reach(ctx.codes, zero_point)
        inside = (steps > low) & (steps < high)
        slope = steps.round().clamp_(low, high).sub_(steps * inside)
        # The numbers of one example, which the first dimension counts where there is one.
        numbers = math.prod(x.shape[1:] if x.dim() > 1 else x.shape)
        share = (_largest(ctx.codes, zero_point) * max(numbers, 1)) ** -0.5
        gathered = (slope * gradient).sum() * share * step.sign()
        return gradient * inside, gathered.to(step.dtype), None, None


def _reach(codes: tuple[int, int], zero_point: Tensor | None) -> tuple[Any, Any]:
    """How many steps the codes reach below and above 0, -Q_N and Q_P."""
    return codes if zero_point is None else (codes[0] - zero_point, codes[1] - zero_point)


def _largest(codes: tuple[int, int], zero_point: Tensor | None) -> Any:
    """Q_P, of a range that lies below 0 alone 1."""
    return codes[1] if zero_point is None else (codes[1] - zero_point).clamp(min=1)
