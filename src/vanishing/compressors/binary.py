"""Binary weights: a sign and a scale."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from vanishing.compressors.base import Gradient, ProjectedWeight, ProjectionCompressor
from vanishing.compressors.blocks import from_blocks, stored_scale, to_blocks, total
from vanishing.compressors.quantization import (
    Quantization,
    annealed,
    binary_scale,
    check_quantizer_gradient,
    damping_gradient,
    make_grid,
    quantize,
    within,
    within_range,
)
from vanishing.granularity import PerChannel, PerGroup, PerTensor
from vanishing.layers.base import Layout
from vanishing.receipt import Grid


@dataclass(frozen=True)
class Binary(ProjectionCompressor):
    """Replace each weight by its sign times the mean magnitude around it (XNOR-Net, arXiv 1603.05279, equation 6).

    A ramp anneals the bits from 8 down to 2, and to the sign at its end.

    Args:
        granularity: what shares a scale: `PerTensor()`, `PerChannel()` or `PerGroup(size)`.
        gradient: `Gradient.STRAIGHT_THROUGH`, or `Gradient.CLIPPED`: nothing beyond twice the scale.

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
        return quantize(matrix, annealed(1, strength), self.granularity, symmetric=True)

    def inside(self, matrix: Tensor, strength: float) -> Tensor | None:
        if self.gradient is not Gradient.CLIPPED:
            return None
        return within_range(matrix, annealed(1, strength), self.granularity, symmetric=True)

    def grid(self, matrix: Tensor, layout: Layout) -> Grid:
        scale = binary_scale(matrix, to_blocks(matrix, self.granularity), self.granularity)
        return make_grid(1, scale, None, self.granularity, layout)


class SignsOfKept(ProjectedWeight):
    """What one bit a weight is after pruning: zeros do not count in the scale of the others.

    Args:
        compressor: the binary quantizer.
        layout: how the weight becomes a matrix.
    """

    def __init__(self, compressor: Binary | Quantization, layout: Layout) -> None:
        super().__init__(layout)
        self.compressor = compressor

    def project(self, matrix: Tensor) -> Tensor:
        granularity, bits = self.compressor.granularity, annealed(1, self.strength)
        if bits != 1:
            return quantize(matrix, bits, granularity, symmetric=True)
        blocks = to_blocks(matrix, granularity)
        return from_blocks(torch.copysign(self._scale(blocks), blocks), matrix)

    def inside(self, matrix: Tensor) -> Tensor | None:
        if self.compressor.gradient is not Gradient.CLIPPED:
            return None
        bits = annealed(1, self.strength)
        if bits != 1:
            return within_range(matrix, bits, self.compressor.granularity, symmetric=True)
        blocks = to_blocks(matrix, self.compressor.granularity)
        return from_blocks(blocks.abs() <= 2 * self._scale(blocks), matrix)

    @property
    def pulls(self) -> bool:
        return self.compressor.pulls

    def matrix_pull(self, matrix: Tensor) -> Tensor | None:
        if not isinstance(self.compressor, Quantization) or annealed(1, self.strength) != 1:
            return self.compressor.pull(matrix, self.strength)
        if not self.pulls:
            return None
        blocks = to_blocks(matrix, self.compressor.granularity)
        inside = from_blocks(within(blocks, 1, self._scale(blocks), None), matrix)
        return damping_gradient(matrix, self.project(matrix), inside, self.compressor.damping)

    def matrix_grid(self, matrix: Tensor) -> Grid:
        granularity = self.compressor.granularity
        return make_grid(1, self._scale(to_blocks(matrix, granularity)), None, granularity, self.layout)

    def _scale(self, blocks: Tensor) -> Tensor:
        magnitudes = blocks.abs()
        kept = magnitudes.count_nonzero(-1).unsqueeze(-1).clamp_(min=1)
        return stored_scale(total(magnitudes).div_(kept).to(blocks.dtype), self.compressor.granularity)
