"""Several techniques, one after the other, on the same weight."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vanishing.calibration import Observer
from vanishing.compressors.activation_quantization import ActivationQuantization, QuantizedInputWeight
from vanishing.compressors.base import CompressedWeight, LayerView, Moment, ProjectedWeight, WeightCompressor
from vanishing.compressors.binary import Binary, SignsOfKept
from vanishing.compressors.low_rank import LowRank, LowRankWeight, layer_view
from vanishing.compressors.magnitude_pruning import MagnitudePruning, Score
from vanishing.compressors.quantization import Quantization
from vanishing.compressors.structured import StructuredPruning
from vanishing.distributed import whole
from vanishing.errors import ConfigError
from vanishing.layers.base import LayerKind, Layout
from vanishing.receipt import Grid


@dataclass(frozen=True)
class Chain(WeightCompressor):
    """Techniques applied in turn, as made by `MagnitudePruning(0.5) | Quantization(bits=4)`.

    Low rank comes first (what follows acts on its factors), then pruning, then quantization, then that of activations.
    Pruned weights stay zero under every quantizer; one bit is the sign of a weight that is kept, times the mean
    magnitude of those that are.

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
        # What acts on the factors would lose its groups, or its count of zeros, with every component that is dropped.
        return all(c.ramps for c in self.compressors) and not self.replaces_layer

    @property
    def replaces_layer(self) -> bool:
        return any(c.replaces_layer for c in self.compressors)

    @property
    def quantizes_input(self) -> bool:
        return self._on_input is not None

    @property
    def _on_input(self) -> ActivationQuantization | None:
        last = self.compressors[-1]
        return last if isinstance(last, ActivationQuantization) else None

    @property
    def _on_weight(self) -> WeightCompressor:
        """All but what acts on the input."""
        parts = self.compressors if self._on_input is None else self.compressors[:-1]
        return parts[0] if len(parts) == 1 else Chain(compressors=parts)

    def check(self) -> None:
        parts = tuple(p for c in self.compressors for p in (c.compressors if isinstance(c, Chain) else (c,)))
        object.__setattr__(self, "compressors", parts)
        if len(parts) < 2:
            raise ConfigError("Chain takes at least two techniques; use the one alone.")
        if any(isinstance(part, StructuredPruning) for part in parts):
            raise ConfigError(
                "a chain acts on one weight, and units are taken out of several. Finish that, then prepare another one."
            )
        for before, after in itertools.pairwise(parts):
            if before.stage >= after.stage:
                raise ConfigError(
                    f"{type(before).__name__} | {type(after).__name__}: each technique of a chain must follow another "
                    f"kind, in the order low rank, pruning, quantization, activation quantization. Change the order or "
                    f"drop one."
                )
        if self.replaces_layer and self.quantizes_input:
            raise ConfigError(
                "after LowRank there are two layers, with inputs that are not known yet. Finish that, then prepare "
                "ActivationQuantization for those two."
            )
        if any(isinstance(part, MagnitudePruning) and part.score is not Score.MAGNITUDE for part in parts[1:]):
            raise ConfigError(
                "after LowRank, pruning acts on its factors, of which calibration batches tell nothing. Use "
                "Score.MAGNITUDE."
            )
        if any(isinstance(part, Quantization) and part.weighted for part in parts[1:]):
            raise ConfigError(
                "Quantization(weighted=True) looks at the inputs of a layer as it is. After another technique use "
                "weighted=False."
            )

    def refusal(self, kind: LayerKind) -> str | None:
        return next((reason for c in self.compressors if (reason := c.refusal(kind))), None)

    def problem(self, layer: LayerView) -> str | None:
        first = self.compressors[0]
        if not isinstance(first, LowRank):
            return next((reason for c in self.compressors if (reason := c.problem(layer))), None)
        reason = first.problem(layer)
        if reason:
            return reason
        factors = first.factors(layer, first.ranks_of(layer)).thin_layers().values()
        reasons = (self._rest().problem(layer_view(thin, "weight")) for thin in factors)
        return next((f"of one of its factors: {reason}" for reason in reasons if reason), None)

    def observer(self, layer: LayerView) -> Observer | None:
        if self._on_input is None:
            return self.compressors[0].observer(layer)
        both = self._on_weight.observer(layer), self._on_input.observer(layer)
        return _Observers(*both) if any(both) else None

    def form(self, layer: LayerView, *, ramped: bool) -> CompressedWeight:
        if self._on_input is not None:
            for_weight, for_input = _views(layer)
            return self._on_input.form_around(self._on_weight.form(for_weight, ramped=ramped), for_input)
        first, rest = self.compressors[0], self._rest()
        if not isinstance(first, LowRank):
            parts = [
                first.form(layer, ramped=ramped),
                *(_form_after_another(c, layer, ramped) for c in self.compressors[1:]),
            ]
            return ChainedWeight(layer.layout, [cast(ProjectedWeight, part) for part in parts])
        return LowRankWeight(first, layer, ramped=ramped, on_factors=functools.partial(_as_one, rest))

    def forms_in_turn(self, layer: LayerView, *, ramped: bool) -> list[CompressedWeight]:
        """Return the forms of which each acts on what the one before gives, so that each can fade by itself.

        After low rank there is one: the others are on its factors.
        """
        if self._on_input is not None:
            for_weight, for_input = _views(layer)
            forms = _in_turn(self._on_weight, for_weight, ramped=ramped)
            return [*forms, self._on_input.form_around(None, for_input)]
        first, rest = self.compressors[0], self._rest()
        if isinstance(first, LowRank):
            return [LowRankWeight(first, layer, ramped=ramped, on_factors=functools.partial(_in_turn, rest))]
        others = [_form_after_another(c, layer, ramped) for c in self.compressors[1:]]
        return [first.form(layer, ramped=ramped), *(KeepingZeros(cast(ProjectedWeight, each)) for each in others)]

    def update(self, forms: Sequence[CompressedWeight], weights: Sequence[Tensor], moment: Moment) -> None:
        if self._on_input is not None:
            inner = [cast(QuantizedInputWeight, form).weights for form in forms]
            self._on_weight.update(cast(list[CompressedWeight], inner), weights, moment)
            return
        first, rest = self.compressors[0], self._rest()
        if isinstance(first, LowRank):
            pairs = zip(cast(Sequence[LowRankWeight], forms), moment.left, strict=True)
            factors = [(*pair, left) for form, left in pairs for pair in form.factor_blends().values()]
            first.update(forms, weights, moment)
            on_factors = dataclasses.replace(moment, left=tuple(left for *_, left in factors))
            rest.update([blend.form for (blend, *_), *_ in factors], [weight for _, weight, _ in factors], on_factors)
            return
        # A mask comes first: it is selected on the latent weight. Of the others only the last keeps something.
        chained = cast(Sequence[ChainedWeight], forms)
        first.update([form.part(0) for form in chained], weights, moment)
        seen = [functools.partial(form.before_last, weight) for form, weight in zip(chained, weights, strict=True)]
        self.compressors[-1].update_after_another([form.part(-1) for form in chained], seen, moment)

    def _rest(self) -> WeightCompressor:
        rest = self.compressors[1:]
        return rest[0] if len(rest) == 1 else Chain(compressors=rest)


