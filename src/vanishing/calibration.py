"""Calibration: one pass over batches in which techniques see what goes through the layers that they will compress."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from vanishing.errors import RecipeError
from vanishing.inputs import evaluation, run_batch
from vanishing.layers.base import LayerKind
from vanishing.random_state import random_state_kept

_NUMBERS_AT_ONCE = 2**24
"""Numbers of a layer's unfolded input that are held at once."""


class Observer(ABC):
    """What a technique gathers about one layer or block in the calibration pass.

    Its memory must not grow with the number of batches.
    """

    needs_gradients: ClassVar[bool] = False
    """Whether every batch is followed by a backward pass."""

    @property
    @abstractmethod
    def saw_nothing(self) -> bool:
        """Whether the pass has told it nothing, because the model never calls the layer for instance."""

    def observe(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Look at a call of the layer, before it, without gradients; by default not at all."""
        return

    def observe_gradients(self) -> None:
        """Look at the gradients after a backward pass over one batch; by default not at all."""
        return


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Batches for techniques that look at activations or gradients, with the loss that gradients are of.

    Args:
        batches: an iterable of batches for the model, each a tensor, a tuple or list whose first item is the input,
            or a mapping of keywords; gone through once.
        loss: (model, batch) -> scalar, for techniques that need gradients, or for batches of another form; may be
            left out where the model's own output has a `loss`, as models of transformers have when a batch holds
            labels.
    """

    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor] | None = None


@dataclass(frozen=True)
class Observed:
    """One observer and the modules whose calls it sees."""

    name: str
    observer: Observer
    modules: Sequence[nn.Module]


def calibrate(model: nn.Module, observed: Sequence[Observed], calibration: Calibration) -> None:
    """Run the batches through the model, in evaluation mode, and let observers look; the model is not changed.

    Args:
        model: the model.
        observed: what is looked at.
        calibration: the batches.

    Raises:
        RecipeError: there is no batch, no loss to take gradients of, or an observer saw nothing.
        TypeError: the batches cannot be gone through.
    """
    if not isinstance(calibration.batches, Iterable) or isinstance(calibration.batches, (Tensor, Mapping, str)):
        raise TypeError(
            f"calibration takes an iterable of batches, such as a list or a DataLoader, got "
            f"{type(calibration.batches).__name__}. Put a single batch into a list."
        )
    gradients = any(each.observer.needs_gradients for each in observed)
    console = Console(stderr=True)
    batches = track(
        calibration.batches, "Calibrating", console=console, disable=not console.is_terminal, transient=True
    )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    with random_state_kept(device), evaluation(model), _hooks(observed), _own_gradients(model, gradients):
        for batch in batches:
            count += 1
            if not gradients:
                with torch.no_grad():
                    if calibration.loss is not None:
                        calibration.loss(model, batch)
                    else:
                        run_batch(model, batch)
                continue
            _loss(model, batch, calibration.loss).backward()
            for each in observed:
                if each.observer.needs_gradients:
                    each.observer.observe_gradients()
            model.zero_grad(set_to_none=True)
    if not count:
        raise RecipeError("calibration: at least one batch is needed, got none.")
    blind = [each.name for each in observed if each.observer.saw_nothing]
    if blind:
        more = f" and {len(blind) - 3} more" if len(blind) > 3 else ""
        raise RecipeError(
            f"calibration: nothing went through {', '.join(map(repr, blind[:3]))}{more}: the model did not call it for "
            f"these batches. Give other batches, or leave it out of the calibrated rule."
        )


def _loss(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    with torch.enable_grad():
        if loss is not None:
            value: Any = loss(model, batch)
        else:
            value = getattr(run_batch(model, batch), "loss", None)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise RecipeError(
            "calibration: a technique needs the gradients of a loss, and the model returns none for the batches. Give "
            "batches with labels to a model that returns a loss, or calibration=Calibration(batches=..., loss=...), a "
            "function of model and batch."
        )
    return value


@contextlib.contextmanager
def _hooks(observed: Sequence[Observed]) -> Iterator[None]:
    handles = []

    def look(observer: Observer) -> Callable[..., None]:
        @torch.no_grad()
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            observer.observe(arguments, keywords)

        return hook

    try:
        for each in observed:
            handles += [m.register_forward_pre_hook(look(each.observer), with_kwargs=True) for m in each.modules]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _own_gradients(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Put gradients that were there before back at the end."""
    before = {p: p.grad for p in model.parameters()} if wanted else {}
    for parameter in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient


class MeanObserver(Observer):
    """A mean over positions or batches of what is added to it."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    @property
    def saw_nothing(self) -> bool:
        return self._count == 0

    @property
    def mean(self) -> Tensor | None:
        """The mean of what was added; None before any."""
        return None if self._sum is None else self._sum / self._count

    def _add(self, total: Tensor, count: int) -> None:
        """Add a sum over some of what is counted."""
        self._sum = total if self._sum is None else self._sum + total
        self._count += count


class InputMoments(MeanObserver):
    """The second moments of what a layer multiplies its weight with: the mean of `x x^T` over all positions.

    Args:
        module: the layer, of a kind that tells what its input is as rows.
        kind: that kind.
        full: whether the whole matrix is gathered, and not its diagonal alone.
    """

    def __init__(self, module: nn.Module, kind: LayerKind, *, full: bool) -> None:
        super().__init__()
        self._module = module
        self._kind = kind
        self._full = full

    @property
    def moments(self) -> Tensor:
        """The means: (groups, columns, columns), or (groups, columns) of the diagonal; of white inputs before any."""
        if (mean := self.mean) is not None:
            return mean
        weight = self._module.get_parameter("weight")
        columns = weight.numel() // self._kind.layout(self._module, tuple(weight.shape)).rows
        ones = weight.new_ones(self._kind.groups(self._module), columns)
        return ones.diag_embed() if self._full else ones

    def observe(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        given = next((x for x in (*arguments, *keywords.values()) if isinstance(x, Tensor)), None)
        if given is None:
            return
        for part in self._parts(given):
            rows = self._kind.input_rows(self._module, part)
            # Sums over many positions lose too much in half precision.
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            self._add(rows.mT @ rows if self._full else rows.square().sum(1), rows.shape[1])

    def _parts(self, given: Tensor) -> Sequence[Tensor]:
        """The input in parts along its first dimension, small enough to be unfolded."""
        if given.dim() < 2 or not given.numel():
            return [given] if given.numel() else []
        blowup = math.prod(getattr(self._module, "kernel_size", (1,)))
        each = max(given.numel() // len(given) * blowup, 1)
        return given.split(max(_NUMBERS_AT_ONCE // each, 1))


class GradientMagnitudes(MeanObserver):
    """The mean over batches of the magnitude of a weight's gradient, in the weight's shape.

    Args:
        weight: the parameter.
    """

    needs_gradients = True

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight

    @property
    def magnitudes(self) -> Tensor:
        """The means; ones before any."""
        return torch.ones_like(self._weight) if (mean := self.mean) is None else mean

    def observe_gradients(self) -> None:
        if self._weight.grad is not None:
            self._add(self._weight.grad.abs().to(torch.promote_types(self._weight.dtype, torch.float32)), 1)
