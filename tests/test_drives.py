"""Schedules that drive layers one after another, and schedules that slow down, in a transition."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import vanishing
from vanishing import (
    Adaptive,
    Binary,
    CosineSchedule,
    LinearSchedule,
    LowRank,
    MagnitudePruning,
    Order,
    Recipe,
    Replace,
    Rule,
    Staggered,
    StepSchedule,
    Transition,
)
from vanishing.schedules import Schedule

FADE = LinearSchedule(steps=12)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def prepared(schedule: Schedule, technique: Any = Binary()) -> tuple[nn.Sequential, Transition]:  # noqa: B008
    model = build()
    return model, vanishing.prepare(model, Recipe({"*": technique}, schedule=schedule))


def train(model: nn.Module, transition: Transition, until: int, optimizer: torch.optim.Optimizer) -> None:
    for step in range(transition.steps_done, until):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()


def shares(transition: Transition) -> list[float]:
    return [beta for (beta,) in transition.betas.values()]


# One after another


def test_layers_fade_one_after_another_within_the_length_of_the_schedule() -> None:
    _, transition = prepared(Staggered(FADE))
    assert transition.end == 12
    seen = []
    for step in range(13):
        transition.seek(step)
        seen.append(shares(transition))
    assert list(transition.betas) == ["0", "2", "4"]
    quarters = [1.0, 0.75, 0.5, 0.25]
    first = [*quarters, *[0.0] * 9]
    assert [betas[0] for betas in seen] == first
    assert [betas[1] for betas in seen] == [*[1.0] * 4, *first[:9]]
    assert [betas[2] for betas in seen] == [*[1.0] * 8, *first[:5]]
    assert transition.done


def test_beta_is_the_largest_share_of_what_the_recipes_schedule_drives() -> None:
    model = build()
    rules: dict[str, Any] = {"0": Rule(Binary(), schedule=LinearSchedule(steps=100)), "*": Binary()}
    transition = vanishing.prepare(model, Recipe(rules, schedule=Staggered(FADE)))
    transition.seek(6)
    assert transition.betas == {"0": (0.94,), "2": (0.0,), "4": (1.0,)}
    assert transition.beta == 1.0
    transition.seek(12)
    assert (transition.beta, transition.done, transition.end) == (0.0, False, 100)
    with pytest.raises(vanishing.TransitionError, match="88 of 100 optimizer steps remain"):
        transition.finish()
    transition.seek(100)
    transition.finish()
    assert transition.betas == {}
    assert transition.beta == 0.0


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (Order.LAST_TO_FIRST, [1.0, 0.5, 0.0]),
        (("2", "*"), [1.0, 0.0, 1.0]),
        (("4", "0", "2"), [0.5, 1.0, 0.0]),
        (("[04]", "?"), [0.0, 1.0, 0.0]),
    ],
)
def test_the_order_is_what_the_user_says(order: Any, expected: list[float]) -> None:
    _, transition = prepared(Staggered(FADE, order=order))
    transition.seek(6)
    assert shares(transition) == expected
    transition.seek(12)
    assert shares(transition) == [0.0] * 3


def test_overlapping_fades_are_longer_and_end_together_with_the_schedule() -> None:
    schedules = Staggered(LinearSchedule(start=5, steps=20), overlap=0.5).spread(["a", "b", "c"])
    assert [(s.begin, s.end) for s in schedules] == [(5, 15), (10, 20), (15, 25)]


@given(
    st.integers(1, 300), st.integers(0, 50), st.integers(1, 100), st.floats(0, 0.99), st.sampled_from([*Order, ("*",)])
)
def test_every_layer_has_a_fade_inside_of_the_whole_one(
    steps: int, start: int, count: int, overlap: float, order: Any
) -> None:
    whole = Staggered(LinearSchedule(steps=steps, start=start), order=order, overlap=overlap)
    parts = whole.spread([str(n) for n in range(count)])
    assert min(p.begin for p in parts) == start
    assert max(p.end for p in parts) == start + steps
    for part in parts:
        assert start <= part.begin < part.end <= start + steps
    begins = [p.begin for p in parts]
    assert begins == sorted(begins, reverse=order is Order.LAST_TO_FIRST)


def test_a_staggered_rule_and_others_are_composed() -> None:
    model = build()
    rules: dict[str, Any] = {
        "[02]": Rule(LowRank(rank=2), schedule=Staggered(FADE)),
        "4": Rule(Replace(lambda _: nn.Linear(8, 4), name="other"), schedule=StepSchedule(at=3)),
    }
    transition = vanishing.prepare(model, Recipe(rules, schedule=FADE))
    transition.seek(3)
    assert transition.betas == {"0": (0.5,), "2": (1.0,), "4": (0.0,)}
    transition.seek(12)
    transition.finish()


def test_shares_of_a_training_are_staggered_and_slowed_down() -> None:
    share = Adaptive(Staggered(LinearSchedule(steps="60%")), limit=0.1, deadline="90%")
    _, transition = prepared(share)
    assert transition.recipe.is_relative
    transition.set_length(20)
    assert transition.recipe.schedule == Adaptive(Staggered(LinearSchedule(steps=12)), limit=0.1, deadline=18)
    assert transition.end == 18
    assert Recipe.from_yaml(transition.recipe.to_yaml()) == transition.recipe


def test_an_order_that_does_not_fit_is_reported_with_everything_else() -> None:
    order = ("0", "3")
    model = build()
    recipe = Recipe({"*": Binary()}, schedule=Staggered(FADE, order=order), ignore=["9"])
    with pytest.raises(vanishing.RecipeError) as caught:
        vanishing.prepare(model, recipe)
    for words in ("order names '3'", "order does not name '2', '4'", "nothing matched '9'"):
        assert words in str(caught.value)
    assert recipe.match(model).problems
    assert not hasattr(model[0], "parametrizations")


# Slower where the gap is large


def test_an_adaptive_schedule_that_is_never_slow_is_the_one_inside_of_it() -> None:
    _, transition = prepared(Adaptive(FADE, limit=100, deadline=40, every=1))
    assert transition.end == 40
    for step in range(1, 14):
        transition.step()
        assert shares(transition) == [FADE(step)] * 3
    assert (transition.done, transition.end) == (True, 12)
    transition.finish()


@pytest.mark.parametrize("speed", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("inner", [FADE, CosineSchedule(start=2, steps=10), Staggered(FADE)])
def test_no_gap_however_large_moves_the_end_past_the_deadline(inner: Any, speed: float) -> None:
    _, transition = prepared(Adaptive(inner, limit=1e-9, deadline=20, speed=speed, every=3))
    before = [1.0] * 3
    for _ in range(20):
        assert not transition.done
        transition.step()
        now = shares(transition)
        assert all(0 <= later <= earlier for later, earlier in zip(now, before, strict=True))
        before = now
    assert before == [0.0] * 3
    assert (transition.done, transition.end) == (True, 20)


def test_the_clock_of_a_slow_schedule_is_slow_only_while_the_gap_is_large() -> None:
    model, transition = prepared(Adaptive(FADE, limit=0.4, deadline=40, speed=0.5, every=4), MagnitudePruning(0.5))
    layers: list[Any] = [model[0], model[2], model[4]]
    latents = [layer.parametrizations.weight.original for layer in layers]
    values: list[Tensor] = [latent.detach().clone() for latent in latents]

    def set_gap(factor: float) -> None:
        # Of a pruned weight whose smaller half is `factor` times the larger one.
        with torch.no_grad():
            for latent, value in zip(latents, values, strict=True):
                flat = torch.ones(value.numel())
                flat[: len(flat) // 2] = factor
                latent.copy_(flat.view_as(value))

    clocks = []
    for step in range(1, 21):
        set_gap(0.9 if 4 <= step < 12 else 0.1)
        transition.step()
        clocks.append(12 * (1 - shares(transition)[0]))
    # Measured at 4 and 8, where it is slow for the next four steps, and at 12, where it is not.
    expected = [1, 2, 3, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, 9, 10, 11, 12, 12, 12, 12, 12]
    assert clocks == pytest.approx(expected)
    assert (transition.done, transition.end) == (True, 16)


def adaptive() -> Adaptive:
    return Adaptive(LinearSchedule(steps=6, start=1), limit=0.3, deadline=12, every=2)


@pytest.mark.parametrize("technique", [MagnitudePruning(0.5), LowRank(rank=2) | MagnitudePruning(0.3)], ids=repr)
def test_an_adaptive_run_is_split_without_a_trace(technique: Any) -> None:
    def begun() -> tuple[nn.Sequential, Transition, torch.optim.Optimizer]:
        model, transition = prepared(adaptive(), technique)
        return model, transition, torch.optim.AdamW(model.parameters(), lr=0.05)

    model, transition, optimizer = begun()
    states, betas = [], []
    for step in range(14):
        train(model, transition, step, optimizer)
        parts = (model.state_dict(), optimizer.state_dict())
        states.append((json.loads(json.dumps(transition.state_dict())), *copy.deepcopy(parts)))
        betas.append(shares(transition))
    assert betas[7] != [0.0] * 3
    for clock, weights, moments in states:
        model, transition, optimizer = begun()
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        transition.load_state_dict(clock)
        assert shares(transition) == betas[clock["steps_done"]]
        train(model, transition, 13, optimizer)
        assert transition.state_dict() == states[-1][0]
        assert all(torch.equal(value, states[-1][1][name]) for name, value in model.state_dict().items())


def test_a_jump_takes_what_was_decided_and_a_step_decides_anew() -> None:
    _, transition = prepared(Adaptive(FADE, limit=1e-9, deadline=40, speed=0.0, every=5))
    seen = [shares(transition)]
    for _ in range(20):
        transition.step()
        seen.append(shares(transition))
    assert seen[5:] == [seen[5]] * 16
    for step in (20, 3, 8, 0, 15):
        transition.seek(step)
        assert shares(transition) == seen[step]
    # Nothing was decided for the steps from 25 on.
    transition.seek(30)
    assert shares(transition) == pytest.approx([1 - 10 / 12] * 3)
    transition.seek(4)
    transition.step()
    transition.seek(30)
    assert shares(transition) == [0.0] * 3


def test_a_forced_end_measures_nothing() -> None:
    model, transition = prepared(Adaptive(FADE, limit=1e-9, deadline=13, every=1))
    transition.seek(12)
    transition.finish(force=True)
    assert not hasattr(model[0], "parametrizations")


def test_a_state_of_an_adaptive_schedule_must_hold_what_it_decided() -> None:
    _, transition = prepared(adaptive())
    state = transition.state_dict()
    assert state.keys() == {"steps_done", "recipe", "slow"}
    wrongs: list[dict[str, Any]] = [{}, {"slow": []}, {"slow": [[[1]]]}, {"slow": [[["a", 2]]]}, {"slow": 3}]
    for wrong in wrongs:
        broken = {name: value for name, value in state.items() if name != "slow"} | wrong
        with pytest.raises(vanishing.TransitionError, match="what its adaptive schedules have decided"):
            transition.load_state_dict(broken)
    _, plain = prepared(FADE)
    assert plain.state_dict().keys() == {"steps_done", "recipe"}


def test_the_gap_of_replaced_blocks_cannot_slow_a_schedule() -> None:
    recipe = Recipe({"4": Replace(lambda _: nn.Linear(8, 4), name="another")}, schedule=adaptive())
    with pytest.raises(vanishing.RecipeError, match="drives only replaced blocks, as '4', whose gap is not measured"):
        vanishing.prepare(build(), recipe)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Staggered(FADE, order=()), "names no layer"),
        (lambda: Staggered(FADE, order="0"), "order is 'first to last', 'last to first' or a list"),  # type: ignore[arg-type]
        (lambda: Staggered(FADE, overlap=1.0), r"in \[0, 1\)"),
        (lambda: Staggered(StepSchedule(at=1)), "expected Fade, got StepSchedule"),  # type: ignore[arg-type]
        (lambda: Adaptive(FADE, limit=0.0, deadline=12), "above 0"),
        (lambda: Adaptive(FADE, limit=1, deadline=11), "takes until optimizer step 12. Give a later deadline"),
        (lambda: Adaptive(LinearSchedule(steps="4%"), limit=1, deadline=11), "Give a share as well"),
        (lambda: Adaptive(adaptive(), limit=1, deadline=11), "expected Fade or Staggered, got Adaptive"),  # type: ignore[arg-type]
        (lambda: Adaptive(FADE, limit=1, deadline="50%").resolved(20), "until optimizer step 12"),
        (lambda: Recipe({"*": Binary()}, schedule=FADE, ramp=Staggered(FADE)), "Staggered cannot be one"),
        (lambda: Rule(Binary(), ramp=adaptive()), "Adaptive cannot be one"),
    ],
)
def test_what_cannot_be_a_schedule(make: Any, words: str) -> None:
    with pytest.raises(vanishing.ConfigError, match=words):
        make()
