"""Recipes: which module gets which technique, and when."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

from vanishing.compressors import Chain, Compressor
from vanishing.config import Config, concrete_kinds
from vanishing.distillation import Distillation
from vanishing.errors import ConfigError
from vanishing.granularity import Granularity
from vanishing.patterns import Pattern, Where, pattern_from_plain, pattern_to_plain, to_pattern
from vanishing.schedules import Adaptive, Schedule, Staggered

if TYPE_CHECKING:
    from vanishing.plan import Plan

_NO_RAMPS = (Staggered, Adaptive)
_FIELDS = {"rules", "schedule", "ignore", "ramp", "freeze_original", "distillation"}

Key = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Rule(Config):
    """A technique with a schedule of its own.

    Args:
        compressor: the technique.
        schedule: beta for the modules of this rule; None for the recipe's.
        ramp: ramp for the modules of this rule; None for the recipe's.
        schedules: in the place of `schedule`, a beta for each technique of a chain, in their order: each of them blends
            what the ones before leave with what it makes of that.

    Raises:
        ConfigError: not one schedule for each technique of a chain, or a ramp that cannot drive the technique.
    """

    compressor: Compressor
    schedule: Schedule | None = None
    ramp: Schedule | None = None
    schedules: tuple[Schedule, ...] = ()

    def check(self) -> None:
        if self.ramp is not None:
            check_ramp(self.compressor, self.ramp)
        if not self.schedules:
            return
        if self.schedule is not None:
            raise ConfigError("Rule(schedule=..., schedules=...): a rule takes one of the two. Drop the other.")
        if not isinstance(self.compressor, Chain):
            raise ConfigError(
                f"Rule(schedules=...) is for a chain such as MagnitudePruning(0.5) | Quantization(bits=4), and "
                f"{self.compressor!r} is one technique. Use `schedule`."
            )
        if len(self.compressor.compressors) != len(self.schedules):
            raise ConfigError(
                f"Rule(schedules=...): expected one schedule for each technique of a chain, got {len(self.schedules)} "
                f"for {len(self.compressor.compressors)}, {self.compressor!r}. Correct their number, or use `schedule`."
            )

    def resolved(self, length: int) -> Rule:
        """Return the rule for a training of `length` optimizer steps."""
        schedule, ramp = (None if each is None else each.resolved(length) for each in (self.schedule, self.ramp))
        return Rule(self.compressor, schedule, ramp, tuple(each.resolved(length) for each in self.schedules))


@dataclass(frozen=True, init=False)
class Recipe:
    """Ordered rules for a whole model.

    Args:
        rules: key -> technique. A key is a glob on the module's full name (`*` crosses dots), a compiled regular
            expression, a module type (with its subclasses) or a predicate on name and module; the first rule that
            matches a module wins. A value is a compressor, or a `Rule` with a schedule of its own.
        ignore: keys of modules that are left alone, with everything below them.
        schedule: beta, the original's share, at every optimizer step.
        ramp: falls from 1 to 0 and drives the strength of the techniques from none to full (1 - ramp): with
            `StepSchedule(at=0)` as schedule this is a technique's own iterative way, gradual pruning for instance.
        freeze_original: do not train what only the original form has, where the compressed one has weights of its own
            (low rank, replaced blocks). Saves the gradient and the optimizer's state of every original.
        distillation: what `Transition.auxiliary_loss` lets the model learn from the original: a `LocalLoss`, a
            `Teacher`, or both.

    Raises:
        ConfigError: a rule, a key, a schedule or a distillation is of the wrong type; or a technique has no strength to
            ramp.

    >>> from vanishing import LinearSchedule, MagnitudePruning
    >>> recipe = Recipe({"*.mlp.*": MagnitudePruning(sparsity=0.9)}, schedule=LinearSchedule(steps=100))
    >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    rules: tuple[tuple[Pattern, Rule], ...]
    ignore: tuple[Pattern, ...]
    schedule: Schedule
    ramp: Schedule | None
    freeze_original: bool
    distillation: tuple[Distillation, ...]

    def __init__(
        self,
        rules: Mapping[Any, Compressor | Rule],
        *,
        ignore: Iterable[Key] | Key = (),
        schedule: Schedule,
        ramp: Schedule | None = None,
        freeze_original: bool = False,
        distillation: Iterable[Distillation] | Distillation = (),
    ) -> None:
        if not isinstance(rules, Mapping) or not rules:
            raise ConfigError(
                f"a recipe takes a mapping from keys to compressors with at least one rule, got {rules!r}."
            )
        entries = tuple((to_pattern(key), _to_rule(key, value)) for key, value in rules.items())
        for name, value in {"schedule": schedule, "ramp": ramp}.items():
            if not isinstance(value, Schedule) and not (name == "ramp" and value is None):
                raise ConfigError(
                    f"the recipe's {name} must be a schedule, as in LinearSchedule(steps=1000), got {value!r}."
                )
        if not isinstance(freeze_original, bool):
            raise ConfigError(f"the recipe's freeze_original is True or False, got {freeze_original!r}.")
        if ramp is not None:
            for _, rule in entries:
                check_ramp(rule.compressor, ramp)
        losses = tuple(distillation) if isinstance(distillation, Iterable) else (distillation,)
        _check_distillation(losses)
        single = isinstance(ignore, str) or not isinstance(ignore, Iterable)
        object.__setattr__(self, "rules", entries)
        object.__setattr__(self, "ignore", tuple(to_pattern(key) for key in ([ignore] if single else ignore)))  # type: ignore[union-attr]
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "ramp", ramp)
        object.__setattr__(self, "freeze_original", freeze_original)
        object.__setattr__(self, "distillation", losses)

    @property
    def is_relative(self) -> bool:
        """Whether a schedule is a share of the training, whose length is still to be given."""
        return any(schedule.is_relative for schedule in self._schedules())

    def resolved(self, length: int) -> Recipe:
        """Return the recipe for a training of `length` optimizer steps: every "40%" becomes steps."""
        settled = copy.copy(self)
        object.__setattr__(settled, "rules", tuple((pattern, rule.resolved(length)) for pattern, rule in self.rules))
        object.__setattr__(settled, "schedule", self.schedule.resolved(length))
        object.__setattr__(settled, "ramp", None if self.ramp is None else self.ramp.resolved(length))
        return settled

    def _schedules(self) -> list[Schedule]:
        own = [schedule for _, rule in self.rules for schedule in (rule.schedule, rule.ramp, *rule.schedules)]
        return [schedule for schedule in (self.schedule, self.ramp, *own) if schedule is not None]

    def match(self, model: nn.Module) -> Plan:
        """Return which module gets what, what is left alone and why, and every problem; the model is not changed.

        Printed, the plan is a table.
        """
        from vanishing.plan import make_plan

        return make_plan(model, self)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, without what has its default."""
        rules = []
        for pattern, rule in self.rules:
            entry = {"match": pattern_to_plain(pattern)} | rule.to_dict()
            del entry["kind"]
            rules.append(entry)
        data: dict[str, Any] = {"rules": rules, "schedule": self.schedule.to_dict()}
        if self.ignore:
            data["ignore"] = [pattern_to_plain(pattern) for pattern in self.ignore]
        if self.ramp is not None:
            data["ramp"] = self.ramp.to_dict()
        if self.freeze_original:
            data["freeze_original"] = True
        if self.distillation:
            data["distillation"] = [each.to_dict() for each in self.distillation]
        return data

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Return the recipe that `to_dict` wrote.

        Raises:
            ConfigError: a field is missing, unknown or out of range; the message names the rule.
        """
        if not isinstance(data, Mapping) or set(data) - _FIELDS:
            fields = sorted(map(str, data)) if isinstance(data, Mapping) else data
            raise ConfigError(f"a recipe has the fields {', '.join(sorted(_FIELDS))}, got {fields!r}.")
        if "schedule" not in data or not isinstance(data.get("rules"), list):
            raise ConfigError(
                "a recipe needs `schedule` and `rules`, a list of mappings with `match` and `compressor`."
            )
        ignore = data.get("ignore", [])
        if not isinstance(ignore, list):
            raise ConfigError(f"a recipe's `ignore` is a list of patterns, got {ignore!r}.")
        losses = data.get("distillation", [])
        if not isinstance(losses, list):
            raise ConfigError(f"a recipe's `distillation` is a list of losses, got {losses!r}.")
        rules: dict[Pattern, Rule] = {}
        for number, entry in enumerate(data["rules"]):
            if not isinstance(entry, Mapping) or not {"match", "compressor"} <= set(entry):
                raise ConfigError(f"rule {number} of the recipe needs `match` and `compressor`, got {entry!r}.")
            fields = {name: value for name, value in entry.items() if name != "match"}
            pattern = pattern_from_plain(entry["match"])
            if pattern in rules:
                raise ConfigError(f"rule {number} of the recipe is a second one for {pattern.text}. Drop one of them.")
            rules[pattern] = Rule.from_dict({"kind": Rule.kind} | fields)
        return cls(
            rules,
            ignore=[pattern_from_plain(each) for each in ignore],  # type: ignore[misc]
            schedule=Schedule.from_dict(data["schedule"]),
            ramp=Schedule.from_dict(data["ramp"]) if data.get("ramp") is not None else None,
            freeze_original=data.get("freeze_original", False),
            distillation=[Distillation.from_dict(each) for each in losses],
        )

    def to_yaml(self) -> str:
        """Return the recipe as YAML.

        Raises:
            ConfigError: a key is a predicate, which no file can hold.
        """
        return yaml.safe_dump(self._for_file(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Return the recipe in a YAML text.

        Raises:
            ConfigError: the text is no YAML, or no recipe.
        """
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the recipe is not valid YAML: {error}.") from None
        return cls.from_dict(data)

    def to_json(self) -> str:
        """Return the recipe as JSON.

        Raises:
            ConfigError: a key is a predicate, which no file can hold.
        """
        return json.dumps(self._for_file(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Return the recipe in a JSON text.

        Raises:
            ConfigError: the text is no JSON, or no recipe.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"the recipe is not valid JSON: {error}.") from None
        return cls.from_dict(data)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """Return the JSON schema (draft 2020-12) of a recipe's file, with every technique known in this process."""
        bases: tuple[type[Config], ...] = (Compressor, Schedule, Granularity, Pattern, Distillation)
        kinds = {c.kind: c.schema() for base in bases for c in concrete_kinds(base) if c is not Granularity}
        compressor, schedule, pattern, distillation = (
            {"oneOf": [{"$ref": f"#/$defs/{c.kind}"} for c in concrete_kinds(base)]}
            for base in (Compressor, Schedule, Pattern, Distillation)
        )
        ramp = {"oneOf": [{"$ref": f"#/$defs/{c.kind}"} for c in concrete_kinds(Schedule) if c not in _NO_RAMPS]}
        match = {"anyOf": [{"type": "string", "description": "a glob on the module's full name"}, pattern]}
        rule = {
            "type": "object",
            "properties": {
                "match": match,
                "compressor": compressor,
                "schedule": schedule,
                "ramp": ramp,
                "schedules": {"type": "array", "items": schedule},
            },
            "required": ["match", "compressor"],
            "additionalProperties": False,
        }
        properties = {
            "rules": {"type": "array", "items": rule, "minItems": 1},
            "ignore": {"type": "array", "items": match},
            "schedule": schedule,
            "ramp": ramp,
            "freeze_original": {"type": "boolean"},
            "distillation": {"type": "array", "items": distillation},
        }
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "vanishing recipe",
            "type": "object",
            "properties": properties,
            "required": ["rules", "schedule"],
            "additionalProperties": False,
            "$defs": kinds,
        }

    def _for_file(self) -> dict[str, Any]:
        for pattern in (*self.ignore, *(pattern for pattern, _ in self.rules)):
            if isinstance(pattern, Where):
                raise ConfigError(f"{pattern.text} cannot be written to a file. Use a glob, a regex or a type instead.")
        return self.to_dict()


def check_ramp(compressor: Compressor, ramp: Schedule) -> None:
    """Raise `ConfigError` if a ramp cannot drive a technique."""
    if isinstance(ramp, _NO_RAMPS):
        raise ConfigError(
            f"a ramp depends on the step alone and is one for all layers, so {type(ramp).__name__} cannot be one. Use "
            f"the schedule inside of it."
        )
    if not compressor.ramps:
        raise ConfigError(
            f"{type(compressor).__name__} has no strength between none and full, so a ramp cannot drive it. "
            f"Leave the ramp out, or give it to the rules of other techniques only."
        )


def _check_distillation(losses: tuple[Any, ...]) -> None:
    for each in losses:
        if not isinstance(each, Distillation):
            raise ConfigError(
                f"the recipe's distillation is a LocalLoss, a Teacher or both, as in [LocalLoss(), Teacher()], got "
                f"{each!r}."
            )
    if len({each.kind for each in losses}) < len(losses):
        raise ConfigError(f"the recipe's distillation has two losses of one kind: {losses!r}. Drop one of them.")


def _to_rule(key: Any, value: Any) -> Rule:
    if isinstance(value, Rule):
        return value
    if not isinstance(value, Compressor):
        raise ConfigError(
            f"the rule for {key!r} must be a compressor, as in LowRank(rank=16), or a Rule, got {value!r}."
        )
    return Rule(value)
