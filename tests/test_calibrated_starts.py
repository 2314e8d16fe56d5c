"""Compressed forms that start from what calibration batches tell, against the formulas of their papers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import vanishing
from vanishing import (
    Calibration,
    ConfigError,
    Global,
    LowRank,
    MagnitudePruning,
    PerChannel,
    Quantization,
    RecipeError,
    Score,
    Split,
)


def skewed(count: int, features: int, seed: int = 0) -> Tensor:
    """Correlated inputs, some features of which are far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, features, generator=generator) @ torch.randn(features, features, generator=generator)
    return mixed * torch.logspace(-1, 1, features)


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12))


def at_once(model: nn.Module, technique: vanishing.Compressor, calibration: object) -> vanishing.Transition:
    recipe = vanishing.Recipe({"*": technique}, schedule=vanishing.StepSchedule(at=0))
    return vanishing.prepare(model, recipe, calibration=calibration)  # type: ignore[arg-type]


def test_a_whitened_start_changes_the_outputs_as_little_as_any_factors_of_its_rank() -> None:
    rank, x = 4, skewed(200, 16)
    model = layer()
    expected = model(x) - model[0].bias
    # Eckart and Young: no outputs of this rank are nearer than the largest singular values allow.
    best = torch.linalg.svdvals(expected)[rank:].norm()
    errors = {}
    for whitened in (True, False):
        small = layer()
        at_once(small, LowRank(rank=rank, whitened=whitened), [x[:90], x[90:]] if whitened else None).finish()
        errors[whitened] = (small(x) - small[0].bias - expected).norm()
    torch.testing.assert_close(errors[True], best, rtol=1e-3, atol=0)
    assert errors[False] > 1.5 * best


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_a_start_of_few_inputs_keeps_all_that_they_tell(rows: int) -> None:
    # Fewer inputs than features: a rank as large as their number loses nothing of the outputs.
    x = torch.cat([skewed(rows, 16), torch.zeros(2, 16)])
    model = layer()
    expected = model(x)
    at_once(model, LowRank(rank=4, whitened=True), [x]).finish()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_whitened_convolution_with_groups_is_better_on_its_inputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 4, 6, 6) * torch.tensor([0.1, 5.0, 3.0, 0.2]).reshape(1, 4, 1, 1)
    weights = nn.Conv2d(4, 12, 3, groups=2, padding=1).state_dict()
    errors = []
    for whitened in (True, False):
        model = nn.Sequential(nn.Conv2d(4, 12, 3, groups=2, padding=1))
        model[0].load_state_dict(weights)
        expected = model(x)
        at_once(model, LowRank(rank=2, whitened=whitened), [x] if whitened else None).finish()
        errors.append((model(x) - expected).norm())
    assert errors[0] < 0.95 * errors[1]


def test_energy_of_a_whitened_start_is_that_of_the_outputs() -> None:
    x, model = skewed(200, 16), layer()
    values = torch.linalg.svdvals(model(x) - model[0].bias).square()
    expected = int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
    at_once(model, LowRank(energy=0.9, whitened=True), [x]).finish()
    assert model[0].rank == expected


def test_wanda_keeps_the_products_of_magnitude_and_input_norm() -> None:
    x, model = skewed(50, 16), layer()
    scores = model[0].get_parameter("weight").detach().abs() * x.norm(dim=0)
    expected = torch.zeros_like(scores).scatter_(1, scores.topk(4, dim=1).indices, 1.0)
    weight = model[0].get_parameter("weight").detach().clone()
    # A loader gives labels too, which nothing here needs.
    batches = [(part, torch.zeros(len(part))) for part in (x[:20], x[20:])]
    at_once(model, MagnitudePruning(0.75, score=Score.WANDA, granularity=PerChannel()), batches).finish()
    assert torch.equal(model[0].get_parameter("weight"), weight * expected)


