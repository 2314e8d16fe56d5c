"""Low rank: a weight becomes the product of two thin ones."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vanishing.blended_weight import BlendedWeight
from vanishing.calibration import InputMoments, Observer
from vanishing.compressors.base import Beta, CompressedWeight, LayerView, Moment, WeightCompressor
from vanishing.distributed import whole
from vanishing.errors import ConfigError
from vanishing.layers.base import Factored, LayerKind, Layout, Split
from vanishing.receipt import Grid

_DAMPING = 1e-6
"""Of the moments of inputs, as a share of their mean, so that directions that no input had can be inverted."""
_ITERATIONS = 10


@dataclass(frozen=True, kw_only=True)
class LowRank(WeightCompressor):
    """Replace a layer by plain ones with fewer channels between them, from truncated singular value decompositions.

    While the original is there the layer runs once, with the weight `beta W + (1 - beta) B A`; once it is gone the
    thin layers run. Exactly one of the first three arguments is given. Under a ramp the rank falls from full to final.

    Args:
        rank: channels between the layers (in each group of a grouped convolution), at least 1; with `Split.TUCKER`, of
            input and of output channels, or all of those where there are fewer.
        ratio: share of the layer's weights that the factors may have together, in (0, 1].
        energy: share of the squared singular values that is kept, in (0, 1]; gives each layer its own rank.
        split: between which of its dimensions a convolution's weight is split: `Split.CHANNELS`, `Split.SPATIAL` for
            kernels of two dimensions, or `Split.TUCKER` for convolutions without groups. Other layers, and kernels of
            one position, are split into two matrices.
        whitened: whether the factors start from the decomposition that changes the layer's outputs least for the
            calibration batches, and not the weight (SVD-LLM, arXiv 2403.07378, section 3.1); singular values are then
            those of the outputs. Needs `prepare(calibration=...)`.

    Raises:
        ConfigError: a value is out of range, not exactly one of the three is given, or whitening is asked of another
            split than `Split.CHANNELS`.
    """

    rank: Annotated[int | None, Field(ge=1, description="the channels between the layers, at least 1")] = None
    ratio: Annotated[float | None, Field(gt=0, le=1, description="the share of weights that is kept, in (0, 1]")] = None
    energy: Annotated[
        float | None, Field(gt=0, le=1, description="the share of squared singular values that is kept, in (0, 1]")
    ] = None
    split: Split = Split.CHANNELS
    whitened: bool = False

    stage: ClassVar[int] = 0

    @property
    def ramps(self) -> bool:
        # A Tucker decomposition has two ranks, which would have to fall together.
        return self.split is not Split.TUCKER

    @property
    def replaces_layer(self) -> bool:
        return True

    def check(self) -> None:
        given = [name for name in ("rank", "ratio", "energy") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"LowRank takes exactly one of rank, ratio and energy, got {' and '.join(given) or 'none'}."
            )
        if self.whitened and self.split is not Split.CHANNELS:
            raise ConfigError(
                f"LowRank(split={self.split}, whitened=True): only the split between channels can be whitened. Leave "
                f"one of the two out."
            )

    def refusal(self, kind: LayerKind) -> str | None:
        if kind.why_not_factored is None and self.whitened and not kind.multiplies_rows:
            return f"what a {kind.name} multiplies its weight with cannot be observed, so it cannot be whitened"
        return kind.why_not_factored

    def problem(self, layer: LayerView) -> str | None:
        split = self.split_of(layer)
        highest = full_rank(_as_split(layer, split))
        if self.rank is not None and self.rank > highest and split is not Split.TUCKER:
            return f"rank is at most {highest}. Lower it, or add the layer to ignore"
        return None

    def observer(self, layer: LayerView) -> Observer | None:
        return InputMoments(layer.module, layer.kind, full=True) if self.whitened else None

    def form(self, layer: LayerView, *, ramped: bool) -> CompressedWeight:
        return LowRankWeight(self, layer, ramped=ramped)

    def update(self, forms: Sequence[CompressedWeight], weights: Sequence[Tensor], moment: Moment) -> None:
        for form in cast(Sequence[LowRankWeight], forms):
            form.choose_components()

    def split_of(self, layer: LayerView) -> Split:
        """Return how a layer is split."""
        return layer.kind.split(layer.module, self.split)

    def ranks_of(self, layer: LayerView, singular_values: Sequence[Tensor] | None = None) -> tuple[int, ...]:
        """Return the ranks for a layer, see `Factored.ranks`.

        Args:
            layer: the weight.
            singular_values: (groups, full rank), falling, for each rank; computed where they matter if not given.
        """
        split = self.split_of(layer)
        matrices = unfoldings(layer, split)
        if singular_values is None and self.energy is not None:
            singular_values = [torch.linalg.svdvals(matrix) for matrix in matrices]
        highest = [min(matrix.shape[1:]) for matrix in matrices]
        if self.rank is not None:
            return tuple(min(self.rank, full) for full in highest)
        if self.ratio is not None:
            ranks = _ranks_by_ratio(self.ratio, [tuple(matrix.shape[1:]) for matrix in matrices])
        else:
            assert self.energy is not None and singular_values is not None
            ranks = [_rank_by_energy(self.energy, values) for values in singular_values]
        return tuple(min(max(rank, 1), full) for rank, full in zip(ranks, highest, strict=True))

    def factors(self, layer: LayerView, ranks: Sequence[int]) -> Factored:
        """Return plain layers that fit in the layer's place, without values."""
        return layer.kind.factor_split(layer.module, ranks, self.split_of(layer))


