"""Scales of quantized weights that are searched for: those of least squared rounding error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vanishing.calibration import InputMoments
from vanishing.compressors.base import LayerView, ProjectedWeight
from vanishing.compressors.blocks import to_blocks, total
from vanishing.receipt import Grid

if TYPE_CHECKING:
    from vanishing.compressors.quantization import Quantization

CANDIDATES = 21
"""Ranges that are tried, evenly spaced from the whole one down."""


class SearchedScale(ProjectedWeight):
    """A quantized weight whose blocks may clip their largest weights; the share of its range that each uses is kept.

    Args:
        compressor: the technique.
        layer: the weight.
    """

    share: Tensor
    importance: Tensor | None

    def __init__(self, compressor: Quantization, layer: LayerView) -> None:
        super().__init__(layer.layout)
        self.compressor = compressor
        blocks = to_blocks(layer.layout.to_matrix(layer.weight.detach()), compressor.granularity)
        self.register_buffer("share", torch.ones_like(blocks[..., :1]))
        observed = layer.observed if compressor.weighted else None
        # (groups, columns): all rows of a group have the same inputs.
        self.register_buffer("importance", observed.moments if isinstance(observed, InputMoments) else None)

    def search(self, weight: Tensor) -> None:
        """Give each block the share by which its weights are rounded with the least error, the largest of equals."""
        matrix = self.layout.to_matrix(weight)
        best = torch.ones_like(self.share)
        least = self._error(matrix, best)
        for number in range(1, CANDIDATES):
            share = torch.full_like(best, 1 - (1 - self.compressor.clip) * number / (CANDIDATES - 1))
            error = self._error(matrix, share)
            best = torch.where(error < least, share, best)
            least = torch.minimum(error, least)
        self.share.copy_(best)

    def project(self, matrix: Tensor) -> Tensor:
        return self.compressor.project(matrix, self.strength, self.share)

    def inside(self, matrix: Tensor) -> Tensor | None:
        return self.compressor.inside(matrix, self.strength, self.share)

    def matrix_grid(self, matrix: Tensor) -> Grid:
        return self.compressor.grid(matrix, self.layout, self.share)

    @property
    def pulls(self) -> bool:
        return self.compressor.pulls

    def matrix_pull(self, matrix: Tensor) -> Tensor | None:
        return self.compressor.pull(matrix, self.strength, self.share)

    def _error(self, matrix: Tensor, share: Tensor) -> Tensor:
        rounded = self.compressor.project(matrix, self.strength, share)
        squares = (rounded - matrix).to(torch.promote_types(matrix.dtype, torch.float32)).square_()
        if self.importance is not None:
            groups, columns = self.importance.shape
            squares = squares.reshape(groups, -1, columns).mul_(self.importance[:, None]).flatten(0, 1)
        return total(to_blocks(squares, self.compressor.granularity))
