"""Mixtures of experts that hold the weights of all experts in three-dimensional parameters."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vanishing.layers.base import LayerKind, Layout, register_kind, row_layout


@register_kind
class ExpertsKind(LayerKind):
    """A module with two or more 3-D parameters of its own that agree on the number of experts.

    The last dimension is taken as the fan-in, whatever the model's own orientation: per channel then means one scale
    for each vector along the last dimension of each expert.
    """

    name = "Experts"
    why_not_factored = "its module multiplies with the experts' weights itself, so two layers cannot take its place"

    def owns(self, module: nn.Module) -> bool:
        return len(self.weight_names(module)) > 0

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        # Learned tokens and positions are 3-D as well, but alone, or with a first dimension of 1.
        own = {n: p for n, p in module._parameters.items() if p is not None and not is_lazy(p)}
        cubes = {n: p for n, p in own.items() if p.dim() == 3 and min(p.shape) > 1}
        experts = Counter(p.shape[0] for p in cubes.values())
        return tuple(name for name, p in cubes.items() if experts[p.shape[0]] >= 2)

    def layout(self, module: nn.Module, shape: tuple[int, ...]) -> Layout:
        return row_layout(shape, row_dimensions=2)

    def positions(self, module: nn.Module, input: Tensor, output: Tensor) -> None:
        # Which experts a token visits is the router's choice.
        return None
