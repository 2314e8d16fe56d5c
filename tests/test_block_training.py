"""Replaced blocks in training: gradient checkpointing, dropout, batch statistics, sharing, and blocks within blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

import vanishing
from architectures import ARCHITECTURES, loss_of
from loops import batch, copied, mlp, states_equal
from test_block_caches import other_weights
from vanishing import LinearSchedule, LowRank, MagnitudePruning, Recipe, RecipeError, Replace, SkipBlock, StepSchedule

HALVED = Replace(other_weights, name="other weights of a training")


def trained(model: Any, transition: vanishing.Transition, name: str, steps: int = 6) -> list[Tensor]:
    """Losses and gradients of every step, with dropout that depends on the step alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: list[Tensor] = []
    for step in range(steps):
        inputs = ARCHITECTURES[name].batch(step)
        torch.manual_seed(step)
        loss = loss_of(model(**inputs), step)
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    return seen


# Gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "name, key, compressor",
    [
        ("bert", "bert.encoder.layer.0", HALVED),
        ("bert", "bert.encoder.layer.0", SkipBlock()),
        ("bert", "*.attention", HALVED),
        ("llama", "model.layers.?", HALVED),
        ("llama", "model.layers.0", SkipBlock()),
        ("gpt2", "*.mlp", HALVED),
    ],
)
def test_gradient_checkpointing_changes_nothing(name: str, key: str, compressor: Any, reentrant: bool) -> None:
    runs: list[Any] = []
    for checkpointed in (False, True):
        model: Any = ARCHITECTURES[name].build()
        transition = vanishing.prepare(model, Recipe({key: compressor}, schedule=LinearSchedule(steps=4)))
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        runs.append([trained(model, transition, name), transition.finish()])
    (plain, first), (checked, second) = runs
    assert torch.equal(plain[0], checked[0])
    if reentrant:
        # A checkpoint of this kind adds up the gradients of a block's input on its own: in another order.
        torch.testing.assert_close(checked, plain, rtol=1e-3, atol=1e-5)
        return
    assert len(plain) == len(checked) and all(torch.equal(a, b) for a, b in zip(plain, checked, strict=True))
    assert states_equal(copied(first.state_dict()), copied(second.state_dict()))


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["around", "in the original", "in the replacement"])
def test_checkpoints_around_and_inside_of_a_block(where: str, reentrant: bool) -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        original, replacement = block(), block()
        if checkpointed and where != "around":
            original = Checkpointed(original, reentrant) if "original" in where else original
            replacement = Checkpointed(replacement, reentrant) if "replacement" in where else replacement
        parts = nn.ModuleList([nn.Linear(8, 8), original])
        recipe = Recipe({"1": Replace(lambda _, r=replacement: r, name="made")}, schedule=LinearSchedule(steps=4))
        transition = vanishing.prepare(parts, recipe)
        transition.seek(2)
        hidden = parts[0](batch())
        inner = Checkpointed(parts[1], reentrant) if checkpointed and where == "around" else parts[1]
        loss = inner(hidden).square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in parts.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Dropout and batch statistics


def test_each_form_has_dropout_of_its_own_while_both_run() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Sequential(nn.Dropout(0.5)))
    recipe = Recipe({"1": Replace(lambda _: nn.Dropout(0.5), name="dropout")}, schedule=LinearSchedule(steps=2))
    transition = vanishing.prepare(model, recipe)
    transition.step()
    hidden = model[0](batch())
    share = model[1](hidden) / hidden
    # Neither, one, or both of two independent masks keep a value, which each doubles.
    assert sorted(share.detach().round(decimals=3).unique().tolist()) == [0, 1, 2]


def statistics(block: Any) -> list[Tensor]:
    return [t for name, t in block.named_buffers() if "running" in name or "num_batches" in name]


