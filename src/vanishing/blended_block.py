"""Original and replacement of a block, blended on what they return."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vanishing.blend import Blend, with_idle
from vanishing.caches import SeparateCaches, cache_places, caches_among, check_alone
from vanishing.compressors.base import Beta
from vanishing.distillation import relative_distance
from vanishing.errors import TransitionError
from vanishing.outputs import blend_outputs, blend_tensors


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
            has_a_share = self.beta_tensor > 0 if torch.compiler.is_compiling() else None
            self.comparison.keep(relative_distance(original, replacement), has_a_share)
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
        return blend_tensors(value, other, beta, name)

    @property
    def _standing(self) -> nn.Module:
        """The form that the rest of the model sees when it does not call the block."""
        return self.replacement if self.vanished else self.original


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
