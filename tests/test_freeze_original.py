"""`Recipe(freeze_original=True)`: the original is not trained, everything else is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from vanishing import LinearSchedule, LowRank, MagnitudePruning, Recipe, RecipeError, Replace, Transition, prepare
from vanishing.errors import ConfigError

INPUTS, TARGETS = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(16, 4)


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 4))


def halved(block: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8))


RECIPE = {"0": LowRank(rank=2), "1": Replace(halved, name="halved, for a frozen original")}


def frozen_recipe() -> Recipe:
    return Recipe(RECIPE, schedule=LinearSchedule(steps=4), freeze_original=True)


def train(model: nn.Module, transition: Transition, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        mse_loss(model(INPUTS), TARGETS).backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    return optimizer


def test_the_original_keeps_its_bits_and_takes_no_state() -> None:
    model = network()
    weight, block = model[0].weight, model[1][0].weight
    before = weight.detach().clone(), block.detach().clone()
    bias, head = model[0].bias.detach().clone(), model[2].weight.detach().clone()
    transition = prepare(model, frozen_recipe())
    optimizer = train(model, transition, 3)
    assert torch.equal(weight, before[0])
    assert torch.equal(block, before[1])
    assert weight not in optimizer.state
    assert block not in optimizer.state
    # The bias is the factored layer's too, and the head is nobody's.
    assert not torch.equal(model[0].bias, bias)
    assert not torch.equal(model[2].weight, head)
    train(model, transition, 1)
    finished = transition.finish()
    assert all(p.requires_grad for p in finished.parameters())


def test_the_same_gradients_as_without() -> None:
    gradients = []
    for recipe in (frozen_recipe(), Recipe(RECIPE, schedule=LinearSchedule(steps=4))):
        model = network()
        prepare(model, recipe).seek(2)
        mse_loss(model(INPUTS), TARGETS).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        expected = None if "original" in name else gradients[1][name]
        assert (gradient is None) == (expected is None), name
        if gradient is not None and expected is not None:
            torch.testing.assert_close(gradient, expected)


def test_cancel_gives_a_model_back_that_can_be_trained() -> None:
    model = network()
    prepare(model, frozen_recipe()).cancel()
    assert all(p.requires_grad for p in model.parameters())


def test_a_resumed_run_has_the_same_bits() -> None:
    whole = network()
    transition = prepare(whole, frozen_recipe())
    optimizer = train(whole, transition, 2)
    resumed = network()
    again = prepare(resumed, frozen_recipe())
    resumed.load_state_dict(whole.state_dict())
    again.load_state_dict(transition.state_dict())
    assert [p.requires_grad for p in resumed.parameters()] == [p.requires_grad for p in whole.parameters()]
    assert len(optimizer.state) == sum(p.requires_grad for p in whole.parameters())


def test_a_weight_that_something_else_uses_is_trained() -> None:
    model = network()
    model[2] = nn.Linear(8, 8)
    model[1][0].weight = model[2].weight
    transition = prepare(model, frozen_recipe())
    assert model[2].weight.requires_grad
    transition.cancel()


def test_refused_where_nothing_is_to_freeze_or_nothing_is_left_to_train() -> None:
    shared = Recipe({"*": MagnitudePruning(sparsity=0.5)}, schedule=LinearSchedule(steps=4), freeze_original=True)
    model = network()
    with pytest.raises(RecipeError, match="shares the original's weights"):
        prepare(model, shared)
    alone = nn.Sequential(nn.Linear(8, 8, bias=False))
    everything = Recipe({"*": LowRank(rank=2)}, schedule=LinearSchedule(steps=4), freeze_original=True)
    with pytest.raises(RecipeError, match="nothing of the model would be trained"):
        prepare(alone, everything)
    for each in (model, alone):
        assert all(p.requires_grad for p in each.parameters())
        assert not any("parametrizations" in name for name, _ in each.named_parameters())
    with pytest.raises(ConfigError, match="True or False"):
        Recipe(RECIPE, schedule=LinearSchedule(steps=4), freeze_original="yes")  # type: ignore[arg-type]


def test_it_is_in_the_file_of_a_recipe() -> None:
    recipe = Recipe({"*": LowRank(rank=2)}, schedule=LinearSchedule(steps=4), freeze_original=True)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.resolved(10).freeze_original