def test_batch_statistics_of_each_form_are_of_what_it_sees_while_it_runs() -> None:
    def block() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm1d(8, momentum=None))

    model: Any = nn.Sequential(nn.Identity(), block())
    recipe = Recipe(
        {"1": Replace(lambda _: block(), name="a normalized block")}, schedule=LinearSchedule(start=2, steps=4)
    )
    transition = vanishing.prepare(model, recipe)
    batches = [batch(step) + step for step in range(10)]
    original, replacement = model[1].original[0], model[1].replacement[0]
    counts = []
    for inputs in batches:
        model(inputs)
        counts.append((int(original.num_batches_tracked), int(replacement.num_batches_tracked)))
        transition.step()
    # Beta is 1 at steps 0 to 2, between until 5, and 0 from 6 on.
    assert counts == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2), (6, 3), (6, 4), (6, 5), (6, 6), (6, 7)]
    for norm, seen in ((original, batches[:6]), (replacement, batches[3:])):
        torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in seen]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in seen]).mean(0))


def test_evaluation_between_the_forms_and_of_one_form_touches_no_statistics() -> None:
    model = ARCHITECTURES["timm_resnet"].build()
    recipe = Recipe({"layer2.0": HALVED}, schedule=LinearSchedule(steps=2))
    transition = vanishing.prepare(model, recipe, example_inputs=ARCHITECTURES["timm_resnet"].batch())
    transition.step()
    before = copied(model.state_dict())
    model.eval()
    with transition.compressed():
        model(**ARCHITECTURES["timm_resnet"].batch(1))
    model(**ARCHITECTURES["timm_resnet"].batch(1))
    assert states_equal(copied(model.state_dict()), before)


def test_statistics_of_a_replacement_are_estimated_anew_at_the_end() -> None:
    model = ARCHITECTURES["timm_resnet"].build()
    transition = vanishing.prepare(model, Recipe({"layer2.0": HALVED}, schedule=StepSchedule(at=0)))
    norm: Any = model.get_submodule("layer2.0.replacement.bn1")
    inputs: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
    transition.finish(recalibrate=[ARCHITECTURES["timm_resnet"].batch(seed) for seed in range(3)])
    assert model.get_submodule("layer2.0.bn1") is norm
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs[-3:]])
    torch.testing.assert_close(norm.running_mean, means.mean(0), rtol=1e-4, atol=1e-5)


# Blocks within blocks


def test_a_rule_for_layers_in_a_replaced_block_says_that_they_are_in_one() -> None:
    model = nn.Sequential(mlp(), nn.Linear(4, 4))
    recipe = Recipe({"0": HALVED, "0.*": MagnitudePruning(0.5)}, schedule=LinearSchedule(steps=2))
    with pytest.raises(RecipeError, match="it is inside a block that is replaced as a whole"):
        vanishing.prepare(model, recipe)
    wide = Recipe({"0": HALVED, "*": MagnitudePruning(0.5)}, schedule=LinearSchedule(steps=2))
    plan = wide.match(model)
    assert {row.name: row.outcome for row in plan.rows} == {
        "0": "compress",
        "0.0": "left",
        "0.2": "left",
        "1": "compress",
    }


def test_a_block_in_a_block_is_replaced_with_the_outer_one_alone() -> None:
    model = nn.Sequential(mlp(), nn.Linear(4, 4))
    recipe = Recipe({"0.2": HALVED, "0": HALVED}, schedule=LinearSchedule(steps=2))
    with pytest.raises(RecipeError, match="it is inside a block that is replaced as a whole"):
        vanishing.prepare(model, recipe)


@pytest.mark.parametrize("second", [MagnitudePruning(0.5), vanishing.Quantization(bits=4)])
def test_the_layers_of_a_replacement_are_compressed_by_a_second_transition(second: Any, tmp_path: Any) -> None:
    model = nn.Sequential(mlp(), nn.Linear(4, 4))
    vanishing.prepare(model, Recipe({"0": HALVED}, schedule=StepSchedule(at=0))).finish()
    vanishing.prepare(model, Recipe({"0.*": second}, schedule=StepSchedule(at=0))).finish()
    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", nn.Sequential(mlp(), nn.Linear(4, 4)))
    assert torch.equal(loaded(batch()), model(batch()))