def _ranks_by_ratio(ratio: float, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The ranks with which factors have a share of the weights; a Tucker split keeps one share of both channels."""
    if len(shapes) == 1:
        rows, columns = shapes[0]
        return [int(ratio * rows * columns / (rows + columns))]
    (outputs, fan_in), (inputs, _) = shapes
    whole = outputs * fan_in
    # The share s solves  s^2 whole + s (inputs^2 + outputs^2) = ratio whole.
    squares = inputs**2 + outputs**2
    share = (math.sqrt(squares**2 + 4 * ratio * whole**2) - squares) / (2 * whole)
    return [int(share * outputs), int(share * inputs)]


def _rank_by_energy(energy: float, singular_values: Tensor) -> int:
    # On a GPU a cumulative sum is not deterministic.
    share = singular_values.double().square().sum(0).cpu().cumsum(0)
    return int((share < energy * share[-1]).sum()) + 1


def full_rank(layer: LayerView) -> int:
    """Return the highest rank of a layer's weight, in each of its groups."""
    return min(layer.layout.rows // layer.groups, layer.columns)


def grouped_matrix(layer: LayerView) -> Tensor:
    """Return the weight as (groups, rows a group, columns), in a type that can be decomposed."""
    matrix = layer.layout.to_matrix(layer.weight.detach()).reshape(layer.groups, -1, layer.columns)
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def unfoldings(layer: LayerView, split: Split) -> list[Tensor]:
    """Return the matrices whose ranks are cut in a split, (groups, rows, columns) each.

    In a Tucker split those are the unfoldings by output and by input channels, else there is one.
    """
    matrix = grouped_matrix(_as_split(layer, split))
    if split is not Split.TUCKER:
        return [matrix]
    outputs, inputs = layer.weight.shape[:2]
    return [matrix, matrix.reshape(outputs, inputs, -1).transpose(0, 1).reshape(1, inputs, -1)]


def _as_split(layer: LayerView, split: Split) -> LayerView:
    """A layer whose weight is the matrix that is decomposed."""
    return dataclasses.replace(layer, layout=layer.kind.split_layout(layer.module, split))


def truncated(matrix: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, s, v of a singular value decomposition, with `u * s @ v` equal to the matrix.

    Args:
        matrix: (groups, rows, columns).
        moments: (groups, columns, columns), of the inputs; then a truncation changes the outputs for these least:
            with `moments = l @ l.T`, the decomposition is that of `matrix @ l` (arXiv 2403.07378, theorem 3.2).
    """
    if moments is None:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, v
    exact = moments.double()
    scale = exact.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=torch.finfo(torch.float32).tiny)
    damped = exact + _DAMPING * scale * torch.eye(exact.shape[-1], dtype=exact.dtype, device=exact.device)
    lower, failures = torch.linalg.cholesky_ex(damped)
    if not bool(failures.any()):
        u, s, v = torch.linalg.svd(matrix.double() @ lower, full_matrices=False)
        v = torch.linalg.solve_triangular(lower, v, upper=False, left=False)
    else:
        # Few inputs leave directions of nothing but rounding, some of them below 0.
        values, vectors = torch.linalg.eigh(damped)
        least = torch.finfo(torch.float32).eps * values[:, -1:].clamp(min=torch.finfo(torch.float32).tiny)
        root = values.clamp(min=least).sqrt()[:, None]
        u, s, v = torch.linalg.svd(matrix.double() @ (vectors * root), full_matrices=False)
        v = (v / root) @ vectors.mT
    return u.to(matrix.dtype), s.to(matrix.dtype), v.to(matrix.dtype)


def tucker(weight: Tensor, rank: int, inner_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Tucker-2 decomposition of a convolution's weight by higher-order orthogonal iteration (1511.06530).

    Args:
        weight: (outputs, inputs, positions of the kernel).
        rank: of the output channels.
        inner_rank: of the input channels.

    Returns:
        (outputs, rank) and (inputs, inner_rank) with orthonormal columns, and the core, (rank, inner_rank, positions).
    """

    def leading(unfolding: Tensor, count: int) -> Tensor:
        return torch.linalg.svd(unfolding.flatten(1), full_matrices=False)[0][:, :count]

    inner = leading(weight.transpose(0, 1), inner_rank)
    for _ in range(_ITERATIONS):
        outer = leading(torch.einsum("oik,ir->ork", weight, inner), rank)
        inner = leading(torch.einsum("oik,or->irk", weight, outer), inner_rank)
    return outer, inner, torch.einsum("oik,os,ir->srk", weight, outer, inner)


OnFactor = Callable[[LayerView], list[CompressedWeight]]


class LowRankWeight(CompressedWeight):
    """Two plain layers whose weights multiply to the compressed weight.

    Args:
        compressor: the technique.
        layer: the weight that the factors start from.
        ramped: whether the factors start at full rank and lose components as the strength grows.
        on_factors: a factor -> the forms that act on it in turn; they are fully faded in from the start, but where
            schedules of their own say otherwise.
    """

    shares_weight = False

    def __init__(
        self, compressor: LowRank, layer: LayerView, *, ramped: bool, on_factors: OnFactor | None = None
    ) -> None:
        super().__init__()
        self.split = compressor.split_of(layer)
        self.layout: Layout = layer.kind.split_layout(layer.module, self.split)
        self.groups = layer.groups
        self.ramped = ramped
        self._make_factors = functools.partial(layer.kind.factor_split, layer.module, split=self.split)
        self._on_factors = on_factors
        if self.split is Split.TUCKER:
            self._start_tucker(compressor, layer)
        else:
            self._start(compressor, layer)
        self.factors.train(layer.module.training)
        # The two forms share one bias, the layer's.
        self.factors.borrow_bias(getattr(layer.module, "bias", None))
        self._compress_factors()
        if compressor.energy is not None and not ramped:
            self.register_load_state_dict_pre_hook(_take_saved_rank)

    def _start(self, compressor: LowRank, layer: LayerView) -> None:
        (matrix,) = unfoldings(layer, self.split)
        observed = layer.observed
        u, s, v = truncated(matrix, observed.moments if isinstance(observed, InputMoments) else None)
        (final_rank,) = compressor.ranks_of(layer, [s])
        rank = min(matrix.shape[1:]) if self.ramped else final_rank
        self.factors = self._make_factors((rank,))
        root = s[:, None, :rank].sqrt()
        self.factors.assign(u[:, :, :rank] * root, v[:, :rank] * root.mT)
        if self.ramped:
            kept = torch.ones(rank, dtype=layer.weight.dtype, device=layer.weight.device)
            self.register_buffer("kept_components", kept)
            self.register_buffer("final_rank", torch.tensor(final_rank))

    def _start_tucker(self, compressor: LowRank, layer: LayerView) -> None:
        rank, inner_rank = compressor.ranks_of(layer)
        weight = layer.weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(2)
        outer, inner, core = tucker(weight, rank, inner_rank)
        # Balanced: three factors of one norm.
        norms = torch.stack([outer.norm(), core.norm(), inner.norm()]).clamp(min=torch.finfo(weight.dtype).tiny)
        outer, core, inner = (
            each * (norms.log().mean().exp() / norm) for each, norm in zip((outer, core, inner), norms, strict=True)
        )
        self.factors = self._make_factors((rank, inner_rank))
        first = self.factors[0]
        assert isinstance(first, Factored)
        first.assign(core.transpose(1, 2).reshape(1, -1, inner_rank), inner.mT[None])
        self.factors.assign_left(outer)

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

    def plain_layers(self, module: nn.Module) -> Factored:
        """Return the plain layers of the final rank: those that were trained, or the kept part of them."""
        plain = self.factors
        if self.ramped:
            kept = self.get_buffer("kept_components").nonzero().flatten()
            plain = self._make_factors((len(kept),)).train(self.factors.training)
            plain.assign(self.factors.left[:, :, kept], self.factors.right[:, kept])
        plain.borrow_bias(getattr(module, "bias", None))
        return plain

    def change_ranks(self, *ranks: int) -> None:
        """Make factors of other ranks, without values; their parameters keep their identity."""
        before, bias = dict(self.factors.named_parameters()), self.factors.bias
        blends = [blends for blends, _ in self.factor_blends().values()]
        self.factors = self._make_factors(ranks).train(self.factors.training)
        self.factors.borrow_bias(bias)
        self._compress_factors()
        for old, (new, _) in zip(blends, self.factor_blends().values(), strict=True):
            for one, other in zip(old, new, strict=True):
                other.set_beta(one.beta, fading=one.fading)
        for name, parameter in list(self.factors.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            before[name].data = parameter.data
            self.factors.get_submodule(owner)._parameters[leaf] = before[name]

    def factor_blends(self) -> dict[str, tuple[list[BlendedWeight], Tensor]]:
        """Return the blends that act on each factor in turn, with its latent weight, by the factor's path."""
        factors: dict[str, Any] = {
            path: thin for path, thin in self.factors.thin_layers().items() if parametrize.is_parametrized(thin)
        }
        lists = {path: thin.parametrizations["weight"] for path, thin in factors.items()}
        return {path: (list(each), each.original) for path, each in lists.items()}

    def _compress_factors(self) -> None:
        if self._on_factors is None:
            return
        for thin in self.factors.thin_layers().values():
            layer = layer_view(thin, "weight")
            for form in self._on_factors(layer):
                for part in form.modules():
                    if isinstance(part, CompressedWeight):
                        part.strength, part.settled = self.strength, self.settled
                blend = BlendedWeight(form).to(layer.weight.device)
                blend.set_beta(0.0, fading=False)
                parametrize.register_parametrization(thin, "weight", blend, unsafe=True)

    def _left(self) -> Tensor:
        return self.factors.left * self.get_buffer("kept_components") if self.ramped else self.factors.left

    def _in_shape(self, matrix: Tensor) -> Tensor:
        return self.layout.from_matrix(matrix.reshape(self.layout.rows, -1))


def _take_saved_rank(form: LowRankWeight, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a state is loaded: by energy, the rank follows from the weights with which that run began."""

    def saved(path: str) -> Tensor | None:
        latent = f"{prefix}factors.{path}.parametrizations.weight.original"
        return state.get(f"{prefix}factors.{path}.weight", state.get(latent))

    if form.split is Split.TUCKER:
        last, first = saved("1"), saved("0.0")
        if last is None or first is None:
            return
        ranks: tuple[int, ...] = (last.shape[1], first.shape[0])
    else:
        first = saved("0")
        if first is None:
            return
        # The first layer's weight has as many numbers for each channel between the two layers.
        ranks = (form.factors.rank * first.numel() // form.factors[0].weight.numel(),)  # type: ignore[operator]
    if ranks != form.factors.ranks:
        form.change_ranks(*ranks)


def layer_view(module: nn.Module, name: str) -> LayerView:
    """Return one weight of a layer of a known kind."""
    from vanishing.layers.base import find_kind

    kind = find_kind(module)
    assert kind is not None
    weight = module.get_parameter(name)
    return LayerView(module=module, kind=kind, weight=weight, layout=kind.layout(module, tuple(weight.shape)))
