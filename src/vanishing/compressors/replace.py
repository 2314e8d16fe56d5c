"""Replacement: a user's own module fades in for a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vanishing.compressors.base import BlockCompressor
from vanishing.errors import ConfigError

Factory = Callable[[nn.Module], nn.Module]

_FACTORIES: dict[str, Factory] = {}


@dataclass(frozen=True)
class Replace(BlockCompressor):
    """Replace a block by the module that a factory makes for it; the two are blended on their outputs.

    The factory is called with the block and returns a new module that takes the same arguments and returns tensors of
    the same shapes, nested in the same way. Files hold only the factory's name: to load a model or a recipe that
    names it, make a `Replace` of the same factory first.

    Args:
        factory: block -> its compressed form.
        name: what files call the factory; its module and qualified name if not given.

    Raises:
        ConfigError: the factory cannot be called, or has no name of its own (as a lambda, or a function inside of
            another) and none was given.

    >>> Replace(lambda block: nn.Identity(), name="nothing").to_dict()
    {'kind': 'replace', 'factory': 'nothing'}
    """

    factory: Callable[..., Any]
    _: KW_ONLY
    name: str | None = None

    def __repr__(self) -> str:
        return f"Replace({self.name})"

    def check(self) -> None:
        if self.name is None:
            qualified = getattr(self.factory, "__qualname__", None)
            if qualified is None or "<" in qualified:
                raise ConfigError(
                    f"Replace(factory={self.factory!r}): the factory has no name of its own for the file. Give "
                    f"one with name=."
                )
            object.__setattr__(self, "name", f"{self.factory.__module__}:{qualified}")
        _FACTORIES[str(self.name)] = self.factory

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "factory": self.name}

    @classmethod
    def schema(cls) -> dict[str, Any]:
        name = {"type": "string", "description": "the name of a factory that is known in the process"}
        properties = {"kind": {"const": cls.kind}, "factory": name}
        return {
            "type": "object",
            "description": "Replace a block by the module that a factory makes for it.",
            "properties": properties,
            "required": ["kind", "factory"],
            "additionalProperties": False,
        }

    @classmethod
    def _build(cls, fields: dict[str, Any]) -> Replace:
        name = fields.get("factory")
        factory = find_factory(name) if isinstance(name, str) else None
        if factory is None or set(fields) != {"factory"}:
            raise ConfigError(f"Replace names the factory {name!r}, which is not known here. {how_to_register(name)}")
        return cls(factory, name=name)

    def build(self, block: nn.Module) -> nn.Module:
        return build_replacement(self.factory, block, str(self.name))


def find_factory(name: str) -> Factory | None:
    """Return the factory of that name of a `Replace` made in this process, None where there is none."""
    return _FACTORIES.get(name)


def how_to_register(name: object) -> str:
    """Return what a user does to make a factory known."""
    return f"Import the code that defines it and make vanishing.Replace(<the factory>, name={name!r}) first."


def build_replacement(factory: Factory, block: nn.Module, name: str) -> nn.Module:
    """Return what a factory makes for a block, on the block's device, in its type and mode.

    Raises:
        ConfigError: the factory does not return a new module.
    """
    try:
        module = factory(block)
    except Exception as error:
        error.add_note(f"This happened in the factory {name!r}, called with a {type(block).__name__}.")
        raise
    if not isinstance(module, nn.Module) or module is block:
        got = "the block itself" if module is block else type(module).__name__
        raise ConfigError(f"the factory {name!r} must return a new nn.Module for a block, got {got}.")
    _adapt(module, block)
    return module


@torch.no_grad()
def _adapt(module: nn.Module, block: nn.Module) -> None:
    """Bring a replacement to the block's device, type and mode, but for those parts that it has from the block."""
    like = next((p for p in block.parameters() if p.is_floating_point()), None)
    kept, held = set(block.modules()), {id(t) for t in (*block.parameters(), *block.buffers())}

    def convert(tensor: Tensor) -> Tensor:
        if like is None or id(tensor) in held:
            return tensor
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)

    for part in module.modules():
        if part not in kept:
            part._apply(convert, recurse=False)
            part.training = block.training
