"""The laws of every schedule, against formulas written out here."""

import json
import math
from dataclasses import dataclass
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from vanishing.config import Config, concrete_kinds
from vanishing.errors import ConfigError, TransitionError, VanishingError
from vanishing.schedules import (
    Adaptive,
    CosineSchedule,
    ExponentialSchedule,
    Fade,
    LinearSchedule,
    Order,
    PolynomialSchedule,
    Schedule,
    SigmoidSchedule,
    Staggered,
    StepSchedule,
)

LENGTHS = st.one_of(st.integers(1, 50), st.integers(1, 10**7))
STARTS = st.one_of(st.just(0), st.integers(0, 10**6))
FADES: dict[type[Fade], st.SearchStrategy[Fade]] = {
    LinearSchedule: st.builds(LinearSchedule, steps=LENGTHS, start=STARTS),
    CosineSchedule: st.builds(CosineSchedule, steps=LENGTHS, start=STARTS),
    PolynomialSchedule: st.builds(PolynomialSchedule, steps=LENGTHS, start=STARTS, power=st.floats(0.01, 100)),
    ExponentialSchedule: st.builds(ExponentialSchedule, steps=LENGTHS, start=STARTS, rate=st.floats(0.01, 500)),
    SigmoidSchedule: st.builds(SigmoidSchedule, steps=LENGTHS, start=STARTS, steepness=st.floats(0.01, 500)),
}
STAGGERED = st.builds(
    Staggered,
    st.one_of(list(FADES.values())),
    order=st.sampled_from([*Order, ("*.1", "*")]),
    overlap=st.floats(0, 0.99),
)
ADAPTIVE = st.one_of(STAGGERED, *FADES.values()).flatmap(
    lambda inner: st.builds(
        Adaptive,
        st.just(inner),
        limit=st.floats(1e-3, 10),
        deadline=st.integers(inner.end, 2 * inner.end),
        speed=st.floats(0, 0.99),
        every=st.integers(1, 100),
    )
)
STEP = st.builds(StepSchedule, at=st.integers(0, 10**6))
ANY_FADE = st.one_of(list(FADES.values()))
ANY = st.one_of(ANY_FADE, STEP, STAGGERED, ADAPTIVE)


def textbook(schedule: Fade, x: float) -> float:
    """The value at the share x of the fall, as a textbook would write it."""
    match schedule:
        case LinearSchedule():
            return max(1 - x, 0)
        case CosineSchedule():
            return (1 + math.cos(math.pi * x)) / 2
        case PolynomialSchedule(power=power):
            return float((1 - x) ** power)
        case ExponentialSchedule(rate=rate):
            return (math.exp(-rate * x) - math.exp(-rate)) / (1 - math.exp(-rate))
        case SigmoidSchedule(steepness=steepness):

            def logistic(z: float) -> float:
                return 1 / (1 + math.exp(-z))

            low, high = logistic(-steepness / 2), logistic(steepness / 2)
            return (logistic(steepness * (0.5 - x)) - low) / (high - low)
    raise AssertionError(f"no formula for {schedule}")


def test_every_schedule_has_its_laws_tested_here() -> None:
    shipped = {kind for kind in concrete_kinds(Schedule) if kind.__module__ == "vanishing.schedules"}
    assert shipped == {*FADES, StepSchedule, Staggered, Adaptive}


@pytest.mark.parametrize("kind", FADES, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_the_value_is_the_textbook_formula(kind: type[Fade], data: st.DataObject) -> None:
    schedule = data.draw(FADES[kind])
    step = data.draw(st.integers(schedule.begin, schedule.end))
    expected = textbook(schedule, (step - schedule.begin) / (schedule.end - schedule.begin))
    assert schedule(step) == pytest.approx(expected, abs=1e-9)


@given(ANY_FADE, st.integers(-(10**6), 10**6))
def test_the_value_is_1_up_to_the_start_and_exactly_0_from_the_end_on(schedule: Fade, offset: int) -> None:
    fields = schedule.to_dict()
    start = fields.get("start", 0)
    assert schedule(start) == 1.0
    assert schedule(start - abs(offset)) == 1.0
    assert schedule(start + fields["steps"]) == 0.0
    assert schedule(start + fields["steps"] + abs(offset)) == 0.0


@given(ANY, st.data())
def test_the_value_stays_in_0_to_1_and_never_rises(schedule: Schedule, data: st.DataObject) -> None:
    step = data.draw(st.integers(schedule.begin - 2, schedule.end + 2))
    later = data.draw(st.one_of(st.just(step + 1), st.integers(step, schedule.end + 2)))
    assert 0.0 <= schedule(later) <= schedule(step) <= 1.0


@given(ANY_FADE, st.data())
def test_the_start_only_shifts(schedule: Fade, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, schedule.end - schedule.begin))
    unshifted = Config.from_dict(schedule.to_dict() | {"start": 0})
    assert isinstance(unshifted, Fade)
    assert schedule(schedule.begin + step) == unshifted(step)


