"""What blocks and models return, in whatever structure, tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vanishing.compressors.base import Beta
from vanishing.errors import TransitionError


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
    return combined(original, replacement, path, lambda f, g, where: blend_tensors(f, g, beta, where))


def combined(original: Any, replacement: Any, path: str, combine: Callable[[Tensor, Tensor, str], Tensor]) -> Any:
    """Return what `combine` makes of the tensors of two outputs and their names, in the structure of the outputs.

    Raises:
        TransitionError: the two differ in structure.
    """
    if isinstance(original, Tensor) and isinstance(replacement, Tensor):
        return combine(original, replacement, path)
    if isinstance(original, Mapping) and isinstance(replacement, Mapping):
        if set(original) != set(replacement):
            raise _mismatch(path, f"keys {sorted(original)}", f"keys {sorted(replacement)}")
        items = {k: combined(original[k], replacement[k], f"{path}[{k!r}]", combine) for k in original}
        # transformers' outputs are ordered mappings that are also dataclasses, and are made from keywords.
        if isinstance(original, defaultdict):
            return defaultdict(original.default_factory, items)
        return type(original)(**items) if dataclasses.is_dataclass(original) else type(original)(items)  # type: ignore[call-arg]
    if isinstance(original, (tuple, list)) and isinstance(replacement, (tuple, list)):
        if len(original) != len(replacement):
            raise _mismatch(path, f"{len(original)} items", f"{len(replacement)} items")
        pairs = enumerate(zip(original, replacement, strict=True))
        sequence = [combined(a, b, f"{path}[{i}]", combine) for i, (a, b) in pairs]
        return type(original)(*sequence) if hasattr(original, "_fields") else type(original)(sequence)
    if dataclasses.is_dataclass(original) and type(original) is type(replacement):
        names = [f.name for f in dataclasses.fields(original)]
        values = {n: combined(getattr(original, n), getattr(replacement, n), f"{path}.{n}", combine) for n in names}
        return dataclasses.replace(original, **values)  # type: ignore[type-var]
    if _holds_tensors(original) or _holds_tensors(replacement):
        raise _mismatch(path, type(original).__name__, type(replacement).__name__)
    return replacement


def _holds_tensors(output: Any) -> bool:
    return isinstance(output, (Tensor, Mapping, tuple, list)) or dataclasses.is_dataclass(output)


def blend_tensors(original: Tensor, replacement: Tensor, beta: Beta, path: str) -> Tensor:
    """Return `beta * original + (1 - beta) * replacement` in the original's type; integers are the replacement's.

    Raises:
        TransitionError: the two differ in shape.
    """
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
