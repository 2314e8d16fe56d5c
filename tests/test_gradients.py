"""Gradient routes, and what is added to the gradients of latent weights, against autograd of textbook formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import reference
import vanishing
from vanishing import (
    Compressor,
    Gradient,
    LinearSchedule,
    LowRank,
    MagnitudePruning,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantization,
    Recipe,
    Rule,
    Staggered,
    StepSchedule,
)

RATE, LENGTH = 0.5, 10
X = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6, bias=False, dtype=torch.float64))


def loss(weight: Tensor, x: Tensor = X) -> Tensor:
    return nn.functional.linear(x, weight).square().mean()


def in_transition(compressor: Compressor, step: int, **options: object) -> tuple[nn.Sequential, nn.Parameter]:
    """A layer whose transition over ten steps has gone on for some, and its latent weight."""
    model = layer()
    schedules = {"schedule": LinearSchedule(steps=LENGTH)} | options
    transition = vanishing.prepare(model, Recipe({"*": compressor}, **schedules))  # type: ignore[arg-type]
    transition.seek(step)
    # As long as the model lives.
    vars(model)["transition"] = transition
    return model, model.get_parameter("0.parametrizations.weight.original")


def blended(model: nn.Sequential) -> Tensor:
    """The weight that the layer uses."""
    weight = model[0].weight
    assert isinstance(weight, Tensor)
    return weight


def one_step(model: nn.Sequential) -> None:
    """Gradient descent without frills."""
    loss(blended(model)).backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()


def textbook_step(step: int, compressed: Callable[[Tensor], Tensor], regularizer: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight after a step of gradient descent on the textbook's loss."""
    weight = layer().get_parameter("0.weight")
    beta = reference.linear(step, LENGTH)
    total = loss(beta * weight + (1 - beta) * compressed(weight)) + (1 - beta) * regularizer(weight)
    return weight.detach() - RATE * torch.autograd.grad(total, weight)[0]


def pruned(weight: Tensor) -> Tensor:
    return reference.prune_per_tensor(weight.detach(), 0.5)


def straight(weight: Tensor) -> Tensor:
    return reference.straight_through(weight, pruned(weight))


# The gradient of pruned weights that decays


@pytest.mark.parametrize("step", [1, 4, 9, 10, 13])
def test_a_decaying_gradient_goes_from_straight_through_to_the_mask(step: int) -> None:
    model, latent = in_transition(MagnitudePruning(0.5, gradient=Gradient.DECAYING), step)
    one_step(model)
    beta = reference.linear(step, LENGTH)
    expected = textbook_step(step, lambda w: reference.decaying(w, pruned(w), beta), lambda w: w.new_zeros(()))
    torch.testing.assert_close(latent.detach(), expected, rtol=1e-6, atol=0)
    if step >= LENGTH:
        unchanged = layer().get_parameter("0.weight")
        zeros = pruned(unchanged) == 0
        assert torch.equal(latent[zeros], unchanged[zeros])


def test_under_a_ramp_the_gradient_decays_with_what_is_left_of_it() -> None:
    technique = MagnitudePruning(0.5, gradient=Gradient.DECAYING)
    model, latent = in_transition(technique, 4, schedule=StepSchedule(at=0), ramp=LinearSchedule(steps=LENGTH))
    used = blended(model)
    assert int((used == 0).sum()) == round(0.5 * 0.4 * 48)
    used.sum().backward()
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad, torch.where(used != 0, 1.0, 0.6).double(), rtol=1e-6, atol=0)


def test_a_decaying_gradient_continues_from_a_saved_state() -> None:
    technique = MagnitudePruning(0.5, gradient=Gradient.DECAYING)
    first, _ = in_transition(technique, 4)
    again = layer()
    transition = vanishing.prepare(again, technique, steps=LENGTH)
    again.load_state_dict(first.state_dict())
    transition.load_state_dict({"steps_done": 4, "recipe": transition.state_dict()["recipe"]})
    for model in (first, again):
        loss(blended(model)).backward()
    gradients = [m.get_parameter("0.parametrizations.weight.original").grad for m in (first, again)]
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


# Pruned weights that are drawn to zero


@pytest.mark.parametrize("step", [1, 4, 9, 13])
def test_pruned_weights_decay_as_in_sr_ste(step: int) -> None:
    model, latent = in_transition(MagnitudePruning(0.5, decay=0.3), step)
    one_step(model)
    expected = textbook_step(step, straight, lambda w: reference.decay_of_pruned(w, pruned(w), 0.3))
    torch.testing.assert_close(latent.detach(), expected)


