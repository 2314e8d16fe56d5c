"""`Replace`: a user's own module fades in for any block, whatever it takes and returns."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vanishing
from loops import batch, copied, mlp, states_equal, train
from vanishing import LinearSchedule, MagnitudePruning, Recipe, Replace, StepSchedule, Transition, TransitionError
from vanishing.blended_block import BlendedBlock
from vanishing.outputs import blend_outputs


class Scale(nn.Module):
    """`factor * x`, and a count of its calls."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * x


Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Result:
    tensor: Tensor
    count: int
    inner: Pair | None = None


class Shaped(Scale):
    """A block with any outputs: `shape(factor * x)`."""

    def __init__(self, factor: float, shape: Callable[[Tensor], Any]) -> None:
        super().__init__(factor)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(super().forward(x))


class Around(nn.Module):
    """A model with a block, and layers before and after it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.block = block
        self.after = nn.Linear(4, 2)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.block(*arguments, **keywords)


def fading(model: nn.Module, replacement: nn.Module, name: str = "block", steps: int = 4, **options: Any) -> Transition:
    recipe = Recipe(
        {name: Replace(lambda block: replacement, name="replacement")}, schedule=LinearSchedule(steps=steps)
    )
    return vanishing.prepare(model, recipe, **options)


# Inputs and outputs


NESTED: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, 2 * x),
    "list": lambda x: [x],
    "named tuple": lambda x: Pair(x, 2 * x),
    "dict": lambda x: {"a": x, "b": {"c": x + 1}},
    "ordered dict": lambda x: OrderedDict(a=x, b=x + 1),
    "dataclass": lambda x: Result(x, 3, Pair(x, None)),
    "model output": lambda x: BaseModelOutputWithPooling(last_hidden_state=x, hidden_states=(x, 2 * x)),
    "none": lambda x: (x, None),
    "numbers and words": lambda x: (x, 3, 2.5, "word", True),
    "whole numbers": lambda x: (x, x.detach().long(), x > 0),
    "empty": lambda x: (x, x[:0], ()),
    "packed sequence": lambda x: nn.utils.rnn.pack_sequence([x, x[:1]]),
    "complex": lambda x: torch.complex(x, 2 * x),
    "half": lambda x: x.half(),
    "double": lambda x: x.double(),
}


def leaves(value: Any) -> Iterator[Any]:
    """Every value in an output, with its kind of container, in order."""
    yield type(value)
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name))
    else:
        yield value


@pytest.mark.parametrize("beta", [1.0, 0.75, 0.5, 0.25, 0.0])
@pytest.mark.parametrize("shape", NESTED.values(), ids=NESTED)
def test_outputs_are_blended_however_they_are_nested(shape: Callable[[Tensor], Any], beta: float) -> None:
    model = Around(Shaped(2.0, shape))
    transition = fading(model, Shaped(4.0, shape))
    transition.seek(round(4 * (1 - beta)))
    assert transition.beta == beta
    x = torch.randn(3, 4)
    got, f, g = list(leaves(model(x))), list(leaves(shape(2 * x))), list(leaves(shape(4 * x)))
    assert len(got) == len(f)
    for value, one, other in zip(got, f, g, strict=True):
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            tolerance: Any = {"rtol": 1e-3, "atol": 1e-6} if value.dtype == torch.half else {}
            torch.testing.assert_close(value, beta * one + (1 - beta) * other, **tolerance)
        elif isinstance(value, Tensor):
            # What cannot be blended is the replacement's, and the original's while that is alone.
            assert torch.equal(value, one if beta == 1 else other)
        else:
            assert value == one


@pytest.mark.parametrize(
    "original, replacement, path",
    [
        (lambda x: x, lambda x: x[:1], "block(...) is shape (3, 4) from the original and shape (1, 4) from the"),
        (lambda x: x, lambda x: x[..., None], "block(...) is shape (3, 4) from the original and shape (3, 4, 1)"),
        (lambda x: (x, (x, x)), lambda x: (x, (x, x.mT)), "block(...)[1][1] is shape (3, 4)"),
        (lambda x: (x, x), lambda x: (x,), "block(...) is 2 items from the original and 1 items"),
        (lambda x: (x, None), lambda x: (x, x), "block(...)[1] is NoneType from the original and Tensor"),
        (lambda x: x, lambda x: (x,), "block(...) is Tensor from the original and tuple"),
        (lambda x: {"a": x}, lambda x: (x,), "block(...) is dict from the original and tuple"),
        (lambda x: {"a": x}, lambda x: {"b": x}, "block(...) is keys ['a'] from the original and keys ['b']"),
        (lambda x: {"a": [x, {"b": x}]}, lambda x: {"a": [x, {"b": 3}]}, "block(...)['a'][1]['b'] is Tensor"),
        (lambda x: Result(x, 3), lambda x: {"tensor": x}, "block(...) is Result from the original and dict"),
        (lambda x: Result(x, 3), lambda x: Result(x[:2], 3), "block(...).tensor is shape (3, 4)"),
        (lambda x: BaseModelOutputWithPooling(x, x), lambda x: BaseModelOutputWithPooling(x), "is keys ['last_hid"),
    ],
)  # fmt: skip
def test_outputs_that_do_not_fit_are_named_by_their_path(
    original: Callable[[Tensor], Any], replacement: Callable[[Tensor], Any], path: str
) -> None:
    model = Around(Shaped(2.0, original))
    transition = fading(model, Shaped(4.0, replacement))
    x = torch.randn(3, 4)
    model(x)
    transition.step()
    with pytest.raises(TransitionError) as caught:
        model(x)
    assert path in str(caught.value)
    assert str(caught.value).startswith("a replacement must return what the original returns, but block(...)")


def test_any_arguments_and_keywords_reach_both_forms() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def forward(self, *arguments: Any, mask: Any = None, **keywords: Any) -> Tensor:
            self.seen.append((arguments, mask, keywords))
            return torch.zeros(2)

    first, second = Takes(), Takes()
    transition = fading(Around(first), second)
    transition.step()
    x, mask = torch.randn(2), object()
    transition.model(x, None, 3, mask=mask, deep={"a": [x]})
    assert first.seen == second.seen == [((x, None, 3), mask, {"deep": {"a": [x]}})]


# What runs


@pytest.mark.parametrize("steps_done, calls", [(0, (1, 0)), (1, (1, 1)), (3, (1, 1)), (4, (0, 1)), (9, (0, 1))])
def test_alone_only_one_form_runs(steps_done: int, calls: tuple[int, int]) -> None:
    first, second = Scale(2.0), Scale(4.0)
    model = Around(first)
    transition = fading(model, second)
    transition.seek(steps_done)
    model(torch.ones(2))
    assert (first.calls, second.calls) == calls
    with transition.compressed():
        model(torch.ones(2))
    with transition.original():
        model(torch.ones(2))
    assert (first.calls, second.calls) == (calls[0] + 1, calls[1] + 1)


def test_at_beta_1_and_0_outputs_and_gradients_are_those_of_one_form_bit_for_bit() -> None:
    torch.manual_seed(0)
    original, replacement = mlp(), mlp()
    model = nn.Sequential(nn.Linear(8, 8), copy.deepcopy(original))
    alone = {
        1.0: copy.deepcopy(nn.Sequential(model[0], original)),
        0.0: copy.deepcopy(nn.Sequential(model[0], replacement)),
    }
    transition = fading(model, replacement, "1")
    for beta, expected in alone.items():
        model.zero_grad()
        transition.seek(0 if beta else 4)
        output, reference = model(batch()), expected(batch())
        output.square().sum().backward()
        reference.square().sum().backward()
        assert torch.equal(output, reference)
        running = model.get_submodule("1.original" if beta else "1.replacement")
        silent = model.get_submodule("1.replacement" if beta else "1.original")
        for one, other in zip(running.parameters(), expected.get_submodule("1").parameters(), strict=True):
            assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
        assert all(p.grad is None for p in silent.parameters())


def test_between_the_gradients_are_shared_by_beta() -> None:
    model = Around(Scale(2.0))
    transition = fading(model, Scale(4.0))
    transition.seek(3)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    model(x).sum().backward()
    assert model.get_parameter("block.original.factor").grad == 0.25 * 3
    assert model.get_parameter("block.replacement.factor").grad == 0.75 * 3
    assert x.grad is not None and x.grad.tolist() == [0.25 * 2 + 0.75 * 4] * 2


class InFullPrecision(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


@pytest.mark.parametrize("block_type", [torch.float32, torch.bfloat16])
def test_forms_of_different_types_under_autocast(block_type: torch.dtype) -> None:
    kinds: dict[torch.dtype, nn.Module] = {torch.bfloat16: nn.Linear(8, 8), torch.float32: InFullPrecision(8, 8)}
    other = torch.float32 if block_type is torch.bfloat16 else torch.bfloat16
    model = nn.Sequential(nn.Linear(8, 8), kinds[block_type], nn.Linear(8, 4))
    transition = fading(model, kinds[other], "1")
    types = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model[1](model[0](batch()))
            loss = model[2](hidden).float().square().mean()
        types.append(hidden.dtype)
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        transition.step()
    assert types == [block_type] * 4 + [other]


def test_the_replacement_is_made_on_the_device_and_in_the_type_and_mode_of_the_block() -> None:
    model = nn.Sequential(mlp(), mlp()).double().eval()
    model[1].train()
    recipe = Recipe({"?": Replace(lambda block: mlp(), name="mlp")}, schedule=StepSchedule(at=1))
    transition = vanishing.prepare(model, recipe)
    assert [m.training for m in model] == [False, True]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    transition.step()
    transition.finish()
    assert [m.training for m in model] == [False, True]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model[0].modules())


def test_train_and_eval_reach_both_forms() -> None:
    model = nn.Sequential(nn.Sequential(nn.Dropout(0.5)), nn.Linear(8, 4))
    transition = fading(model, nn.Sequential(nn.Dropout(0.9)), "0")
    transition.step()
    model.eval()
    assert torch.equal(model[0](batch()), batch())
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())
    assert (model[0](batch()) == 0).any()


def test_a_normalization_that_is_kept_in_evaluation_mode_inside_of_the_block_stays_so() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    block[1].eval()
    model = nn.Sequential(block, nn.Linear(8, 4))
    expected = model(batch())
    transition = fading(model, mlp(), "0")
    assert not block[1].training
    assert torch.equal(model(batch()), expected)
    transition.cancel()
    assert not block[1].training


# Where a block may stand


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ModuleList([Scale(2.0), Scale(3.0)])
        self.named = nn.ModuleDict({"a": Scale(5.0)})
        self.chain = nn.Sequential(nn.Sequential(Scale(7.0), Scale(11.0)), Scale(13.0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.list:
            x = layer(x)
        return self.chain(self.named["a"](x))


@pytest.mark.parametrize(
    "name, factor", [("list.1", 3), ("named.a", 5), ("chain.0", 77), ("chain.0.1", 11), ("chain", 1001)]
)
def test_parents_of_every_kind(name: str, factor: int) -> None:
    model = Layers()
    transition = fading(model, Scale(1.0), name, steps=2)
    whole = 2 * 3 * 5 * 7 * 11 * 13
    for beta in (1.0, 0.5, 0.0):
        assert model(torch.ones(())).item() == pytest.approx(beta * whole + (1 - beta) * whole / factor)
        transition.step()
    transition.finish()
    assert model(torch.ones(())).item() == pytest.approx(whole / factor)
    assert not any(isinstance(module, BlendedBlock) for module in model.modules())


def test_a_block_that_is_used_twice_stays_one() -> None:
    block, replacement = Scale(2.0), Scale(3.0)
    model = nn.Sequential(block, nn.Sequential(nn.Identity(), block))
    transition = fading(model, replacement, "0", steps=2)
    assert model[0] is model.get_submodule("1.1")
    transition.step()
    assert model(torch.ones(())).item() == 2.5**2
    transition.step()
    transition.finish()
    assert model[0] is model.get_submodule("1.1") is replacement
    assert model(torch.ones(())).item() == 9


def test_a_replacement_may_keep_parts_of_the_block_and_the_block_itself() -> None:
    class Adapter(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block, self.extra = block, nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.extra(x)

    model = mlp()
    first = model[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe({"0": Replace(Adapter, name="adapter")}, schedule=LinearSchedule(steps=2))
    transition = vanishing.prepare(model, recipe, optimizer=optimizer, example_inputs=batch())
    assert len(optimizer.param_groups[0]["params"]) == 6
    train(model, transition, 2, optimizer)
    transition.finish()
    assert model.get_submodule("0.block") is first
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    train(model, None, 1, optimizer)


def test_a_block_without_parameters_is_replaced_by_one_with_some() -> None:
    model = mlp()
    groups: Any = [{"params": model[2].parameters(), "lr": 0.1}, {"params": model[0].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.2)
    recipe = Recipe({"1": Replace(lambda block: nn.PReLU(), name="prelu")}, schedule=LinearSchedule(steps=2))
    transition = vanishing.prepare(model, recipe, optimizer=optimizer)
    slope = model.get_parameter("1.replacement.weight")
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 2]
    train(model, transition, 2, optimizer)
    transition.finish()
    assert isinstance(model[1], nn.PReLU) and model[1].weight is slope and slope.item() != 0.25


# What the rest of the model sees


class Attention(nn.Module):
    num_heads = 4

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)

    def describe(self) -> str:
        return f"{self.num_heads} heads"


def test_attributes_are_read_through_the_wrapper() -> None:
    model = Around(Attention(4))
    transition = fading(model, Attention(2))
    block: Any = model.block
    for _ in range(4):
        assert (block.num_heads, block.describe(), block.proj.weight.shape) == (4, "4 heads", (4, 4))
        assert block.proj is block.original.proj
        assert not hasattr(block, "nothing")
        transition.step()
    # With nothing left of the original the model must do with what will be shipped.
    assert (block.num_heads, block.describe()) == (2, "2 heads")
    transition.seek(1)
    assert block.num_heads == 4
    with transition.compressed():
        assert block.num_heads == 2


def test_at_beta_0_an_attribute_that_the_replacement_lacks_is_an_error_that_says_so() -> None:
    model = Around(Attention())
    transition = fading(model, nn.Linear(4, 4))
    with transition.compressed(), pytest.raises(AttributeError) as caught:
        model.block.num_heads  # noqa: B018
    assert str(caught.value) == (
        "'Linear', the replacement of 'Attention', has no attribute 'num_heads'. If the model reads it, set it in the "
        "factory."
    )


def test_a_block_has_the_length_the_items_and_the_truth_of_the_form_that_stands() -> None:
    model = Around(nn.Sequential(Scale(2.0), Scale(3.0)))
    transition = fading(model, nn.Sequential(Scale(6.0)))
    block: Any = model.block
    assert (len(block), bool(block), [m.factor.item() for m in block], block[1].factor.item()) == (2, True, [2, 3], 3)
    with transition.compressed():
        assert (len(block), bool(block), [m.factor.item() for m in block]) == (1, True, [6])
    plain = Around(Scale(2.0))
    fading(plain, Scale(3.0))
    assert bool(plain.block)
    with pytest.raises(TypeError):
        len(plain.block)  # type: ignore[arg-type]


@pytest.mark.parametrize("parametrized", [False, True])
def test_copies_are_copies_of_the_wrapper(parametrized: bool) -> None:
    model = mlp()
    if parametrized:
        nn.utils.parametrizations.weight_norm(model[0])
    transition = fading(model, nn.Linear(8, 16), "0")
    transition.seek(2)
    twin = copy.deepcopy(model)
    assert type(twin[0]) is BlendedBlock and torch.equal(twin(batch()), model(batch()))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    transition.seek(4)
    assert not torch.equal(twin(batch()), model(batch()))


# Hooks


def test_hooks_of_the_user_see_the_blended_output_and_survive() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Scale(2.0), nn.Linear(4, 4))
    block: Any = model[1]
    seen: list[tuple[str, Any]] = []
    handles = [
        block.register_forward_pre_hook(lambda module, inputs: seen.append(("pre", inputs[0]))),
        block.register_forward_hook(lambda module, inputs, output: seen.append(("post", output))),
        block.register_forward_hook(lambda m, i, k, o: seen.append(("keywords", k)), with_kwargs=True),
        block.register_full_backward_hook(lambda module, inward, outward: seen.append(("backward", outward[0]))),
    ]
    transition = fading(model, Scale(4.0), "1", steps=2)

    def run(factor: float) -> None:
        seen.clear()
        x = torch.randn(3, 4)
        model(x).sum().backward()
        assert [name for name, _ in seen] == ["pre", "post", "keywords", "backward"]
        torch.testing.assert_close(seen[1][1], factor * model[0](x))
        torch.testing.assert_close(seen[3][1], model.get_parameter("2.weight").sum(0).expand(3, 4))

    run(2.0)
    transition.step()
    run(3.0)
    transition.step()
    run(4.0)
    handles[0].remove()
    assert transition.finish() is model
    seen.clear()
    model(torch.randn(3, 4)).sum().backward()
    assert [name for name, _ in seen] == ["post", "keywords", "backward"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.randn(3, 4)).sum().backward()
    assert seen == []


def test_hooks_come_back_when_the_transition_is_cancelled() -> None:
    model, calls = mlp(), list[int]()
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    transition = fading(model, nn.Linear(8, 16), "0")
    late = model[0].register_forward_hook(lambda *_: calls.append(2))
    transition.cancel()
    model(batch())
    assert calls == [1, 2] and len(model[0]._forward_hooks) == 2
    handle.remove()
    late.remove()
    assert not model[0]._forward_hooks


def test_hooks_of_the_replacement_itself_stay_and_run_inside() -> None:
    order: list[str] = []
    replacement = nn.Linear(8, 16)
    replacement.register_forward_pre_hook(lambda *_: order.append("its own, before"))
    replacement.register_forward_hook(lambda *_: order.append("its own, after"))
    model = mlp()
    model[0].register_forward_pre_hook(lambda *_: order.append("before"))
    model[0].register_forward_hook(lambda *_: order.append("after"))
    transition = fading(model, replacement, "0", steps=1)
    expected = ["before", "its own, before", "its own, after", "after"]
    transition.step()
    model(batch())
    assert order == expected
    transition.finish()
    order.clear()
    model(batch())
    assert order == expected


def test_a_replacement_with_weight_norm_of_the_old_kind_works_after_finish() -> None:
    with pytest.warns(FutureWarning):
        replacement = nn.utils.weight_norm(nn.Linear(8, 16))
    model = mlp()
    transition = fading(model, replacement, "0", steps=2)
    train(model, transition, 2)
    before = model(batch())
    transition.finish()
    assert torch.equal(model(batch()), before)
    train(model, None, 2)
    assert not torch.equal(model(batch()), before)


# The life cycle


def trained(steps: int, state: Any = None) -> tuple[nn.Module, torch.optim.Optimizer, Transition]:
    """A run of six steps, or its rest from a saved state on; what is random in a step depends on the step alone."""
    torch.manual_seed(1 if state is None else 2)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(mlp(), nn.Dropout(0.1)), nn.Linear(4, 4))
    recipe = Recipe(
        {"1": Replace(lambda block: nn.Linear(8, 4), name="linear"), "*": MagnitudePruning(0.5)},
        schedule=LinearSchedule(steps=5),
    )
    transition = vanishing.prepare(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        transition.load_state_dict(state["transition"])
    for step in range(transition.steps_done, steps):
        torch.manual_seed(step)
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    return model, optimizer, transition


@pytest.mark.parametrize("split", [0, 1, 3, 5])
def test_a_run_that_is_split_changes_no_bit(split: int, tmp_path: Path) -> None:
    model, optimizer, transition = trained(split)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "transition": transition}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "state")
    model, _, transition = trained(6, torch.load(tmp_path / "state"))
    whole, _, whole_transition = trained(6)
    assert states_equal(copied(model.state_dict()), copied(whole.state_dict()))
    assert transition.steps_done == whole_transition.steps_done == 6
    transition.finish()
    whole_transition.finish()
    assert states_equal(copied(model.state_dict()), copied(whole.state_dict()))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]


def test_cancel_gives_the_block_back() -> None:
    model = mlp()
    before, blocks = copied(model.state_dict()), list(model)
    transition = fading(model, nn.Linear(8, 16), "0")
    transition.seek(3)
    assert transition.cancel() is model
    assert list(model) == blocks and states_equal(copied(model.state_dict()), before)


def test_with_a_step_schedule_the_block_is_replaced_at_once() -> None:
    model = mlp()
    recipe = Recipe({"0": Replace(lambda block: nn.Linear(8, 16), name="linear")}, schedule=StepSchedule(at=0))
    transition = vanishing.prepare(model, recipe)
    model.get_parameter("0.original.weight").data.fill_(torch.nan)
    assert model(batch()).isfinite().all()
    transition.finish()


def test_blending_is_a_pure_function_of_nested_outputs() -> None:
    original, replacement = {"a": (torch.ones(2), None)}, {"a": (torch.zeros(2), None)}
    assert blend_outputs(original, replacement, 0.25, "x")["a"][0].tolist() == [0.25, 0.25]
    assert original["a"][0].tolist() == [1, 1] and replacement["a"][0].tolist() == [0, 0]


# What the README shows: blocks of real models, replaced by a user's own smaller ones


class SmallFeedForward(nn.Module):
    """A feed-forward block of a ViT with a quarter of the hidden units."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        width = block.get_parameter("fc1.weight").shape[1]
        hidden = block.get_parameter("fc1.weight").shape[0] // 4
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(hidden_states)))


