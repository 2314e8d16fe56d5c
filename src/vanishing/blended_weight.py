"""Original and compressed form of a layer, blended in its weight."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vanishing.blend import Blend, Form, with_idle
from vanishing.compressors.base import CompressedWeight
from vanishing.layers.quantized_input import with_first
from vanishing.outputs import blend_tensors
from vanishing.receipt import Grid


class BlendedWeight(Blend):
    """The parametrization of one weight: `beta W + (1 - beta) g(W)` (arXiv 2510.09696, equation 1, in weight space).

    Args:
        form: the compressed form.
    """

    def __init__(self, form: CompressedWeight) -> None:
        super().__init__()
        self.form = form
        # The form that is looked at now without the other one.
        self.alone: Form | None = None
        self.shown: tuple[Tensor] | None = None
        """The weight that the layer is to use now, while both forms run one after the other."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer uses: the original itself at beta = 1."""
        if self.alone is Form.ORIGINAL:
            if torch.compiler.is_compiling():
                return torch.where(self.beta_tensor > 0, weight, self.form.compress(weight))
            return weight
        if self.alone is Form.DIFFERENCE:
            return weight.detach() - self.form.compress(weight)
        if self.vanished or self.alone is Form.COMPRESSED:
            return with_idle(self.form.compress(weight), [] if self.form.shares_weight else [weight])
        beta = self.current_beta()
        if isinstance(beta, float) and beta == 1.0:
            return with_idle(weight, self.form.parameters())
        return self.form.blend(weight, beta)


def install_blended_weight(module: nn.Module, name: str, blends: Sequence[BlendedWeight]) -> None:
    """Register blends on a layer's weight, each on what the one before gives.

    The layer keeps its class, its `.weight` and its hooks. One that two smaller ones will replace runs those as soon
    as the original is gone (beta = 0). One whose input is quantized as well runs in both forms while the original
    fades, and their outputs are blended.
    """
    for each in blends:
        parametrize.register_parametrization(module, name, each, unsafe=True)
    blend = blends[0]
    blended_type: Any = type(module)
    recurrent = isinstance(module, nn.RNNBase)
    fast = _weight_property(name, getattr(blended_type, name))
    setattr(blended_type, name, _held_property(name, fast) if recurrent else fast)
    base_forward = blended_type.__mro__[1].forward
    if recurrent:
        blended_type.forward = _recurrent_forward(base_forward)
        blended_type._apply = _recurrent_apply(blended_type.__mro__[1]._apply)
    if blend.form.factored is not None:
        blended_type.forward = _factored_forward(base_forward, name)
    if blends[-1].form.input_quantizer is not None:
        setattr(blended_type, name, _shown_property(name, fast))
        blended_type.forward = _quantized_forward(base_forward, name, len(blends) - 1)


def _weight_property(name: str, slow: property) -> property:
    """PyTorch's property without the two module calls below it, which cost more than blending a small weight."""

    def blended(self: nn.Module) -> Tensor:
        if parametrize._cache_enabled:
            return slow.fget(self)  # type: ignore[misc]
        parametrizations: Any = self._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        original = parametrizations._parameters.get("original")
        # A copy of `nn.DataParallel` holds no parameters; on top there may be further techniques, or a user's own.
        if original is None or len(parametrizations._modules) > 1:
            return slow.fget(self)  # type: ignore[misc]
        return parametrizations._modules["0"].forward(original)

    return property(blended, slow.fset)


_held = threading.local()
"""In `weights`, those of the recurrent layer whose forward pass this thread is in."""


def _held_property(name: str, fast: property) -> property:
    """The property of a recurrent layer, which asks for every weight several times in a forward pass."""

    def blended(self: nn.Module) -> Tensor:
        weights: dict[tuple[int, str], Tensor] | None = getattr(_held, "weights", None)
        if weights is None:
            return fast.fget(self)  # type: ignore[misc]
        if (id(self), name) not in weights:
            weights[id(self), name] = fast.fget(self)  # type: ignore[misc]
        return weights[id(self), name]

    return property(blended, fast.fset)


def _recurrent_forward(base_forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.RNNBase, *arguments: Any, **keywords: Any) -> Any:
        _held.weights = {}
        try:
            output = base_forward(self, *arguments, **keywords)
        finally:
            _held.weights = None
        _forget_graphs(self)
        return output

    return forward


