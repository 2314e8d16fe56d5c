"""The interfaces of a technique: in weight space, as a projection of the weight, or as another block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vanishing.config import Config
from vanishing.errors import ConfigError
from vanishing.layers.base import Factored, LayerKind, Layout
from vanishing.layers.quantized_input import InputQuantizer
from vanishing.receipt import Grid

if TYPE_CHECKING:
    from vanishing.calibration import Observer
    from vanishing.compressors.chain import Chain
    from vanishing.structure import Group

Beta = float | Tensor
"""The original's share: a float in eager mode, a tensor of no dimensions inside a compiled graph."""


class Gradient(Enum):
    """How the gradient of the compressed weight reaches the latent one."""

    STRAIGHT_THROUGH = "straight-through"
    """As if compressing were the identity (Bengio et al., arXiv 1308.3432)."""
    CLIPPED = "clipped"
    """Straight-through where the quantizer's range holds the weight, nothing outside it."""
    EXACT = "exact"
    """The derivative of the mask: nothing for a weight that is pruned."""
    DECAYING = "decaying"
    """From straight-through to exact: a pruned weight gets the share that is left of fade and ramp, from 1 down to 0
    (after Bambhaniya et al., arXiv 2402.04744, who restrict the gradients of pruned weights progressively)."""


_UNFIT = {
    Gradient.CLIPPED: "only a quantizer has a range",
    Gradient.EXACT: "rounding has no derivative",
    Gradient.DECAYING: "only the gradient of pruned weights can decay",
}


def check_gradient(config: Config, gradient: Gradient, known: Sequence[Gradient]) -> None:
    """Raise `ConfigError` for a gradient that a technique does not have.

    Args:
        config: the technique.
        gradient: the one that was asked for.
        known: those that it has, the ones to advise first.
    """
    if gradient not in known:
        *names, last = [each.name for each in known]
        advice = f"{', '.join(names)} or {last}"
        raise ConfigError(f"{type(config).__name__}(gradient={gradient.name}): {_UNFIT[gradient]}. Use {advice}.")


@dataclass(frozen=True)
class Moment:
    """A position of the clock, as a technique sees it after an optimizer step.

    Args:
        step: optimizer steps done.
        arriving: whether everything is to be selected anew and exactly: at the start, after a jump, at the end.
        settled: whether the fade and the ramp of the rule are over.
        was_settled: whether they were over before the clock moved, as well.
        left: of each form, how much of fade and ramp is left, from 1 to 0: `1 - (1 - beta) * strength`.
    """

    step: int
    arriving: bool
    settled: bool
    was_settled: bool
    left: tuple[float, ...]


@dataclass(frozen=True)
class LayerView:
    """One weight of one layer, as a technique sees it when it says whether it can compress it.

    Args:
        module: the layer.
        kind: what the library knows about its type.
        weight: the weight, in the layer's own shape.
        layout: how it becomes a matrix.
        group: the layers that are cut with it where units are taken out.
        observed: what the technique's observer saw in the calibration pass, None without one.
    """

    module: nn.Module
    kind: LayerKind
    weight: Tensor
    layout: Layout
    group: Group | None = None
    observed: Observer | None = None

    @property
    def groups(self) -> int:
        """Blocks on the diagonal of the weight's matrix (a convolution's groups)."""
        return self.kind.groups(self.module)

    @property
    def columns(self) -> int:
        """Fan-in of an output channel."""
        return self.weight.numel() // self.layout.rows

    def describe(self) -> str:
        """Return type and size, as in `Linear 256 -> 128`."""
        return f"{type(self.module).__name__} {self.columns * self.groups} -> {self.layout.rows}"


class CompressedWeight(nn.Module, ABC):
    """The compressed form of one weight during the transition.

    Laws, with `W` the weight and `g` the compressed one:
        `compress(W) == g`, of the shape of `W`; `blend(W, beta) == beta * W + (1 - beta) * g`, gradients included.
    """

    strength: float = 1.0
    """How much of the technique is applied, from 0 (none) to 1 (all); below 1 only under a ramp."""
    settled: bool = False
    """Whether fade and ramp are over."""
    shares_weight: bool = True
    """Whether the compressed weight is computed from the latent one, and not from parameters alone."""
    keeps_weight: bool = False
    """Whether it is the latent one, and only what it is multiplied with differs."""

    @abstractmethod
    def compress(self, weight: Tensor) -> Tensor:
        """Return the compressed weight, in the layer's shape."""

    @abstractmethod
    def blend(self, weight: Tensor, beta: Beta) -> Tensor:
        """Return `beta * weight + (1 - beta) * compress(weight)` for 0 < beta <= 1."""

    @abstractmethod
    def grid(self, weight: Tensor) -> Grid | None:
        """Return the values that the compressed weight takes, None where they are any."""

    @property
    def pulls(self) -> bool:
        """Whether `pull` is to be asked."""
        return False

    def pull(self, weight: Tensor) -> Tensor | None:
        """Return the gradient of a regularizer of the latent weight, in memory of its own; None, the default, for none.

        Times 1 - beta it is added to the weight's gradient once before each optimizer step, however many backward
        passes the step has.
        """
        return None

    @property
    def factored(self) -> Factored | None:
        """The two plain layers that take the layer's place at the end, None where the layer stays."""
        return None

    @property
    def input_quantizer(self) -> InputQuantizer | None:
        """What the layer's input goes through before it meets the compressed weight, None where it is as it was.

        Where there is one, the two forms are blended on the layer's outputs.
        """
        return None


