"""Embeddings: a matrix of one row a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from vanishing.layers.base import Factored, LayerKind, Layout, register_kind, row_layout


@register_kind
class EmbeddingKind(LayerKind):
    name = "Embedding"
    explicit_only = True

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight",)

    def layout(self, module: nn.Module, shape: tuple[int, ...]) -> Layout:
        return row_layout(shape)

    def problem(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "max_norm rescales the weight inside the forward pass. Set max_norm=None"
        if module.sparse:
            return "sparse gradients do not pass through a blended weight. Set sparse=False"
        return None

    def positions(self, module: nn.Module, input: Tensor, output: Tensor) -> int:
        return 0

    def base_forward(self, module: nn.Module) -> Callable[..., Any]:
        return nn.Embedding.forward

    def probe_input(self, module: nn.Module) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return torch.arange(min(weight.shape[0], 8), device=weight.device)

    def factor(self, module: nn.Module, rank: int) -> Factored:
        assert isinstance(module, nn.Embedding)
        tokens, channels = module.weight.shape
        place = {"device": module.weight.device, "dtype": module.weight.dtype}
        padding, frequency = module.padding_idx, module.scale_grad_by_freq
        first = skip_init(nn.Embedding, tokens, rank, padding_idx=padding, scale_grad_by_freq=frequency, **place)
        second = skip_init(nn.Linear, rank, channels, bias=False, **place)
        sizes = {"num_embeddings": tokens, "embedding_dim": channels, "padding_idx": padding}
        return Factored(first, second, layout=row_layout((tokens, channels)), first_has_rows=True, sizes=sizes)
