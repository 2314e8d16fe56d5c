"""Ternary weights: zero, or a sign and a scale."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from vanishing.compressors.base import Gradient, ProjectionCompressor
from vanishing.compressors.blocks import from_blocks, stored_scale, to_blocks, total
from vanishing.compressors.quantization import (
    annealed,
    check_quantizer_gradient,
    make_grid,
    mean_magnitude,
    quantize,
    within_range,
    within_scale,
)
from vanishing.granularity import PerChannel, PerGroup, PerTensor
from vanishing.layers.base import Layout
from vanishing.receipt import Grid

_THRESHOLD = 0.7


@dataclass(frozen=True)
class Ternary(ProjectionCompressor):
    """Replace each weight by -s, 0 or +s (Ternary Weight Networks, arXiv 1605.04711, equations 5 and 6).

    Zero within 0.7 times the mean magnitude; s is the mean magnitude of the rest. A ramp anneals the bits from 8 down
    to 3, and to three values at its end.

    Args:
        granularity: what shares a scale: `PerTensor()`, `PerChannel()` or `PerGroup(size)`.
        gradient: `Gradient.STRAIGHT_THROUGH`, or `Gradient.CLIPPED`: nothing beyond twice the mean magnitude.

    Raises:
        ConfigError: a value is of the wrong type.
    """

    _: KW_ONLY
    granularity: PerTensor | PerChannel | PerGroup = PerChannel()
    gradient: Gradient = Gradient.STRAIGHT_THROUGH

    @property
    def ramps(self) -> bool:
        return True

    def check(self) -> None:
        check_quantizer_gradient(self, self.gradient)

    def project(self, matrix: Tensor, strength: float) -> Tensor:
        if strength < 1.0:
            return quantize(matrix, annealed(2, strength), self.granularity, symmetric=True)
        blocks = to_blocks(matrix, self.granularity)
        kept, scale = self._kept_and_scale(matrix, blocks)
        return from_blocks(torch.copysign(scale, blocks).mul_(kept), matrix)

    def inside(self, matrix: Tensor, strength: float) -> Tensor | None:
        if self.gradient is not Gradient.CLIPPED:
            return None
        if strength < 1.0:
            return within_range(matrix, annealed(2, strength), self.granularity, symmetric=True)
        return within_scale(matrix, self.granularity)

    def grid(self, matrix: Tensor, layout: Layout) -> Grid:
        _, scale = self._kept_and_scale(matrix, to_blocks(matrix, self.granularity))
        return make_grid(2, scale, None, self.granularity, layout)

    def _kept_and_scale(self, matrix: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        magnitude = blocks.abs()
        # Compared in place, the mask stays in the weight's type: mixed types are slow on a CPU.
        threshold = _THRESHOLD * mean_magnitude(matrix, blocks, self.granularity)
        kept = magnitude.clone().gt_(threshold)
        count = total(kept).clamp_(min=1)
        scale = total(magnitude.mul_(kept)).div_(count).to(matrix.dtype)
        return kept, stored_scale(scale, self.granularity)
