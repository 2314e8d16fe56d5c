"""The estimate of a training's memory against PyTorch's own record of every allocation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function

import vanishing
from vanishing import LowRank, MagnitudePruning, estimate_memory

BATCH = 24


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 128),
        nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip


def losses(model: nn.Module) -> Callable[[int], Tensor]:
    images, labels = torch.randn(BATCH, 3, 8, 8), torch.randint(10, (BATCH,))
    return lambda size: cross_entropy(model(images[:size]), labels[:size])


def measured_peak(step: Callable[[], object], held: int) -> int:
    """The most bytes that tensors hold in a step, of which some were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function("step"):
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = held
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("compressor", [MagnitudePruning(sparsity=0.9), LowRank(rank=4)])
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(
    compressor: vanishing.Compressor, freeze: bool, accumulate: bool
) -> None:
    if freeze and isinstance(compressor, MagnitudePruning):
        pytest.skip("pruning has no weights of its own")
    model = network()
    schedule = vanishing.LinearSchedule(steps=100)
    transition = vanishing.prepare(
        model, vanishing.Recipe({"*": compressor}, schedule=schedule, freeze_original=freeze)
    )
    loss = losses(model)
    estimate = estimate_memory(transition, loss, BATCH, accumulate=accumulate)

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    transition.seek(50)
    for _ in range(2):
        loss(BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
    if accumulate:
        loss(BATCH).backward()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *states, *gradients])
    peak = measured_peak(lambda: loss(BATCH).backward(), held)
    assert estimate.peak == pytest.approx(peak, rel=0.15)
    assert estimate.optimizer == sum(t.nbytes for t in states)


def test_the_model_is_left_as_it_was() -> None:
    model = network().eval()
    transition = vanishing.prepare(model, MagnitudePruning(sparsity=0.5), steps=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    loss = losses(model)
    state = torch.get_rng_state()
    estimate_memory(transition, loss, BATCH)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert transition.beta == 1.0


def test_a_frozen_original_saves_its_gradient_and_its_moments() -> None:
    def estimate(freeze: bool) -> Any:
        model = network()
        recipe = vanishing.Recipe(
            {"4": LowRank(rank=4)}, schedule=vanishing.LinearSchedule(steps=10), freeze_original=freeze
        )
        return estimate_memory(vanishing.prepare(model, recipe), losses(model), BATCH)

    original = 16 * 64 * 128 * 4
    assert estimate(False).optimizer - estimate(True).optimizer == 2 * original
    assert estimate(True).peak <= estimate(False).peak - 2 * original


@pytest.mark.parametrize(
    ("batch_size", "settings", "message"),
    [
        (0, {}, "batch_size is a whole number, at least 1, got 0"),
        (2.5, {}, r"batch_size .* got 2\.5"),
        (True, {}, "batch_size .* got True"),
        (8, {"moments": -1}, "moments is a whole number, at least 0, got -1"),
    ],
)
def test_a_number_that_is_none_is_refused(batch_size: Any, settings: dict[str, Any], message: str) -> None:
    model = network()
    transition = vanishing.prepare(model, MagnitudePruning(sparsity=0.5), steps=10)
    with pytest.raises(ValueError, match=message):
        estimate_memory(transition, losses(model), batch_size, **settings)


@pytest.mark.parametrize("given", [lambda loss: loss.item(), lambda loss: loss.detach(), lambda loss: loss.expand(3)])
def test_what_is_no_loss_is_refused_and_the_model_left_as_it_was(given: Callable[[Tensor], Any]) -> None:
    model = network().eval()
    transition = vanishing.prepare(model, MagnitudePruning(sparsity=0.5), steps=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = losses(model)
    with pytest.raises(TypeError, match="compute_loss must return the loss"):
        estimate_memory(transition, lambda size: given(loss(size)), BATCH)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_transition_that_is_over_is_refused() -> None:
    model = network()
    transition = vanishing.prepare(model, MagnitudePruning(sparsity=0.5), steps=10)
    transition.finish(force=True)
    with pytest.raises(vanishing.TransitionError, match="was finished"):
        estimate_memory(transition, losses(model), BATCH)