def _form_after_another(compressor: WeightCompressor, layer: LayerView, ramped: bool) -> CompressedWeight:
    if isinstance(compressor, Binary) or (isinstance(compressor, Quantization) and compressor.bits == 1):
        return SignsOfKept(compressor, layer.layout)
    return compressor.form(layer, ramped=ramped)


def _as_one(compressor: WeightCompressor, layer: LayerView, *, ramped: bool = False) -> list[CompressedWeight]:
    return [compressor.form(layer, ramped=ramped)]


def _in_turn(compressor: WeightCompressor, layer: LayerView, *, ramped: bool = False) -> list[CompressedWeight]:
    if isinstance(compressor, Chain):
        return compressor.forms_in_turn(layer, ramped=ramped)
    return _as_one(compressor, layer, ramped=ramped)


class KeepingZeros(ProjectedWeight):
    """A projection that leaves zeros as they are, also where a quantizer or a codebook has no zero.

    Args:
        part: the projection.
    """

    def __init__(self, part: ProjectedWeight) -> None:
        super().__init__(part.layout)
        self.part = part

    def project(self, matrix: Tensor) -> Tensor:
        return self.part.project(matrix).mul_(matrix.ne(0).to(matrix.dtype))

    def inside(self, matrix: Tensor) -> Tensor | None:
        return self.part.inside(matrix)

    @property
    def pulls(self) -> bool:
        return self.part.pulls

    def matrix_pull(self, matrix: Tensor) -> Tensor | None:
        pulled = self.part.matrix_pull(matrix)
        return None if pulled is None else pulled.mul_(matrix.ne(0))

    def matrix_grid(self, matrix: Tensor) -> Grid | None:
        return self.part.matrix_grid(matrix)


