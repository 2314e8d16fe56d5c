"""Binary weights: a sign and a scale."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from vanishing.compressors.base import Gradient, ProjectionCompressor
from vanishing.compressors.blocks import to_blocks
from vanishing.compressors.quantization import (
    annealed,
    binary_scale,
    check_quantizer_gradient,
    make_grid,
    quantize,
    within_scale,
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
        return within_scale(matrix, self.granularity) if self.gradient is Gradient.CLIPPED else None

    def grid(self, matrix: Tensor, layout: Layout) -> Grid:
        scale = binary_scale(matrix, to_blocks(matrix, self.granularity), self.granularity)
        return make_grid(1, scale, None, self.granularity, layout)
