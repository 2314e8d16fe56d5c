"""Low rank: a weight becomes the product of two thin ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vanishing.blend import BlendedWeight
from vanishing.compressors.base import Beta, CompressedWeight, LayerView, Moment, WeightCompressor
from vanishing.errors import ConfigError
from vanishing.layers.base import Factored, LayerKind, Layout
from vanishing.receipt import Grid

_SVD_TYPE = torch.float32


@dataclass(frozen=True, kw_only=True)
class LowRank(WeightCompressor):
    """Replace a layer by two plain ones through a truncated singular value decomposition with balanced factors.

    While the original is there the layer runs once, with the weight `beta W + (1 - beta) B A`; once it is gone the two
    thin layers run. Exactly one of the three arguments is given. Under a ramp the rank falls from full to final.

    Args:
        rank: channels between the two layers (in each group of a grouped convolution), at least 1.
        ratio: share of the layer's weights that the two factors may have together, in (0, 1].
        energy: share of the squared singular values that is kept, in (0, 1]; gives each layer its own rank.

    Raises:
        ConfigError: a value is out of range, or not exactly one is given.
    """

    rank: Annotated[int | None, Field(ge=1, description="the channels between the two layers, at least 1")] = None
    ratio: Annotated[float | None, Field(gt=0, le=1, description="the share of weights that is kept, in (0, 1]")] = None
    energy: Annotated[
        float | None, Field(gt=0, le=1, description="the share of squared singular values that is kept, in (0, 1]")
    ] = None

    stage: ClassVar[int] = 0

    @property
    def ramps(self) -> bool:
        return True

    @property
    def replaces_layer(self) -> bool:
        return True

    def check(self) -> None:
        given = [name for name in ("rank", "ratio", "energy") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"LowRank takes exactly one of rank, ratio and energy, got {' and '.join(given) or 'none'}.")

    def refusal(self, kind: LayerKind) -> str | None:
        return kind.why_not_factored

    def problem(self, layer: LayerView) -> str | None:
        highest = full_rank(layer)
        if self.rank is not None and self.rank > highest:
            return f"rank is at most {highest}. Lower it, or add the layer to ignore"
        return None

    def form(self, layer: LayerView, *, ramped: bool) -> CompressedWeight:
        return LowRankWeight(self, layer, ramped=ramped)

    def update(self, forms: Sequence[CompressedWeight], weights: Sequence[Tensor], moment: Moment) -> None:
        for form in cast(Sequence[LowRankWeight], forms):
            form.drop_components()

    def rank_of(self, layer: LayerView, singular_values: Tensor) -> int:
        """Return the rank for a layer.

        Args:
            layer: the weight.
            singular_values: (groups, full rank), falling.
        """
        if self.rank is not None:
            return self.rank
        rows, columns = layer.layout.rows // layer.groups, layer.columns
        if self.ratio is not None:
            rank = int(self.ratio * rows * columns / (rows + columns))
        else:
            assert self.energy is not None
            share = singular_values.double().square().sum(0).cumsum(0)
            rank = int((share < self.energy * share[-1]).sum()) + 1
        return min(max(rank, 1), full_rank(layer))


def full_rank(layer: LayerView) -> int:
    """Return the highest rank of a layer's weight, in each of its groups."""
    return min(layer.layout.rows // layer.groups, layer.columns)


class LowRankWeight(CompressedWeight):
    """Two plain layers whose weights multiply to the compressed weight.

    Args:
        compressor: the technique.
        layer: the weight that the factors start from.
        ramped: whether the factors start at full rank and lose components as the strength grows.
    """

    def __init__(self, compressor: LowRank, layer: LayerView, *, ramped: bool) -> None:
        super().__init__()
        self.layout: Layout = layer.layout
        self.groups = layer.groups
        matrix = layer.layout.to_matrix(layer.weight.detach()).reshape(self.groups, -1, layer.columns)
        u, s, vh = torch.linalg.svd(matrix.to(_SVD_TYPE), full_matrices=False)
        self.final_rank = compressor.rank_of(layer, s)
        self.ramped = ramped
        rank = full_rank(layer) if ramped else self.final_rank
        self.factors = layer.kind.factor(layer.module, rank)
        root = s[:, None, :rank].sqrt()
        with torch.no_grad():
            self.factors.left.copy_(u[:, :, :rank] * root)
            self.factors.right.copy_((vh[:, :rank] * root.mT))
        if ramped:
            kept = torch.ones(rank, dtype=matrix.dtype, device=matrix.device)
            self.register_buffer("kept_components", kept)
        self.factors.train(layer.module.training)
        bias = getattr(layer.module, "bias", None)
        if bias is not None:
            # The layer's own parameter: the two forms share one bias.
            self.factors[1].bias = bias

    @property
    def factored(self) -> Factored | None:
        # Under a ramp components still come and go in weight space, and the layer runs with the product.
        return None if self.ramped else self.factors

    def compress(self, weight: Tensor) -> Tensor:
        return self._in_shape(self._left() @ self.factors.right)

    def blend(self, weight: Tensor, beta: Beta) -> Tensor:
        left, right = self._left(), self.factors.right
        matrix = self.layout.to_matrix(weight).reshape(self.groups, -1, right.shape[-1])
        blended = matrix * beta
        if self.groups == 1:
            blended = blended[0].addmm_((1 - beta) * left[0], right[0])
        else:
            blended = blended.baddbmm_((1 - beta) * left, right)
        return self._in_shape(blended)

    def grid(self, weight: Tensor) -> Grid | None:
        return None

    def drop_components(self) -> None:
        """Keep as many components as the strength allows: those whose factors have the largest norms."""
        if not self.ramped:
            return
        kept = self.get_buffer("kept_components")
        full = kept.numel()
        rank = round(full + self.strength * (self.final_rank - full))
        if rank < int(kept.count_nonzero()):
            norms = self.factors.left.norm(dim=1).square().sum(0) * self.factors.right.norm(dim=2).square().sum(0)
            chosen = norms.where(kept > 0, -1.0).topk(rank).indices
            kept.zero_().index_fill_(0, chosen, 1.0)

    def plain_layers(self, module: nn.Module, kind: LayerKind) -> Factored:
        """Return the two plain layers of the final rank: those that were trained, or the kept part of them."""
        if not self.ramped:
            return self.factors
        kept = self.get_buffer("kept_components").nonzero().flatten()
        plain = kind.factor(module, self.final_rank)
        with torch.no_grad():
            plain.left.copy_(self.factors.left[:, :, kept])
            plain.right.copy_(self.factors.right[:, kept])
        plain[1].bias = self.factors[1].bias
        return plain.train(self.factors.training)

    def compress_factors(self, compressor: WeightCompressor, layer: LayerView) -> None:
        """Put another technique on both factors, fully faded in from the start."""
        for thin in self.factors:
            factor_layer = layer_view(thin, "weight")
            blend = BlendedWeight(compressor.form(factor_layer, ramped=self.ramped))
            blend.to(factor_layer.weight.device).set_beta(0.0)
            parametrize.register_parametrization(thin, "weight", blend, unsafe=True)

    def factor_blends(self) -> list[tuple[BlendedWeight, Tensor]]:
        """Return the blends that `compress_factors` made, with the latent weight of each."""
        lists = [thin.parametrizations["weight"] for thin in self.factors if parametrize.is_parametrized(thin)]  # type: ignore[index,union-attr]
        return [(each[0], each.original) for each in lists]

    def _left(self) -> Tensor:
        return self.factors.left * self.get_buffer("kept_components") if self.ramped else self.factors.left

    def _in_shape(self, matrix: Tensor) -> Tensor:
        return self.layout.from_matrix(matrix.reshape(self.layout.rows, -1))


def layer_view(module: nn.Module, name: str) -> LayerView:
    """Return one weight of a layer of a known kind."""
    from vanishing.layers.base import find_kind

    kind = find_kind(module)
    assert kind is not None
    weight = module.get_parameter(name)
    return LayerView(module=module, kind=kind, weight=weight, layout=kind.layout(module, tuple(weight.shape)))
