"""What users do to a model in the middle of a transition, beside training it."""

from __future__ import annotations

import copy
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vanishing
from loops import batch, mlp, train
from vanishing import Binary, Gradient, LowRank, MagnitudePruning, Quantization, Recipe, Replace, StepSchedule
from vanishing.blended_block import BlendedBlock
from vanishing.outputs import blend_outputs
from vanishing.schedules import LinearSchedule


@pytest.fixture
def overwriting_parameters() -> Iterator[None]:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def at(model: nn.Sequential, position: int) -> Any:
    return model[position]


def first(model: nn.Sequential) -> Any:
    return model[0]


def assign_state(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def check_shipped(model: nn.Module, transition: vanishing.Transition, steps: int) -> None:
    """Train to the end; what is finished is what ran at beta = 0."""
    train(model, transition, steps)
    model.eval()
    x = batch().to(next(model.parameters()).dtype)
    with transition.compressed():
        expected = model(x)
    transition.finish()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("compressor", [MagnitudePruning(0.5), Binary(), LowRank(rank=2)], ids=repr)
def test_parameters_that_a_load_put_in_are_those_that_are_compressed(compressor: vanishing.Compressor) -> None:
    model = mlp()
    transition = vanishing.prepare(model, compressor, steps=4)
    assign_state(model)
    check_shipped(model, transition, 4)
    if isinstance(compressor, MagnitudePruning):
        assert all(int((at(model, i).weight == 0).sum()) == at(model, i).weight.numel() // 2 for i in (0, 2))
    if isinstance(compressor, LowRank):
        assert sorted(n for n, _ in model.named_parameters()) == [
            "0.0.weight", "0.1.bias", "0.1.weight", "2.0.weight", "2.1.bias", "2.1.weight",
        ]  # fmt: skip


@pytest.mark.parametrize("compressor", [MagnitudePruning(0.5), LowRank(rank=2)], ids=repr)
def test_a_cast_that_makes_new_parameters(compressor: vanishing.Compressor, overwriting_parameters: None) -> None:
    model = mlp()
    transition = vanishing.prepare(model, compressor, steps=3)
    model.double()
    model.load_state_dict(model.state_dict())
    x = batch().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        transition.step()
    with transition.compressed():
        expected = model(x)
    transition.finish()
    torch.testing.assert_close(model(x), expected)


def test_the_bias_of_a_factored_layer_is_in_the_state_once() -> None:
    model = mlp()
    vanishing.prepare(model, LowRank(rank=2), steps=3)
    tensors = model.state_dict(keep_vars=True)
    assert len({id(t) for t in tensors.values()}) == len(tensors)


# Replacements


def test_parts_that_a_replacement_has_from_its_block_are_not_touched() -> None:
    block = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.LayerNorm(8), nn.BatchNorm1d(8))
    block[2].eval()
    model = nn.Sequential(block)
    recipe = Recipe({"0": Replace(lambda old: nn.Sequential(nn.Linear(8, 8), old[1], old[2]), name="keeps two")},
                    schedule=LinearSchedule(steps=2))  # fmt: skip
    vanishing.prepare(model, recipe)
    assert not block[2].training and block[1].weight.dtype == torch.float32
    replaced = first(model).replacement
    assert replaced[0].weight.dtype == torch.bfloat16 and replaced[0].training


def test_a_complex_parameter_of_a_replacement_stays_complex() -> None:
    class Phase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.tensor([1j, 2 - 1j]))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.phase.abs().sum()

    model = nn.Sequential(nn.Linear(4, 4))
    recipe = Recipe({"0": Replace(lambda old: Phase(), name="phase")}, schedule=StepSchedule(at=0))
    vanishing.prepare(model, recipe)
    assert first(model).replacement.phase.tolist() == [1j, 2 - 1j]


def test_an_original_that_writes_into_its_input_is_an_error() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)))
    recipe = Recipe({"0": Replace(lambda old: nn.Linear(8, 8), name="linear")}, schedule=LinearSchedule(steps=2))
    transition = vanishing.prepare(model, recipe)
    model(batch())
    transition.seek(1)
    with pytest.raises(vanishing.TransitionError, match="writes into its input, which the replacement would then get"):
        model(batch())
    transition.cancel()
    with pytest.raises(vanishing.TransitionError, match="writes into its input"):
        vanishing.prepare(model, recipe, example_inputs=batch())
    assert not any(isinstance(m, BlendedBlock) for m in model.modules())


@pytest.mark.parametrize("beta", [0.25, 0.5, torch.tensor(0.75)])
def test_scores_masked_with_infinity_stay_masked(beta: Any) -> None:
    original, replacement = torch.tensor([1.0, -torch.inf, 2.0]), torch.tensor([3.0, -torch.inf, 5.0])
    got = blend_outputs(original, replacement, beta, "f(...)")
    torch.testing.assert_close(got, beta * original + (1 - beta) * replacement)
    assert got[1] == -torch.inf


