"""The end: plain modules are left, the originals are gone, and what was computed at beta = 0 is what is computed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vanishing
from loops import batch, copied, mlp, states_equal, train
from vanishing import (
    Binary,
    Compressor,
    Global,
    LinearSchedule,
    LowRank,
    MagnitudePruning,
    ProjectionCompressor,
    Quantization,
    Recipe,
    Replace,
    StepSchedule,
    Ternary,
    Transition,
    TransitionError,
)
from vanishing.blend import Blend
from vanishing.compressors.low_rank import LowRankWeight
from vanishing.layers import Factored
from vanishing.receipt import read_receipt


def small(block: nn.Module) -> nn.Module:
    """The block of `model()` with a quarter of its hidden units."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def network() -> nn.Sequential:
    """A layer, a block and a layer."""
    return nn.Sequential(
        nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), nn.ReLU(), nn.Linear(8, 4)
    )


TECHNIQUES: dict[str, dict[Any, Compressor]] = {
    "pruning": {"*": MagnitudePruning(0.5)},
    "global pruning": {"*": MagnitudePruning(0.5, granularity=Global())},
    "quantization": {"*": Quantization(4)},
    "binary": {"*": Binary()},
    "ternary": {"*": Ternary()},
    "low rank": {"*": LowRank(rank=2)},
    "pruned and quantized": {"*": MagnitudePruning(0.5) | Quantization(4)},
    "quantized factors": {"*": LowRank(rank=2) | Quantization(8)},
    "replaced": {"1": Replace(small)},
    "all of it": {"0": LowRank(rank=2), "1": Replace(small), "3": MagnitudePruning(0.5) | Binary()},
}
each_technique = pytest.mark.parametrize("technique", TECHNIQUES)


def begun(
    technique: str, model: nn.Module | None = None, steps: int = 4, **options: Any
) -> tuple[nn.Module, Transition]:
    model = model or network()
    recipe = Recipe(TECHNIQUES[technique], schedule=LinearSchedule(steps=steps))
    return model, vanishing.prepare(model, recipe, **options)


# Plain modules


@each_technique
def test_what_is_left_is_plain_and_computes_what_ran_at_beta_0(technique: str) -> None:
    model, transition = begun(technique, example_inputs=batch())
    optimizer = train(model, transition, 5)
    with transition.compressed():
        expected = model(batch(9))
    assert transition.finish() is model
    assert torch.equal(model(batch(9)), expected)
    assert not any(isinstance(m, Blend) or parametrize.is_parametrized(m) for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert {type(m) for m in model.modules()} <= {nn.Sequential, nn.Linear, nn.ReLU, Factored}
    assert all(type(p) is nn.Parameter and p.requires_grad and p.is_leaf for p in model.parameters())
    assert not list(model.buffers())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert set(optimizer.state) == set(model.parameters())


@each_technique
def test_the_finished_model_can_be_copied_pickled_and_its_state_loaded(technique: str) -> None:
    model, transition = begun(technique)
    train(model, transition, 4)
    transition.finish()
    expected = model(batch())
    file = io.BytesIO(pickle.dumps(model))
    for other in (copy.deepcopy(model), pickle.load(file)):
        assert torch.equal(other(batch()), expected)
        receipts = [read_receipt(each) for each in (other, model)]
        assert receipts[0] and receipts[1] and list(receipts[0].layers) == list(receipts[1].layers)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(batch()), expected)


@pytest.mark.parametrize("technique", ["pruning", "binary", "pruned and quantized"])
def test_techniques_that_keep_the_layer_keep_names_order_and_parameters(technique: str) -> None:
    model = network()
    names, parameters = list(model.state_dict()), list(model.parameters())
    begun(technique, model)[1].finish(force=True)
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]