class _ProjectAndBlend(torch.autograd.Function):
    """A weight blended with its projection, computed without a graph; the gradient goes to the latent weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, form: ProjectedWeight, beta: Beta) -> Tensor:
        matrix = form.layout.to_matrix(weight)
        value = form.layout.from_matrix(form.project(matrix))
        if isinstance(beta, Tensor) or beta > 0.0:
            value.lerp_(weight, beta)
        inside = form.inside(matrix)
        ctx.passes_everywhere = inside is None
        if inside is not None:
            tensors = [beta] if isinstance(beta, Tensor) else []
            ctx.save_for_backward(form.layout.from_matrix(inside), *tensors)
            ctx.beta = None if tensors else beta
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if not ctx.passes_everywhere:
            inside, *rest = ctx.saved_tensors
            beta = rest[0] if rest else ctx.beta
            if inside.dtype is torch.bool:
                outside = torch.zeros_like(gradient) if isinstance(beta, float) and beta == 0.0 else gradient * beta
                gradient = torch.where(inside, gradient, outside)
            else:
                gradient = gradient * (beta + (1 - beta) * inside)
        return gradient, None, None


class ProjectedWeight(CompressedWeight):
    """A compressed form that is a function of the one latent weight, which it shares with the original.

    Args:
        layout: how the weight becomes a matrix.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    @abstractmethod
    def project(self, matrix: Tensor) -> Tensor:
        """Return the compressed (rows, columns) matrix in memory of its own."""

    @abstractmethod
    def inside(self, matrix: Tensor) -> Tensor | None:
        """Return where the gradient passes, a boolean matrix, or which share of it does; None for all of it."""

    @abstractmethod
    def matrix_grid(self, matrix: Tensor) -> Grid | None:
        """Return the values that `project(matrix)` takes, None where they are any."""

    def matrix_pull(self, matrix: Tensor) -> Tensor | None:
        """Return `pull` for the matrix; None, the default, for nothing."""
        return None

    def compress(self, weight: Tensor) -> Tensor:
        return self.blend(weight, 0.0)

    def blend(self, weight: Tensor, beta: Beta) -> Tensor:
        blended: Tensor = _ProjectAndBlend.apply(weight, self, beta)
        return blended

    def grid(self, weight: Tensor) -> Grid | None:
        return self.matrix_grid(self.layout.to_matrix(weight))

    def pull(self, weight: Tensor) -> Tensor | None:
        pulled = self.matrix_pull(self.layout.to_matrix(weight))
        return None if pulled is None else self.layout.from_matrix(pulled)


@dataclass(frozen=True)
class Compressor(Config, ABC):
    """The hyper-parameters of one technique; it has no state and can serve any number of layers and models."""

    @property
    def ramps(self) -> bool:
        """Whether a recipe's `ramp` can drive its strength from none to full."""
        return False


