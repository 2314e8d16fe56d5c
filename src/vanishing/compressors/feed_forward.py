"""Narrow feed-forward blocks, which start from the units of the original that count most."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from vanishing.calibration import MeanObserver, Observer
from vanishing.compressors.base import BlockCompressor
from vanishing.errors import ConfigError
from vanishing.structure import Group, Unit, cut, find_groups

_DAMPING = 1e-3
"""Share of the mean of the diagonal that is added to it."""


@dataclass(frozen=True, kw_only=True)
class NarrowFeedForward(BlockCompressor):
    """Replace a feed-forward block by one of the same kind with fewer hidden units and weights of its own.

    It starts from the units with the largest weights. With `calibrated=True` those are taken that carry most of the
    output for the calibration batches, and the last layer is fitted to the original's output by least squares, as in
    ThiNet (arXiv 1707.06342, section 3.2.3). `WidthPruning` takes units out of the original's own weights instead, at
    the cost of one form; here both forms run and learn apart.

    Known are blocks of linear layers with the names that transformers, timm and PyTorch use. What else is in a block
    (the attention of a BERT layer, a normalization) is shared with the original.

    Args:
        ratio: the share of the hidden units that is kept, in (0, 1); at least one.
        calibrated: whether to choose and fit them with the batches of `prepare(calibration=...)`.

    Raises:
        ConfigError: the ratio is out of range.
    """

    ratio: Annotated[float, Field(gt=0, lt=1, description="the share of the hidden units that is kept, in (0, 1)")]
    calibrated: bool = False

    def refusal(self, block: nn.Module) -> str | None:
        return "it is no feed-forward block of a kind that is known" if _group_of(block) is None else None

    def build(self, block: nn.Module) -> nn.Module:
        group = _group_of(block)
        if group is None:
            raise ConfigError(f"NarrowFeedForward cannot replace a {type(block).__name__}: {self.refusal(block)}.")
        narrow = _own_feed_forward(block, group)
        copied = _group_of(narrow)
        assert copied is not None
        cut(copied, self._largest(group.norms()))
        return narrow

    def observer(self, block: nn.Module) -> Observer | None:
        return HiddenUnits(block) if self.calibrated else None

    @torch.no_grad()
    def calibrate(self, replacement: nn.Module, observer: Observer) -> None:
        assert isinstance(observer, HiddenUnits)
        group, narrow = observer.group, _group_of(replacement)
        assert narrow is not None
        moments = observer.moments
        weight = group.taker.layer.get_parameter("weight").to(moments.dtype)
        kept = self._largest(moments.diagonal() * weight.square().sum(0))
        for old, new in zip(group.makers, narrow.makers, strict=True):
            for name in ("weight", "bias"):
                if new.layer._parameters[name] is not None:
                    new.layer.get_parameter(name).copy_(old.layer.get_parameter(name)[kept])
        among = moments[kept][:, kept]
        among.diagonal().add_(_DAMPING * moments.diagonal().mean())
        narrow.taker.layer.get_parameter("weight").copy_(torch.linalg.solve(among, moments[kept] @ weight.T).T)

    def _largest(self, scores: Tensor) -> Tensor:
        return scores.topk(max(1, round(self.ratio * len(scores)))).indices.sort().values


class HiddenUnits(MeanObserver):
    """The second moments of the hidden units of a feed-forward block.

    Args:
        block: the block.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        group = _group_of(block)
        assert group is not None
        self.group = group
        self._block = block

    @property
    def moments(self) -> Tensor:
        """The mean of `h h^T` over all positions, (units, units)."""
        mean = self.mean
        assert mean is not None
        return mean

    def observe(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        handle = self.group.taker.layer.register_forward_pre_hook(self._look)
        try:
            # The module's own forward, without the hook by which this is called.
            self._block.forward(*arguments, **keywords)
        finally:
            handle.remove()

    def _look(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        units = inputs[0].flatten(0, -2)
        # Sums over many positions lose too much in less.
        units = units.to(torch.float64 if units.device.type != "mps" else torch.float32)
        self._add(units.T @ units, len(units))


def _group_of(block: nn.Module) -> Group | None:
    """The feed-forward that a module is, with all that is in it; None if it is none."""
    return next((group for group in find_groups(block, Unit.WIDTH) if group.owner is block), None)


def _own_feed_forward(block: nn.Module, group: Group) -> nn.Module:
    """A copy of a block with layers of the feed-forward of its own; all other modules are shared."""
    own = [part.name for part in group.parts]
    memo: dict[int, Any] = {}
    for name, module in block.named_modules():
        if name and not any(part == name or part.startswith(f"{name}.") for part in own):
            memo[id(module)] = module
            continue
        # Settings, which all layers share.
        own_things = (nn.Module, Tensor, dict)
        memo |= {id(v): v for v in vars(module).values() if hasattr(v, "__dict__") and not isinstance(v, own_things)}
    return copy.deepcopy(block, memo)