def _views(layer: LayerView) -> tuple[LayerView, LayerView]:
    """A layer for the technique on its weight, and for that on its input, each with what its own observer saw."""
    both = layer.observed if isinstance(layer.observed, _Observers) else _Observers(None, None)
    return dataclasses.replace(layer, observed=both.weight), dataclasses.replace(layer, observed=both.input)


class _Observers(Observer):
    """What looks at a layer for the technique on its weight, and for that on its input."""

    def __init__(self, weight: Observer | None, input: Observer | None) -> None:
        self.weight = weight
        self.input = input
        self.needs_gradients = any(each.needs_gradients for each in self._all)  # type: ignore[misc]

    @property
    def _all(self) -> list[Observer]:
        return [each for each in (self.weight, self.input) if each is not None]

    @property
    def saw_nothing(self) -> bool:
        return any(each.saw_nothing for each in self._all)

    def observe(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        for each in self._all:
            each.observe(arguments, keywords)

    def observe_gradients(self) -> None:
        for each in self._all:
            if each.needs_gradients:
                each.observe_gradients()


class ChainedWeight(ProjectedWeight):
    """Projections in turn; each sees what the one before left, and what the first one set to zero stays zero."""

    def __init__(self, layout: Layout, parts: Sequence[ProjectedWeight]) -> None:
        super().__init__(layout)
        self.parts = nn.ModuleList(parts)

    def project(self, matrix: Tensor) -> Tensor:
        first, *rest = self._projections()
        result = masked = first.project(matrix)
        for part in rest:
            result = part.project(result)
        # What was pruned stays zero, also where a quantizer or a codebook has no zero.
        return result.mul_(masked.ne_(0))

    def inside(self, matrix: Tensor) -> Tensor | None:
        result: Tensor | None = None
        for part in self._projections():
            passed = part.inside(matrix)
            if passed is not None:
                result = passed if result is None else _both(result, passed)
            matrix = part.project(matrix)
        return result

    @property
    def pulls(self) -> bool:
        return any(part.pulls for part in self._projections())

    def matrix_pull(self, matrix: Tensor) -> Tensor | None:
        first, *rest = self._projections()
        result, masked = first.matrix_pull(matrix), first.project(matrix)
        inner = masked
        for part in rest:
            pulled = part.matrix_pull(inner)
            if pulled is not None:
                # What was pruned stays zero, which nothing is rounded to.
                pulled.mul_(masked.ne(0))
                result = pulled if result is None else result.add_(pulled)
            inner = part.project(inner)
        return result

    def matrix_grid(self, matrix: Tensor) -> Grid | None:
        return self.part(-1).matrix_grid(self._before_last(matrix))

    def part(self, number: int) -> ProjectedWeight:
        """Return one of the projections."""
        return self._projections()[number]

    def before_last(self, weight: Tensor) -> Tensor:
        """Return the weight that the last projection sees."""
        return self.layout.from_matrix(self._before_last(self.layout.to_matrix(whole(weight))))

    def _before_last(self, matrix: Tensor) -> Tensor:
        for part in self._projections()[:-1]:
            matrix = part.project(matrix)
        return matrix

    def _projections(self) -> list[ProjectedWeight]:
        return [cast(ProjectedWeight, part) for part in self.parts]


def _both(first: Tensor, second: Tensor) -> Tensor:
    """What passes two gates, each a boolean matrix or one of shares."""
    return first & second if first.dtype is second.dtype is torch.bool else first * second
