"""Uniform quantization of weights to 1 to 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vanishing.calibration import InputMoments, Observer
from vanishing.compressors.base import (
    CompressedWeight,
    Gradient,
    LayerView,
    Moment,
    ProjectionCompressor,
    check_gradient,
)
from vanishing.compressors.blocks import block_sizes, from_blocks, grid_scale, stored_scale, to_blocks, total
from vanishing.compressors.searched_scale import SearchedScale
from vanishing.distributed import whole
from vanishing.errors import ConfigError
from vanishing.granularity import Granularity, PerChannel, PerGroup, PerTensor
from vanishing.layers.base import LayerKind, Layout
from vanishing.receipt import Grid

ANNEALED_FROM = 8
"""Bits at which a ramp starts to quantize."""
_RENEWED_EVERY = 16
"""Optimizer steps between two searches for a layer's scales; layers take turns."""


@dataclass(frozen=True)
class Quantization(ProjectionCompressor):
    """Round each weight to one of `2**bits` equally spaced values.

    Symmetric: codes from `-2**(bits-1)` to `2**(bits-1) - 1`, times a scale of `max|w| / ((2**bits - 1) / 2)`. With 1
    bit the two values are plus and minus the mean magnitude, as in `Binary`. Asymmetric: unsigned codes and a zero
    point that is a code itself, so that 0 stays 0. A ramp anneals the bits from 8 down.

    Args:
        bits: width of a code, 1 to 8.
        granularity: what shares a scale: `PerTensor()`, `PerChannel()` or `PerGroup(size)`, whose scales are kept in
            bfloat16.
        symmetric: whether the codes are signed around 0.
        gradient: `Gradient.STRAIGHT_THROUGH` or `Gradient.CLIPPED`.
        damping: the factor lambda by which weights are drawn to the values that they are rounded to, so that they do
            not go back and forth between two (Nagel et al., arXiv 2203.11086, section 4): before each optimizer step
            the gradient of `(1 - beta) * lambda * |g(w) - clip(w)|^2` is added to the weight's, with `g(w)` held and
            `clip` to the range of the codes; 0 for none.
        clip: the least share of its range, in (0, 1], that a scale may stand for. Below 1 each scale is the one, of 21
            shares from 1 down, by which its weights are rounded with the least squared error; it is searched for every
            16 steps, and in between follows the largest weight.
        weighted: whether in that search the errors count by the second moments of the inputs that they are multiplied
            with (their share of the outputs' errors); needs `prepare(calibration=...)`.

    Raises:
        ConfigError: a value is out of range, one bit is asked to be asymmetric or to be clipped, or errors are to be
            weighted without a search.
    """

    bits: Annotated[int, Field(ge=1, le=8, description="the width of a code in bits, 1 to 8")]
    _: KW_ONLY
    granularity: PerTensor | PerChannel | PerGroup = PerChannel()
    symmetric: bool = True
    gradient: Gradient = Gradient.STRAIGHT_THROUGH
    damping: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="a factor of rounding errors, at least 0")
    ] = 0.0
    clip: Annotated[float, Field(gt=0, le=1, description="a share of the range of the weights, in (0, 1]")] = 1.0
    weighted: bool = False

    @property
    def ramps(self) -> bool:
        return True

    def check(self) -> None:
        if self.bits == 1 and not self.symmetric:
            raise ConfigError(
                "Quantization(bits=1, symmetric=False): one bit has no zero point. Use bits=2 or symmetric."
            )
        if self.bits == 1 and self.clip < 1:
            raise ConfigError(
                f"Quantization(bits=1, clip={self.clip:g}): the scale of one bit, the mean magnitude, is that of least "
                f"error already. Leave clip out."
            )
        if self.weighted and self.clip == 1:
            raise ConfigError(
                "Quantization(weighted=True): errors count where scales are searched for. Give the least share of the "
                "range, as in clip=0.5, too."
            )
        check_quantizer_gradient(self, self.gradient)

    def refusal(self, kind: LayerKind) -> str | None:
        if self.weighted and not kind.multiplies_rows:
            return f"what a {kind.name} multiplies its weight with cannot be observed. Use weighted=False for it"
        return None

    def observer(self, layer: LayerView) -> Observer | None:
        return InputMoments(layer.module, layer.kind, full=False) if self.weighted else None

    def form(self, layer: LayerView, *, ramped: bool) -> CompressedWeight:
        return SearchedScale(self, layer) if self.clip < 1 else super().form(layer, ramped=ramped)

    def update(self, forms: Sequence[CompressedWeight], weights: Sequence[Tensor], moment: Moment) -> None:
        self.update_after_another(forms, [partial(whole, weight) for weight in weights], moment)

    def update_after_another(
        self, forms: Sequence[CompressedWeight], weights: Sequence[Callable[[], Tensor]], moment: Moment
    ) -> None:
        if self.clip == 1:
            return
        for turn, (form, weight) in enumerate(zip(forms, weights, strict=True)):
            if moment.arriving or (moment.step + turn) % _RENEWED_EVERY == 0:
                searched = (part for part in form.modules() if isinstance(part, SearchedScale))
                next(searched).search(weight())

    def project(self, matrix: Tensor, strength: float, share: Tensor | None = None) -> Tensor:
        return quantize(matrix, annealed(self.bits, strength), self.granularity, self.symmetric, share)

    def inside(self, matrix: Tensor, strength: float, share: Tensor | None = None) -> Tensor | None:
        if self.gradient is not Gradient.CLIPPED:
            return None
        return within_range(matrix, annealed(self.bits, strength), self.granularity, self.symmetric, share)

    @property
    def pulls(self) -> bool:
        return self.damping > 0

    def pull(self, matrix: Tensor, strength: float, share: Tensor | None = None) -> Tensor | None:
        bits = annealed(self.bits, strength)
        if not self.pulls or not bits:
            return None
        blocks = to_blocks(matrix, self.granularity)
        scale, zero_point = scales(matrix, blocks, bits, self.granularity, self.symmetric, share)
        inside = from_blocks(within(blocks, bits, scale, zero_point), matrix)
        return damping_gradient(matrix, self.project(matrix, strength, share), inside, self.damping)

    def grid(self, matrix: Tensor, layout: Layout, share: Tensor | None = None) -> Grid:
        blocks = to_blocks(matrix, self.granularity)
        scale, zero_point = scales(matrix, blocks, self.bits, self.granularity, self.symmetric, share)
        return make_grid(self.bits, scale, zero_point, self.granularity, layout)