def test_default_dictionaries_are_blended() -> None:
    got = blend_outputs(defaultdict(list, a=torch.ones(2)), defaultdict(list, a=torch.zeros(2)), 0.25, "f(...)")
    assert got["a"].tolist() == [0.25, 0.25] and got["new"] == []


def test_hooks_on_the_state_stay_with_the_block_and_those_on_its_calls_move() -> None:
    seen: list[str] = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_load_state_dict_pre_hook(self.note)
            self.register_forward_hook(lambda *_: seen.append("forward"))

        def note(self, module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
            assert f"{prefix}linear.weight" in state
            seen.append("load")

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.linear(x)
            return output

    model = nn.Sequential(Block())
    recipe = Recipe({"0": Replace(lambda old: nn.Linear(8, 8), name="plain")}, schedule=StepSchedule(at=1))
    transition = vanishing.prepare(model, recipe)
    model.load_state_dict(model.state_dict())
    model(batch())
    assert seen == ["load", "forward"]
    transition.seek(1)
    transition.finish()
    model.load_state_dict(model.state_dict())
    model(batch())
    assert seen == ["load", "forward", "forward"]


# Threads, copies, other parametrizations


def test_a_recurrent_layer_in_another_thread_does_not_make_weights_stale() -> None:
    inside, leave = threading.Event(), threading.Event()

    class Slow(nn.LSTM):
        def forward(self, *arguments: Any) -> Any:
            output = super().forward(*arguments)
            inside.set()
            leave.wait(20)
            return output

    slow = nn.Sequential(Slow(4, 4))
    vanishing.prepare(slow, MagnitudePruning(0.5), steps=4)
    thread = threading.Thread(target=lambda: slow(torch.randn(2, 3, 4)))
    thread.start()
    assert inside.wait(20)
    model = mlp()
    transition = vanishing.prepare(model, MagnitudePruning(0.5), steps=10)
    before = first(model).weight.detach().clone()
    train(model, transition, 3)
    assert not torch.equal(first(model).weight, before)
    leave.set()
    thread.join()


@pytest.mark.parametrize("change", [nn.Module.double, lambda m: m.to("cpu", torch.float64)])
def test_a_recurrent_layer_can_be_cast_and_copied_during_the_fade(change: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4)})
    transition = vanishing.prepare(model, MagnitudePruning(0.5), steps=4)
    transition.seek(2)
    model["lstm"](torch.randn(2, 3, 4))
    change(model)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 4).double()
    assert torch.equal(twin["lstm"](x)[0], model["lstm"](x)[0])
    transition.seek(4)
    transition.finish()
    lstm: Any = model["lstm"]
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters(), strict=True))


def test_replicas_without_parameters_of_their_own() -> None:
    model = mlp()
    transition = vanishing.prepare(model, MagnitudePruning(0.5), steps=4)
    transition.seek(2)
    expected = first(model).weight
    held: Any = first(model).parametrizations
    # What `nn.DataParallel` does to a module on its way to another device.
    original = held.weight._parameters.pop("original")
    object.__setattr__(held.weight, "original", original)
    assert torch.equal(first(model).weight, expected)


def test_a_parametrization_on_top_is_applied() -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = mlp()
    transition = vanishing.prepare(model, Binary(), steps=4)
    transition.seek(2)
    blended = first(model).weight.detach().clone()
    parametrize.register_parametrization(first(model), "weight", Twice())
    assert torch.equal(first(model).weight, 2 * blended)


def test_a_parametrized_bias_is_a_problem_for_factors() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    parametrize.register_parametrization(first(model), "bias", nn.Identity())
    with pytest.raises(vanishing.RecipeError, match="its bias is parametrized"):
        vanishing.prepare(model, LowRank(rank=2), steps=3)


# The clock


def test_a_frozen_mask_stays_through_every_later_jump() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    transition = vanishing.prepare(model, MagnitudePruning(0.5, freeze=True), steps=4)
    transition.seek(4)
    mask = (first(model).weight != 0).clone()
    with torch.no_grad():
        first(model).parametrizations.weight.original.neg_().add_(1)
    for step in (5, 9, 30):
        transition.seek(step)
        assert torch.equal(first(model).weight != 0, mask)
    transition.seek(2)
    transition.seek(8)
    assert not torch.equal(first(model).weight != 0, mask)


def test_where_a_transition_ended_is_remembered() -> None:
    for last in ("finish", "cancel"):
        model = mlp()
        transition = vanishing.prepare(model, MagnitudePruning(0.5), steps=5)
        if last == "finish":
            transition.seek(5)
        getattr(transition, last)()
        assert transition.end == 5
        assert transition.done is (last == "finish")


