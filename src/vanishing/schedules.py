"""Schedules: pure functions from the optimizer step to a value in [0, 1] that never rises."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import Annotated, Self

from pydantic import Field, StringConstraints

from vanishing.config import Config
from vanishing.errors import ConfigError, TransitionError

Share = Annotated[str, StringConstraints(pattern=r"^(100|[0-9]{1,2}(\.[0-9]+)?)%$")]
"""A share of a training's optimizer steps, as in "40%"."""

_OR_SHARE = 'or a share of the training as in "40%"'
Steps = Annotated[
    Annotated[int, Field(ge=1)] | Share,
    Field(description=f"the length of the fall in optimizer steps, at least 1, {_OR_SHARE}"),
]
Start = Annotated[
    Annotated[int, Field(ge=0)] | Share,
    Field(description=f"the optimizer step up to which the value is 1, at least 0, {_OR_SHARE}"),
]


@dataclass(frozen=True, kw_only=True)
class Schedule(Config, ABC):
    """A value in [0, 1] for every optimizer step, computed in closed form and never carried along.

    Lengths are optimizer steps, or shares of the training as in "40%" until `resolved` makes them steps.

    Laws, with `begin` and `end` the first and the last step of the fall:
        s(t) == 1 for t <= begin, s(t) == 0 exactly for t >= end, s(t + 1) <= s(t).
    """

    @property
    @abstractmethod
    def begin(self) -> int:
        """The last step at which the value is 1 for certain."""

    @property
    @abstractmethod
    def end(self) -> int:
        """The first step at which the value is 0."""

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Return the value for a progress in (0, 1), the share of the fall that has passed."""

    @property
    def is_relative(self) -> bool:
        """Whether a length is a share of the training, so that there is no value before `resolved`."""
        return False

    def resolved(self, length: int) -> Self:
        """Return the schedule for a training of `length` optimizer steps, its shares rounded to steps.

        >>> LinearSchedule(steps="40%", start="10%").resolved(1000)
        LinearSchedule(steps=400, start=100)
        """
        return self

    def spread(self, names: Sequence[str]) -> list[Schedule]:
        """Return the schedule of each of the layers that it drives: by default all have the same.

        Args:
            names: full names of the layers, in the model's order.
        """
        return [self] * len(names)

    def problems(self, names: Sequence[str]) -> list[str]:
        """Return why it cannot drive layers of these names; by default it can drive any."""
        return []

    def __call__(self, step: float) -> float:
        """Return the value at an optimizer step (the number of optimizer steps already done).

        >>> LinearSchedule(steps=10)(4)
        0.6
        """
        if step >= self.end:
            return 0.0
        if step <= self.begin:
            return 1.0
        return min(max(self.shape((step - self.begin) / (self.end - self.begin)), 0.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class Fade(Schedule):
    """Base of the schedules that fall over `steps` optimizer steps after `start`.

    Args:
        steps: length of the fall, in optimizer steps or as a share of the training ("40%").
        start: optimizer step at which the fall begins, or a share of the training.
    """

    steps: Steps
    start: Start = 0

    @property
    def is_relative(self) -> bool:
        return isinstance(self.start, str) or isinstance(self.steps, str)

    def resolved(self, length: int) -> Self:
        start = _exact(self.start, length)
        # The end is rounded and not the fall, so that shares of 100 % together end with the training.
        end = round(start + _exact(self.steps, length))
        return dataclasses.replace(self, start=round(start), steps=max(end - round(start), 1))

    @property
    def begin(self) -> int:
        return _known(self.start)

    @property
    def end(self) -> int:
        return _known(self.start) + _known(self.steps)


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(Fade):
    """`1 - t / steps`: the schedule of the paper (arXiv 2510.09696, section 3)."""

    def shape(self, progress: float) -> float:
        return 1.0 - progress


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Fade):
    """`(1 + cos(pi t / steps)) / 2`: slow at both ends."""

    def shape(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class PolynomialSchedule(Fade):
    """`(1 - t / steps) ** power`: fast first, slow near 0; power 3 is the cubic law of Zhu and Gupta (1710.01878)."""

    power: Annotated[float, Field(gt=0, le=100, description="the exponent, above 0 and at most 100")] = 3.0

    def shape(self, progress: float) -> float:
        return float((1.0 - progress) ** self.power)


@dataclass(frozen=True, kw_only=True)
class ExponentialSchedule(Fade):
    """`exp(-rate t / steps)`, shifted and scaled so that it runs from 1 to 0."""

    rate: Annotated[float, Field(ge=0.01, le=500, description="the decay over the fall, 0.01 to 500")] = 5.0

    def shape(self, progress: float) -> float:
        return math.expm1(-self.rate * progress) / -math.expm1(-self.rate) + 1.0


@dataclass(frozen=True, kw_only=True)
class SigmoidSchedule(Fade):
    """A logistic curve centered on the middle of the fall, shifted and scaled so that it runs from 1 to 0."""

    steepness: Annotated[float, Field(ge=0.01, le=500, description="the slope over the fall, 0.01 to 500")] = 10.0

    def shape(self, progress: float) -> float:
        # tanh(x / 2) is the logistic function up to scale and offset, and does not overflow.
        half = math.tanh(self.steepness / 4)
        return 0.5 - 0.5 * math.tanh(self.steepness * (progress - 0.5) / 2) / half


@dataclass(frozen=True, kw_only=True)
class StepSchedule(Schedule):
    """1 before the optimizer step `at` and 0 from it on: compression at once, after `at` steps of dense training.

    Args:
        at: optimizer step from which the value is 0, or a share of the training ("40%"); with 0 the model is
            compressed from the beginning.
    """

    at: Annotated[
        Annotated[int, Field(ge=0)] | Share,
        Field(description=f"the optimizer step from which the value is 0, at least 0, {_OR_SHARE}"),
    ]

    @property
    def is_relative(self) -> bool:
        return isinstance(self.at, str)

    def resolved(self, length: int) -> Self:
        return dataclasses.replace(self, at=round(_exact(self.at, length)))

    @property
    def begin(self) -> int:
        return _known(self.at) - 1

    @property
    def end(self) -> int:
        return _known(self.at)

    def shape(self, progress: float) -> float:
        raise AssertionError("a step has no interior")


class Order(Enum):
    """In which order layers fade."""

    FIRST_TO_LAST = "first to last"
    """As they stand in the model."""
    LAST_TO_FIRST = "last to first"
    """From its end to its beginning."""


@dataclass(frozen=True)
class Staggered(Schedule):
    """Layers fade one after another, each by the same schedule, shortened so that all together take its length.

    It drives the layers of its rule or, as the recipe's schedule, those of all rules without one of their own. Called
    by itself it is the schedule of a single layer.

    Args:
        schedule: the fade of all layers together: when it begins, how long it takes, and the shape of each one's.
        order: `Order.FIRST_TO_LAST`, `Order.LAST_TO_FIRST`, or names of layers, in which `*` stands for anything and
            crosses dots. Layers that one name matches fade together; the first name that matches counts.
        overlap: share of a layer's fade that the next one's has in common with it, in [0, 1).

    Raises:
        ConfigError: a value is out of range, or the order is empty.

    >>> [s.begin for s in Staggered(LinearSchedule(steps=12)).spread(["0", "1", "2"])]
    [0, 4, 8]
    """

    schedule: Fade
    _: KW_ONLY
    order: Annotated[
        Order | tuple[str, ...], Field(description="'first to last', 'last to first' or a list of layers' names")
    ] = Order.FIRST_TO_LAST
    overlap: Annotated[
        float, Field(ge=0, lt=1, description="the share of a fade that the next one has in common with it, in [0, 1)")
    ] = 0.0

    def check(self) -> None:
        if not self.order:
            raise ConfigError("Staggered(order=()): it names no layer. Leave it out to go from the first to the last.")

    @property
    def begin(self) -> int:
        return self.schedule.begin

    @property
    def end(self) -> int:
        return self.schedule.end

    @property
    def is_relative(self) -> bool:
        return self.schedule.is_relative

    def resolved(self, length: int) -> Self:
        return dataclasses.replace(self, schedule=self.schedule.resolved(length))

    def shape(self, progress: float) -> float:
        return self.schedule.shape(progress)

    def problems(self, names: Sequence[str]) -> list[str]:
        if isinstance(self.order, Order):
            return []
        problems = [
            f"Staggered: its order names {pattern!r}, but it drives no such layer. Correct it."
            for pattern in self.order
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names)
        ]
        left = [name for name, place in zip(names, self._places(names), strict=True) if place == len(self.order)]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            named = ", ".join(map(repr, left[:3]))
            problems.append(f"Staggered: its order does not name {named}{more}. Let it end with '*' for the rest.")
        return problems

    def spread(self, names: Sequence[str]) -> list[Schedule]:
        places = self._places(names)
        turns = {place: turn for turn, place in enumerate(sorted(set(places)))}
        return [self._turn(turns[place], len(turns)) for place in places]

    def _places(self, names: Sequence[str]) -> list[int]:
        """Where each layer stands in the order; those of one number fade together."""
        if self.order is Order.FIRST_TO_LAST:
            return list(range(len(names)))
        if self.order is Order.LAST_TO_FIRST:
            return list(range(len(names)))[::-1]
        patterns = list(enumerate(self.order))
        return [
            next((n for n, pattern in patterns if fnmatch.fnmatchcase(name, pattern)), len(patterns)) for name in names
        ]

    def _turn(self, number: int, count: int) -> Fade:
        begin, length = self.begin, self.end - self.begin
        each = length / (1 + (count - 1) * (1 - self.overlap))
        shift = number * each * (1 - self.overlap)
        # A fade takes a step at least, also where there are more layers than steps.
        start = min(round(shift), length - 1)
        steps = max(round(shift + each) - start, 1)
        return dataclasses.replace(self.schedule, start=begin + start, steps=steps)


@dataclass(frozen=True)
class Adaptive(Schedule):
    """A schedule whose clock runs slower while the compressed weights are far from their originals.

    Every few optimizer steps the gap of the layers that it drives is measured (as `Transition.gap` does), and while it
    is above `limit` the schedule's own clock runs at `speed`. As late as the deadline allows it runs at full speed
    again, so that the value is 0 at the deadline whatever was measured. What was decided is part of the transition's
    state. Called by itself it is the schedule when the gap is never above the limit.

    Args:
        schedule: what is slowed down: a fade, or layers that fade one after another.
        limit: the gap above which it is slow: the mean over weights of |g(W) - W| / |W|, above 0.
        deadline: the optimizer step at which the value is 0 at the latest, or a share of the training.
        speed: of its clock while the gap is above the limit, in [0, 1); 0 stops it.
        every: optimizer steps between two measurements, each of which compresses every weight once.

    Raises:
        ConfigError: a value is out of range, or the deadline is before the schedule's end.

    >>> Adaptive(LinearSchedule(steps=100), limit=0.3, deadline=200).end
    200
    """

    schedule: Fade | Staggered
    _: KW_ONLY
    limit: Annotated[float, Field(gt=0, description="the gap above which the schedule is slow, above 0")]
    deadline: Annotated[
        Annotated[int, Field(ge=1)] | Share,
        Field(description=f"the optimizer step at which the value is 0 at the latest, at least 1, {_OR_SHARE}"),
    ]
    speed: Annotated[
        float, Field(ge=0, lt=1, description="the clock's speed while the gap is above the limit, in [0, 1)")
    ] = 0.25
    every: Annotated[int, Field(ge=1, description="a number of optimizer steps, at least 1")] = 10

    def check(self) -> None:
        if self.schedule.is_relative and not isinstance(self.deadline, str):
            raise ConfigError(
                f"Adaptive(deadline={self.deadline}): its schedule is a share of the training and its deadline a "
                f"number of steps. Give a share as well."
            )
        if not self.is_relative and self.end < self.schedule.end:
            raise ConfigError(
                f"Adaptive(deadline={self.deadline}): its schedule takes until optimizer step {self.schedule.end}. "
                f"Give a later deadline, or a shorter schedule."
            )

    @property
    def begin(self) -> int:
        return self.schedule.begin

    @property
    def end(self) -> int:
        return _known(self.deadline)

    @property
    def is_relative(self) -> bool:
        return isinstance(self.deadline, str)

    def resolved(self, length: int) -> Self:
        schedule, exact = self.schedule.resolved(length), _exact(self.deadline, length)
        deadline = max(round(exact), 1)
        if schedule.end <= exact + 1.5:
            # A share is meant to the nearest step, and a fall takes one at least.
            deadline = max(deadline, schedule.end)
        return dataclasses.replace(self, schedule=schedule, deadline=deadline)

    def spread(self, names: Sequence[str]) -> list[Schedule]:
        return self.schedule.spread(names)

    def problems(self, names: Sequence[str]) -> list[str]:
        return self.schedule.problems(names)

    def shape(self, progress: float) -> float:
        return self.schedule(self.begin + progress * (self.end - self.begin))

    def clock(self, step: int, slow_steps: int) -> float:
        """Return what the schedule's own clock shows.

        Args:
            step: optimizer steps done.
            slow_steps: how many of them it went at the lower speed.
        """
        return step - min((1.0 - self.speed) * slow_steps, self.end - self.schedule.end)


def _exact(steps: int | str, length: int) -> float:
    return length * float(steps.rstrip("%")) / 100 if isinstance(steps, str) else steps


def _known(steps: int | str) -> int:
    if isinstance(steps, str):
        raise TransitionError(
            f"{steps} of a training whose length is not known. Call transition.set_length with its number of optimizer "
            f"steps, or give the schedule a number of steps."
        )
    return steps
