"""Structured pruning: whole heads, hidden units and channels vanish, and the layers are smaller afterwards."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vanishing.calibration import GradientMagnitudes, InputMoments, Observer
from vanishing.compressors.base import Beta, CompressedWeight, LayerView, WeightCompressor
from vanishing.receipt import Grid
from vanishing.structure import Unit


class Importance(Enum):
    """By what a unit stays or goes."""

    MAGNITUDE = "magnitude"
    """The norm of the weights that take it up, times that of the weights that make it."""
    ACTIVATION = "activation"
    """The norm of what it passes on, over calibration batches: of the inputs that weights are multiplied with."""
    FIRST_ORDER = "first order"
    """`|w| * |g|`, summed over the weights that take it up, with the mean magnitude of the gradients over calibration
    batches: the change of the loss to first order (Molchanov et al., arXiv 1906.10771)."""


@dataclass(frozen=True)
class StructuredPruning(WeightCompressor):
    """Take units out of a network as a whole.

    Original and compressed form differ in the units that the next layer takes up, so the blend `beta f(x) +
    (1 - beta) g(x)` is that layer with the columns of the vanishing units times beta: a step costs what the original's
    costs. `finish` cuts the units out of all layers, which are smaller and faster then on any backend.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1, description="the share of units that vanish, in [0, 1)")]
    _: KW_ONLY
    importance: Importance = Importance.MAGNITUDE

    stage: ClassVar[int] = 0

    def observer(self, layer: LayerView) -> Observer | None:
        if self.importance is Importance.ACTIVATION:
            return InputMoments(layer.module, layer.kind, full=False)
        return GradientMagnitudes(layer.weight) if self.importance is Importance.FIRST_ORDER else None

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
        return TakenUnits(_scores(layer), self.units_kept(layer.group.count))


@dataclass(frozen=True)
class HeadPruning(StructuredPruning):
    """Take heads out of attentions, the least important ones (Michel et al., arXiv 1905.10650, prune heads so).

    A rule matches the layer that takes the heads up, the output projection; queries, keys and values are cut along
    with it. With grouped queries a head of keys and values goes with all queries that read it, and caches hold fewer
    heads. Known are attentions of linear layers with the names that transformers and timm use.

    Args:
        sparsity: share of the heads that vanish, in [0, 1); at least one stays in every attention.
        importance: by what one stays: `Importance.MAGNITUDE`, or one that needs `prepare(calibration=...)`.

    Raises:
        ConfigError: the share is out of range.
    """

    @property
    def unit(self) -> Unit:
        return Unit.HEAD


@dataclass(frozen=True)
class WidthPruning(StructuredPruning):
    """Take hidden units out of feed-forward blocks, gated ones as well: the least important ones.

    A rule matches the last layer of the block, which takes the hidden units up; the layers before are cut along with
    it. Known are blocks of linear layers with the names that transformers, timm and PyTorch use.

    Args:
        sparsity: share of the hidden units that vanish, in [0, 1); at least one stays in every block.
        importance: by what one stays: `Importance.MAGNITUDE`, or one that needs `prepare(calibration=...)`.

    Raises:
        ConfigError: the share is out of range.
    """

    @property
    def unit(self) -> Unit:
        return Unit.WIDTH


@dataclass(frozen=True)
class ChannelPruning(StructuredPruning):
    """Take out channels that stay inside of a block: the least important ones.

    A rule matches the convolution that takes the channels up; the one that makes them is cut along with it, and so is
    what is between the two: batch normalization with its statistics, depthwise convolutions, and both ends of
    squeeze-and-excitation. So residual blocks keep their outer shapes. A block is the innermost module around several
    convolutions, and is left alone if a copy of it does not compute, with channels cut out, what it computes without
    them.

    Args:
        sparsity: share of the channels that vanish, in [0, 1); at least one stays between two convolutions.
        importance: by what a channel stays: `Importance.MAGNITUDE` (behind batch normalization its scale, as in Liu et
            al., arXiv 1708.06519, times the norm of the weights that take it up), or one that needs
            `prepare(calibration=...)`.

    Raises:
        ConfigError: the share is out of range.
    """

    @property
    def unit(self) -> Unit:
        return Unit.CHANNEL


def _scores(layer: LayerView) -> Tensor:
    """How important each unit is, (count,)."""
    group, observed = layer.group, layer.observed
    assert group is not None
    if group.scores is not None:
        return group.scores
    if isinstance(observed, InputMoments):
        return observed.moments.reshape(group.count, -1).sum(1).sqrt()
    if isinstance(observed, GradientMagnitudes):
        changes = layer.weight.detach().abs() * observed.magnitudes
        return changes.reshape(len(changes), group.count, -1).sum((0, 2))
    return group.norms()


class TakenUnits(CompressedWeight):
    """The weights that take units up, without those of the vanishing ones; which stay is a buffer, chosen once.

    All layers that take the units up share it. Its inputs are the second dimension of a weight.

    Args:
        scores: (units,), how important each one is.
        count: how many stay.
    """

    mask: Tensor

    def __init__(self, scores: Tensor, count: int) -> None:
        super().__init__()
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[scores.topk(count).indices] = True
        self.register_buffer("mask", mask)

    @property
    def kept(self) -> Tensor:
        """The numbers of the units that stay, in rising order."""
        return self.mask.nonzero()[:, 0]

    def compress(self, weight: Tensor) -> Tensor:
        return weight * self._columns(weight)

    def blend(self, weight: Tensor, beta: Beta) -> Tensor:
        # What the compressed form does not have it does not learn: the gradient has the same factor.
        kept = self._columns(weight)
        return weight * (kept + (1 - kept) * beta)

    def grid(self, weight: Tensor) -> Grid | None:
        return None

    def _columns(self, weight: Tensor) -> Tensor:
        """One for the columns of the units that stay, zero for others, of a shape that goes with the weight's."""
        columns = self.mask.repeat_interleave(weight.shape[1] // len(self.mask))
        return columns.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 2))