def test_first_order_scores_are_magnitude_times_gradient() -> None:
    x, model = skewed(8, 16), layer()
    targets = torch.arange(8)
    gradient = torch.autograd.grad(functional.cross_entropy(model(x), targets), model[0].get_parameter("weight"))[0]
    weight = model[0].get_parameter("weight").detach().clone()
    scores = (weight * gradient).abs().flatten()
    expected = torch.zeros_like(scores).scatter_(0, scores.topk(48).indices, 1.0).reshape(weight.shape)
    batches = Calibration(batches=[(x, targets)], loss=lambda m, b: functional.cross_entropy(m(b[0]), b[1]))
    at_once(model, MagnitudePruning(0.75, score=Score.FIRST_ORDER), batches).finish()
    assert torch.equal(model[0].get_parameter("weight"), weight * expected)


@pytest.mark.parametrize("score", [Score.WANDA, Score.FIRST_ORDER])
def test_layers_that_compete_are_compared_by_score(score: Score) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    technique = MagnitudePruning(0.5, score=score, granularity=Global()) | Quantization(bits=8)
    batches = Calibration(batches=[skewed(30, 16)], loss=lambda m, b: m(b).square().mean())
    at_once(model, technique, batches).finish()
    # The last layer sees small inputs, the first one inputs of about 100 times their size.
    zeros = [int((part.get_parameter("weight") == 0).sum()) for part in model]
    assert sum(zeros) >= 96
    if score is Score.WANDA:
        assert zeros[0] != 64


@pytest.mark.parametrize("technique", [MagnitudePruning(0.5, score=Score.WANDA), LowRank(energy=0.8, whitened=True)])
def test_a_resumed_run_takes_what_was_seen_from_its_state(technique: vanishing.Compressor) -> None:
    def start(seed: int) -> tuple[nn.Sequential, vanishing.Transition, torch.optim.Optimizer]:
        model = layer()
        batches = [skewed(40, 16, seed)]
        recipe = vanishing.Recipe({"*": technique}, schedule=vanishing.LinearSchedule(steps=4))
        transition = vanishing.prepare(model, recipe, calibration=batches)
        return model, transition, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(model: nn.Module, transition: vanishing.Transition, optimizer: torch.optim.Optimizer, until: int) -> None:
        for step in range(transition.steps_done, until):
            model(skewed(8, 16, 100 + step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            transition.step()

    whole = start(0)
    train(*whole, 2)
    states = [part.state_dict() for part in (whole[0], whole[2], whole[1])]
    saved = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, states)
    train(*whole, 6)
    again = start(1)
    for part, state in zip((again[0], again[2], again[1]), saved, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    train(*again, 6)
    x = skewed(5, 16)
    assert torch.equal(again[1].finish()(x), whole[1].finish()(x))


def test_batches_that_are_missing_or_useless_are_reported() -> None:
    with pytest.raises(RecipeError, match=r"'0' looks at batches, and none were given.*calibration=batches"):
        at_once(layer(), LowRank(rank=4, whitened=True), None)
    with pytest.raises(RecipeError, match="no technique of the recipe looks at activations"):
        at_once(layer(), LowRank(rank=4), [skewed(4, 16)])
    with pytest.raises(RecipeError, match="cannot be observed"):
        at_once(nn.Sequential(nn.LSTM(4, 4)), MagnitudePruning(0.5, score=Score.WANDA), [torch.randn(2, 3, 4)])
    with pytest.raises(ConfigError, match="only the split between channels can be whitened"):
        LowRank(rank=4, split=Split.SPATIAL, whitened=True)
    with pytest.raises(ConfigError, match="acts on its factors"):
        LowRank(rank=4) | MagnitudePruning(0.5, score=Score.WANDA)


def test_a_failed_calibration_leaves_the_model_as_it_was() -> None:
    model = layer()
    with pytest.raises(RuntimeError):
        at_once(model, LowRank(rank=4, whitened=True), [torch.randn(3, 7)])
    assert type(model[0]) is nn.Linear and not model[0]._forward_pre_hooks