@dataclass(frozen=True)
class WeightCompressor(Compressor):
    """A technique whose compressed form is the same operation with another weight.

    Laws: those of `CompressedWeight`; and in the lossless limit `compress(W)` equals `W` within rounding.
    """

    stage: ClassVar[int] = 2
    """Its place in a chain on one weight: 0 changes the shape, 1 the mask, 2 the values."""

    @abstractmethod
    def form(self, layer: LayerView, *, ramped: bool) -> CompressedWeight:
        """Return the compressed form of a layer's weight, on its device and in its type.

        Args:
            layer: the weight to compress.
            ramped: whether the strength will be driven by a ramp.
        """

    @property
    def replaces_layer(self) -> bool:
        """Whether other layers take the layer's place at the end."""
        return False

    @property
    def quantizes_input(self) -> bool:
        """Whether the layer's input is another one, so that the layer must be called and not its weight be read."""
        return False

    def observer(self, layer: LayerView) -> Observer | None:
        """Return what looks at a layer in the calibration pass, None for a technique that needs none.

        `form` finds it, with what it saw, as the layer's `observed`. It saw nothing where a state is loaded afterwards,
        which has what was seen: the form then needs the right shapes alone.
        """
        return None

    def refusal(self, kind: LayerKind) -> str | None:
        """Return why layers of a kind cannot be compressed so, None where they can."""
        return None

    def problem(self, layer: LayerView) -> str | None:
        """Return why this one layer cannot be compressed so and what to do, None where it can."""
        return None

    def update(self, forms: Sequence[CompressedWeight], weights: Sequence[Tensor], moment: Moment) -> None:
        """Renew what is not computed in every forward pass, after an optimizer step.

        Args:
            forms: the compressed forms of all weights that one rule matched.
            weights: the latent weights, in the same order.
            moment: where the clock stands.
        """

    def update_after_another(
        self, forms: Sequence[CompressedWeight], weights: Sequence[Callable[[], Tensor]], moment: Moment
    ) -> None:
        """Do what `update` does where another technique comes before this one on the weights.

        Args:
            forms: the compressed forms.
            weights: functions that return what each of them is computed from, in the layer's shape.
            moment: where the clock stands.
        """

    def __or__(self, other: WeightCompressor) -> Chain:
        """Return this technique followed by another on the same weight.

        Raises:
            ConfigError: the two cannot follow each other.
        """
        from vanishing.compressors.chain import Chain

        return Chain(compressors=(self, other))


class _StatelessProjection(ProjectedWeight):
    def __init__(self, compressor: ProjectionCompressor, layout: Layout) -> None:
        super().__init__(layout)
        self.compressor = compressor

    def project(self, matrix: Tensor) -> Tensor:
        return self.compressor.project(matrix, self.strength)

    def inside(self, matrix: Tensor) -> Tensor | None:
        return self.compressor.inside(matrix, self.strength)

    def matrix_grid(self, matrix: Tensor) -> Grid | None:
        return self.compressor.grid(matrix, self.layout)

    @property
    def pulls(self) -> bool:
        return self.compressor.pulls

    def matrix_pull(self, matrix: Tensor) -> Tensor | None:
        return self.compressor.pull(matrix, self.strength)


@dataclass(frozen=True)
class ProjectionCompressor(WeightCompressor):
    """A technique that is a function of the weight alone: the shortest way to write one of your own.

    A subclass is a frozen dataclass with one method, `project`; the latent weight is shared with the original and the
    gradient is straight-through.
    """

    @abstractmethod
    def project(self, matrix: Tensor, strength: float) -> Tensor:
        """Return the compressed matrix.

        Args:
            matrix: (rows, columns), output channels by fan-in; never to be written to.
            strength: 1 for all of the technique; below 1 only if `ramps` says so.

        Returns:
            (rows, columns) of the same type, in memory of its own.
        """

    def inside(self, matrix: Tensor, strength: float) -> Tensor | None:
        """Return where the gradient passes, a boolean matrix, or which share of it does; None, the default, for all."""
        return None

    @property
    def pulls(self) -> bool:
        """Whether `pull` is to be asked."""
        return False

    def pull(self, matrix: Tensor, strength: float) -> Tensor | None:
        """Return the gradient of a regularizer of the latent weight, see `CompressedWeight.pull`; None for none."""
        return None

    def grid(self, matrix: Tensor, layout: Layout) -> Grid | None:
        """Return the values that `project(matrix, 1.0)` takes, so that the file holds codes; None for any values."""
        return None

    def form(self, layer: LayerView, *, ramped: bool) -> CompressedWeight:
        return _StatelessProjection(self, layer.layout)


@dataclass(frozen=True)
class BlockCompressor(Compressor):
    """A technique whose compressed form is another module; the two are blended on their outputs.

    Law: the module that `build` returns takes what the block takes and returns tensors of the same shapes.
    """

    @abstractmethod
    def build(self, block: nn.Module) -> nn.Module:
        """Return the compressed form of a block, a new module; the block is not changed."""

    def refusal(self, block: nn.Module) -> str | None:
        """Return why a rule does not take a block that its pattern matches, None where it does."""
        return None

    def observer(self, block: nn.Module) -> Observer | None:
        """Return what looks at a block in the calibration pass, None for a technique that needs none."""
        return None

    def calibrate(self, replacement: nn.Module, observer: Observer) -> None:
        """Give the compressed form of a block what the observer saw."""
        raise NotImplementedError(f"{type(self).__name__} has an observer, but no `calibrate`.")
