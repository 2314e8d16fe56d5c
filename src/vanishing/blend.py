"""Where original and compressed form meet: in a layer's weight, or in a block's outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from vanishing.caches import SeparateCaches, cache_places, caches_among, check_alone
from vanishing.compressors.base import Beta, CompressedWeight
from vanishing.distributed import is_distributed
from vanishing.errors import TransitionError
from vanishing.layers.quantized_input import with_first
from vanishing.receipt import Grid


class Comparison(NamedTuple):
    """What looks at both forms in forward passes that are trained on; functions, which copies of a model share.

    Args:
        is_wanted: whether the pass that is under way is such a one.
        keep: takes what the original and what the compressed form have computed from the same inputs, and in a graph
            that is compiled for every beta, whether the original has a share.
    """

    is_wanted: Callable[[], bool]
    keep: Callable[[Any, Any, Tensor | None], None]


class Form(Enum):
    """One of the two forms that are blended."""

    ORIGINAL = "original"
    COMPRESSED = "compressed"


class Blend(nn.Module):
    """Holds beta for one layer or block: a float for eager mode and a tensor, beside it, for compiled graphs.

    A compiled graph reads the tensor, so that it is not compiled anew while beta moves, and `fading`, which changes
    once in a transition: where layers fade one after another, when the last of them has no original left.
    """

    beta_tensor: Tensor
    comparison: Comparison | None = None
    """What looks at both forms at this optimizer step, as long as both are there."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.0
        self.fading = True
        self.register_buffer("beta_tensor", torch.ones(()), persistent=False)

    def set_beta(self, beta: float, *, fading: bool) -> None:
        """Set the original's share, in [0, 1], and whether compiled graphs have to run it."""
        if beta != self.beta:
            # A module's own way to set an attribute costs more than all the rest of a step of the clock.
            vars(self).update(beta=beta)
            self.beta_tensor.fill_(beta)
        if fading != self.fading:
            vars(self).update(fading=fading)

    @property
    def vanished(self) -> bool:
        """Whether the original has no part in what is computed now, and need not run."""
        return not self.fading if torch.compiler.is_compiling() else self.beta == 0.0

    def current_beta(self) -> Beta:
        """Return beta as a tensor while a graph is being compiled, else as a float."""
        return self.beta_tensor if torch.compiler.is_compiling() else self.beta

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # model.half() must not round beta; its device follows the model.
        self.beta_tensor = torch.full((), self.beta, dtype=torch.float32, device=self.beta_tensor.device)
        return self


