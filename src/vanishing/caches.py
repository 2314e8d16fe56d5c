"""The caches of transformers between the two forms of a block: each form keeps keys, values and states of its own."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from vanishing.errors import TransitionError

_TWIN = "_vanishing_twin"
_KEPT_TOGETHER = (
    "offload", "prefetch", "reset", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices",
    "activate_past_recording",
)  # fmt: skip
"""What generation does to a layer of a cache between two passes: to beams, to tokens that it takes back."""


def caches_among(arguments: Sequence[Any], keywords: dict[str, Any]) -> list[Any]:
    """Return the caches of transformers among a block's arguments; does not import transformers."""
    library = sys.modules.get("transformers.cache_utils")
    if library is None:
        return []
    return [value for value in (*arguments, *keywords.values()) if isinstance(value, library.Cache)]


def cache_places(*forms: nn.Module) -> list[int]:
    """Return the numbers of the layers of a cache that modules of transformers below these write to."""
    numbers = (vars(module).get("layer_idx") for form in forms for module in form.modules())
    return sorted({number for number in numbers if isinstance(number, int)})


class SeparateCaches:
    """Caches in which every layer that a block writes to has a twin, for the block's other form.

    The twin is an attribute of the layer, and what generation does to the one it does to the other.

    Args:
        caches: the caches, before the original is called.
        places: numbers of the layers that the block writes to.
        who: the block's name, for errors.

    """

    def __init__(self, caches: Sequence[Any], places: Iterable[int], who: str) -> None:
        single = _single(caches)
        self._who = who
        self._slots: list[tuple[list[Any], int, Any, Any]] = []
        for cache in single:
            for number in places:
                while cache.layer_class_to_replicate is not None and len(cache.layers) <= number:
                    cache.layers.append(cache.layer_class_to_replicate())
                if number < len(cache.layers) and (twin := _twin_of(cache.layers[number])) is not None:
                    self._slots.append((cache.layers, number, cache.layers[number], twin))
        self._places = set(places)
        self._layers = [cache.layers for cache in single]
        pairs = [cache for cache in caches if cache not in single]
        self._flags = [(cache.is_updated, dict(cache.is_updated)) for cache in pairs]
        self._before = self._elsewhere()

    @contextlib.contextmanager
    def of_replacement(self) -> Iterator[None]:
        """Let the replacement see its own side, as it was before the original was called.

        Raises:
            TransitionError: one of the forms writes to what has no twin.
        """
        self._check("original")
        after = [dict(flags) for flags, _ in self._flags]
        self._set_flags([before for _, before in self._flags])
        for layers, number, _, twin in self._slots:
            layers[number] = twin
        try:
            yield
        finally:
            for layers, number, layer, _ in self._slots:
                layers[number] = layer
            self._set_flags(after)
        self._check("replacement")

    def _set_flags(self, values: Sequence[dict[Any, bool]]) -> None:
        for (flags, _), value in zip(self._flags, values, strict=True):
            flags.clear()
            flags.update(value)

    def _elsewhere(self) -> list[tuple[int, Tensor, int]]:
        """What the caches hold in layers without a twin: number, tensor, and how often it was written to."""
        mine = {id(layer) for *_, layer, _ in self._slots}
        return [
            (number, tensor, 0 if tensor.is_inference() else tensor._version)
            for layers in self._layers
            for number, layer in enumerate(layers)
            if id(layer) not in mine
            for tensor in _contents(layer)
        ]

    def _check(self, form: str) -> None:
        known = {id(tensor): version for _, tensor, version in self._before}
        written = {number for number, tensor, version in self._elsewhere() if known.get(id(tensor)) != version}
        if written & self._places:
            raise _filled_before(self._who)
        if written:
            raise TransitionError(
                f"the {form} of {self._who} writes to a layer of the cache that no `layer_idx` below it names, so the "
                f"two forms cannot be kept apart. Give the module that writes the number as its layer_idx, or call the "
                f"model with use_cache=False until the transition is finished."
            )


def check_alone(caches: Sequence[Any], places: Iterable[int], who: str) -> None:
    """Raise `TransitionError` if a cache holds what both forms of a block wrote, of which now only one runs."""
    for cache in _single(caches):
        held = [cache.layers[number] for number in places if number < len(cache.layers)]
        if any(_TWIN in vars(layer) and not _is_empty(layer) for layer in held):
            raise _filled_before(who)


def hold_place(cache: Any, number: int, hidden: Tensor) -> None:
    """Let a layer of a cache count tokens, of which it holds next to nothing.

    Args:
        cache: a cache of transformers.
        number: number of the layer.
        hidden: (batch, tokens, features), what the layer would be computed from.
    """
    attention = _single([cache])[0]
    layer = attention.layers[number] if number < len(attention.layers) else None
    states: dict[int, bool] = {} if layer is None else vars(layer).get("has_previous_state", {})
    states.update(dict.fromkeys(states, True))
    if layer is not None and not hasattr(layer, "get_seq_length"):
        # Linear attention has states alone.
        return
    heads = sizes = None
    if layer is not None and layer.is_initialized:
        heads, sizes = layer.keys.shape[1], (layer.keys.shape[-1], layer.values.shape[-1])
    batch, tokens = hidden.shape[:2]
    keys, values = (hidden.new_zeros(batch, heads or 1, tokens, size) for size in sizes or (1, 1))
    attention.update(keys, values, number)


def _single(caches: Sequence[Any]) -> list[Any]:
    """The caches, with the two that an encoder-decoder cache consists of in its place."""
    library: Any = sys.modules["transformers.cache_utils"]
    parts: list[Any] = []
    for cache in caches:
        is_pair = isinstance(cache, library.EncoderDecoderCache)
        parts += [cache.self_attention_cache, cache.cross_attention_cache] if is_pair else [cache]
    return parts


def _twin_of(layer: Any) -> Any | None:
    """The twin of a layer; None where something was written before, as by the other attention of a block."""
    if _TWIN in vars(layer) or not _is_empty(layer):
        return vars(layer).get(_TWIN)
    twin = copy.deepcopy(layer)
    vars(layer)[_TWIN] = twin
    layer.__class__ = _with_twin(type(layer))  # type: ignore[arg-type]
    return twin


def _filled_before(who: str) -> TransitionError:
    return TransitionError(
        f"{who} got a cache that was filled at another beta, when other forms of it ran. Begin a new cache whenever "
        f"beta has changed."
    )


def _is_empty(layer: Any) -> bool:
    # One of linear attention has states and no length, a hybrid one both.
    started = any(vars(layer).get("has_previous_state", {}).values())
    return not started and (not hasattr(layer, "get_seq_length") or bool(layer.get_seq_length() == 0))


def _contents(layer: Any) -> list[Tensor]:
    """The tensors that a layer of a cache holds, those of linear attention in dictionaries too."""
    values = [v for value in vars(layer).values() for v in (value.values() if isinstance(value, dict) else (value,))]
    return [value for value in values if isinstance(value, Tensor)]


@functools.cache
def _with_twin(kind: Any) -> type:
    """A subclass whose layers have a twin to which happens what happens to them."""

    def on_both(name: str) -> Any:
        def method(self: Any, *arguments: Any, **keywords: Any) -> None:
            getattr(kind, name)(self, *arguments, **keywords)
            getattr(vars(self)[_TWIN], name)(*arguments, **keywords)

        return method

    methods = {name: on_both(name) for name in _KEPT_TOGETHER if hasattr(kind, name)}
    # A class with a layer type would register itself in the place of its base.
    return type(kind.__name__, (kind,), {"_layer_type": None, **methods})
