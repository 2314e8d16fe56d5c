"""Low rank: what the rank is, what runs when, and how a saved run with another rank is taken over."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vanishing
from cases import LAYERS, Pair, Run, Technique
from vanishing import (
    NM,
    LinearSchedule,
    LowRank,
    MagnitudePruning,
    PolynomialSchedule,
    Quantization,
    Recipe,
    StepSchedule,
)
from vanishing.compressors.low_rank import LowRankWeight
from vanishing.layers import Factored


def form_of(layer: nn.Module) -> LowRankWeight:
    """The compressed form of a layer in transition."""
    form = layer.parametrizations.weight[0].form  # type: ignore[union-attr, index]
    assert isinstance(form, LowRankWeight)
    return form


def prepared(compressor: vanishing.Compressor, *layers: nn.Module) -> vanishing.Transition:
    """Layers in transition over four steps."""
    recipe = Recipe({"*": compressor}, schedule=LinearSchedule(steps=4))
    return vanishing.prepare(nn.Sequential(*layers), recipe)


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("layer", ["linear", "conv2d", "conv2d_groups", "transposed2d", "transformers_conv1d"])
def test_a_ratio_is_the_share_of_weights_that_stay(layer: str, ratio: float) -> None:
    model = LAYERS[layer].build()
    weight = model.get_submodule("layer").get_parameter("weight")
    vanishing.prepare(model, LowRank(ratio=ratio), steps=1).finish(force=True)
    factored = model.get_submodule("layer")
    assert isinstance(factored, Factored)
    sizes = [thin.get_parameter("weight").numel() for thin in factored]
    one = sum(sizes) // factored.rank
    assert sum(sizes) <= ratio * weight.numel() or factored.rank == 1
    assert sum(sizes) + one > ratio * weight.numel() or factored.rank == min(
        factored.left.shape[1], factored.right.shape[2]
    )


def test_the_factors_are_balanced() -> None:
    layer = nn.Linear(12, 8)
    prepared(LowRank(rank=3), layer)
    factors = form_of(layer).factors
    torch.testing.assert_close(factors.left[0].norm(dim=0), factors.right[0].norm(dim=1))


def test_the_dense_weight_is_not_computed_once_the_original_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(12, 8)
    transition = prepared(LowRank(rank=2), layer)
    calls: list[str] = []
    for name in ("compress", "blend"):
        method = getattr(LowRankWeight, name)
        monkeypatch.setattr(
            LowRankWeight,
            name,
            lambda *a, _name=name, _method=method: (calls.append(_name), _method(*a))[1],  # type: ignore[func-returns-value]
        )
    x = torch.randn(2, 12)
    layer(x)
    assert calls == []
    transition.seek(2)
    layer(x)
    assert calls == ["blend"]
    transition.seek(4)
    layer(x)
    assert calls == ["blend"]
    with transition.original():
        layer(x)
    assert calls == ["blend"]


def test_a_convolution_of_two_to_four_keeps_each_component_in_every_group() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=2)
    transition = prepared(LowRank(rank=2), layer)
    transition.seek(4)
    assert torch.linalg.matrix_rank(layer.weight.detach().reshape(2, 4, -1)).tolist() == [2, 2]


@pytest.mark.parametrize(
    "compressor", [LowRank(energy=0.7), LowRank(energy=0.7) | MagnitudePruning(0.5) | Quantization(4)]
)
def test_a_run_by_energy_continues_with_its_rank_in_a_model_of_another_one(compressor: vanishing.Compressor) -> None:
    pair = Pair(LAYERS["linear"], Technique(compressor))
    whole = pair.prepare().train(2)
    state = whole.state()
    other = pair.layer.build(seed=1)
    other.get_submodule("layer").get_parameter("weight").data.fill_(1.0)
    split = Run(pair, other, torch.float32, pair.layer.recipe(compressor))
    ranks = [form_of(run.model.get_submodule("layer")).factors.rank for run in (whole, split)]
    assert ranks[0] > ranks[1] == 1
    parameters = [id(p) for p in split.model.parameters()]
    split.load(state)
    assert form_of(split.model.get_submodule("layer")).factors.rank == ranks[0]
    assert [id(p) for p in split.model.parameters()] == parameters
    thin = form_of(split.model.get_submodule("layer")).factors
    assert (thin[0].out_features, thin[1].in_features) == (ranks[0], ranks[0])  # type: ignore[comparison-overlap]
    for run in (whole, split):
        run.train(5).transition.finish()
    assert all(torch.equal(a, b) for a, b in zip(whole.outputs(), split.outputs(), strict=True))


def test_another_fixed_rank_is_an_error_to_load() -> None:
    state = nn.Sequential(nn.Linear(12, 8))
    transition = vanishing.prepare(state, LowRank(rank=3), steps=4)
    other = nn.Sequential(nn.Linear(12, 8))
    vanishing.prepare(other, LowRank(rank=2), steps=4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(transition.model.state_dict())


def test_a_ramp_by_energy_keeps_its_final_rank_across_a_restart() -> None:
    recipe = Recipe({"*": LowRank(energy=0.7)}, schedule=StepSchedule(at=0), ramp=PolynomialSchedule(steps=4, power=1))
    models = [nn.Sequential(nn.Linear(12, 8)) for _ in range(2)]
    with torch.no_grad():
        models[1][0].weight.fill_(1.0)  # type: ignore[operator]
    first, second = (vanishing.prepare(model, recipe) for model in models)
    first.seek(2)
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    second.load_state_dict(first.state_dict())
    for transition in (first, second):
        transition.seek(4)
        transition.finish()
    assert torch.equal(models[0][0].weight, models[1][0].weight)  # type: ignore[arg-type]


def test_a_technique_on_the_factors_is_asked_about_the_factors() -> None:
    pruned = MagnitudePruning(granularity=NM(n=2, m=4))
    prepared(LowRank(rank=4) | pruned, nn.Linear(12, 8)).finish(force=True)
    with pytest.raises(
        vanishing.RecipeError, match=r"of one of its factors: its fan-in of 3 is not a multiple of m = 4"
    ):
        prepared(LowRank(rank=3) | pruned, nn.Linear(12, 8))
    with pytest.raises(vanishing.RecipeError, match="rank is at most 8"):
        prepared(LowRank(rank=9) | pruned, nn.Linear(12, 8))


def test_both_factors_have_their_sparsity_to_one_weight() -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    recipe = Recipe({"*": LowRank(rank=3) | MagnitudePruning(0.7)}, schedule=LinearSchedule(steps=3))
    transition = vanishing.prepare(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        model(torch.randn(4, 12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    transition.finish()
    for thin in model[0]:  # type: ignore[attr-defined]
        assert int((thin.weight == 0).sum()) == round(0.7 * thin.weight.numel())
