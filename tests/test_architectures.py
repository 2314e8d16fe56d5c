"""The whole life cycle on real architectures with random weights."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import resume_worker
import vanishing
from architectures import ARCHITECTURES, Architecture, loss_of, tensors_of
from cases import by_old_names
from resume_worker import END, JOBS, SPLIT, TECHNIQUES, UNITS, Run, evaluate, rules
from vanishing import LinearSchedule, Recipe, StepSchedule
from vanishing.layers import Factored, Layout


def job_parameters() -> Iterator[Any]:
    """Every architecture with every technique that fits it; those that take long only in the slow suite."""
    for name, architecture in ARCHITECTURES.items():
        for technique in JOBS:
            if not rules(name, technique):
                continue
            if name in NO_INPUTS and technique == "quantized_inputs":
                continue
            slow = architecture.slow or (technique == "quantized_inputs" and name not in QUICK_WITH_INPUTS)
            yield pytest.param(f"{name}-{technique}", marks=[pytest.mark.slow] if slow else [])


# Linear layers, transposed ones, one that is read for its type, convolutions.
QUICK_WITH_INPUTS = ("bert", "gpt2", "t5", "timm_resnet")
# What these are made of multiplies inside, all but their heads.
NO_INPUTS = ("encoder", "lstm", "gru")


# One process for these: a tied head, experts, batch statistics, fused attention, recurrence, each with a technique.
FAST_RESUMES = [
    "bert-low_rank",
    "gpt2-pruned_quantized",
    "mixtral-quantized",
    "t5-low_rank",
    "timm_resnet-pruned",
    "encoder-pruned",
    "lstm-quantized",
    "llama-structured",
    "timm_resnet-structured",
    "llama-quantized_inputs",
]
each_job = pytest.mark.parametrize("job", list(job_parameters()))


def ties(model: nn.Module) -> set[frozenset[str]]:
    """The groups of parameter names that are one parameter."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def assert_same_bits(left: Any, right: Any, path: str = "state") -> None:
    """Compare nested states; tensors to the last bit."""
    assert type(left) is type(right), path
    if isinstance(left, Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape), path
        # Bytes, so that 0 and -0 differ.
        assert torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8)), path
    elif isinstance(left, dict):
        assert list(left) == list(right), path
        for key in left:
            assert_same_bits(left[key], right[key], f"{path}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same_bits(a, b, f"{path}[{index}]")
    else:
        assert left == right, path


def hooks(module: nn.Module) -> int:
    """The number of hooks of any sort on a module."""
    return sum(len(value) for name, value in vars(module).items() if name.endswith("_hooks") and value)


def assert_plain(model: nn.Module, original: nn.Module, block: str = "no block") -> None:
    """Compare a finished model with a freshly built one: the same modules, but for two plain layers in place of one.

    What rounds the input of a layer is passed over.

    Args:
        model: the finished model.
        original: the freshly built one.
        block: the name of one that was replaced, which is not compared.
    """

    def outside(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return {name: each for name, each in modules.items() if not f"{name}.".startswith(f"{block}.")}

    expected = outside(dict(original.named_modules()))
    found = outside(by_old_names(model))
    factored = {name for name, module in model.named_modules() if type(module) is Factored}
    for name, module in found.items():
        assert not parametrize.is_parametrized(module), name
        assert "forward" not in vars(module) or "forward" in vars(expected[name]), name
        if name in factored:
            assert hooks(module) == 0, name
        elif name.rpartition(".")[0] in factored:
            assert type(module).__module__.startswith("torch.nn"), name
        else:
            assert type(module) is type(expected[name]), name
            assert hooks(module) == hooks(expected[name]), name
    remaining = {name for name in found if name.rpartition(".")[0] not in factored}
    assert remaining == set(expected)


def blended_weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every weight in transition: its layer, its name and the latent weight."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name, parametrization in module.parametrizations.items():  # type: ignore[operator, union-attr]
                yield module, name, parametrization.original


def assert_compressed(weight: Tensor, layout: Layout, job: str) -> None:
    """Check that half of the weights are zero, and that a row has no more values than 4 bits can tell apart."""
    matrix = layout.to_matrix(weight)
    zeros = matrix.numel() - int(matrix.count_nonzero())
    if "pruned" in job:
        assert zeros >= round(matrix.numel() / 2)
    if "quantized" in job:
        assert max(row.unique().numel() for row in matrix) <= 16
    else:
        assert zeros == round(matrix.numel() / 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_reproducible_and_tied_as_the_table_says(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    assert sum(len(group) - 1 for group in ties(model)) == architecture.ties
    assert_same_bits(evaluate(model, architecture), evaluate(architecture.build(), architecture))
    assert any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), architecture.build(1).parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_of_units_holds_all_that_are_found(name: str) -> None:
    model = ARCHITECTURES[name].build()
    found = {
        key
        for key, (technique, _) in UNITS.items()
        if not Recipe({key: technique}, schedule=StepSchedule(at=0)).match(model).problems
    }
    assert found == set(rules(name, "structured"))


@each_job
def test_at_beta_1_no_output_and_no_gradient_of_the_original_changes_a_bit(job: str) -> None:
    architecture = ARCHITECTURES[job.split("-")[0]]
    plain, model = architecture.build(), architecture.build()
    parameters = dict(model.named_parameters())
    vanishing.prepare(model, Recipe(rules(*job.split("-")), schedule=LinearSchedule(steps=4)))
    outputs = [each(**architecture.batch()) for each in (plain, model)]
    for each in outputs:
        loss_of(each).backward()
    assert_same_bits(tensors_of(outputs[1]), tensors_of(outputs[0]))
    for name, parameter in plain.named_parameters():
        assert_same_bits(parameters[name].grad, parameter.grad, name)
    original = set(parameters.values())
    others = [parameter for parameter in model.parameters() if parameter not in original]
    assert all(p.grad is None or not p.grad.any() for p in others)
    assert_same_bits(evaluate(model, architecture), evaluate(plain, architecture))


@each_job
def test_at_beta_0_the_original_has_no_influence(job: str) -> None:
    run = Run(job).train(SPLIT)
    assert 0 < run.transition.beta < 1
    with run.transition.compressed():
        before = run.outputs()
        assert all(tensor.isfinite().all() for tensor in before)
        with run.transition.original():
            assert not torch.equal(before[0], run.outputs()[0])
        with torch.no_grad():
            for module, name, latent in blended_weights(run.model):
                if "low_rank" in job:
                    latent.fill_(torch.nan)
                elif "pruned" in job or "structured" in job:
                    # Smaller than before and of the other sign, so that the same weights are pruned.
                    latent.copy_(torch.where(getattr(module, name) == 0, -0.5 * latent, latent))
        after = run.outputs()
    assert_same_bits(before, after)
    if "low_rank" in job:
        assert any(not tensor.isfinite().all() for tensor in run.outputs())


@each_job
def test_a_split_run_changes_no_bit(job: str, tmp_path: Path) -> None:
    whole = Run(job).train(SPLIT)
    torch.save(whole.state(), tmp_path / "state")
    whole.train(END)
    split = Run(job).load(torch.load(tmp_path / "state"))
    assert split.transition.steps_done == SPLIT
    split.train(END)
    assert_same_bits(split.state(), whole.state())
    assert_same_bits(split.outputs(), whole.outputs())


def assert_resumes_in_a_new_process(jobs: list[str], folder: Path) -> None:
    expected = {}
    for job in jobs:
        run = Run(job).train(SPLIT)
        torch.save(run.state(), folder / f"{job}.before")
        run.train(END)
        expected[job] = run.state() | {"outputs": run.outputs()}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, resume_worker.__file__, str(folder), *jobs]
    subprocess.run(command, check=True, env=environment, timeout=300)
    for job in jobs:
        assert_same_bits(torch.load(folder / f"{job}.after"), expected[job], job)


def test_a_run_continues_in_a_new_process_with_the_same_bits(tmp_path: Path) -> None:
    assert_resumes_in_a_new_process(FAST_RESUMES, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("technique", JOBS)
def test_every_architecture_continues_in_a_new_process_with_the_same_bits(technique: str, tmp_path: Path) -> None:
    jobs = [f"{name}-{technique}" for name in ARCHITECTURES if rules(name, technique)]
    assert_resumes_in_a_new_process(jobs, tmp_path)


@each_job
def test_a_finished_model_is_plain_small_and_survives_the_file(job: str, tmp_path: Path) -> None:
    run = Run(job)
    architecture = run.architecture
    assert run.plan.weights
    expected = run.train(END).outputs()

    model = run.transition.finish()
    assert model is run.model
    finished = run.outputs()
    for got, wanted in zip(finished, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for planned in run.plan.weights:
        if "structured" in job:
            assert planned.layer.module.get_parameter("weight").shape[1] == planned.layer.weight.shape[1] // 2
        elif "low_rank" in job:
            assert {type(model.get_submodule(name)) for name in planned.names} == {Factored}
        else:
            assert_compressed(planned.layer.weight, planned.layer.layout, job)
            assert all(getattr(module, name) is planned.layer.weight for module, name in planned.owners)
    original = architecture.build(1)
    assert_plain(model, original)
    assert ties(model) == ties(original)

    vanishing.save(model, tmp_path / "small")
    dense = sum(tensor.nbytes for tensor in (*original.parameters(), *original.buffers()))
    assert (tmp_path / "small" / "model.safetensors").stat().st_size < dense
    loaded = load(tmp_path / "small", architecture)
    assert_plain(loaded, original)
    assert ties(loaded) == ties(original)
    assert_same_bits(evaluate(loaded, architecture), evaluate(model, architecture))


@torch.no_grad()
def other_weights(block: nn.Module) -> nn.Module:
    """A copy of a block with half its weights."""
    new = copy.deepcopy(block)
    for parameter in new.parameters():
        parameter.mul_(0.5)
    return new


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if each.slow else []) for name, each in ARCHITECTURES.items()],
)
def test_replaced_blocks_from_the_first_step_to_the_file(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    modules = dict(architecture.build().named_modules())
    named = [path for path, module in modules.items() if path and any(True for _ in module.parameters())]
    depth = min(1, max(path.count(".") for path in named))
    pattern = re.compile("|".join(re.escape(path) for path in named if path.count(".") == depth))
    replace = vanishing.Replace(other_weights, name="other weights of architectures")

    def run(until: int, state: Any = None) -> Any:
        model = architecture.build()
        transition = vanishing.prepare(model, vanishing.Recipe({pattern: replace}, schedule=LinearSchedule(steps=4)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "transition": transition}
        for part in parts if state else ():
            parts[part].load_state_dict(state[part])
        for step in range(transition.steps_done, until):
            loss_of(model(**architecture.batch(step)), step).backward()
            optimizer.step()
            optimizer.zero_grad()
            transition.step()
        return parts

    assert_same_bits(evaluate(run(0)["model"], architecture), evaluate(architecture.build(), architecture))
    half = {part: each.state_dict() for part, each in run(SPLIT).items()}
    whole, resumed = run(END), run(END, half)
    assert_same_bits(resumed["model"].state_dict(), whole["model"].state_dict())
    model = whole["model"]
    expected = evaluate(model, architecture)
    whole["transition"].finish()
    assert_same_bits(evaluate(model, architecture), expected)
    vanishing.save(model, tmp_path / "small")
    assert_same_bits(evaluate(load(tmp_path / "small", architecture), architecture), expected)


def load(path: Path, architecture: Architecture) -> nn.Module:
    """Load a model alone where its folder tells the architecture, else into a fresh one with other weights."""
    return vanishing.load(path) if architecture.huggingface else vanishing.load(path, architecture.build(1))


@pytest.mark.parametrize("technique", ["pruned", "quantized", "pruned_quantized"])
@pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if architecture.ties])
def test_a_tied_weight_that_is_named_is_compressed_in_all_its_places(name: str, technique: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model, original = architecture.build(), architecture.build(1)
    owners = {parameter.rpartition(".")[0] for group in ties(model) for parameter in group}
    recipe = vanishing.Recipe(dict.fromkeys(sorted(owners), TECHNIQUES[technique]), schedule=LinearSchedule(steps=2))
    (planned,) = recipe.match(model).weights
    assert set(planned.names) == owners
    transition = vanishing.prepare(model, recipe)
    assert len(list(blended_weights(model))) == len(owners)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(3):
        loss_of(model(**architecture.batch(step)), step).backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    expected = evaluate(model, architecture)
    transition.finish()
    for got, wanted in zip(evaluate(model, architecture), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert_compressed(planned.layer.weight, planned.layer.layout, technique)
    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small")
    for each in (model, loaded):
        assert_plain(each, original)
        assert ties(each) == ties(original)
    assert_same_bits(evaluate(loaded, architecture), evaluate(model, architecture))


def test_a_layer_that_computes_something_else_is_not_replaced_by_two_plain_ones() -> None:
    model = ARCHITECTURES["timm_nfnet"].build()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(
        vanishing.RecipeError, match=r"'stem\.conv1' .*ScaledStdConv2d does not compute what the plain layer"
    ):
        vanishing.prepare(model, TECHNIQUES["low_rank"], steps=4)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("job", ["bert-low_rank", "gpt2-pruned", "mixtral-pruned_quantized", "lstm-quantized"])
def test_a_copy_of_a_model_in_transition_lives_on_its_own(job: str) -> None:
    run = Run(job).train(SPLIT)
    copied = copy.deepcopy(run.model)
    outputs = run.outputs()
    state = copy.deepcopy(copied.state_dict())
    run.train(END)
    assert_same_bits(copied.state_dict(), state)
    assert_same_bits(evaluate(copied, run.architecture), outputs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("job", ["bert-low_rank", "llama-pruned_quantized", "mixtral-pruned"])
def test_activation_checkpointing_changes_no_bit(job: str, reentrant: bool) -> None:
    whole, checkpointed = Run(job), Run(job)
    model: Any = checkpointed.model
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_bits(checkpointed.train(END).state(), whole.train(END).state())


@pytest.mark.parametrize("job", ["gpt2-pruned_quantized", "mixtral-quantized", "t5-low_rank", "bart-pruned"])
def test_a_language_model_generates_the_same_before_and_after_the_end_and_from_its_file(
    job: str, tmp_path: Path
) -> None:
    run = Run(job).train(END)
    prompt = {"input_ids": run.architecture.batch(7)["input_ids"]}
    generated = []

    def generate(model: Any) -> None:
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": True}
        generated.append(model.eval().generate(**prompt, **options))

    generate(run.model)
    generate(run.transition.finish())
    vanishing.save(run.model, tmp_path / "small")
    generate(vanishing.load(tmp_path / "small"))
    assert_same_bits(generated[1], generated[0])
    assert_same_bits(generated[2], generated[0])


@pytest.mark.parametrize("second", ["pruned", "quantized"])
@pytest.mark.parametrize("first", ["pruned", "quantized", "low_rank"])
@pytest.mark.parametrize("name", ["gpt2", "timm_resnet"])
def test_a_loaded_model_can_be_compressed_again(name: str, first: str, second: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    for number, technique in enumerate([first, second]):
        recipe = vanishing.Recipe({"*": TECHNIQUES[technique]}, schedule=StepSchedule(at=0))
        vanishing.prepare(model, recipe).finish()
        vanishing.save(model, tmp_path / str(number))
        loaded = load(tmp_path / str(number), architecture)
        assert_same_bits(evaluate(loaded, architecture), evaluate(model, architecture))
        model = loaded
    assert any(type(module) is Factored for module in model.modules()) == (first == "low_rank")