@pytest.mark.parametrize("inner", [MagnitudePruning(0.5), LowRank(rank=2), HALVED])
def test_a_replacement_that_is_in_a_transition_itself_is_refused(inner: Any) -> None:
    def factory(block: nn.Module) -> nn.Module:
        new = nn.Sequential(copy.deepcopy(block))
        vanishing.prepare(new, Recipe({"0.0": inner}, schedule=LinearSchedule(steps=2)))
        return new

    model = nn.Sequential(mlp(), nn.Linear(4, 4))
    before = copied(model.state_dict())
    recipe = Recipe({"0": Replace(factory, name="nested")}, schedule=LinearSchedule(steps=2))
    with pytest.raises(RecipeError, match=r"'0' cannot be replaced: the replacement is in a transition of its own"):
        vanishing.prepare(model, recipe)
    assert states_equal(copied(model.state_dict()), before)


# Blocks that are called several times


@pytest.mark.parametrize("steps_done", [0, 1, 2, 4])
def test_a_block_that_is_called_several_times_is_blended_in_every_call(steps_done: int) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(len(x), 8)
            for step in x.unbind(1):
                state = self.cell(step, hx=state)
            return state

    torch.manual_seed(0)
    model = Recurrent()
    original, other = copy.deepcopy(model.cell), nn.GRUCell(4, 8)
    recipe = Recipe({"cell": Replace(lambda _: copy.deepcopy(other), name="cell")}, schedule=LinearSchedule(steps=4))
    transition = vanishing.prepare(model, recipe)
    transition.seek(steps_done)
    x, beta = torch.randn(3, 5, 4), transition.beta
    state = torch.zeros(3, 8)
    for step in x.unbind(1):
        state = beta * original(step, state) + (1 - beta) * other(step, state)
    torch.testing.assert_close(model(x), state)


def test_a_layer_that_an_albert_shares_is_blended_at_every_depth() -> None:
    model: Any = ARCHITECTURES["albert"].build().eval()
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    other = other_weights(layer)
    original = copy.deepcopy(layer)
    recipe = Recipe({"*albert_layers.0": Replace(lambda _: other, name="other")}, schedule=LinearSchedule(steps=2))
    transition = vanishing.prepare(model, recipe)
    transition.step()
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    block = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    block.register_forward_hook(lambda _, a, k, output: calls.append((a, k, output)), with_kwargs=True)
    model(**ARCHITECTURES["albert"].batch())
    assert len(calls) == model.config.num_hidden_layers == 2
    for arguments, keywords, output in calls:
        expected = (original(*arguments, **keywords) + other(*arguments, **keywords)) / 2
        torch.testing.assert_close(output, expected)


def test_a_block_that_is_called_with_keywords_alone_is_skipped() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
            return states + self.linear(states), None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: Tensor) -> Any:
            return self.layer(mask=None, states=x)

    model: Any = Model()
    transition = vanishing.prepare(model, Recipe({"layer": SkipBlock()}, schedule=LinearSchedule(steps=2)))
    transition.step()
    x = batch()
    states, nothing = model(x)
    assert nothing is None
    torch.testing.assert_close(states, x + model.layer.original.linear(x) / 2)
    transition.step()
    transition.finish()
    assert model(x)[0] is x and model(x)[1] is None


def test_hidden_states_of_a_replaced_layer_are_the_blended_ones() -> None:
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    # The library hooks its layers when it is first asked for their outputs.
    model(torch.arange(6)[None], output_hidden_states=True)
    transition = vanishing.prepare(model, Recipe({"*.layer.1": HALVED}, schedule=LinearSchedule(steps=2)))
    seen: list[Tensor] = []
    model.bert.encoder.layer[1].register_forward_hook(lambda _, __, output: seen.append(output))
    for _ in range(3):
        states = model(torch.arange(6)[None], output_hidden_states=True).hidden_states
        assert len(states) == 4 and torch.equal(states[2], seen[-1])
        transition.step()
    transition.finish()
    states = model(torch.arange(6)[None], output_hidden_states=True).hidden_states
    assert len(states) == 4 and torch.equal(states[2], seen[-1])