def test_low_rank_leaves_two_plain_layers_of_which_the_second_has_the_bias() -> None:
    model, transition = begun("low rank")
    bias = model.get_parameter("0.bias")
    transition.finish(force=True)
    assert list(model.state_dict())[:3] == ["0.0.weight", "0.1.weight", "0.1.bias"]
    assert model.get_parameter("0.1.bias") is bias
    assert [tuple(p.shape) for p in model.get_submodule("0").parameters()] == [(2, 8), (8, 2), (8,)]


# What was trained, and in which mode


def ramps(technique: str) -> bool:
    """Whether a ramp can drive all techniques of a row."""
    return all(compressor.ramps for compressor in TECHNIQUES[technique].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "technique, ramp", [(t, ramp) for t in TECHNIQUES for ramp in (False, True) if ramps(t) or not ramp]
)
def test_types_modes_and_frozen_biases_are_kept(technique: str, dtype: torch.dtype, ramp: bool) -> None:
    model = network().to(dtype)
    model[3].eval()
    model.get_parameter("3.bias").requires_grad_(False)
    x = batch().to(dtype)
    falling = LinearSchedule(steps=4) if ramp else None
    recipe = Recipe(TECHNIQUES[technique], schedule=LinearSchedule(steps=3), ramp=falling)
    transition = vanishing.prepare(model, recipe, example_inputs=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(4):
        model(x).square().mean().backward()
        optimizer.step()
        transition.step()
    transition.finish()
    assert {p.dtype for p in model.parameters()} == {dtype}
    last = model.get_submodule("3")
    assert not any(m.training for m in last.modules())
    assert all(m.training for m in model.modules() if m not in set(last.modules()))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["3.1.bias" if isinstance(last, Factored) else "3.bias"]
    assert model(x).isfinite().all()


@each_technique
def test_training_goes_on_with_the_same_optimizer(technique: str) -> None:
    model, transition = begun(technique)
    optimizer = train(model, transition, 4)
    transition.finish()
    losses = []
    for _ in range(30):
        loss = (model(batch()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len(optimizer.state) == len(list(model.parameters()))


# The originals are gone


@pytest.mark.parametrize(
    "technique, names", [("low rank", ["0", "1.0", "1.2", "3"]), ("replaced", ["1", "1.0", "1.2"])]
)
@pytest.mark.parametrize("early", [True, False], ids=["optimizer passed", "optimizer made afterwards"])
@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_what_is_gone_dies_with_its_optimizer_state(technique: str, names: list[str], early: bool, end: str) -> None:
    model = network()
    optimizer = train(model, None, 1) if early else None
    transition = begun(technique, model, optimizer=optimizer)[1]
    optimizer = train(model, transition, 4, optimizer)
    originals = [model.get_submodule(name) for name in names] if technique == "low rank" else []
    if technique == "replaced":
        originals = [model.get_submodule(name.replace("1", "1.original", 1)) for name in names]
    weights = [p for n, p in model.named_parameters() if n.endswith(".original") or ".original." in n]
    new = [p for n, p in model.named_parameters() if ".form." in n or ".replacement." in n]
    going = weights if end == "finish" else new
    state = [value for p in going for value in optimizer.state[p].values()]
    assert (
        len(going) == {"low rank": {"finish": 4, "cancel": 8}, "replaced": {"finish": 4, "cancel": 4}}[technique][end]
    )
    assert len(state) == 3 * len(going)
    references: list[weakref.ref[Any]] = [weakref.ref(each) for each in [*going, *state]]
    if end == "finish":
        references += [weakref.ref(module) for module in originals]
    del originals, weights, new, going, state
    gc.collect()
    assert all(reference() is not None for reference in references)
    getattr(transition, end)()
    gc.collect()
    assert not any(reference() is not None for reference in references)
    left = [id(p) for p in model.parameters()]
    assert sorted(id(p) for group in optimizer.param_groups for p in group["params"]) == sorted(left)
    assert {id(p) for p in optimizer.state} == set(left)


def live_bytes() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    seen = {}
    for candidate in gc.get_objects():
        # The type itself is asked: some objects warn when anything else of them is looked at. What a compiler leaves
        # behind has other types, and no memory.
        if type(candidate) in (Tensor, nn.Parameter):
            storage = candidate.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


@pytest.mark.parametrize("keep_transition", [True, False])
def test_memory_falls_to_that_of_the_small_model(keep_transition: bool) -> None:
    gc.collect()
    before = live_bytes()
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    x = torch.randn(2, 256)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    dense = 4 * sum(p.numel() for p in model.parameters())
    transition: Transition | None = vanishing.prepare(
        model, LowRank(rank=4), steps=2, optimizer=optimizer, example_inputs=x
    )
    assert transition is not None
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        transition.step()
    optimizer.zero_grad()
    full = live_bytes() - before
    assert full > 3 * dense
    transition.finish()
    if not keep_transition:
        transition = None
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert parameters < 0.05 * dense
    # The small model with its two moments, their step counts, and the batch.
    assert live_bytes() - before <= 3 * parameters + x.nbytes + 4 * len(optimizer.state) + 64
    del transition


def test_nothing_of_a_transition_outlives_it() -> None:
    from vanishing.optimizers import _watches

    gc.collect()
    watched = len(_watches)
    for end in ("finish", "cancel", "forgotten"):
        model, transition = begun("low rank")
        assert len(_watches) == watched + 1
        reference = weakref.ref(transition)
        if end == "forgotten":
            del model
        else:
            getattr(transition, end)(**({"force": True} if end == "finish" else {}))
        del transition
        gc.collect()
        assert reference() is None
        assert len(_watches) == watched


# Cancel


@each_technique
def test_cancel_gives_the_untrained_original_back_bit_for_bit(technique: str) -> None:
    model = network()
    twin = copy.deepcopy(model)
    state, modules = copied(model.state_dict()), list(model.modules())
    parameters = [id(p) for p in model.parameters()]
    _, transition = begun(technique, model)
    transition.seek(3)
    with transition.compressed():
        model(batch())
    assert transition.cancel() is model
    assert states_equal(copied(model.state_dict()), state)
    assert list(model.modules()) == modules and [id(p) for p in model.parameters()] == parameters
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in twin.modules()]
    assert torch.equal(model(batch()), twin(batch()))
    assert read_receipt(model) is None


@each_technique
def test_cancel_keeps_what_the_original_has_learned(technique: str) -> None:
    model, transition = begun(technique)
    optimizer = train(model, transition, 3)
    with transition.original():
        expected = model(batch())
    transition.cancel()
    assert torch.equal(model(batch()), expected)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    train(model, None, 2, optimizer)
    assert not torch.equal(model(batch()), expected)


# Too early, and by force


@pytest.mark.parametrize("steps", [0, 2])
@each_technique
def test_by_force_the_compression_is_as_complete_as_at_the_end(technique: str, steps: int) -> None:
    ramp = LinearSchedule(steps=8) if ramps(technique) else None
    model = network()
    recipe = Recipe(TECHNIQUES[technique], schedule=LinearSchedule(steps=6), ramp=ramp)
    transition = vanishing.prepare(model, recipe)
    train(model, transition, steps)
    transition.finish(force=True)
    if "pruning" in technique:
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        zeros = [int((weight == 0).sum()) for weight in weights]
        total = sum(weight.numel() for weight in weights)
        assert sum(zeros) == total // 2
    if technique == "low rank":
        assert {m.rank for m in model.modules() if isinstance(m, Factored)} == {2}
    if technique == "binary":
        assert all(
            len(row.abs().unique()) == 1 for m in model.modules() if isinstance(m, nn.Linear) for row in m.weight
        )


def test_at_the_end_of_its_schedules_no_force_is_needed() -> None:
    _, transition = begun("pruning", steps=3)
    transition.seek(3)
    assert transition.done
    transition.finish()


# The proof


class NeverTheSame(ProjectionCompressor):
    """A technique that breaks the law: it computes something else each time."""

    def project(self, matrix: Tensor, strength: float) -> Tensor:
        return torch.rand_like(matrix)


def test_a_model_that_changes_is_an_error_with_example_inputs() -> None:
    model = mlp()
    transition = vanishing.prepare(model, NeverTheSame(), steps=1, example_inputs=batch())
    transition.step()
    with pytest.raises(TransitionError, match=r"the finished model differs from the transition at beta = 0 by \d"):
        transition.finish()


def test_factors_that_do_not_compute_the_same_are_an_error_before_anything_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, transition = begun("low rank")
    train(model, transition, 4)
    expected = model(batch())
    plain_layers = LowRankWeight.plain_layers

    def wrong(form: LowRankWeight, *arguments: Any) -> Factored:
        plain = copy.deepcopy(plain_layers(form, *arguments))
        with torch.no_grad():
            plain.get_parameter("0.weight").mul_(1.01)
        return plain

    monkeypatch.setattr(LowRankWeight, "plain_layers", wrong)
    with pytest.raises(TransitionError, match=r"'0' would change when it is finished: its outputs differ by"):
        transition.finish()
    assert torch.equal(model(batch()), expected)
    monkeypatch.undo()
    transition.finish()


class Masked(nn.Linear):
    """A layer whose outputs are infinite in some places, as the logits of forbidden tokens are."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).index_fill(-1, torch.tensor([1]), -torch.inf)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_the_proof_sees_through_infinite_outputs(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Masked(8, 4))
    transition = vanishing.prepare(model, Binary(), steps=1, example_inputs=batch())
    train(nn.Sequential(model[0]), transition, 1)
    transition.finish()
    model = nn.Sequential(nn.Linear(8, 8), Masked(8, 4))
    transition = vanishing.prepare(model, Binary(), steps=1, example_inputs=batch(), ignore=["1"])
    transition.step()
    calls = [0]

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return output if calls[0] == 1 else output.index_fill(-1, torch.tensor([0]), value)

    model.register_forward_hook(spoil)
    with pytest.raises(TransitionError, match="by inf on the example inputs"):
        transition.finish()


def test_finish_draws_no_random_numbers() -> None:
    for technique in TECHNIQUES:
        _, transition = begun(technique, example_inputs=batch())
        state = torch.get_rng_state()
        transition.finish(force=True)
        assert torch.equal(torch.get_rng_state(), state)


# Where it may be called


def test_inside_of_compressed_and_without_gradients() -> None:
    model, transition = begun("low rank")
    train(model, transition, 4)
    with torch.no_grad(), transition.compressed():
        expected = model(batch())
        transition.finish()
    assert torch.equal(model(batch()), expected)
    assert all(p.requires_grad for p in model.parameters())


# One transition after another


def test_a_finished_model_can_be_compressed_again_and_is_saved_with_both(tmp_path: Path) -> None:
    model = network()
    optimizer: torch.optim.Optimizer | None = None
    recipes: list[dict[Any, Compressor]] = [
        {"1": Replace(small), "0": Quantization(4)},
        {"1.*": LowRank(rank=2), "3": MagnitudePruning(0.5)},
        {"3": Quantization(4), "1.2.*": Binary()},
    ]
    for rules in recipes:
        transition = vanishing.prepare(model, Recipe(rules, schedule=LinearSchedule(steps=2)), optimizer=optimizer)
        optimizer = train(model, transition, 2, optimizer)
        transition.finish()
        # Only what is trained no more is on its grid: the rest of the model learned in between.
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.param_groups[0]["weight_decay"] = 0.0
    receipt = read_receipt(model)
    assert receipt is not None
    structures = {name: layer.structure for name, layer in receipt.layers.items()}
    assert structures == {
        "0": "weight",
        "1": "replaced",
        "1.0": "factored",
        "1.2": "factored",
        "3": "weight",
        "1.2.0": "weight",
        "1.2.1": "weight",
    }
    assert receipt.layers["3"].compressor == Quantization(4)
    expected = model(batch())
    vanishing.save(model, tmp_path / "small")
    assert torch.equal(vanishing.load(tmp_path / "small", network())(batch()), expected)


def test_sizes_before_are_those_of_the_first_original() -> None:
    model = mlp()
    for compressor in (LowRank(rank=2), Binary()):
        vanishing.prepare(model, compressor, steps=1).finish(force=True)
    receipt = read_receipt(model)
    assert receipt is not None
    assert {n: layer.parameters_before for n, layer in receipt.layers.items()} == {
        "0": 144, "2": 68, "0.0": 16, "0.1": 48, "2.0": 32, "2.1": 12,
    }  # fmt: skip


# During the transition


@each_technique
def test_copies_and_saved_states_are_those_of_the_moment(technique: str, tmp_path: Path) -> None:
    model, transition = begun(technique)
    train(model, transition, 2)
    expected = model(batch())
    twin = copy.deepcopy(model)
    torch.save(model.state_dict(), tmp_path / "state")
    transition.seek(4)
    assert torch.equal(twin(batch()), expected)
    train(twin, None, 1)
    model.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    transition.seek(2)
    model.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(model(batch()), expected)


@each_technique
def test_modes_change_during_the_transition(technique: str) -> None:
    model, transition = begun(technique)
    for step in range(4):
        model.train(step % 2 == 0)
        assert all(m.training == (step % 2 == 0) for m in model.modules())
        train(model, transition, 1)
    model.eval()
    transition.finish()
    assert not any(m.training for m in model.modules())


@each_technique
def test_evaluating_one_form_changes_nothing_of_the_run(technique: str) -> None:
    results = []
    for looks in (False, True):
        torch.manual_seed(0)
        model, transition = begun(technique)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(4):
            train(model, transition, 1, optimizer)
            if looks:
                for form in (transition.compressed, transition.original):
                    with form() as same, torch.no_grad():
                        assert same is model
                        model(batch(5))
        transition.finish()
        results.append(copied(model.state_dict()))
    assert states_equal(*results)


def test_nested_and_broken_off_contexts_come_back_to_beta() -> None:
    model, transition = begun("pruning")
    train(model, transition, 2)
    expected = model(batch())
    with transition.original():
        original = model(batch())
        with pytest.raises(KeyError), transition.compressed():
            raise KeyError
        assert torch.equal(model(batch()), original)
    assert torch.equal(model(batch()), expected)


@pytest.mark.parametrize("make", [lambda: StepSchedule(at=0), lambda: StepSchedule(at=3)])
def test_a_step_schedule_compresses_at_once_or_after_dense_training(make: Callable[[], StepSchedule]) -> None:
    schedule = make()
    model = mlp()
    transition = vanishing.prepare(model, Recipe({"*": Binary()}, schedule=schedule))
    for step in range(5):
        weight: Any = model.get_submodule("0")
        assert (len(weight.weight.abs().unique()) <= 16) == (step >= schedule.end)
        train(model, transition, 1)
    transition.finish()


# Shared modules


def test_a_layer_under_two_names_becomes_one_pair_of_layers_under_both() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), nn.ModuleDict({"again": shared}), nn.Linear(8, 4))
    calls: list[int] = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    transition = vanishing.prepare(model, LowRank(rank=2), steps=2, ignore=["3"])
    x = torch.randn(2, 8)
    transition.seek(2)
    expected = model[3](model.get_submodule("2.again")(model[1](model[0](x))))
    transition.finish()
    assert type(model[0]) is Factored and model[0] is model.get_submodule("2.again")
    calls.clear()
    assert torch.equal(model[3](model.get_submodule("2.again")(model[1](model[0](x)))), expected)
    assert len(calls) == 2


def test_hundreds_of_layers_are_finished_in_time_that_grows_with_their_number() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(300)))
    transition = vanishing.prepare(model, LowRank(rank=1), steps=2)
    start = time.process_time()
    transition.finish(force=True)
    assert time.process_time() - start < 6