class SmallAttention(nn.Module):
    """An attention block of a BERT with one narrow head, and a mean over the tokens for what it lacks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        width = block.get_parameter("output.dense.weight").shape[0]
        self.project, self.out = nn.Linear(width, 3 * 4), nn.Linear(4, width)
        self.norm = block.get_submodule("output.LayerNorm")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        query, key, value = self.project(hidden_states)[:, None].chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask)
        return self.norm(self.out(mixed[:, 0]) + hidden_states), None


SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny_vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3)
    return ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 16, 16)}


def tiny_bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = BertConfig(**SIZES, vocab_size=30, num_labels=3)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return BertForSequenceClassification(config), {"input_ids": torch.randint(0, 30, (4, 6)), "attention_mask": mask}


@pytest.mark.parametrize(
    "build, key, factory, count",
    [(tiny_vit, "*.mlp", SmallFeedForward, 2), (tiny_bert, "*.attention", SmallAttention, 2)],
    ids=["vit", "bert"],
)
def test_a_block_of_a_real_model_replaced_trained_finished_saved_and_loaded(
    build: Callable[[], Any], key: str, factory: Callable[[nn.Module], nn.Module], count: int, tmp_path: Path
) -> None:
    model, inputs = build()
    labels = torch.tensor([0, 1, 2, 0])
    before = sum(p.numel() for p in model.parameters())
    plain = model.eval()(**inputs).logits
    model.train()
    transition = vanishing.prepare(
        model, Recipe({key: Replace(factory)}, schedule=LinearSchedule(steps=4)), example_inputs=inputs
    )
    model.eval()
    assert torch.equal(model(**inputs).logits, plain)
    model.train()
    assert sum(isinstance(m, BlendedBlock) for m in model.modules()) == count
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(6):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    model.eval()
    with transition.compressed():
        shipped = model(**inputs).logits
    transition.finish()
    assert torch.equal(model(**inputs).logits, shipped)
    assert sum(isinstance(m, factory) for m in model.modules()) == count  # type: ignore[arg-type]
    assert sum(p.numel() for p in model.parameters()) < before
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    vanishing.save(model, tmp_path / "small")
    fresh = build()[0].eval()
    loaded = vanishing.load(tmp_path / "small", fresh)
    assert torch.equal(loaded(**inputs).logits, shipped)
    rebuilt = vanishing.load(tmp_path / "small")
    assert torch.equal(rebuilt(**inputs).logits, shipped)


# Weights and blocks that are shared


def test_one_replacement_for_two_blocks_is_shared_by_them(tmp_path: Path) -> None:
    def layers() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))

    model, shared = layers(), nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe({"[01]": Replace(lambda block: shared, name="shared")}, schedule=LinearSchedule(steps=2))
    transition = vanishing.prepare(model, recipe, optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 8
    train(model, transition, 2, optimizer)
    expected = model(batch())
    transition.finish()
    assert model[0] is model[1] is shared
    assert torch.equal(model(batch()), expected)
    assert len(optimizer.param_groups[0]["params"]) == 4
    vanishing.save(model, tmp_path / "small")
    assert torch.equal(vanishing.load(tmp_path / "small", layers())(batch()), expected)


@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_a_replacement_that_stands_elsewhere_in_the_model_stays_in_the_optimizer(end: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    second = model[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe({"0": Replace(lambda block: second, name="second")}, schedule=LinearSchedule(steps=2))
    transition = vanishing.prepare(model, recipe, optimizer=optimizer)
    train(model, transition, 2, optimizer)
    getattr(transition, end)()
    assert (model[0] is second) == (end == "finish")
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert len(optimizer.state) == len(list(model.parameters()))


def test_a_weight_of_the_block_that_is_tied_to_another_layer_stays() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = Recipe({"0": Replace(lambda block: nn.Linear(8, 8), name="linear")}, schedule=LinearSchedule(steps=2))
    transition = vanishing.prepare(model, recipe, optimizer=optimizer)
    train(model, transition, 2, optimizer)
    transition.finish()
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert model.get_parameter("1.weight") in optimizer.state


def test_hundreds_of_blocks_are_replaced_in_time_that_grows_with_their_number() -> None:
    model = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2), "down": nn.Linear(2, 2)}) for _ in range(400))
    recipe = Recipe({"*.up": Replace(lambda block: nn.Linear(2, 2), name="tiny")}, schedule=LinearSchedule(steps=2))
    start = time.process_time()
    vanishing.prepare(model, recipe).finish(force=True)
    assert time.process_time() - start < 3


# One transition after another


def another_linear(block: nn.Linear) -> nn.Module:
    return nn.Linear(block.in_features, block.out_features)


@pytest.mark.parametrize("second", [Replace(another_linear), vanishing.LowRank(rank=2), MagnitudePruning(sparsity=0.5)])
def test_a_replacement_is_not_compressed_itself(second: vanishing.Compressor) -> None:
    model = mlp()
    vanishing.prepare(model, Recipe({"0": Replace(another_linear)}, schedule=StepSchedule(at=0))).finish()
    before = copied(model.state_dict())
    with pytest.raises(vanishing.RecipeError, match="an earlier transition put it there, and load could not do both"):
        vanishing.prepare(model, Recipe({"0": second}, schedule=StepSchedule(at=0)))
    assert states_equal(model.state_dict(), before)


def test_a_block_with_factored_layers_is_not_replaced() -> None:
    model = nn.Sequential(mlp(), nn.Identity())
    vanishing.prepare(model, Recipe({"0.0": vanishing.LowRank(rank=2)}, schedule=StepSchedule(at=0))).finish()
    with pytest.raises(vanishing.RecipeError, match=r"an earlier transition built '0\.0' in it"):
        vanishing.prepare(model, Recipe({"0": Replace(another_linear)}, schedule=StepSchedule(at=0)))
