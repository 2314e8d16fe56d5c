"""Schedules: pure functions from the optimizer step to a value in [0, 1] that never rises."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, StringConstraints

from vanishing.config import Config
from vanishing.errors import TransitionError

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

    def __call__(self, step: int) -> float:
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


def _exact(steps: int | str, length: int) -> float:
    return length * float(steps.rstrip("%")) / 100 if isinstance(steps, str) else steps


def _known(steps: int | str) -> int:
    if isinstance(steps, str):
        raise TransitionError(
            f"{steps} of a training whose length is not known. Call transition.set_length with its number of optimizer "
            f"steps, or give the schedule a number of steps."
        )
    return steps
