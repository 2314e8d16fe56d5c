"""Optimizers: what joins and leaves them, and the training loops that people write around them."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import vanishing
from loops import batch, copied, mlp, states_equal, train
from vanishing import Binary, LinearSchedule, LowRank, MagnitudePruning, Quantization, Recipe, Replace
from vanishing.optimizers import OptimizerWatch, join, leave

Optimizers = Callable[[Iterable[Any]], torch.optim.Optimizer]
LOW_RANK = Recipe({"*": LowRank(rank=2)}, schedule=LinearSchedule(steps=3))
MIXED = Recipe(
    {"0": LowRank(rank=2), "2": Replace(lambda block: nn.Linear(16, 4), name="linear")},
    schedule=LinearSchedule(steps=3),
)


def names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of the parameters in each group; "?" for one that the model does not have."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [[known.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]


# Joining and leaving


def test_new_parameters_join_the_group_of_the_weight_that_they_come_from_and_originals_leave() -> None:
    model = mlp()
    groups: Any = [
        {"params": [model.get_parameter("0.bias"), model.get_parameter("2.bias")], "weight_decay": 0.0},
        {"params": [model.get_parameter("2.weight")], "lr": 0.5},
        {"params": [model.get_parameter("0.weight")]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    transition = vanishing.prepare(model, MIXED, optimizer=optimizer)
    factors = "0.parametrizations.weight.0.form.factors"
    assert names(model, optimizer) == [
        # A replacement's matrices join the original's matrices, its vectors the vectors.
        ["0.bias", "2.original.bias", "2.replacement.bias"],
        ["2.original.weight", "2.replacement.weight"],
        ["0.parametrizations.weight.original", f"{factors}.0.weight", f"{factors}.1.weight"],
    ]
    train(model, transition, 3, optimizer)
    transition.finish()
    assert names(model, optimizer) == [["0.1.bias", "2.bias"], ["2.weight"], ["0.0.weight", "0.1.weight"]]
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == settings
    train(model, None, 2, optimizer)


def test_on_cancel_the_new_parameters_leave_and_the_order_is_that_of_before() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = [list(group["params"]) for group in optimizer.param_groups]
    transition = vanishing.prepare(model, MIXED, optimizer=optimizer)
    train(model, transition, 2, optimizer)
    transition.cancel()
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[id(p) for p in before[0]]]
    assert len(optimizer.state) == 4


def test_optimizers_made_from_named_parameters_keep_their_names_in_step() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    transition = vanishing.prepare(model, MIXED, optimizer=optimizer)
    group = optimizer.param_groups[0]
    assert len(group["param_names"]) == len(group["params"]) == 8
    now = dict(model.named_parameters())
    assert all(now[name] is p for name, p in list(zip(group["param_names"], group["params"], strict=True))[4:])
    train(model, transition, 3, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    transition.finish()
    group = optimizer.param_groups[0]
    assert len(group["param_names"]) == len(group["params"]) == 5
    train(model, None, 1, optimizer)


ALL: dict[str, Optimizers] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
}


@pytest.mark.parametrize("passed", [True, False], ids=["passed", "made afterwards"])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_every_optimizer_trains_to_the_end_and_on(make: Optimizers, passed: bool) -> None:
    model = mlp()
    early = make(model.parameters()) if passed else None
    transition = vanishing.prepare(model, MIXED, optimizer=early)
    optimizer = early or make(model.parameters())
    start = copied(dict(model.named_parameters()))
    train(model, transition, 3, optimizer)
    assert all(not torch.equal(value, start[name]) for name, value in model.named_parameters())
    transition.finish()
    assert set(optimizer.state) <= set(model.parameters())
    before = copied(model.state_dict())
    train(model, None, 1, optimizer)
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_several_optimizers_of_one_model() -> None:
    model = mlp()
    optimizers = []
    transition = vanishing.prepare(model, LOW_RANK)
    for layer in (model[0], model[2]):
        optimizers.append(torch.optim.AdamW(layer.parameters(), lr=1e-2))
    for _ in range(3):
        model(batch()).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        transition.step()
    transition.finish()
    assert [sorted(group) for optimizer in optimizers for group in names(model, optimizer)] == [
        ["0.0.weight", "0.1.bias", "0.1.weight"],
        ["2.0.weight", "2.1.bias", "2.1.weight"],
    ]


def test_optimizers_that_come_and_go_are_not_kept_alive() -> None:
    model = mlp()
    transition = vanishing.prepare(model, LOW_RANK)
    for _ in range(3):
        optimizer = train(model, transition, 1)
        reference = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert reference() is None
    transition.finish()


def test_a_learning_rate_schedule_goes_on_through_the_end() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    transition = vanishing.prepare(model, LOW_RANK, optimizer=optimizer)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(5):
        assert [group["lr"] for group in optimizer.param_groups] == [1 / (1 + step)]
        train(model, transition if step < 3 else None, 1, optimizer)
        rates.step()
        if step == 2:
            transition.finish()


def test_a_watch_knows_who_made_a_step_until_it_is_closed() -> None:
    model = mlp()
    calls: list[int] = []
    watch = OptimizerWatch(lambda _: calls.append(len(list(watch.seen))))
    optimizer, late = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    assert not list(watch.seen)
    model(batch()).sum().backward()
    optimizer.step()
    assert list(watch.seen) == [optimizer]
    # Before the step, when the optimizer was not known yet.
    assert calls == [0]
    watch.close()
    late.step()
    assert list(watch.seen) == [optimizer]
    assert calls == [0]


def test_a_transition_that_is_forgotten_within_a_step_does_not_break_it() -> None:
    model = mlp()
    transition = vanishing.prepare(model, Binary(), steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    forgotten: list[Any] = []

    def forget(*_: Any) -> None:
        forgotten.clear()
        gc.collect()

    hook = register_optimizer_step_pre_hook(forget)
    forgotten.append(vanishing.prepare(mlp(), Binary(), steps=4))
    train(model, transition, 2, optimizer)
    hook.remove()
    assert transition.steps_done == 2


def test_joining_twice_and_leaving_what_is_not_there_change_nothing() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    new = {"new": nn.Parameter(torch.zeros(2))}
    for _ in range(2):
        join(optimizer, [model.get_parameter("0.weight")], new)
    assert len(optimizer.param_groups[0]["params"]) == 5
    for _ in range(2):
        leave([optimizer], new.values())
    assert len(optimizer.param_groups[0]["params"]) == 4


# Training loops


def resumed(split: int, steps: int, passed: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Model and optimizer state of a run that is saved and continued in other objects at a step."""
    saved: Any = None
    for begin, end in ((0, split), (split, steps)):
        torch.manual_seed(begin)
        model = mlp()
        if begin == 0:
            first = copied(model.state_dict())
        model.load_state_dict(first)
        early = torch.optim.AdamW(model.parameters(), lr=1e-2) if passed else None
        transition = vanishing.prepare(model, MIXED, optimizer=early)
        optimizer = early or torch.optim.AdamW(model.parameters(), lr=1e-2)
        if saved is None:
            model.get_submodule("2.replacement").load_state_dict({"weight": torch.ones(4, 16), "bias": torch.ones(4)})
        else:
            file = torch.load(io.BytesIO(saved))
            model.load_state_dict(file["model"])
            optimizer.load_state_dict(file["optimizer"])
            transition.load_state_dict(file["transition"])
        for step in range(begin, end):
            model(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            transition.step()
        buffer = io.BytesIO()
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "transition": transition}
        torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
        saved = buffer.getvalue()
    return copied(model.state_dict()), optimizer.state_dict()