@given(ANY, st.integers(0, 10**7))
def test_the_value_depends_on_nothing_but_the_step(schedule: Schedule, step: int) -> None:
    first = schedule(step)
    schedule(step + 1)
    schedule(0)
    assert schedule(step) == first
    assert type(first) is float


@given(STEP)
def test_a_step_schedule_is_1_before_and_0_from_its_step_on(schedule: StepSchedule) -> None:
    at = schedule.to_dict()["at"]
    assert schedule(at - 1) == 1.0
    assert schedule(at) == 0.0
    assert schedule(at + 1) == 0.0


def test_a_step_schedule_at_0_compresses_from_the_beginning() -> None:
    assert [StepSchedule(at=0)(step) for step in range(3)] == [0.0, 0.0, 0.0]


def test_the_linear_schedule_is_the_papers_to_the_last_bit() -> None:
    assert [LinearSchedule(steps=12)(t) for t in range(20)] == [max(1 - t / 12, 0) for t in range(20)]


@given(st.sampled_from([CosineSchedule, SigmoidSchedule, LinearSchedule]), st.integers(1, 10**6), st.data())
def test_symmetric_schedules_are_symmetric(kind: type[Fade], steps: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, steps))
    schedule = kind(steps=steps)
    assert schedule(step) + schedule(steps - step) == pytest.approx(1.0, abs=1e-9)


def test_the_shapes_differ_as_their_names_say() -> None:
    def quarters(schedule: Schedule) -> list[float]:
        return [round(schedule(step), 3) for step in (25, 50, 75)]

    assert quarters(LinearSchedule(steps=100)) == [0.75, 0.5, 0.25]
    assert quarters(CosineSchedule(steps=100)) == [0.854, 0.5, 0.146]
    assert quarters(PolynomialSchedule(steps=100)) == [0.422, 0.125, 0.016]
    assert quarters(ExponentialSchedule(steps=100)) == [0.282, 0.076, 0.017]
    assert quarters(SigmoidSchedule(steps=100)) == [0.93, 0.5, 0.07]


@given(ANY)
def test_a_schedule_round_trips_through_json_and_compares_by_value(schedule: Schedule) -> None:
    back = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert back == schedule
    assert hash(back) == hash(schedule)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (LinearSchedule, {"steps": 0}, ["LinearSchedule(steps=0)", "optimizer steps, at least 1"]),
        (LinearSchedule, {"steps": -3}, ["LinearSchedule(steps=-3)", "at least 1"]),
        (LinearSchedule, {"steps": 2.5}, ["LinearSchedule(steps=2.5)", "integer"]),
        (LinearSchedule, {"steps": "10"}, ["LinearSchedule(steps='10')", "str"]),
        (LinearSchedule, {"steps": True}, ["LinearSchedule(steps=True)", "bool"]),
        (LinearSchedule, {"steps": None}, ["LinearSchedule(steps=None)", "integer"]),
        (CosineSchedule, {"steps": 5, "start": -1}, ["CosineSchedule(start=-1)", "at least 0"]),
        (PolynomialSchedule, {"steps": 5, "power": 0}, ["PolynomialSchedule(power=0)", "above 0"]),
        (PolynomialSchedule, {"steps": 5, "power": math.inf}, ["PolynomialSchedule(power=inf)", "at most 100"]),
        (PolynomialSchedule, {"steps": 5, "power": math.nan}, ["PolynomialSchedule(power=nan)", "above 0"]),
        (ExponentialSchedule, {"steps": 5, "rate": -1}, ["ExponentialSchedule(rate=-1)", "0.01 to 500"]),
        (SigmoidSchedule, {"steps": 5, "steepness": 0}, ["SigmoidSchedule(steepness=0)", "0.01 to 500"]),
        (StepSchedule, {"at": -1}, ["StepSchedule(at=-1)", "at least 0"]),
    ],
)
def test_a_bad_value_says_who_what_was_expected_and_what_came(
    kind: type[Schedule], fields: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**fields)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, VanishingError)
    for word in words:
        assert word in str(caught.value)