def _recurrent_apply(base_apply: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: nn.RNNBase, *arguments: Any, **keywords: Any) -> Any:
        result = base_apply(self, *arguments, **keywords)
        _forget_graphs(self)
        return result

    return apply


def _forget_graphs(module: nn.RNNBase) -> None:
    """Let a recurrent layer's own list of its weights hold none that nobody could copy with its graph."""
    module._flat_weights = [None if weight is None else weight.detach() for weight in module._flat_weights]
    # It makes the list anew when these are not its weights.
    module._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in module._flat_weights]


def _factored_forward(base_forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Tensor:
        current: Any = self.parametrizations[name][0]  # type: ignore[index]
        if not current.vanished and current.alone is not Form.COMPRESSED:
            output: Tensor = base_forward(self, *arguments, **keywords)
            return output
        # Loading or casting may have put another one in its place.
        current.form.factored.borrow_bias(self._parameters.get("bias"))
        idle = [self.parametrizations[name].original]  # type: ignore[index,union-attr]
        arguments, keywords = with_idle((arguments, keywords), idle)
        replaced: Tensor = current.form.factored(*arguments, **keywords)
        return replaced

    return forward


def _shown_property(name: str, fast: property) -> property:
    """The property of a layer that runs with one weight after the other."""

    def blended(self: nn.Module) -> Tensor:
        parametrizations: Any = self._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        shown = parametrizations._modules["0"].shown
        weight: Tensor = fast.fget(self) if shown is None else shown[0]  # type: ignore[misc]
        return weight

    return property(blended, fast.fset)


def _quantized_forward(base_forward: Callable[..., Any], name: str, position: int) -> Callable[..., Any]:
    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Tensor:
        parametrizations: Any = self.parametrizations[name]  # type: ignore[index]
        current = parametrizations[position]
        beta, form = current.current_beta(), current.form
        output: Tensor
        compressed = current.vanished or current.alone is Form.COMPRESSED
        if not compressed and (current.alone is Form.ORIGINAL or (isinstance(beta, float) and beta == 1.0)):
            output = base_forward(self, *arguments, **keywords)
            return output
        quantized, others = with_first(form.input_quantizer, arguments, keywords)
        if compressed:
            output = base_forward(self, *quantized, **others)
            return output
        modules = list(parametrizations)
        weight = _through(modules[:position], parametrizations.original)
        after = modules[position + 1 :]
        try:
            modules[0].shown = (_through(after, weight),)
            output = base_forward(self, *arguments, **keywords)
            modules[0].shown = (_through(after, form.compress(weight)),)
            other: Tensor = base_forward(self, *quantized, **others)
        finally:
            modules[0].shown = None
        return blend_tensors(output, other, beta, name)

    return forward


def _through(modules: Iterable[nn.Module], weight: Tensor) -> Tensor:
    for module in modules:
        weight = module(weight)
    return weight


def remove_blended_weight(module: nn.Module, name: str, order: tuple[str, ...]) -> None:
    """Give a layer its latent weight back as a plain parameter, in the place among its parameters that it had."""
    # PyTorch takes the weight's property away from the class, which copies of the module share.
    shared: Any = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for parameter in order:
        # Reinserting in the old order keeps `parameters()` as an optimizer or a checkpoint knew it.
        if parameter in module._parameters:
            module._parameters[parameter] = module._parameters.pop(parameter)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def blended_weights(module: nn.Module) -> Iterator[tuple[str, list[BlendedWeight]]]:
    """Yield name and blends of every weight of one module that is in transition; several act in turn."""
    if not parametrize.is_parametrized(module):
        return
    for name, parametrizations in module.parametrizations.items():  # type: ignore[operator,union-attr]
        blends = [blend for blend in parametrizations if isinstance(blend, BlendedWeight)]
        if blends:
            yield name, blends


def compressed_in_turn(blends: Sequence[BlendedWeight], weight: Tensor) -> Tensor:
    """Return what blends make of a latent weight with nothing left of any original."""
    for blend in blends:
        weight = blend.form.compress(weight)
    return weight


def grid_in_turn(blends: Sequence[BlendedWeight], weight: Tensor) -> Grid | None:
    """Return the values that `compressed_in_turn` takes, None where they are any."""
    on_weight = [blend for blend in blends if not blend.form.keeps_weight]
    return on_weight[-1].form.grid(compressed_in_turn(on_weight[:-1], weight)) if on_weight else None
