"""`nn.MultiheadAttention`: its input projections, packed into one weight or separate.

Its output projection is a linear layer of its own, and is matched as one.
"""

from __future__ import annotations

from torch import Tensor, nn

from vanishing.layers.base import LayerKind, Layout, register_kind, row_layout


@register_kind
class MultiheadAttentionKind(LayerKind):
    name = "MultiheadAttention"
    why_not_factored = (
        "nn.MultiheadAttention multiplies with its packed weight itself, so two layers cannot take its place"
    )

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(name for name in names if getattr(module, name) is not None)

    def layout(self, module: nn.Module, shape: tuple[int, ...]) -> Layout:
        return row_layout(shape)

    def positions(self, module: nn.Module, input: Tensor, output: Tensor) -> int:
        return input.numel() // input.shape[-1]
