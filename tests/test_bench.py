"""The benchmark's parts: the order of batches, the arms' recipes, the budget, statistics and wording."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import vanishing
from vanishing.bench.arms import ARMS, DENSE_THEN_COMPRESS, ITERATIVE, POST_SHOT, VCON, Arm
from vanishing.bench.digits import digits_task
from vanishing.bench.statistics import PairedDifference, Summary, lead_over_best, summarize
from vanishing.bench.tasks import Examples, SmallViT, Task
from vanishing.bench.training import Budget
from vanishing.bench.wording import percent, verdict


def test_statistics_agree_with_numpy() -> None:
    values = [0.91, 0.95, 0.90, 0.97]
    summary = summarize(values)
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.spread == pytest.approx(np.std(values, ddof=1))
    assert summarize([0.5]) == Summary(0.5, None)


def test_the_lead_is_over_the_best_other_strategy_and_paired() -> None:
    values = np.array([0.94, 0.96, 0.90])
    others = {"weak": [0.5, 0.6, 0.7], "strong": [0.93, 0.97, 0.89]}
    lead = lead_over_best(values.tolist(), others)
    differences = values - np.array(others["strong"])
    assert (lead.other, lead.ahead, lead.behind) == ("strong", 2, 1)
    assert lead.difference.mean == pytest.approx(differences.mean())
    assert lead.difference.spread == pytest.approx(differences.std(ddof=1))


@pytest.mark.parametrize(
    ("arm", "beta", "missing"),
    [
        (POST_SHOT, {0: 0.0, 5: 0.0, 10: 0.0}, {}),
        (DENSE_THEN_COMPRESS, {0: 1.0, 9: 1.0, 10: 0.0}, {}),
        (ITERATIVE, {0: 0.0, 10: 0.0}, {0: 1.0, 5: 0.125, 10: 0.0}),
        (VCON, {0: 1.0, 5: 0.5, 10: 0.0}, {}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_an_arm_is_a_recipe(arm: Arm, beta: dict[int, float], missing: dict[int, float]) -> None:
    recipe = arm.recipe({"blocks.*": vanishing.LowRank(rank=2)}, fade_steps=10)
    assert {step: recipe.schedule(step) for step in beta} == beta
    assert (recipe.ramp is None) == (not missing)
    assert {step: recipe.ramp(step) for step in missing if recipe.ramp} == missing


def test_all_arms_compress_the_same_layers() -> None:
    model = SmallViT(depth=1)
    rules = {"blocks.*": vanishing.Binary()}
    tables = {str(arm.recipe(rules, fade_steps=10).match(model)) for arm in ARMS}
    assert len(tables) == 1


def test_the_learning_rate_stays_high_through_the_fade_and_falls_to_zero_after_it() -> None:
    budget = Budget(steps=100, fade_steps=40, learning_rate=1e-3, evaluations=5)
    rates = [budget.rate(step) for step in range(101)]
    assert rates[:41] == [1.0] * 41
    assert np.diff(rates[40:]) == pytest.approx(np.full(60, -1 / 60))
    assert rates[100] == 0.0
    assert [step for step in range(1, 101) if budget.evaluates(step)] == [20, 40, 60, 80, 100]


def test_a_task_repeats_itself_exactly() -> None:
    first, second, other = digits_task(3), digits_task(3), digits_task(4)
    for a, b in zip(first.batches(60), second.batches(60), strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
    assert not torch.equal(first.test.inputs, other.test.inputs)


def test_an_epoch_shows_each_example_at_most_once_and_the_next_in_another_order() -> None:
    numbers = Examples(torch.arange(10), torch.zeros(10))
    task = Task("numbers", 0, nn.Identity, "*", train=numbers, test=numbers, batch_size=5)
    batches = [batch.inputs.tolist() for batch in task.batches(4)]
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == list(range(10))
    assert batches[:2] != batches[2:]


def test_the_split_is_stratified_and_has_no_image_in_both_parts() -> None:
    task = digits_task(0)
    counts = [torch.bincount(part.targets, minlength=10) for part in (task.train, task.test)]
    assert len(task.train.targets) + len(task.test.targets) == 1797
    assert torch.allclose(counts[0] / counts[0].sum(), counts[1] / counts[1].sum(), atol=0.005)


def test_accuracy_keeps_the_mode_and_counts() -> None:
    task = digits_task(0)
    layer = nn.Linear(64, 10)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.eye(10)[7])
    model = nn.Sequential(nn.Flatten(), layer).train()
    assert task.accuracy(model) == pytest.approx((task.test.targets == 7).double().mean().item())
    assert model.training


@pytest.mark.parametrize(
    ("ahead", "behind", "seeds", "said"),
    [
        (3, 0, 3, "VCON is ahead of"),
        (0, 3, 3, "VCON is behind"),
        (2, 1, 3, "do not differ clearly"),
        (0, 0, 3, "do not differ clearly"),
        (1, 0, 1, "One seed says little"),
    ],
)
def test_the_verdict_claims_no_more_than_the_seeds_show(ahead: int, behind: int, seeds: int, said: str) -> None:
    spread = None if seeds == 1 else 0.004
    lead = PairedDifference("iterative", Summary(0.01 * (ahead - behind), spread), ahead, behind)
    assert said in verdict(lead, seeds)
    assert percent(lead.difference, signed=True) in verdict(lead, seeds)