@pytest.mark.parametrize("passed", [True, False], ids=["passed", "made afterwards"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(passed: bool) -> None:
    whole, whole_optimizer = resumed(0, 5, passed)
    for split in (1, 3, 4):
        state, optimizer = resumed(split, 5, passed)
        assert states_equal(state, whole)
        assert optimizer["param_groups"] == whole_optimizer["param_groups"]
        for one, other in zip(optimizer["state"].values(), whole_optimizer["state"].values(), strict=True):
            assert states_equal(one, other)


@pytest.mark.parametrize("recipe", [LOW_RANK, Recipe({"*": MagnitudePruning(0.5)}, schedule=LinearSchedule(steps=3))])
def test_gradient_accumulation_gives_the_gradients_of_the_whole_batch(recipe: Recipe) -> None:
    gradients = []
    for parts in (1, 5):
        torch.manual_seed(0)
        model = mlp()
        transition = vanishing.prepare(model, recipe)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            for part in batch(step).chunk(parts):
                (model(part).square().sum() / 20).backward()
            optimizer.step()
            # The clock counts optimizer steps, not backward passes.
            transition.step()
        gradients.append([p.grad for p in model.parameters()])
    assert transition.steps_done == 2
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("recipe", [LOW_RANK, MIXED], ids=["low rank", "mixed"])
def test_gradients_are_clipped_over_both_forms(recipe: Recipe) -> None:
    model = mlp()
    transition = vanishing.prepare(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        (100 * model(batch()).square().mean()).backward()
        before = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        after = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert before > 1 and after <= 1.0001
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    transition.finish()


def test_at_beta_1_the_clipped_step_is_that_of_the_plain_model() -> None:
    plain, model = mlp(), mlp()
    model.load_state_dict(plain.state_dict())
    vanishing.prepare(model, MIXED)
    norms = []
    for each in (plain, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        (100 * each(batch()).square().mean()).backward()
        norms.append(nn.utils.clip_grad_norm_(each.parameters(), 1.0))
        optimizer.step()
    assert norms[0] == norms[1]
    assert torch.equal(plain(batch()), model(batch()))


@pytest.mark.parametrize(
    "rules",
    [
        {"*": MagnitudePruning(0.5)},
        {"*": Quantization(4)},
        {"*": Binary()},
        {"*": LowRank(rank=2)},
        {"*": LowRank(rank=2) | Quantization(8)},
        {"0": Replace(lambda block: nn.Linear(8, 16), name="wide linear"), "2": LowRank(rank=2)},
    ],
    ids=str,
)
def test_mixed_precision_keeps_the_weights_in_full_precision(rules: dict[Any, Any]) -> None:
    model = mlp()
    transition = vanishing.prepare(model, Recipe(rules, schedule=LinearSchedule(steps=4)), example_inputs=batch())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch())
            assert output.dtype == torch.bfloat16
            loss = (output.float() - 1).square().mean()
        loss.backward()
        assert all(
            p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in model.parameters()
        )
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.7 * losses[0]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(batch())
    transition.finish()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(batch()), expected)


def test_an_average_of_the_weights_follows_through_the_fade() -> None:
    model = mlp()
    transition = vanishing.prepare(model, LOW_RANK)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        train(model, transition, 1, optimizer)
        average.update_parameters(model)
    assert states_equal(copied(average.module.state_dict()), copied(model.state_dict()))


def test_a_model_that_is_copied_for_each_trial_is_independent() -> None:
    model = mlp()
    results = []
    for _ in range(2):
        trial = copy.deepcopy(model)
        torch.manual_seed(0)
        transition = vanishing.prepare(trial, MIXED)
        train(trial, transition, 3)
        results.append(copied(transition.finish().state_dict()))
    assert states_equal(*results)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
