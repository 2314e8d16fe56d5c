"""Frozen, validated settings that round-trip through plain dictionaries, and so through YAML and JSON."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Self

from pydantic import InstanceOf, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from vanishing.errors import ConfigError

_KINDS: dict[str, type[Config]] = {}


@dataclass(frozen=True)
class Config:
    """Settings of one technique or one schedule: compared by value, never changed, checked when they are made.

    A subclass is a frozen dataclass. The annotation of a field is its contract: `Annotated[float, Field(ge=0, le=1,
    description="...")]` (pydantic's `Field`) gives the range that `__post_init__` checks, the words of the error and
    the entry in the JSON schema. What depends on two fields at once goes into `check`.

    Every subclass has a `kind`, its name in files: the class name in snake case unless the class sets its own. Two
    classes cannot share one. A base class, which files cannot name, lists `ABC` among its bases.

    Laws: `Config.from_dict(c.to_dict()) == c`, and `to_dict` holds only strings, numbers, booleans, lists and
    dictionaries.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    kind: ClassVar[str] = "config"

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        # Set on the class itself, so that `dataclass` does not write its own, which shows every default.
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Config.__repr__  # type: ignore[method-assign]
        if "kind" not in cls.__dict__:
            cls.kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        taken = _KINDS.get(cls.kind, cls)
        # A class that is defined again, as a notebook's cell does, replaces itself.
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"{cls.__module__}.{cls.__qualname__} cannot have the kind {cls.kind!r}: it is the name of "
                f"{taken.__module__}.{taken.__qualname__} in files. Rename the class, or set its `kind`."
            )
        if ABC not in cls.__bases__:
            _KINDS[cls.kind] = cls

    def __post_init__(self) -> None:
        for name, (annotation, adapter) in _adapters(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            try:
                checked = adapter.validate_python(value)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise ConfigError(_field_message(self, name, value, annotation, reason)) from None
            # pydantic reads "4" as 4 and True as 1; in settings both are mistakes.
            if isinstance(value, (bool, str)) and not isinstance(checked, (type(value), Enum)):
                reason = f"Got a {type(value).__name__}"
                raise ConfigError(_field_message(self, name, value, annotation, reason))
            object.__setattr__(self, name, checked)
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where two fields contradict each other; by default they cannot."""

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and every field that differs from its default, as plain values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {"kind": self.kind} | {name: _plain(value) for name, value in fields.items()}

    def __repr__(self) -> str:
        values = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        shown = (
            f"{name}={value}" if isinstance(value, Enum) else f"{name}={value!r}"
            for name, value, default in values
            if value != default
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """Return the JSON schema of what `to_dict` writes."""
        return kind_schema(cls)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the settings that `to_dict` wrote.

        Args:
            data: a mapping with `kind` and the fields of that kind.

        Raises:
            ConfigError: `kind` is missing, unknown, or not one of `cls`; or a field is unknown or out of range.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
            raise ConfigError(f"expected a mapping with `kind` for a {cls.__name__}, got {data!r}.")
        fields = {str(name): value for name, value in data.items()}
        kind = fields.pop("kind")
        found = {c.kind: c for c in concrete_kinds(cls)}
        if kind not in found:
            near = difflib.get_close_matches(kind, found, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(found))}."
            raise ConfigError(
                f"{kind!r} is not a known {cls.__name__}. {hint} A class of your own must be imported first."
            )
        return found[kind]._build(fields)  # type: ignore[return-value]

    @classmethod
    def _build(cls, fields: dict[str, Any]) -> Config:
        known = {f.name: _is_required(f) for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {unknown[0]!r}. It has: {', '.join(sorted(known)) or 'none'}."
            )
        missing = [name for name, is_required in known.items() if is_required and name not in fields]
        if missing:
            raise ConfigError(f"{cls.__name__} needs {missing[0]!r}, got only {fields!r}. Add it.")
        return cls(**{name: _revive(value) for name, value in fields.items()})


def concrete_kinds(base: type[Config]) -> list[type[Config]]:
    """Return every known kind that derives from `base` and can be made."""
    return [c for c in _KINDS.values() if issubclass(c, base) and not inspect.isabstract(c)]


def json_schema(annotation: Any) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a field's annotation, with kinds as references into `$defs`."""
    classes = _config_classes(annotation)
    if classes:
        kinds = sorted({found.kind for c in classes for found in concrete_kinds(c)})
        choices = [{"$ref": f"#/$defs/{kind}"} for kind in kinds]
        if typing.get_origin(annotation) is tuple:
            return {"type": "array", "items": {"oneOf": choices}}
        return {"oneOf": [*choices, {"type": "null"}] if type(None) in typing.get_args(annotation) else choices}
    return TypeAdapter(annotation).json_schema()


def kind_schema(kind: type[Config]) -> dict[str, Any]:
    """Return the JSON schema of one kind: `kind` and its fields."""
    properties: dict[str, Any] = {"kind": {"const": kind.kind}}
    required = ["kind"]
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        properties[field.name] = json_schema(hints[field.name])
        if _is_required(field):
            required.append(field.name)
    return {
        "type": "object",
        "description": (inspect.getdoc(kind) or kind.__name__).split("\n")[0],
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _config_classes(annotation: Any) -> list[type[Config]]:
    """The settings classes that an annotation names, alone, in a union (None apart) or as a tuple of them."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    holds_others = typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple)
    named = typing.get_args(annotation) if holds_others else (annotation,)
    members = [m for m in named if m not in (type(None), Ellipsis)]
    return members if all(inspect.isclass(m) and issubclass(m, Config) for m in members) else []


@functools.cache
def _adapters(cls: type[Config]) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: (hints[f.name], _adapter(hints[f.name])) for f in dataclasses.fields(cls)}


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    classes = _config_classes(annotation)
    if not classes:
        return TypeAdapter(annotation)
    # Settings inside settings checked themselves when they were made: their type is all there is to see.
    union: Any = functools.reduce(lambda a, b: a | b, [InstanceOf[c] for c in classes])  # type: ignore[misc, valid-type]
    if typing.get_origin(annotation) is tuple:
        return TypeAdapter(tuple[union, ...])
    return TypeAdapter(union | None if type(None) in typing.get_args(annotation) else union)


def _field_message(config: Config, name: str, value: Any, annotation: Any, reason: str) -> str:
    said = [
        m.description for m in getattr(annotation, "__metadata__", ()) if isinstance(m, FieldInfo) and m.description
    ]
    who = f"{type(config).__name__}({name}={value!r})"
    classes = _config_classes(annotation)
    if classes:
        return f"{who}: expected {' or '.join(c.__name__ for c in classes)}, got {type(value).__name__}."
    expected = f"{name} is {said[0]}" if said else f"{name} has the wrong type"
    return f"{who}: {expected}. {reason}."


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _revive(value: Any) -> Any:
    if isinstance(value, Mapping) and "kind" in value:
        return Config.from_dict(value)
    if isinstance(value, list):
        return tuple(_revive(item) for item in value)
    return value