def test_schedules_are_keyword_only_and_frozen() -> None:
    with pytest.raises(TypeError, match="positional"):
        LinearSchedule(10)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="steps"):
        LinearSchedule(steps=10).steps = 3  # type: ignore[misc]


def test_whole_numbers_of_any_type_are_step_counts() -> None:
    assert LinearSchedule(steps=10.0) == LinearSchedule(steps=10)  # type: ignore[arg-type]
    assert type(LinearSchedule(steps=10.0).steps) is int  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class SquareRootSchedule(Fade):
    """A user's own: `1 - (t / steps) ** root`."""

    root: Annotated[float, Field(gt=0, le=1, description="the exponent, above 0 and at most 1")] = 0.5

    def shape(self, progress: float) -> float:
        return float(1 - progress**self.root)


def test_a_schedule_of_a_users_own_takes_ten_lines_and_round_trips() -> None:
    schedule = SquareRootSchedule(steps=100, start=20, root=0.25)
    assert [schedule(t) for t in (0, 20, 120, 500)] == [1.0, 1.0, 0.0, 0.0]
    assert schedule(45) == pytest.approx(1 - 0.25**0.25)
    assert schedule.to_dict() == {"kind": "square_root_schedule", "steps": 100, "start": 20, "root": 0.25}
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    with pytest.raises(ConfigError, match=r"SquareRootSchedule\(root=2\): root is the exponent, above 0 and at most 1"):
        SquareRootSchedule(steps=10, root=2)


def test_a_shape_that_leaves_0_to_1_is_clamped() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Overshooting(Fade):
        def shape(self, progress: float) -> float:
            return 3 * (0.5 - progress)

    schedule = Overshooting(steps=10)
    assert [schedule(t) for t in (1, 4, 9)] == [1.0, pytest.approx(0.3), 0.0]


# Shares of a training


@given(st.sampled_from(list(FADES)), st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 10**6))
def test_a_share_is_that_part_of_the_training_to_the_nearest_step(
    kind: type[Fade], start: int, steps: int, length: int
) -> None:
    relative = kind(start=f"{start / 10:g}%", steps=f"{steps / 10:g}%")
    assert relative.is_relative
    assert Config.from_dict(relative.to_dict()) == relative
    schedule = relative.resolved(length)
    assert not schedule.is_relative
    assert abs(schedule.begin - start / 1000 * length) <= 0.5 + 1e-6
    # A fall takes a step at least.
    assert abs(schedule.end - max((start + steps) / 1000 * length, schedule.begin + 1)) <= 0.5 + 1e-6
    assert schedule.resolved(2 * length) == schedule


@given(st.integers(1, 99), st.integers(1, 10**6))
def test_shares_of_100_percent_together_end_with_the_training(start: int, length: int) -> None:
    schedule = LinearSchedule(start=f"{start}%", steps=f"{100 - start}%").resolved(length)
    assert schedule.end == max(length, schedule.begin + 1)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 10**6))
def test_a_deadline_that_is_the_end_as_a_share_is_the_end_in_steps(start: int, steps: int, length: int) -> None:
    fade = LinearSchedule(start=f"{start / 10:g}%", steps=f"{steps / 10:g}%")
    relative = Adaptive(fade, limit=0.1, deadline=f"{(start + steps) / 10:g}%")
    assert relative.is_relative
    assert relative.resolved(length).end - fade.resolved(length).end in (0, 1)


def test_a_step_schedule_at_a_share() -> None:
    assert StepSchedule(at="40%").resolved(314) == StepSchedule(at=126)
    assert StepSchedule(at="0%").resolved(314)(0) == 0.0


def test_a_share_has_no_value_before_the_length_is_known() -> None:
    with pytest.raises(TransitionError, match="40% of a training whose length is not known"):
        LinearSchedule(steps="40%")(3)


@pytest.mark.parametrize("wrong", ["40", "140%", "-1%", "40 %", "forty", "", "1e1%"])
def test_what_is_not_a_share(wrong: str) -> None:
    with pytest.raises(ConfigError, match='or a share of the training as in "40%"'):
        LinearSchedule(steps=wrong)
