"""Which modules a rule means: by name, by type or by what the user says."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vanishing.config import Config
from vanishing.errors import ConfigError

_FLAGS = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE}


@dataclass(frozen=True)
class Pattern(Config, ABC):
    """A test on a module's full name and the module itself."""

    @abstractmethod
    def matches(self, name: str, module: nn.Module) -> bool:
        """Whether the module under this name is meant."""

    @property
    @abstractmethod
    def explicit(self) -> bool:
        """Whether it names single modules or a type, so that what it means must be possible."""

    @property
    @abstractmethod
    def text(self) -> str:
        """How messages show it."""


@dataclass(frozen=True)
class Glob(Pattern):
    """A shell pattern on the full name, in which `*` crosses dots."""

    pattern: str

    def matches(self, name: str, module: nn.Module) -> bool:
        return fnmatch.fnmatchcase(name, self.pattern)

    @property
    def explicit(self) -> bool:
        return not any(c in self.pattern for c in "*?[")

    @property
    def text(self) -> str:
        return repr(self.pattern)


@dataclass(frozen=True)
class Regex(Pattern):
    """A regular expression that is searched for in the full name."""

    pattern: str

    def check(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"Regex(pattern={self.pattern!r}) is not a regular expression: {error}.") from None

    def matches(self, name: str, module: nn.Module) -> bool:
        return re.search(self.pattern, name) is not None

    @property
    def explicit(self) -> bool:
        return False

    @property
    def text(self) -> str:
        return f"re.compile({self.pattern!r})"


@dataclass(frozen=True)
class OfType(Pattern):
    """A module type with its subclasses, by full name, so that a file never imports one."""

    type: str

    def matches(self, name: str, module: nn.Module) -> bool:
        return any(type_name(base) == self.type for base in type(module).__mro__)

    @property
    def explicit(self) -> bool:
        return True

    @property
    def text(self) -> str:
        return self.type


@dataclass(frozen=True)
class Where(Pattern):
    """A predicate on name and module; it is written to files by its name only, and cannot be read from one."""

    predicate: Callable[..., Any]

    def matches(self, name: str, module: nn.Module) -> bool:
        return bool(self.predicate(name, module))

    @property
    def explicit(self) -> bool:
        return False

    @property
    def text(self) -> str:
        return f"the predicate {getattr(self.predicate, '__name__', self.predicate)!r}"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "predicate": getattr(self.predicate, "__qualname__", repr(self.predicate))}

    @classmethod
    def schema(cls) -> dict[str, Any]:
        return {"not": {}, "description": "A predicate, which no file can hold."}

    @classmethod
    def _build(cls, fields: dict[str, Any]) -> Config:
        raise ConfigError("a rule whose key is a predicate cannot be read from a file. Make the recipe in Python.")


def nearest(wanted: str, names: Iterable[str]) -> list[str]:
    """Return up to three names that are like a pattern, or have a part that is like it.

    Args:
        wanted: a glob, a regular expression or a name.
        names: dotted names.
    """
    wanted = re.sub(r"[\\^$()]", "", wanted).strip("*?.")
    width = wanted.count(".") + 1
    parts: dict[str, str] = {}
    for name in names:
        pieces = name.split(".")
        for start in range(max(len(pieces) - width, 0) + 1):
            # The name up to the part that is alike: of many layers in one block, the block.
            parts.setdefault(".".join(pieces[start : start + width]), ".".join(pieces[: start + width]))
    found = difflib.get_close_matches(wanted, parts, n=3)
    return list(dict.fromkeys(parts[part] for part in found))


def type_name(kind: type) -> str:
    """Return module and qualified name of a type."""
    return f"{kind.__module__}.{kind.__qualname__}"


def to_pattern(key: Any) -> Pattern:
    """Return the pattern of a rule's key.

    Raises:
        ConfigError: the key is none of glob, compiled regex, module type and predicate.
    """
    if isinstance(key, Pattern):
        return key
    if isinstance(key, str):
        return Glob(key)
    if isinstance(key, re.Pattern) and isinstance(key.pattern, str):
        flags = "".join(letter for letter, flag in _FLAGS.items() if key.flags & flag)
        return Regex(f"(?{flags}){key.pattern}" if flags else key.pattern)
    if inspect.isclass(key) and issubclass(key, nn.Module):
        return OfType(type_name(key))
    if callable(key) and not inspect.isclass(key):
        return Where(key)
    raise ConfigError(
        f"{key!r} cannot be the key of a rule: expected a glob, a compiled regular expression, a module type or a "
        f"function of name and module, got {type(key).__name__}."
    )


def pattern_to_plain(pattern: Pattern) -> Any:
    """Return how a recipe's file writes a pattern: a glob as a string, the others as a mapping."""
    if isinstance(pattern, Glob):
        return pattern.pattern
    return pattern.to_dict()


def pattern_from_plain(data: Any) -> Pattern:
    """Return the pattern that `pattern_to_plain` wrote."""
    if isinstance(data, (int, float)):
        raise ConfigError(f"a pattern is a text, got the number {data!r}. Put it in quotes, as in '{data}'.")
    return Glob(data) if isinstance(data, str) else Pattern.from_dict(data)