class _WithIdle(torch.autograd.Function):
    """A tensor as it is, through which parameters that have no part in it get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (gradients[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))


def with_idle(values: Any, parameters: Iterable[Tensor], *, copy: bool = False) -> Any:
    """Return tensors in whose graph the parameters of the form that does not run take part, with zeros.

    Among several processes only: `DistributedDataParallel` waits for the gradient of every parameter.

    Args:
        values: what a form computes from, or what it computed: any nesting of tensors that can be blended.
        parameters: those of the other form.
        copy: whether the model may write into the result, which must not be a view then.
    """
    if not (is_distributed() and torch.is_grad_enabled()):
        return values
    idle = [parameter for parameter in parameters if parameter.requires_grad]
    if not idle:
        return values

    def tied(leaf: Tensor, _: Tensor, __: str) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        result: Tensor = _WithIdle.apply(leaf, *idle)
        return result.clone() if copy else result

    return _combined(values, values, "", tied)


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
        return _blend_tensors(output, other, beta, name)

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


class BlendedBlock(Blend):
    """Original and replacement of a block, blended on their outputs (arXiv 2510.09696, equation 1).

    At beta = 1 only the original runs and at beta = 0 only the replacement. Attributes that it does not have are
    those of the original, and of the replacement at beta = 0, where the model must do with what will be shipped. A
    weight that both have in one shape is blended, too: some modules read a layer's weight and never call the layer.

    Args:
        original: f.
        replacement: g, with the same inputs and outputs.
        name: the block's name, for errors.
    """

    def __init__(self, original: nn.Module, replacement: nn.Module, name: str) -> None:
        super().__init__()
        self.original = original
        self.replacement = replacement
        self._name = name
        self._cache_places = cache_places(original, replacement)
        # Not `train()`, which would thaw a normalization that is kept in evaluation mode inside of the block.
        self.training = original.training

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Return `beta f(...) + (1 - beta) g(...)` for every floating tensor of the outputs."""
        beta, vanished = self.current_beta(), self.vanished
        is_original = isinstance(beta, float) and beta == 1.0
        caches = caches_among(arguments, keywords) if self._cache_places else []
        compared = not vanished and self.comparison is not None and self.comparison.is_wanted()
        if compared or not (vanished or is_original):
            return (self._with_caches if caches else self._between)(arguments, keywords, beta, caches)
        if caches and not torch.compiler.is_compiling():
            check_alone(caches, self._cache_places, repr(self._name))
        running, idle = (self.replacement, self.original) if vanished else (self.original, self.replacement)
        return with_idle(running(*arguments, **keywords), idle.parameters(), copy=True)

    def _between(self, arguments: tuple[Any, ...], keywords: dict[str, Any], beta: Beta, caches: list[Any]) -> Any:
        before = _writes(arguments, keywords)
        separate = SeparateCaches(caches, self._cache_places, repr(self._name)) if caches else None
        original = self.original(*arguments, **keywords)
        if not _same(before, _writes(arguments, keywords)):
            raise TransitionError(
                f"the original of {self._name}(...) writes into its input, which the replacement would then get "
                f"instead. Let it write into a copy (inplace=False), or replace a block around it."
            )
        with contextlib.nullcontext() if separate is None else separate.of_replacement():
            replacement = self.replacement(*arguments, **keywords)
        if self.comparison is not None and self.comparison.is_wanted():
            self.comparison.keep(original, replacement, self.beta_tensor > 0 if torch.compiler.is_compiling() else None)
        if isinstance(beta, float) and beta == 1.0:
            return with_idle(original, self.replacement.parameters(), copy=True)
        return blend_outputs(original, replacement, beta, f"{self._name}(...)")

    # A cache's layers are exchanged in between, which no graph can hold; the forms themselves are compiled.
    _with_caches = torch.compiler.disable(_between, recursive=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Copying and unpickling look for special methods, which are this module's own.
            if name in ("original", "replacement", "beta", "fading", "vanished", "_standing") or name.startswith("__"):
                raise
        try:
            value = getattr(self._standing, name)
        except AttributeError:
            if not self.vanished:
                raise
            raise AttributeError(
                f"{type(self.replacement).__name__!r}, the replacement of {type(self.original).__name__!r}, has no "
                f"attribute {name!r}. If the model reads it, set it in the factory."
            ) from None
        return self._blended(name, value) if isinstance(value, Tensor) and not self.vanished else value

    def __bool__(self) -> bool:
        # A module with a length is false when it is empty.
        return bool(self._standing)

    def __len__(self) -> int:
        return len(self._standing)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._standing)  # type: ignore[call-overload]

    def __getitem__(self, key: Any) -> Any:
        return self._standing[key]  # type: ignore[index]

    def _blended(self, name: str, value: Tensor) -> Tensor:
        beta, other = self.current_beta(), getattr(self.replacement, name, None)
        if not isinstance(other, Tensor) or other.shape != value.shape or (isinstance(beta, float) and beta == 1.0):
            return value
        return _blend_tensors(value, other, beta, name)

    @property
    def _standing(self) -> nn.Module:
        """The form that the rest of the model sees when it does not call the block."""
        return self.replacement if self.vanished else self.original


def blend_outputs(original: Any, replacement: Any, beta: Beta, path: str) -> Any:
    """Return `beta * original + (1 - beta) * replacement` through tuples, lists, mappings and dataclasses.

    Floating and complex tensors are blended in the original's type; everything else is taken from the replacement.

    Args:
        original: what f returned.
        replacement: what g returned.
        beta: the original's share.
        path: what the outputs are called in errors.

    Raises:
        TransitionError: the two differ in structure or in the shape of a tensor.
    """
    return _combined(original, replacement, path, lambda f, g, where: _blend_tensors(f, g, beta, where))


