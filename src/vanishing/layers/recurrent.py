"""Recurrent layers and cells: the gates' input and hidden matrices."""

from __future__ import annotations

from torch import Tensor, nn

from vanishing.layers.base import LayerKind, Layout, register_kind, row_layout


@register_kind
class RecurrentKind(LayerKind):
    name = "Recurrent"
    why_not_factored = (
        "a recurrent layer multiplies with its gates' weights itself, so two layers cannot take its place"
    )

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.RNNBase, nn.RNNCellBase))

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        if isinstance(module, nn.RNNBase):
            return tuple(name for names in module._all_weights for name in names if name.startswith("weight"))
        return ("weight_ih", "weight_hh")

    def layout(self, module: nn.Module, shape: tuple[int, ...]) -> Layout:
        return row_layout(shape)

    def positions(self, module: nn.Module, input: Tensor, output: Tensor) -> int:
        return input.numel() // input.shape[-1]
