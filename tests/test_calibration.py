"""The calibration pass: what observers see, what is left of it in the model, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vanishing.calibration import Calibration, GradientMagnitudes, InputMoments, Observed, calibrate
from vanishing.errors import RecipeError
from vanishing.layers import find_kind

CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "padded, strided, dilated": lambda: nn.Conv2d(4, 6, (3, 2), padding=(2, 1), stride=2, dilation=(1, 2)),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "same, reflected": lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "one dimension": lambda: nn.Conv1d(4, 6, 3, stride=2),
    "three dimensions": lambda: nn.Conv3d(4, 6, 2, padding=1),
    "linear": lambda: nn.Linear(4, 6),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))


def moments(module: nn.Module, *, full: bool) -> InputMoments:
    kind = find_kind(module)
    assert kind is not None
    return InputMoments(module, kind, full=full)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_input_rows_times_the_matrix_are_the_output(case: str) -> None:
    torch.manual_seed(0)
    module = CONVOLUTIONS[case]().double()
    kind = find_kind(module)
    assert kind is not None and isinstance(module.weight, Tensor)
    dimensions = max(module.weight.dim() - 2, 0)
    x = torch.randn(2, *((4,) if dimensions else (7,)), *([6] * dimensions or [4]), dtype=torch.float64)
    expected = module(x)
    rows = kind.input_rows(module, x)
    matrix = kind.layout(module, tuple(module.weight.shape)).to_matrix(module.weight)
    groups = kind.groups(module)
    product = rows @ matrix.reshape(groups, -1, rows.shape[-1]).mT
    flat = product.permute(1, 0, 2).flatten(1)
    if isinstance(module.bias, Tensor):
        flat = flat + module.bias
    channels_last = expected.movedim(1, -1) if dimensions else expected
    torch.testing.assert_close(flat, channels_last.reshape(flat.shape))


def test_moments_are_means_over_all_positions() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    batches = [torch.randn(2, 5, 4), torch.randn(7, 4)]
    full, diagonal = moments(net[0], full=True), moments(net[0], full=False)
    calibrate(net, [Observed("0", each, [net[0]]) for each in (full, diagonal)], Calibration(batches=batches))
    rows = torch.cat([batch.reshape(-1, 4) for batch in batches])
    torch.testing.assert_close(full.moments[0], rows.T @ rows / 17)
    torch.testing.assert_close(diagonal.moments[0], rows.square().mean(0))


def test_gradients_are_those_of_the_loss() -> None:
    net, batches = model().eval(), [(images(4), torch.tensor([0, 1, 2, 3])), (images(3), torch.tensor([4, 0, 1]))]
    last = net.get_submodule("5")
    assert isinstance(last, nn.Linear)
    observer = GradientMagnitudes(last.weight)
    given = Calibration(batches=batches, loss=lambda m, b: functional.cross_entropy(m(b[0]), b[1]))
    calibrate(net, [Observed("5", observer, [last])], given)
    found = []
    for x, y in batches:
        (gradient,) = torch.autograd.grad(functional.cross_entropy(net(x), y), last.weight)
        found.append(gradient.abs())
    torch.testing.assert_close(observer.magnitudes, torch.stack(found).mean(0))


def test_nothing_of_the_model_changes() -> None:
    net = model()
    net(images(2)).sum().backward()
    net.get_submodule("1").eval()
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    random = torch.get_rng_state()
    last = net.get_submodule("5")
    observers = [moments(last, full=True), GradientMagnitudes(last.get_parameter("weight"))]
    given = Calibration(batches=[images(4)], loss=lambda m, b: m(b).square().mean())
    calibrate(net, [Observed("5", each, [last]) for each in observers], given)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for parameter, before in zip(net.parameters(), gradients, strict=True):
        assert before is not None and parameter.grad is not None and torch.equal(parameter.grad, before)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_hooks_go_when_a_batch_does_not_fit() -> None:
    net = model()
    with pytest.raises(RuntimeError):
        calibrate(net, [Observed("5", moments(net[5], full=False), [net[5]])], Calibration(batches=[torch.randn(2, 1)]))
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_bad_batches_are_refused() -> None:
    net = model()
    observed = [Observed("5", moments(net[5], full=False), [net[5]])]
    with pytest.raises(RecipeError, match="at least one batch is needed"):
        calibrate(net, observed, Calibration(batches=[]))
    with pytest.raises(TypeError, match="Put a single batch into a list"):
        calibrate(net, observed, Calibration(batches=images(2)))
    with pytest.raises(RecipeError, match="nothing went through '5'"):
        calibrate(net[0:2], observed, Calibration(batches=[images(2)]))
    gradients = [Observed("5", GradientMagnitudes(net[5].get_parameter("weight")), [net[5]])]
    with pytest.raises(RecipeError, match="the model returns none"):
        calibrate(net, gradients, Calibration(batches=[images(2)]))
