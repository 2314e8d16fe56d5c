"""Magnitude pruning: the smallest weights become zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from vanishing.calibration import GradientMagnitudes, InputMoments, Observer
from vanishing.compressors.base import (
    CompressedWeight,
    Gradient,
    LayerView,
    Moment,
    ProjectedWeight,
    WeightCompressor,
    check_gradient,
)
from vanishing.compressors.selection import keep_largest
from vanishing.distributed import whole
from vanishing.errors import ConfigError
from vanishing.granularity import NM, Global, PerChannel, PerTensor
from vanishing.layers.base import LayerKind
from vanishing.receipt import Grid


class Score(Enum):
    """By what a weight stays or goes."""

    MAGNITUDE = "magnitude"
    """`|w|`."""
    WANDA = "wanda"
    """`|w| * |x|`, with the norm of the input that it is multiplied with (Sun et al., arXiv 2306.11695, equation 1)."""
    FIRST_ORDER = "first order"
    """`|w| * |g|`, with the mean magnitude of its gradient over calibration batches: the change of the loss to first
    order (Molchanov et al., arXiv 1906.10771, take the same product over units)."""


@dataclass(frozen=True)
class MagnitudePruning(WeightCompressor):
    """Keep the weights of largest magnitude and set the rest to zero (Han et al., arXiv 1506.02626).

    The share of zeros that comes out is exact to one weight in each tensor, row or group, whatever the ties.

    Args:
        sparsity: share of weights that become zero, in [0, 1]; omitted with `NM`, which implies it.
        granularity: what competes with what: `PerTensor()` (a layer), `PerChannel()` (an output channel), `Global()`
            (all layers that the rule matches) or `NM(n, m)`.
        gradient: `Gradient.STRAIGHT_THROUGH`, by which a pruned weight can grow back, `Gradient.EXACT`, or
            `Gradient.DECAYING` from the first to the second.
        decay: the factor lambda by which pruned weights are drawn to zero, so that they do not come and go (SR-STE,
            Zhou et al., arXiv 2102.04010, where it is 2e-4): before each optimizer step `(1 - beta) * lambda * w` is
            added to the gradient of a pruned weight; 0 for none.
        freeze: whether the mask stays as it is once the fade is over; otherwise it is selected anew throughout.
        score: `Score.MAGNITUDE`, or `Score.WANDA` or `Score.FIRST_ORDER`, which need `prepare(calibration=...)`. What
            the batches tell is kept; the magnitudes are always those of the weights as they are now.
        update_every: optimizer steps between two selections of a layer; layers take turns. On a GPU a selection waits
            for the device, and every few steps are enough.

    Raises:
        ConfigError: a value is out of range, or sparsity and granularity contradict each other.
    """

    sparsity: Annotated[
        float | None, Field(ge=0, le=1, description="the share of weights that become zero, in [0, 1]")
    ] = None
    _: KW_ONLY
    granularity: PerTensor | PerChannel | Global | NM = PerTensor()
    gradient: Gradient = Gradient.STRAIGHT_THROUGH
    decay: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="a factor of the pruned weights, at least 0")
    ] = 0.0
    freeze: bool = False
    score: Score = Score.MAGNITUDE
    update_every: Annotated[int, Field(ge=1, description="a number of optimizer steps, at least 1")] = 2

    stage: ClassVar[int] = 1

    @property
    def ramps(self) -> bool:
        return True

    def check(self) -> None:
        if isinstance(self.granularity, NM):
            implied = 1 - self.granularity.n / self.granularity.m
            if self.sparsity is not None and self.sparsity != implied:
                raise ConfigError(
                    f"MagnitudePruning(sparsity={self.sparsity}, granularity={self.granularity!r}): "
                    f"this granularity means a sparsity of {implied:g}. Leave sparsity out."
                )
        elif self.sparsity is None:
            raise ConfigError("MagnitudePruning(): sparsity is missing. Give the share of zeros, as in sparsity=0.9.")
        check_gradient(self, self.gradient, (Gradient.EXACT, Gradient.DECAYING, Gradient.STRAIGHT_THROUGH))

    def refusal(self, kind: LayerKind) -> str | None:
        if self.score is Score.WANDA and not kind.multiplies_rows:
            return f"what a {kind.name} multiplies its weight with cannot be observed. Use Score.MAGNITUDE for it"
        return None

    def observer(self, layer: LayerView) -> Observer | None:
        if self.score is Score.WANDA:
            return InputMoments(layer.module, layer.kind, full=False)
        return GradientMagnitudes(layer.weight) if self.score is Score.FIRST_ORDER else None

    def problem(self, layer: LayerView) -> str | None:
        if isinstance(self.granularity, NM) and layer.columns % self.granularity.m:
            return (
                f"its fan-in of {layer.columns} is not a multiple of m = {self.granularity.m}. Add the layer to ignore"
            )
        return None

    def form(self, layer: LayerView, *, ramped: bool) -> CompressedWeight:
        return MaskedWeight(self, layer)

    def update(self, forms: Sequence[CompressedWeight], weights: Sequence[Tensor], moment: Moment) -> None:
        masked = cast(Sequence[MaskedWeight], forms)
        for form, left in zip(masked, moment.left, strict=True):
            if form.left is not None:
                form.left.fill_(left)
        if self.freeze and moment.settled and moment.was_settled:
            return
        if isinstance(self.granularity, Global):
            if moment.arriving or moment.step % self.update_every == 0:
                self._select_together(masked, weights)
            return
        for turn, (form, weight) in enumerate(zip(masked, weights, strict=True)):
            if moment.arriving or (moment.step + turn) % self.update_every == 0:
                self._select(form, weight)

    def _select(self, form: MaskedWeight, weight: Tensor) -> None:
        magnitude = form.scores(weight)
        if isinstance(self.granularity, PerTensor):
            keep = kept(magnitude.numel(), form.strength * (self.sparsity or 0.0))
            (mask,), form.border = keep_largest([magnitude], keep, form.border)
            form.mask.copy_(mask)
            return
        if isinstance(self.granularity, NM):
            n, m = self.granularity.n, self.granularity.m
            magnitude, keep = magnitude.reshape(-1, m), m - round(form.strength * (m - n))
        else:
            keep = kept(magnitude.shape[1], form.strength * (self.sparsity or 0.0))
        chosen = magnitude.topk(keep, dim=1, sorted=False).indices
        mask = torch.zeros_like(magnitude, dtype=torch.bool).scatter_(1, chosen, True)
        form.mask.copy_(mask.reshape(form.mask.shape))

    def _select_together(self, forms: Sequence[MaskedWeight], weights: Sequence[Tensor]) -> None:
        magnitudes = [form.scores(weight) for form, weight in zip(forms, weights, strict=True)]
        keep = kept(sum(m.numel() for m in magnitudes), forms[0].strength * (self.sparsity or 0.0))
        masks, border = keep_largest(magnitudes, keep, forms[0].border)
        for form, mask in zip(forms, masks, strict=True):
            form.mask.copy_(mask)
            form.border = border


def kept(count: int, sparsity: float) -> int:
    """Return how many of `count` weights stay at a sparsity, to the nearest weight."""
    return count - round(count * sparsity)


class MaskedWeight(ProjectedWeight):
    """A weight times its mask; the mask is a buffer and is saved with the model's state."""

    mask: Tensor
    importance: Tensor | None
    left: Tensor | None
    """How much of fade and ramp is left, for a gradient that decays; a tensor, so that no graph is compiled anew."""

    def __init__(self, compressor: MagnitudePruning, layer: LayerView) -> None:
        super().__init__(layer.layout)
        self.compressor = compressor
        shape = (layer.layout.rows, layer.columns)
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool, device=layer.weight.device))
        self.border: float | None = None
        # (1, rows, columns), or (groups, 1, columns) where all rows of a group have the same inputs.
        self.register_buffer("importance", _importance(layer))
        decays = compressor.gradient is Gradient.DECAYING
        self.register_buffer("left", torch.ones((), device=layer.weight.device) if decays else None)

    def scores(self, weight: Tensor) -> Tensor:
        """Return what a selection compares, (rows, columns)."""
        magnitude = self.layout.to_matrix(whole(weight)).abs()
        if self.importance is None:
            return magnitude
        return magnitude.reshape(len(self.importance), -1, magnitude.shape[1]).mul(self.importance).flatten(0, 1)

    def project(self, matrix: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # The compiler's code for the view of the mask is several times slower on a CPU.
            return matrix * self.mask
        # Converted first: an operation on two types is several times slower on a CPU.
        return self.mask.view(torch.uint8).to(matrix.dtype).mul_(matrix)

    def inside(self, matrix: Tensor) -> Tensor | None:
        # A weight under a frozen mask will never count again: its gradient would only swell the gradient's norm.
        if self._frozen or self.compressor.gradient is Gradient.EXACT:
            return self.mask
        if self.left is None:
            return None
        return torch.where(self.mask, 1.0, self.left.to(matrix.dtype))

    @property
    def pulls(self) -> bool:
        return self.compressor.decay > 0 and not self._frozen

    def matrix_pull(self, matrix: Tensor) -> Tensor | None:
        if not self.pulls:
            return None
        return matrix.masked_fill(self.mask, 0.0).mul_(self.compressor.decay)

    def matrix_grid(self, matrix: Tensor) -> Grid | None:
        return None

    @property
    def _frozen(self) -> bool:
        return self.compressor.freeze and self.settled


def _importance(layer: LayerView) -> Tensor | None:
    """What calibration batches say about the weights of a layer; None without them."""
    observed = layer.observed
    if isinstance(observed, InputMoments):
        return observed.moments.sqrt()[:, None].to(layer.weight.dtype)
    if isinstance(observed, GradientMagnitudes):
        return layer.layout.to_matrix(observed.magnitudes)[None].to(layer.weight.dtype)
    return None