@pytest.mark.parametrize(
    "compressor",
    [
        Binary(gradient=Gradient.CLIPPED),
        Quantization(bits=1, gradient=Gradient.CLIPPED),
        vanishing.Ternary(gradient=Gradient.CLIPPED),
    ],
    ids=repr,
)
def test_a_quantizer_that_does_nothing_yet_clips_no_gradient(compressor: vanishing.Compressor) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    recipe = Recipe({"*": compressor}, schedule=StepSchedule(at=0), ramp=LinearSchedule(steps=4))
    vanishing.prepare(model, recipe)
    first(model).weight.sum().backward()
    gradient = model.get_parameter("0.parametrizations.weight.original").grad
    assert gradient is not None and bool((gradient == 1).all())


def test_a_batch_that_does_not_fit_is_seen_before_anything_is_finished() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    transition = vanishing.prepare(model, MagnitudePruning(0.5), steps=2, ignore=["1"])
    transition.seek(2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        transition.finish(recalibrate=[torch.randn(5, 3)])
    transition.finish(recalibrate=[batch()])


# Parts of a model


def test_what_was_done_to_a_part_is_saved_with_the_whole(tmp_path: Any) -> None:
    def whole() -> nn.ModuleDict:
        return nn.ModuleDict({"body": mlp(), "head": nn.Linear(4, 2)})

    model = whole()
    vanishing.prepare(model["body"], Quantization(bits=4), steps=1).finish(force=True)
    vanishing.prepare(model, Recipe({"head": Binary()}, schedule=StepSchedule(at=0))).finish()
    vanishing.prepare(model.get_submodule("body.2"), MagnitudePruning(0.5), steps=1).finish(force=True)
    techniques = {row.name: row.technique for row in vanishing.summary(model).rows}
    assert techniques == {
        "body.0": repr(Quantization(bits=4)),
        "body.2": repr(MagnitudePruning(0.5)),
        "head": repr(Binary()),
    }
    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", whole())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    again = {row.name: row.technique for row in vanishing.summary(loaded).rows}
    assert again == techniques


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_model_is_not_saved_under_the_wrappers_names(wrap: Any, tmp_path: Any) -> None:
    with pytest.raises(TypeError, match=r"save: the model is wrapped in .* Give the model inside: model"):
        vanishing.save(wrap(mlp()), tmp_path / "small")


def test_a_second_technique_on_factors_is_in_the_summary_as_in_the_file(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    vanishing.prepare(model, Recipe({"0": LowRank(rank=16)}, schedule=StepSchedule(at=0))).finish()
    vanishing.prepare(model, Quantization(bits=4), steps=1).finish(force=True)
    (row,) = vanishing.summary(model).rows
    assert row.technique == f"{LowRank(rank=16)!r}, then {Quantization(bits=4)!r}"
    vanishing.save(model, tmp_path / "small")
    weights = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert weights - 2_000 < row.after.bytes <= weights
    assert row.after.bytes < 0.2 * sum(p.nbytes for p in model.parameters())


# Names and patterns


def test_two_factories_of_one_name_are_a_problem() -> None:
    rules = {
        "0": Replace(lambda old: nn.Linear(8, 16), name="new"),
        "2": Replace(lambda old: nn.Identity(), name="new"),
    }
    with pytest.raises(vanishing.RecipeError, match="two different factories are called 'new'"):
        vanishing.prepare(mlp(), Recipe(rules, schedule=StepSchedule(at=0)))


def test_a_factory_without_a_name_of_its_own_needs_one() -> None:
    def inner(block: nn.Module) -> nn.Module:
        return block

    for factory in (inner, lambda block: block):
        with pytest.raises(vanishing.ConfigError, match=r"has no name of its own for the file. Give one with name="):
            Replace(factory)


def test_an_error_in_a_factory_names_it() -> None:
    def broken(block: nn.Module) -> nn.Module:
        raise KeyError("width")

    recipe = Recipe({"0": Replace(broken, name="broken")}, schedule=StepSchedule(at=0))
    with pytest.raises(KeyError) as caught:
        vanishing.prepare(mlp(), recipe)
    assert caught.value.__notes__ == ["This happened in the factory 'broken', called with a Linear."]


def test_an_ignored_name_that_matches_nothing_is_a_problem() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    with pytest.raises(vanishing.RecipeError, match=r"ignore: nothing matched 'clasifier'.* 'classifier'"):
        vanishing.prepare(model, MagnitudePruning(0.5), steps=3, ignore=["clasifier"])


@pytest.mark.parametrize(
    "text",
    [
        "rules: [{match: 0, compressor: {kind: binary}}]",
        "rules: [{match: '*', compressor: {kind: binary}}]\nignore: [4]",
    ],
)
def test_a_number_where_a_name_is_meant(text: str) -> None:
    with pytest.raises(vanishing.ConfigError, match="Put it in quotes"):
        Recipe.from_yaml(f"{text}\nschedule: {{kind: step_schedule, at: 0}}")
