"""Several techniques, one after the other, on the same weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from vanishing.compressors.base import CompressedWeight, LayerView, Moment, ProjectedWeight, WeightCompressor
from vanishing.compressors.low_rank import LowRank, LowRankWeight
from vanishing.errors import ConfigError
from vanishing.layers.base import LayerKind, Layout
from vanishing.receipt import Grid


@dataclass(frozen=True)
class Chain(WeightCompressor):
    """Techniques applied in turn, as made by `MagnitudePruning(0.5) | Quantization(bits=4)`.

    Low rank comes first (what follows acts on its factors), then pruning, then quantization. Pruned weights stay zero
    under every quantizer that has a zero.

    Args:
        compressors: the techniques in their order; chains in it are flattened.

    Raises:
        ConfigError: an order that cannot work, or fewer than two techniques.
    """

    compressors: tuple[WeightCompressor, ...]

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.compressors))

    @property
    def ramps(self) -> bool:
        return all(c.ramps for c in self.compressors)

    @property
    def replaces_layer(self) -> bool:
        return any(c.replaces_layer for c in self.compressors)

    def check(self) -> None:
        parts = tuple(p for c in self.compressors for p in (c.compressors if isinstance(c, Chain) else (c,)))
        object.__setattr__(self, "compressors", parts)
        if len(parts) < 2:
            raise ConfigError("Chain takes at least two techniques; use the one alone.")
        for before, after in zip(parts, parts[1:], strict=False):
            if before.stage >= after.stage:
                raise ConfigError(
                    f"{type(before).__name__} | {type(after).__name__}: each technique of a chain must follow another "
                    f"kind, in the order low rank, pruning, quantization. Change the order or drop one."
                )

    def refusal(self, kind: LayerKind) -> str | None:
        return next((reason for c in self.compressors if (reason := c.refusal(kind))), None)

    def problem(self, layer: LayerView) -> str | None:
        return next((reason for c in self.compressors if (reason := c.problem(layer))), None)

    def form(self, layer: LayerView, *, ramped: bool) -> CompressedWeight:
        first, rest = self.compressors[0], self._rest()
        if not isinstance(first, LowRank):
            parts = [cast(ProjectedWeight, c.form(layer, ramped=ramped)) for c in self.compressors]
            return ChainedWeight(layer.layout, parts)
        form = LowRankWeight(first, layer, ramped=ramped)
        form.compress_factors(rest, layer)
        return form

    def update(self, forms: Sequence[CompressedWeight], weights: Sequence[Tensor], moment: Moment) -> None:
        first, rest = self.compressors[0], self._rest()
        if isinstance(first, LowRank):
            factors = [pair for form in forms for pair in cast(LowRankWeight, form).factor_blends()]
            first.update(forms, weights, moment)
            rest.update([blend.form for blend, _ in factors], [weight for _, weight in factors], moment)
            return
        # Only a mask is kept between steps, and the mask comes first: it is selected on the latent weight.
        first.update([cast(ProjectedWeight, cast(ChainedWeight, f).parts[0]) for f in forms], weights, moment)

    def _rest(self) -> WeightCompressor:
        rest = self.compressors[1:]
        return rest[0] if len(rest) == 1 else Chain(compressors=rest)


class ChainedWeight(ProjectedWeight):
    """Projections in turn; each sees what the one before left."""

    def __init__(self, layout: Layout, parts: Sequence[ProjectedWeight]) -> None:
        super().__init__(layout)
        self.parts = nn.ModuleList(parts)

    def project(self, matrix: Tensor) -> Tensor:
        for part in self._projections():
            matrix = part.project(matrix)
        return matrix

    def inside(self, matrix: Tensor) -> Tensor | None:
        result: Tensor | None = None
        for part in self._projections():
            passed = part.inside(matrix)
            if passed is not None:
                result = passed if result is None else result & passed
            matrix = part.project(matrix)
        return result

    def matrix_grid(self, matrix: Tensor) -> Grid | None:
        *before, last = self._projections()
        for part in before:
            matrix = part.project(matrix)
        return last.matrix_grid(matrix)

    def _projections(self) -> list[ProjectedWeight]:
        return [cast(ProjectedWeight, part) for part in self.parts]
