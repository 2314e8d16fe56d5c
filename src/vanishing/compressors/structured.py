"""Structured pruning: whole heads and hidden units vanish, and the layers are smaller afterwards."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vanishing.compressors.base import CompressedWeight, LayerView, ProjectedWeight, WeightCompressor
from vanishing.layers.base import Layout
from vanishing.receipt import Grid
from vanishing.structure import Group, Unit


@dataclass(frozen=True)
class StructuredPruning(WeightCompressor):
    """Take units out of a network as a whole.

    Original and compressed form differ in the units that the next layer takes up, so the blend `beta f(x) +
    (1 - beta) g(x)` is that layer with the columns of the vanishing units times beta: a step costs what the original's
    costs. `finish` cuts the units out of all layers, which are smaller and faster then on any backend.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1, description="the share of units that vanish, in [0, 1)")]

    stage: ClassVar[int] = 0

    @property
    @abstractmethod
    def unit(self) -> Unit:
        """What is taken out."""

    def units_kept(self, count: int) -> int:
        """Return how many of `count` units stay: at least one."""
        return max(1, count - round(count * self.sparsity))

    def problem(self, layer: LayerView) -> str | None:
        assert layer.group is not None
        count = layer.group.count
        if self.sparsity and self.units_kept(count) == count:
            return f"of its {count} {self.unit.value} none would vanish. Raise sparsity, or add it to ignore"
        return None

    def form(self, layer: LayerView, *, ramped: bool) -> CompressedWeight:
        assert layer.group is not None
        return TakenUnits(layer.layout, layer.group, self.units_kept(layer.group.count))


@dataclass(frozen=True)
class HeadPruning(StructuredPruning):
    """Take heads out of attentions, those of the smallest weights (Michel et al., arXiv 1905.10650, prune heads so).

    A rule matches the layer that takes the heads up, the output projection; queries, keys and values are cut along
    with it. With grouped queries a head of keys and values goes with all queries that read it, and caches hold fewer
    heads. Known are attentions of linear layers with the names that transformers and timm use.

    Args:
        sparsity: share of the heads that vanish, in [0, 1); at least one stays in every attention.

    Raises:
        ConfigError: the share is out of range.
    """

    @property
    def unit(self) -> Unit:
        return Unit.HEAD


@dataclass(frozen=True)
class WidthPruning(StructuredPruning):
    """Take hidden units out of feed-forward blocks, gated ones as well, those of the smallest weights.

    A rule matches the last layer of the block, which takes the hidden units up; the layers before are cut along with
    it. Known are blocks of linear layers with the names that transformers, timm and PyTorch use.

    Args:
        sparsity: share of the hidden units that vanish, in [0, 1); at least one stays in every block.

    Raises:
        ConfigError: the share is out of range.
    """

    @property
    def unit(self) -> Unit:
        return Unit.WIDTH


class TakenUnits(ProjectedWeight):
    """A weight whose columns of the vanishing units are zero; which ones stay is a buffer, chosen once.

    Args:
        layout: of the weight.
        group: the layers of the units.
        count: how many units stay.
    """

    mask: Tensor

    def __init__(self, layout: Layout, group: Group, count: int) -> None:
        super().__init__(layout)
        self.size = group.taker.size
        mask = torch.zeros(group.count, dtype=torch.bool, device=group.taker.layer.weight.device)
        mask[group.norms().topk(count).indices] = True
        self.register_buffer("mask", mask)

    @property
    def kept(self) -> Tensor:
        """The numbers of the units that stay, in rising order."""
        return self.mask.nonzero()[:, 0]

    def project(self, matrix: Tensor) -> Tensor:
        return matrix * self._columns().to(matrix.dtype)

    def inside(self, matrix: Tensor) -> Tensor | None:
        # What the compressed form does not have it does not learn.
        return self._columns().expand_as(matrix)

    def matrix_grid(self, matrix: Tensor) -> Grid | None:
        return None

    def _columns(self) -> Tensor:
        return self.mask.repeat_interleave(self.size)