def test_under_a_frozen_mask_nothing_decays() -> None:
    states = []
    for decay in (0.0, 0.3):
        model, latent = in_transition(MagnitudePruning(0.5, decay=decay, freeze=True), LENGTH)
        one_step(model)
        states.append(latent.detach())
    assert torch.equal(*states)


def accumulated(model: nn.Sequential) -> None:
    for part in X.split(3):
        (loss(blended(model), part) / 4).backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()


def closed(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def closure() -> float:
        optimizer.zero_grad()
        loss(blended(model)).backward()
        return 1.0

    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    assert optimizer.step(closure) == 1.0


def closed_by_keyword(model: nn.Sequential) -> None:
    def closure() -> float:
        loss(blended(model)).backward()
        return 1.0

    assert torch.optim.SGD(model.parameters(), lr=RATE).step(closure=closure) == 1.0


def scaled(model: nn.Sequential, *, fused: bool = False) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, fused=fused)
    scaler.scale(loss(blended(model))).backward()
    scaler.step(optimizer)


def scaled_and_fused(model: nn.Sequential) -> None:
    scaled(model, fused=True)


def beside_another_optimizer(model: nn.Sequential) -> None:
    loss(blended(model)).backward()
    other = nn.Linear(2, 2)
    other(torch.randn(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=RATE).step()
    torch.optim.SGD(model.parameters(), lr=RATE).step()


def read_twice(model: nn.Sequential) -> None:
    (loss(blended(model)) / 2 + loss(blended(model)) / 2).backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()


LOOPS = [accumulated, closed, closed_by_keyword, scaled, scaled_and_fused, beside_another_optimizer, read_twice]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("compressor", [MagnitudePruning(0.5, decay=0.3), Quantization(3, damping=0.3)], ids=repr)
def test_a_step_is_drawn_once_whatever_the_loop(loop: Callable[[nn.Sequential], None], compressor: Compressor) -> None:
    weights = []
    for each in (one_step, loop):
        model, latent = in_transition(compressor, 4)
        each(model)
        weights.append(latent.detach())
    torch.testing.assert_close(weights[1], weights[0])


@pytest.mark.parametrize("compressor", [MagnitudePruning(0.5, decay=0.3), Quantization(3, damping=0.3)], ids=repr)
def test_the_original_alone_is_not_drawn(compressor: Compressor) -> None:
    model, latent = in_transition(compressor, 0)
    one_step(model)
    plain = layer()
    loss(plain.get_parameter("0.weight")).backward()
    torch.optim.SGD(plain.parameters(), lr=RATE).step()
    assert torch.equal(latent, plain.get_parameter("0.weight"))


# Weights that are drawn to where they are rounded to


def blocks(weight: Tensor, granularity: PerTensor | PerChannel | PerGroup) -> list[Tensor]:
    """What shares a scale, as views."""
    if isinstance(granularity, PerTensor):
        return [weight.reshape(-1)]
    size = granularity.size if isinstance(granularity, PerGroup) else weight.shape[1]
    return [part for row in weight for part in row.split(size)]


def grid(block: Tensor, bits: int, symmetric: bool, scale_type: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """A block rounded, and the smallest and the largest value of its grid."""
    if bits == 1:
        rounded = reference.quantize_symmetric(block, 1, scale_type)
        return rounded, -rounded.abs().max(), rounded.abs().max()
    top = 2**bits - 1
    if symmetric:
        scale = block.abs().max() / (top / 2)
        scale = scale if scale_type is None else scale.to(scale_type).to(scale.dtype)
        return reference.quantize_symmetric(block, bits, scale_type), -(2 ** (bits - 1)) * scale, (top // 2) * scale
    low = block.min().clamp(max=0)
    scale = (block.max().clamp(min=0) - low) / top
    scale = scale if scale_type is None else scale.to(scale_type).to(scale.dtype)
    zero = (-low / scale).round()
    return reference.quantize_asymmetric(block, bits, scale_type), -zero * scale, (top - zero) * scale


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(size=3)], ids=repr)
@pytest.mark.parametrize(("bits", "symmetric"), [(1, True), (2, True), (2, False), (4, True), (4, False)])
def test_damping_is_the_gradient_of_the_squared_rounding_error(
    bits: int, symmetric: bool, granularity: PerTensor | PerChannel | PerGroup
) -> None:
    scale_type = torch.bfloat16 if isinstance(granularity, PerGroup) else None
    model, latent = in_transition(Quantization(bits, symmetric=symmetric, granularity=granularity, damping=0.3), 4)

    def quantized(weight: Tensor) -> Tensor:
        value = weight.detach().clone()
        for block in blocks(value, granularity):
            block.copy_(grid(block, bits, symmetric, scale_type)[0])
        return reference.straight_through(weight, value)

    def regularizer(weight: Tensor) -> Tensor:
        grids = ((b, grid(b.detach(), bits, symmetric, scale_type)) for b in blocks(weight, granularity))
        return torch.stack([reference.damping(block, *each, factor=0.3) for block, each in grids]).sum()

    one_step(model)
    torch.testing.assert_close(latent.detach(), textbook_step(4, quantized, regularizer))


@pytest.mark.parametrize(("damping", "changes"), [(0.0, range(10, 60)), (2.0, range(1))])
def test_a_damped_weight_does_not_go_back_and_forth_between_two_values(damping: float, changes: range) -> None:
    # The paper's example: the best value, 0.4, lies between two of the grid's, 0 and 1.
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].get_parameter("weight").data.copy_(torch.tensor([[1.5, 0.1]]))
    transition = vanishing.prepare(model, Recipe({"*": Quantization(2, damping=damping)}, schedule=StepSchedule(at=0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for _ in range(60):
        used = blended(model)[0, 1]
        values.append(used.item())
        (used - 0.4).square().backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    assert set(values) <= {0.0, 1.0}
    assert sum(one != other for one, other in itertools.pairwise(values)) in changes


# Chains


def test_in_a_chain_each_technique_draws_its_part() -> None:
    model, latent = in_transition(MagnitudePruning(0.5, decay=0.3) | Quantization(2, damping=0.2), 4)

    def quantized(weight: Tensor) -> Tensor:
        return torch.stack([reference.quantize_symmetric(row, 2) for row in pruned(weight)])

    def regularizer(weight: Tensor) -> Tensor:
        masked = weight * (pruned(weight) != 0)
        grids = [grid(row, 2, True, None) for row in masked.detach()]
        damped = [reference.damping(row, *each, factor=0.2) for row, each in zip(masked, grids, strict=True)]
        return reference.decay_of_pruned(weight, pruned(weight), 0.3) + torch.stack(damped).sum()

    one_step(model)
    expected = textbook_step(4, lambda w: reference.straight_through(w, quantized(w)), regularizer)
    torch.testing.assert_close(latent.detach(), expected)


def test_one_bit_after_pruning_is_damped_to_the_signs_of_what_is_kept() -> None:
    model, latent = in_transition(MagnitudePruning(0.5) | Quantization(1, damping=0.2), 4)

    def scales(weight: Tensor) -> Tensor:
        magnitudes, kept = pruned(weight).abs(), (pruned(weight) != 0).sum(1, keepdim=True)
        return magnitudes.sum(1, keepdim=True) / kept.clamp(min=1)

    def quantized(weight: Tensor) -> Tensor:
        return pruned(weight).sign() * scales(weight)

    def regularizer(weight: Tensor) -> Tensor:
        kept = pruned(weight) != 0
        limit = scales(weight).expand_as(weight)[kept]
        return reference.damping(weight[kept], quantized(weight)[kept], -limit, limit, 0.2)

    one_step(model)
    expected = textbook_step(4, lambda w: reference.straight_through(w, quantized(w)), regularizer)
    torch.testing.assert_close(latent.detach(), expected)


def test_a_decaying_and_a_clipped_gradient_multiply() -> None:
    technique = MagnitudePruning(0.5, gradient=Gradient.DECAYING) | Quantization(2, gradient=Gradient.CLIPPED)
    model, latent = in_transition(technique, 4)
    with torch.no_grad():
        latent[0] = torch.tensor([0.001, -0.001, 0.002, 9.0, 5.0, -5.0, 8.9, -8.9])
    blended(model).sum().backward()
    # All of it; of a pruned weight's, what is left; beyond the range nothing of the compressed form.
    assert latent.grad is not None
    assert sorted({round(each, 6) for each in latent.grad.flatten().tolist()}) == [0.6, 0.6 + 0.4 * 0.6, 1.0]


@pytest.mark.parametrize("route", [Gradient.STRAIGHT_THROUGH, Gradient.EXACT])
@pytest.mark.parametrize("step", [2, 5, 7, 9, 12])
def test_techniques_that_fade_in_turn_draw_by_their_own_betas(step: int, route: Gradient) -> None:
    windows = LinearSchedule(steps=6, start=1), LinearSchedule(steps=6, start=4)
    chain = MagnitudePruning(0.5, gradient=route, decay=0.3) | Quantization(2, damping=0.2)
    model = layer()
    transition = vanishing.prepare(model, Recipe({"*": Rule(chain, schedules=windows)}, schedule=StepSchedule(at=0)))
    transition.seek(step)
    one_step(model)

    first, second = (window(step) for window in windows)
    weight = layer().get_parameter("0.weight")
    masked = straight(weight) if route is Gradient.STRAIGHT_THROUGH else weight * (pruned(weight) != 0)
    seen = first * weight + (1 - first) * masked
    grids = [grid(row, 2, True, None) for row in seen.detach()]
    rounded = torch.stack([each for each, *_ in grids]) * (seen.detach() != 0)
    total = loss(second * seen + (1 - second) * reference.straight_through(seen, rounded))
    total = total + (1 - first) * reference.decay_of_pruned(weight, pruned(weight), 0.3)
    damped = [reference.damping(row, *each, factor=0.2) for row, each in zip(seen, grids, strict=True)]
    total = total + (1 - second) * torch.stack(damped).sum()
    expected = weight.detach() - RATE * torch.autograd.grad(total, weight)[0]
    torch.testing.assert_close(model.get_parameter("0.parametrizations.weight.original").detach(), expected)


def test_layers_that_fade_one_after_another_have_gradients_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    technique = MagnitudePruning(0.5, gradient=Gradient.DECAYING, decay=0.3)
    transition = vanishing.prepare(model, Recipe({"*": technique}, schedule=Staggered(LinearSchedule(steps=10))))
    transition.seek(6)
    shares, drawn = [], []
    for part in model:
        latent: nn.Parameter = part.parametrizations.weight.original  # type: ignore[assignment, union-attr]
        part.weight.sum().backward()  # type: ignore[operator]
        assert latent.grad is not None
        shares.append(round(latent.grad.min().item(), 6))
        before = latent.detach().clone()
        latent.grad = torch.zeros_like(latent)
        torch.optim.SGD([latent], lr=1.0).step()
        drawn.append(bool((latent != before).any()))
    # The first has no original left; of the second's gradient beta and the same share of the rest.
    assert shares == [0.0, 0.96]
    assert drawn == [True, True]
    transition.seek(4)
    betas = [part.parametrizations.weight[0].beta for part in model]  # type: ignore[index, union-attr]
    assert betas[1] == 1.0


def test_factors_are_drawn_as_weights_are() -> None:
    updates = []
    for damping in (0.0, 0.2):
        model, _ = in_transition(LowRank(rank=2) | Quantization(3, damping=damping), 4)
        name = "0.parametrizations.weight.0.form.factors.0.parametrizations.weight.original"
        factor = model.get_parameter(name)
        before = factor.detach().clone()
        one_step(model)
        updates.append((before, factor.detach() - before))
    (start, without), (_, damped) = updates
    free = start.clone().requires_grad_()
    grids = [grid(row, 3, True, None) for row in start]
    torch.stack(
        [reference.damping(row, *each, factor=0.2) for row, each in zip(free, grids, strict=True)]
    ).sum().backward()
    assert free.grad is not None
    torch.testing.assert_close(damped - without, -RATE * 0.4 * free.grad)


def test_gradients_that_a_technique_does_not_have_are_refused() -> None:
    known: Iterable[tuple[Compressor, set[Gradient]]] = [
        (MagnitudePruning(0.5), {Gradient.STRAIGHT_THROUGH, Gradient.EXACT, Gradient.DECAYING}),
        *((each, {Gradient.STRAIGHT_THROUGH, Gradient.CLIPPED}) for each in (Quantization(2), vanishing.Binary())),
        (vanishing.Ternary(), {Gradient.STRAIGHT_THROUGH, Gradient.CLIPPED}),
    ]
    for (compressor, routes), route in itertools.product(known, Gradient):
        settings = compressor.to_dict() | {"gradient": route.value}
        if route in routes:
            Compressor.from_dict(settings)
        else:
            with pytest.raises(
                vanishing.ConfigError, match=rf"gradient={route.name}\): .*\. Use [A-Z_, ]+ or [A-Z_]+\."
            ):
                Compressor.from_dict(settings)
