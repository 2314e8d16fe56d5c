"""Low rank: a weight becomes the product of two thin ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vanishing.blend import BlendedWeight
from vanishing.compressors.base import Beta, CompressedWeight, LayerView, Moment, WeightCompressor
from vanishing.distributed import whole
from vanishing.errors import ConfigError
from vanishing.layers.base import Factored, LayerKind, Layout
from vanishing.receipt import Grid


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
            raise ConfigError(
                f"LowRank takes exactly one of rank, ratio and energy, got {' and '.join(given) or 'none'}."
            )

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
            form.choose_components()

    def rank_of(self, layer: LayerView, singular_values: Tensor | None = None) -> int:
        """Return the rank for a layer.

        Args:
            layer: the weight.
            singular_values: (groups, full rank), falling; computed where they matter if not given.
        """
        if self.rank is not None:
            return self.rank
        rows, columns = layer.layout.rows // layer.groups, layer.columns
        if self.ratio is not None:
            rank = int(self.ratio * rows * columns / (rows + columns))
        else:
            assert self.energy is not None
            if singular_values is None:
                singular_values = torch.linalg.svdvals(grouped_matrix(layer))
            # On a GPU a cumulative sum is not deterministic.
            share = singular_values.double().square().sum(0).cpu().cumsum(0)
            rank = int((share < self.energy * share[-1]).sum()) + 1
        return min(max(rank, 1), full_rank(layer))


def full_rank(layer: LayerView) -> int:
    """Return the highest rank of a layer's weight, in each of its groups."""
    return min(layer.layout.rows // layer.groups, layer.columns)


def grouped_matrix(layer: LayerView) -> Tensor:
    """Return the weight as (groups, rows a group, columns), in a type that can be decomposed."""
    matrix = layer.layout.to_matrix(layer.weight.detach()).reshape(layer.groups, -1, layer.columns)
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


class LowRankWeight(CompressedWeight):
    """Two plain layers whose weights multiply to the compressed weight.

    Args:
        compressor: the technique.
        layer: the weight that the factors start from.
        ramped: whether the factors start at full rank and lose components as the strength grows.
        on_factors: a technique on both factors, fully faded in from the start.
    """

    shares_weight = False

    def __init__(
        self, compressor: LowRank, layer: LayerView, *, ramped: bool, on_factors: WeightCompressor | None = None
    ) -> None:
        super().__init__()
        self.layout: Layout = layer.layout
        self.groups = layer.groups
        self.ramped = ramped
        self._make_factors = functools.partial(layer.kind.factor, layer.module)
        self._on_factors = on_factors
        u, s, vh = torch.linalg.svd(grouped_matrix(layer), full_matrices=False)
        final_rank = compressor.rank_of(layer, s)
        rank = full_rank(layer) if ramped else final_rank
        self.factors = self._make_factors(rank)
        root = s[:, None, :rank].sqrt()
        self.factors.assign(u[:, :, :rank] * root, vh[:, :rank] * root.mT)
        if ramped:
            kept = torch.ones(rank, dtype=layer.weight.dtype, device=layer.weight.device)
            self.register_buffer("kept_components", kept)
            self.register_buffer("final_rank", torch.tensor(final_rank))
        self.factors.train(layer.module.training)
        # The two forms share one bias, the layer's.
        self.factors.borrow_bias(getattr(layer.module, "bias", None))
        self._compress_factors()
        if compressor.energy is not None and not ramped:
            self.register_load_state_dict_pre_hook(_take_saved_rank)

    @property
    def factored(self) -> Factored | None:
        # Under a ramp components still come and go in weight space, and the layer runs with the product.
        return None if self.ramped else self.factors

    def compress(self, weight: Tensor) -> Tensor:
        return self._in_shape(self._left() @ self.factors.right)

    def blend(self, weight: Tensor, beta: Beta) -> Tensor:
        matrix = self.layout.to_matrix(weight)
        if self.groups == 1 and not self.ramped:
            left, right = self.factors.matrices()
            # In place, as autocast would compute a new one in half precision.
            if isinstance(beta, Tensor):
                return self.layout.from_matrix((matrix * beta).addmm_((1 - beta) * left, right))
            return self.layout.from_matrix((matrix * beta).addmm_(left, right, alpha=1 - beta))
        left, right = self._left(), self.factors.right
        blended = (matrix * beta).reshape(self.groups, -1, right.shape[-1])
        return self._in_shape(blended.baddbmm_((1 - beta) * left, right))

    def grid(self, weight: Tensor) -> Grid | None:
        return None

    def choose_components(self) -> None:
        """Keep as many components as the strength allows: of those that are left the ones with the largest factors."""
        if not self.ramped:
            return
        kept = self.get_buffer("kept_components")
        full, final = kept.numel(), int(self.get_buffer("final_rank"))
        rank, left = round(full + self.strength * (final - full)), int(kept.count_nonzero())
        if rank == left:
            return
        if rank > left:
            # The clock was set back: those that were dropped are as they were then.
            kept.fill_(1.0)
        columns, rows = whole(self.factors.left), whole(self.factors.right)
        norms = columns.norm(dim=1).square().sum(0) * rows.norm(dim=2).square().sum(0)
        chosen = norms.where(kept > 0, -1.0).topk(rank).indices
        kept.zero_().index_fill_(0, chosen, 1.0)

    def plain_layers(self, module: nn.Module, kind: LayerKind) -> Factored:
        """Return the two plain layers of the final rank: those that were trained, or the kept part of them."""
        plain = self.factors
        if self.ramped:
            kept = self.get_buffer("kept_components").nonzero().flatten()
            plain = kind.factor(module, len(kept)).train(self.factors.training)
            plain.assign(self.factors.left[:, :, kept], self.factors.right[:, kept])
        plain.borrow_bias(getattr(module, "bias", None))
        return plain

    def change_rank(self, rank: int) -> None:
        """Make factors of another rank, without values; their parameters keep their identity."""
        before, bias = dict(self.factors.named_parameters()), self.factors.bias
        self.factors = self._make_factors(rank).train(self.factors.training)
        self.factors.borrow_bias(bias)
        self._compress_factors()
        for name, parameter in list(self.factors.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            before[name].data = parameter.data
            self.factors.get_submodule(owner)._parameters[leaf] = before[name]

    def factor_blends(self) -> list[tuple[BlendedWeight, Tensor]]:
        """Return the blends of the technique on the factors, with the latent weight of each."""
        factors: list[Any] = [thin for thin in self.factors if parametrize.is_parametrized(thin)]
        lists = [thin.parametrizations["weight"] for thin in factors]
        return [(each[0], each.original) for each in lists]

    def _compress_factors(self) -> None:
        if self._on_factors is None:
            return
        for thin in self.factors:
            layer = layer_view(thin, "weight")
            form = self._on_factors.form(layer, ramped=False)
            for part in form.modules():
                if isinstance(part, CompressedWeight):
                    part.strength, part.settled = self.strength, self.settled
            blend = BlendedWeight(form).to(layer.weight.device)
            blend.set_beta(0.0)
            parametrize.register_parametrization(thin, "weight", blend, unsafe=True)

    def _left(self) -> Tensor:
        return self.factors.left * self.get_buffer("kept_components") if self.ramped else self.factors.left

    def _in_shape(self, matrix: Tensor) -> Tensor:
        return self.layout.from_matrix(matrix.reshape(self.layout.rows, -1))


def _take_saved_rank(form: LowRankWeight, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a state is loaded: by energy, the rank follows from the weights with which that run began."""
    first, latent = f"{prefix}factors.0.weight", f"{prefix}factors.0.parametrizations.weight.original"
    saved = state.get(first, state.get(latent))
    if saved is None:
        return
    # The first layer's weight has as many numbers for each channel between the two layers.
    rank = form.factors.rank * saved.numel() // form.factors[0].weight.numel()  # type: ignore[operator]
    if rank != form.factors.rank:
        form.change_rank(rank)


def layer_view(module: nn.Module, name: str) -> LayerView:
    """Return one weight of a layer of a known kind."""
    from vanishing.layers.base import find_kind

    kind = find_kind(module)
    assert kind is not None
    weight = module.get_parameter(name)
    return LayerView(module=module, kind=kind, weight=weight, layout=kind.layout(module, tuple(weight.shape)))
