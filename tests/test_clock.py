"""What the clock drives: ramps, jumps, schedules of single rules, and what runs inside `compressed` and `original`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vanishing
from cases import LAYERS, TECHNIQUES, Pair, Run, outputs
from vanishing import (
    Binary,
    Gradient,
    LinearSchedule,
    LowRank,
    MagnitudePruning,
    PolynomialSchedule,
    Quantization,
    Recipe,
    Rule,
    StepSchedule,
    Ternary,
)

RAMPED = [name for name, technique in TECHNIQUES.items() if technique.compressor.ramps]
ramped = pytest.mark.parametrize(
    "technique", [pytest.param(n, marks=() if TECHNIQUES[n].quick else pytest.mark.slow) for n in RAMPED]
)
RAMP = {"schedule": StepSchedule(at=0), "ramp": PolynomialSchedule(steps=6, power=3)}
some_layers = pytest.mark.parametrize(
    "layer", ["linear", "transformers_conv1d", "conv2d_groups", "transposed2d", "encoder"]
)


def pair_of(layer: str, technique: str) -> Pair:
    """A cell of the table, or skip the test where it is refused."""
    pair = Pair(LAYERS[layer], TECHNIQUES[technique])
    if pair.layer.refusal(pair.technique):
        pytest.skip("refused")
    return pair


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether outputs are equal to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Ramps


def test_which_techniques_have_a_strength() -> None:
    without = {name for name in TECHNIQUES if name not in RAMPED and "inputs" not in name}
    assert without == {
        "replaced", "codebook", "pruned_codebook", "low_rank_8_bits", "low_rank_pruned", "low_rank_pruned_4_bits",
        "low_rank_decaying_3_bits_damped", "low_rank_3_bits_searched",
        "rank_tucker", "rank_tucker_by_energy_8_bits", "rank_spatial_by_energy_pruned",
    }  # fmt: skip
    with pytest.raises(vanishing.ConfigError, match="Chain has no strength between none and full"):
        Recipe({"*": LowRank(rank=2) | Quantization(bits=4)}, **RAMP)  # type: ignore[arg-type]
    assert not any("inputs" in name for name in RAMPED)


@some_layers
@ramped
def test_a_ramp_leads_from_nothing_to_the_whole_technique(layer: str, technique: str) -> None:
    pair = pair_of(layer, technique)
    run = pair.prepare(**RAMP)  # type: ignore[arg-type]
    assert run.transition.beta == 0.0
    plain = outputs(pair.layer.build(), pair.layer.batch(99))
    for got, expected in zip(run.outputs(), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    seen = [run.outputs()]
    for step in range(1, 7):
        run.transition.seek(step)
        seen.append(run.outputs())
    assert not same(seen[0], seen[-1])
    whole = pair.prepare(schedule=StepSchedule(at=0)).outputs()
    for got, expected in zip(seen[-1], whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    fresh = pair.prepare(**RAMP)  # type: ignore[arg-type]
    for each in (run, fresh):
        each.transition.seek(2)
    assert same(run.outputs(), fresh.outputs())
    run.train(7)
    expected = run.outputs()  # type: ignore[assignment]
    run.transition.finish()
    for got, wanted in zip(run.outputs(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@ramped
def test_a_ramped_run_is_split_without_a_trace(technique: str) -> None:
    pair = pair_of("linear", technique)
    whole, states = pair.prepare(**RAMP), []  # type: ignore[arg-type]
    for step in range(7):
        states.append(whole.train(step).state())
    for state in states:
        split = pair.prepare(seed=1, **RAMP).load(state).train(6)  # type: ignore[arg-type]
        assert all(torch.equal(split.state()["model"][k], v) for k, v in states[-1]["model"].items())


def test_under_a_ramp_the_sparsity_rises_and_the_rank_falls() -> None:
    layers = [nn.Linear(12, 10, bias=False) for _ in range(3)]
    zeros, ranks, values = [], [], []
    compressors = (MagnitudePruning(0.8), LowRank(rank=2), Ternary())
    transitions = [
        vanishing.prepare(nn.Sequential(layer), Recipe({"*": compressor}, **RAMP))  # type: ignore[arg-type]
        for layer, compressor in zip(layers, compressors, strict=True)
    ]
    for step in range(7):
        for transition in transitions:
            transition.seek(step)
        zeros.append(int((layers[0].weight == 0).sum()))
        ranks.append(int(torch.linalg.matrix_rank(layers[1].weight)))
        values.append(max(len(row.unique()) for row in layers[2].weight))
    assert zeros == sorted(zeros)
    assert (zeros[0], zeros[-1]) == (0, 96)
    assert ranks == sorted(ranks, reverse=True)
    assert (ranks[0], ranks[-1]) == (10, 2)
    assert values[-1] == 3


# Jumps


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_jump_leads_where_the_steps_lead(technique: str) -> None:
    walked, jumped = (pair_of("linear", technique).prepare() for _ in range(2))
    seen = []
    for _ in range(6):
        seen.append(walked.outputs())
        walked.transition.step()
    for step in (5, 0, 4, 2, 3, 1):
        jumped.transition.seek(step)
        assert jumped.transition.steps_done == step
        assert same(jumped.outputs(), seen[step])


def test_a_mask_is_selected_anew_after_a_jump() -> None:
    layer = nn.Linear(8, 1, bias=False)
    transition = vanishing.prepare(nn.Sequential(layer), MagnitudePruning(0.5, update_every=100), steps=1000)
    latent = layer.parametrizations.weight.original  # type: ignore[union-attr]
    with torch.no_grad():
        latent.copy_(torch.arange(8.0).flip(0))  # type: ignore[operator]
    transition.seek(500)
    with transition.compressed():
        assert layer.weight.tolist() == [[7, 6, 5, 4, 0, 0, 0, 0]]


@pytest.mark.parametrize("freeze", [True, False])
def test_a_mask_is_frozen_when_the_fade_is_over(freeze: bool) -> None:
    layer = nn.Linear(8, 1, bias=False)
    pruning = MagnitudePruning(0.5, freeze=freeze, update_every=1)
    transition = vanishing.prepare(nn.Sequential(layer), pruning, steps=2)
    latent: nn.Parameter = layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    rising, falling = torch.arange(1.0, 9.0), torch.arange(1.0, 9.0).flip(0)
    for values in (rising, falling, rising, rising):
        with torch.no_grad():
            latent.copy_(values)
        transition.step()
    # The mask of the second step, at which the fade was over, or that of the last one.
    assert (layer.weight != 0).flatten().tolist() == [freeze] * 4 + [not freeze] * 4
    layer.weight.sum().backward()
    assert latent.grad is not None
    assert latent.grad.count_nonzero() == (4 if freeze else 8)


# Schedules of single rules


def test_a_rule_has_a_schedule_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    recipe = Recipe(
        {"0": Rule(Binary(), schedule=LinearSchedule(steps=10, start=10)), "1": Binary()},
        schedule=LinearSchedule(steps=4),
    )
    latents = [layer.weight.detach().clone() for layer in model]  # type: ignore[operator]
    binary = [w.sign() * w.abs().mean(1, keepdim=True) for w in latents]
    transition = vanishing.prepare(model, recipe)
    assert (transition.end, transition.beta) == (20, 1.0)
    for step, shares in {0: (1, 1), 1: (1, 0.75), 4: (1, 0), 10: (1, 0), 15: (0.5, 0), 20: (0, 0)}.items():
        transition.seek(step)
        for layer, share, latent, compressed in zip(model, shares, latents, binary, strict=True):
            torch.testing.assert_close(layer.weight, share * latent + (1 - share) * compressed)
    assert transition.done


def test_a_rule_has_a_ramp_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    rule = Rule(MagnitudePruning(0.5), schedule=StepSchedule(at=0), ramp=LinearSchedule(steps=8))
    transition = vanishing.prepare(model, Recipe({"0": rule, "1": LowRank(rank=2)}, schedule=LinearSchedule(steps=4)))
    transition.seek(4)
    assert not transition.done
    assert int((model[0].weight == 0).sum()) == 16  # type: ignore[union-attr]
    transition.seek(8)
    assert transition.done
    assert int((model[0].weight == 0).sum()) == 32


# What runs


def trained(technique: str = "binary") -> Run:
    return pair_of("linear", technique).prepare(schedule=LinearSchedule(steps=10)).train(4)


@pytest.mark.parametrize("technique", ["pruned", "binary", "rank_2", "low_rank_8_bits", "replaced"])
def test_contexts_nest_and_give_back_what_ran_before(technique: str) -> None:
    run = trained(technique)
    transition, between = run.transition, run.outputs()
    with transition.compressed() as model:
        assert model is run.model
        compressed = run.outputs()
        with transition.original():
            original = run.outputs()
            with transition.compressed():
                assert same(run.outputs(), compressed)
            assert same(run.outputs(), original)
        assert same(run.outputs(), compressed)
    assert same(run.outputs(), between)
    assert not same(between, compressed)
    assert not same(between, original)


@pytest.mark.parametrize("technique", ["pruned", "rank_2", "replaced"])
def test_an_error_inside_a_context_leaves_it(technique: str) -> None:
    run = trained(technique)
    between = run.outputs()
    for context in (run.transition.compressed, run.transition.original):
        with pytest.raises(RuntimeError, match="mat1 and mat2"), context():
            run.model(torch.randn(3, 5))
        assert same(run.outputs(), between)


def test_the_clock_may_move_inside_a_context() -> None:
    run, other = trained(), trained()
    with run.transition.compressed():
        compressed = run.outputs()
        run.transition.step()
        assert same(run.outputs(), compressed)
    other.transition.step()
    assert same(run.outputs(), other.outputs())


def test_finish_inside_a_context_is_finish() -> None:
    run = trained()
    with run.transition.compressed():
        expected = run.outputs()
        run.transition.finish(force=True)
    assert same(run.outputs(), expected)
    with pytest.raises(vanishing.TransitionError, match="was finished"), run.transition.compressed():
        pass


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_training_inside_compressed_trains_what_is_shipped(technique: str) -> None:
    run = pair_of("linear", technique).prepare()
    with run.transition.compressed():
        batch = run.layer.batch()
        before = run.model(*batch)
        before.square().mean().backward()
        run.optimizer.step()
        assert not torch.equal(run.model(*batch), before)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_cancel_gives_the_original_back_as_trained_so_far(technique: str) -> None:
    run = pair_of("encoder" if not TECHNIQUES[technique].needs else "linear", technique).prepare()
    plain = run.layer.build()
    names = [name for name, _ in plain.named_parameters()]
    run.train(3)
    with run.transition.original():
        expected = run.outputs()
    assert run.transition.cancel() is run.model
    assert [name for name, _ in run.model.named_parameters()] == names
    assert {type(m) for m in run.model.modules()} == {type(m) for m in plain.modules()}
    assert same(run.outputs(), expected)
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {id(p) for p in run.model.parameters()}


def test_an_exact_gradient_is_the_one_of_the_mask() -> None:
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    pruning = MagnitudePruning(0.5, gradient=Gradient.EXACT)
    vanishing.prepare(nn.Sequential(layer), Recipe({"*": pruning}, schedule=LinearSchedule(steps=4))).seek(1)
    layer.weight.sum().backward()
    latent: nn.Parameter = layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    assert latent.grad is not None
    assert latent.grad.tolist() == [[0.75, 0.75, 1.0, 1.0]]


# Lengths that are shares of the training


def relative_recipe() -> Recipe:
    return Recipe(
        {
            "0": Rule(MagnitudePruning(0.5), schedule=StepSchedule(at="50%")),
            "2": Rule(Binary(), ramp=LinearSchedule(start="10%", steps="20%")),
        },
        schedule=LinearSchedule(steps="40%"),
    )


def absolute_recipe() -> Recipe:
    return Recipe(
        {
            "0": Rule(MagnitudePruning(0.5), schedule=StepSchedule(at=10)),
            "2": Rule(Binary(), ramp=LinearSchedule(start=2, steps=4)),
        },
        schedule=LinearSchedule(steps=8),
    )


def same_shape(block: nn.Module) -> nn.Module:
    return nn.Linear(8, 4)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_shares_of_a_training_are_steps_once_its_length_is_given() -> None:
    one, other = small_model(), small_model()
    relative = vanishing.prepare(one, relative_recipe())
    absolute = vanishing.prepare(other, absolute_recipe())
    assert relative.beta == 1.0
    assert not relative.done
    batch = torch.randn(4, 8)
    assert torch.equal(one(batch), other(batch))
    relative.set_length(20)
    assert relative.recipe == absolute.recipe
    assert relative.end == absolute.end == 10
    for _ in range(10):
        relative.step()
        absolute.step()
        assert torch.equal(one(batch), other(batch))
    relative.load_state_dict(absolute.state_dict())
    relative.finish()
    assert Recipe.from_yaml(relative_recipe().to_yaml()) == relative_recipe()


def test_without_the_length_of_the_training_the_clock_does_not_move() -> None:
    model = small_model()
    transition = vanishing.prepare(model, Binary(), steps="40%")
    before = model.state_dict()
    with pytest.raises(vanishing.TransitionError, match=r"the clock stands at 0.*TransitionCallback"):
        transition.finish()
    for call in (transition.step, lambda: transition.seek(3), lambda: transition.finish(force=True)):
        with pytest.raises(vanishing.TransitionError, match=r"length is not known\. Call transition\.set_length"):
            call()
    finished_state = {"steps_done": 4, "recipe": '{"rules": []}'}
    with pytest.raises(vanishing.TransitionError, match="length is not known"):
        transition.load_state_dict(finished_state)
    assert transition.steps_done == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    transition.cancel()


def test_a_training_has_one_length() -> None:
    transition = vanishing.prepare(small_model(), Binary(), steps="40%")
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="at least 1"):
            transition.set_length(wrong)  # type: ignore[arg-type]
    # Before the first step another length may be tried, as when a smaller batch makes a training longer.
    transition.set_length(20)
    transition.set_length(30)
    assert transition.end == 12
    transition.set_length(20)
    transition.step()
    transition.set_length(20)
    with pytest.raises(vanishing.TransitionError, match="under way, laid out for another length"):
        transition.set_length(30)
    assert transition.end == 8
    # Steps are steps, however long the training is.
    vanishing.prepare(small_model(), Binary(), steps=4).set_length(3)


def test_a_length_may_compress_at_once() -> None:
    model = small_model()
    transition = vanishing.prepare(model, Recipe({"*": Binary()}, schedule=StepSchedule(at="1%")))
    assert transition.beta == 1.0
    transition.set_length(20)
    assert transition.beta == 0.0
    layer: Any = model.get_submodule("2")
    assert len(layer.weight.abs().unique()) == 4


def test_the_gap_is_the_mean_distance_from_the_original_weights() -> None:
    model = small_model()
    weights = [weight.detach().clone() for name, weight in model.named_parameters() if name.endswith("weight")]
    transition = vanishing.prepare(model, LowRank(rank=2), steps=4)
    # The part of a truncated decomposition that is left out: the root of the sum of the squares of the rest.
    tails = [(s := torch.linalg.svdvals(w))[2:].square().sum().sqrt() / s.square().sum().sqrt() for w in weights]
    assert transition.gap() == pytest.approx(float(sum(tails)) / 2, rel=1e-4)
    transition.cancel()
    replaced = Recipe({"2": vanishing.Replace(same_shape)}, schedule=LinearSchedule(steps=4))
    assert vanishing.prepare(model, replaced).gap() is None


@pytest.mark.parametrize("end", ["finish", "cancel"])
@pytest.mark.parametrize(
    "call", [lambda t: t.gap(), lambda t: t.set_length(8), lambda t: t.step(), lambda t: t.cancel()]
)
def test_a_transition_that_is_over_says_so(end: str, call: Callable[[vanishing.Transition], object]) -> None:
    transition = vanishing.prepare(small_model(), Binary(), steps="50%")
    transition.set_length(4)
    transition.finish(force=True) if end == "finish" else transition.cancel()
    with pytest.raises(vanishing.TransitionError, match=f"was {end}"):
        call(transition)