def check_quantizer_gradient(config: ProjectionCompressor, gradient: Gradient) -> None:
    """Raise `ConfigError` for a gradient that a quantizer does not have."""
    check_gradient(config, gradient, (Gradient.STRAIGHT_THROUGH, Gradient.CLIPPED))


def make_grid(bits: int, scale: Tensor, zero_point: Tensor | None, granularity: Granularity, layout: Layout) -> Grid:
    """Return the grid of the scales and zero points of blocks."""
    zeros = None if zero_point is None else zero_point.reshape(zero_point.shape[0], -1).to(torch.uint8)
    group = granularity.size if isinstance(granularity, PerGroup) else None
    return Grid(bits=bits, scale=grid_scale(scale, granularity), zero_point=zeros, group=group, layout=layout)


def annealed(bits: int, strength: float) -> int:
    """Return the bits at a strength: 0 for no quantization at all, then from 8 down to `bits`."""
    if strength == 0.0:
        return 0
    return math.ceil(ANNEALED_FROM - strength * (ANNEALED_FROM - bits))


def quantize(
    matrix: Tensor, bits: int, granularity: Granularity, symmetric: bool, share: Tensor | None = None
) -> Tensor:
    """Return the matrix rounded to `bits` (0: unchanged), in memory of its own; for `share` see `affine`."""
    if bits == 0:
        return matrix.clone()
    blocks = to_blocks(matrix, granularity)
    scale, zero_point = scales(matrix, blocks, bits, granularity, symmetric, share)
    if bits == 1:
        return from_blocks(torch.copysign(scale, blocks), matrix)
    low, high = code_range(bits, zero_point is None)
    codes = (blocks / scale).round_()
    if zero_point is None:
        return from_blocks(codes.clamp_(low, high).mul_(scale), matrix)
    return from_blocks(codes.add_(zero_point).clamp_(low, high).sub_(zero_point).mul_(scale), matrix)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and the largest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def scales(
    matrix: Tensor,
    blocks: Tensor,
    bits: int,
    granularity: Granularity,
    symmetric: bool,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point of each block of a matrix, see `affine`; with 1 bit, the scale of the signs."""
    if bits == 1:
        return binary_scale(matrix, blocks, granularity), None
    return affine(blocks, bits, granularity, symmetric, share)


def affine(
    blocks: Tensor, bits: int, granularity: Granularity, symmetric: bool, share: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point (None when symmetric) of each block, with a last dimension of 1.

    Args:
        blocks: the weights.
        bits: width of a code.
        granularity: what a block is.
        symmetric: whether the codes are signed around 0.
        share: of the range of a block's weights, the part that the codes reach over; None for all of it.
    """
    steps = 2**bits - 1
    if symmetric:
        span = blocks.abs().amax(-1, keepdim=True).mul_(2)
        span = span if share is None else span.mul_(share)
        return _nonzero(stored_scale(span / steps, granularity)), None
    low, high = blocks.amin(-1, keepdim=True).clamp_(max=0), blocks.amax(-1, keepdim=True).clamp_(min=0)
    if share is not None:
        low, high = low.mul_(share), high.mul_(share)
    scale = _nonzero(stored_scale((high - low) / steps, granularity))
    return scale, (-low / scale).round_().clamp_(0, steps)


def _nonzero(scale: Tensor) -> Tensor:
    return scale.masked_fill_(scale == 0, 1.0)


def mean_magnitude(matrix: Tensor, blocks: Tensor, granularity: Granularity) -> Tensor:
    """Return the mean of |w| over each block: the least-squares scale of sign(w) (1603.05279, equation 6)."""
    # On a CPU this is several times faster than a norm of order 1.
    return total(blocks.abs()).div_(block_sizes(matrix, blocks, granularity)).to(matrix.dtype)


def binary_scale(matrix: Tensor, blocks: Tensor, granularity: Granularity) -> Tensor:
    """Return the scale of a binary weight as it is stored."""
    return stored_scale(mean_magnitude(matrix, blocks, granularity), granularity)


def within_range(
    matrix: Tensor, bits: int, granularity: Granularity, symmetric: bool, share: Tensor | None = None
) -> Tensor | None:
    """Return where `quantize` rounds a weight and does not clip it; None where it does nothing (0 bits)."""
    if bits == 0:
        return None
    if bits == 1:
        return within_scale(matrix, granularity)
    blocks = to_blocks(matrix, granularity)
    scale, zero_point = affine(blocks, bits, granularity, symmetric, share)
    codes = (blocks / scale).round_()
    low, high = code_range(bits, zero_point is None)
    codes = codes if zero_point is None else codes.add_(zero_point)
    return from_blocks((codes >= low) & (codes <= high), matrix)


def damping_gradient(matrix: Tensor, rounded: Tensor, inside: Tensor, factor: float) -> Tensor:
    """Return the gradient of `factor * |rounded - clip(w)|^2` by w, with `rounded` held."""
    return (matrix - rounded).mul_(inside).mul_(2 * factor)


def within(blocks: Tensor, bits: int, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return where a weight lies between the smallest and the largest value of its block's grid."""
    if bits == 1:
        return blocks.abs() <= scale
    low, high = code_range(bits, zero_point is None)
    zero = 0 if zero_point is None else zero_point
    return (blocks >= (low - zero) * scale) & (blocks <= (high - zero) * scale)


def within_scale(matrix: Tensor, granularity: Granularity) -> Tensor:
    """Return where a weight is within twice its block's mean magnitude: the range of a binary or ternary weight."""
    blocks = to_blocks(matrix, granularity)
    return from_blocks(blocks.abs() <= 2 * mean_magnitude(matrix, blocks, granularity), matrix)