def _combined(original: Any, replacement: Any, path: str, combine: Callable[[Tensor, Tensor, str], Tensor]) -> Any:
    if isinstance(original, Tensor) and isinstance(replacement, Tensor):
        return combine(original, replacement, path)
    if isinstance(original, Mapping) and isinstance(replacement, Mapping):
        if set(original) != set(replacement):
            raise _mismatch(path, f"keys {sorted(original)}", f"keys {sorted(replacement)}")
        items = {k: _combined(original[k], replacement[k], f"{path}[{k!r}]", combine) for k in original}
        # transformers' outputs are ordered mappings that are also dataclasses, and are made from keywords.
        if isinstance(original, defaultdict):
            return defaultdict(original.default_factory, items)
        return type(original)(**items) if dataclasses.is_dataclass(original) else type(original)(items)  # type: ignore[call-arg]
    if isinstance(original, (tuple, list)) and isinstance(replacement, (tuple, list)):
        if len(original) != len(replacement):
            raise _mismatch(path, f"{len(original)} items", f"{len(replacement)} items")
        pairs = enumerate(zip(original, replacement, strict=True))
        sequence = [_combined(a, b, f"{path}[{i}]", combine) for i, (a, b) in pairs]
        return type(original)(*sequence) if hasattr(original, "_fields") else type(original)(sequence)
    if dataclasses.is_dataclass(original) and type(original) is type(replacement):
        names = [f.name for f in dataclasses.fields(original)]
        values = {n: _combined(getattr(original, n), getattr(replacement, n), f"{path}.{n}", combine) for n in names}
        return dataclasses.replace(original, **values)  # type: ignore[type-var]
    if _holds_tensors(original) or _holds_tensors(replacement):
        raise _mismatch(path, type(original).__name__, type(replacement).__name__)
    return replacement


def _writes(*inputs: Any) -> list[tuple[Tensor, int]]:
    """Every tensor among the inputs, in containers and objects too, and how often it was written to."""
    if torch.compiler.is_compiling():
        return []
    found: list[tuple[Tensor, int]] = []
    seen: set[int] = set()
    waiting = tree_leaves(inputs)
    while waiting:
        leaf = waiting.pop()
        if isinstance(leaf, Tensor):
            found.append((leaf, 0 if leaf.is_inference() else leaf._version))
        elif _is_opaque(leaf) and id(leaf) not in seen:
            seen.add(id(leaf))
            waiting += tree_leaves(vars(leaf))
    return found


def _is_opaque(value: Any) -> bool:
    """Whether a value is an object that may hold tensors for a block to change, as a cache of the user's own does."""
    # A cache of transformers is known, and kept apart for the two forms.
    return hasattr(value, "__dict__") and not callable(value) and not caches_among([value], {})


def _same(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    pairs = zip(before, after, strict=False)
    return len(before) == len(after) and all(a is b and old == new for (a, old), (b, new) in pairs)


def _holds_tensors(output: Any) -> bool:
    return isinstance(output, (Tensor, Mapping, tuple, list)) or dataclasses.is_dataclass(output)


def _blend_tensors(original: Tensor, replacement: Tensor, beta: Beta, path: str) -> Tensor:
    if original.shape != replacement.shape:
        raise _mismatch(path, f"shape {tuple(original.shape)}", f"shape {tuple(replacement.shape)}")
    if not (original.is_floating_point() or original.is_complex()):
        return replacement
    # Not `lerp`, whose difference of two infinities is no number: scores are masked with minus infinity.
    first, second = original * beta, replacement.to(original.dtype) * (1 - beta)
    if isinstance(beta, Tensor):
        # A compiled graph blends at 0 and 1 too, and infinity times 0 is no number either.
        first, second = first.where(beta > 0, 0), second.where(beta < 1, 0)
    return first + second


def _mismatch(path: str, expected: str, got: str) -> TransitionError:
    return TransitionError(
        f"a replacement must return what the original returns, but {path} is {expected} from the original and {got} "
        f"from the replacement. Change the factory of the replacement."
    )
