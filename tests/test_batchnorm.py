"""BatchNorm's statistics, estimated anew for the model that is shipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vanishing
from loops import copied, states_equal
from vanishing import Binary, Compressor, LinearSchedule, LowRank, MagnitudePruning, Recipe, Replace
from vanishing.batchnorm import reestimate_batchnorm


class Network(nn.Module):
    """Convolutions with normalizations of every sort, one of them kept in evaluation mode; takes keywords too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None)
        self.fixed = nn.BatchNorm2d(4, momentum=0.3).eval()
        self.stateless = nn.BatchNorm2d(4, track_running_stats=False)
        self.head, self.norm3 = nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)

    def forward(self, pixels: Tensor, scale: float = 1.0) -> Tensor:
        x = self.drop(self.norm1(self.conv1(pixels)).relu())
        x = self.stateless(self.fixed(self.norm2(self.conv2(x))).relu())
        return self.norm3(self.head(x.mean((2, 3)))) * scale


def images(count: int = 3, size: int = 4) -> list[Tensor]:
    return [2 + 3 * torch.randn(size, 2, 7, 7, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def trained() -> Network:
    model = Network()
    for pixels in images(5):
        model(10 * pixels)
    return model


NORMS = ("norm1", "norm2", "fixed", "norm3")


def plain_pass(model: nn.Module, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of what each normalization sees, by batch, averaged over the batches.

    Written out layer by layer, as `Network.forward` runs without dropout.
    """
    get = model.get_submodule
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in NORMS}

    def normalize(name: str, x: Tensor) -> Tensor:
        dimensions = [d for d in range(x.dim()) if d != 1]
        mean, variance = x.mean(dimensions), x.var(dimensions, unbiased=False)
        if name in seen:
            seen[name].append((mean, x.var(dimensions, unbiased=True)))
        shape = [1, -1, *[1] * (x.dim() - 2)]
        x = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
        weight, bias = get(name)._parameters["weight"], get(name)._parameters["bias"]
        return x if weight is None or bias is None else x * weight.view(shape) + bias.view(shape)

    with torch.no_grad():
        for pixels in batches:
            x = normalize("norm1", get("conv1")(pixels)).relu()
            x = normalize("fixed", normalize("norm2", get("conv2")(x))).relu()
            normalize("norm3", get("head")(normalize("stateless", x).mean((2, 3))))
    return {
        name: (torch.stack([m for m, _ in pairs]).mean(0), torch.stack([v for _, v in pairs]).mean(0))
        for name, pairs in seen.items()
    }


def assert_reestimated(model: nn.Module, batches: list[Tensor]) -> None:
    for name, (mean, variance) in plain_pass(model, batches).items():
        norm: Any = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)
        assert norm.num_batches_tracked == len(batches)


def settings(model: nn.Module) -> list[Any]:
    return [(m.training, vars(m).get("momentum")) for m in model.modules()]


FORMS: dict[str, Callable[[list[Tensor]], Iterable[Any]]] = {
    "tensors": lambda batches: batches,
    "tuples": lambda batches: [(x, torch.zeros(4)) for x in batches],
    "lists": lambda batches: [[x, "label"] for x in batches],
    "keywords": lambda batches: [{"pixels": x, "scale": 2.0} for x in batches],
    "a generator": lambda batches: (x for x in batches),
    "a loader": lambda batches: DataLoader(TensorDataset(torch.cat(batches)), batch_size=4),
}


@pytest.mark.parametrize("batches", FORMS.values(), ids=FORMS)
def test_statistics_are_those_of_a_plain_pass(batches: Callable[[list[Tensor]], Iterable[Any]]) -> None:
    model = trained()
    before = settings(model)
    assert {training for training, _ in before} == {True, False}
    reestimate_batchnorm(model, batches(images()))
    assert_reestimated(model, images())
    assert settings(model) == before


RULES: dict[str, dict[Any, Compressor]] = {
    "pruning": {"*": MagnitudePruning(0.5)},
    "binary": {"*": Binary()},
    "low rank": {"*": LowRank(ratio=0.5)},
    "replaced": {"conv2": Replace(lambda block: nn.Conv2d(4, 4, 3, groups=2), name="grouped convolution")},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_finish_estimates_them_for_the_compressed_model(rules: dict[Any, Compressor], mode: bool) -> None:
    model = trained()
    transition = vanishing.prepare(model, Recipe(rules, schedule=LinearSchedule(steps=2)), example_inputs=images()[0])
    for pixels in images(2):
        model(pixels).square().sum().backward()
        transition.step()
    model.train(mode)
    model.get_submodule("fixed").eval()
    before = {name: (m.training, vars(m).get("momentum")) for name, m in model.named_modules() if name in NORMS}
    transition.finish(recalibrate=images())
    assert_reestimated(model, images())
    assert before == {name: (m.training, vars(m).get("momentum")) for name, m in model.named_modules() if name in NORMS}
    assert model.training == mode


def test_without_recalibrate_the_statistics_are_those_of_training() -> None:
    model = trained()
    statistics = copied(dict(model.named_buffers()))
    vanishing.prepare(model, Binary(), steps=2).finish(force=True)
    assert states_equal(copied(dict(model.named_buffers())), statistics)


def test_it_helps_a_compressed_network() -> None:
    results = {}
    for recalibrate in (None, images()):
        torch.manual_seed(0)
        model = trained()
        vanishing.prepare(model, Binary(), steps=1).finish(force=True, recalibrate=recalibrate)
        with torch.no_grad():
            outputs = model.eval()(torch.cat(images()))
        # The last normalization gives each class mean 0 and variance 1 over the data, if its statistics are right.
        results[recalibrate is None] = float(outputs.mean(0).abs().max() + (outputs.var(0) - 1).abs().max())
    assert results[False] < 0.5 * results[True]


@pytest.mark.parametrize("batches", [[], (), iter([])])
def test_without_a_batch_nothing_changes(batches: Iterable[Any]) -> None:
    model = trained()
    statistics, before = copied(dict(model.named_buffers())), settings(model)
    with pytest.raises(vanishing.TransitionError, match="at least one batch is needed"):
        reestimate_batchnorm(model, batches)
    assert states_equal(copied(dict(model.named_buffers())), statistics)
    assert settings(model) == before


def test_a_batch_that_fails_leaves_statistics_and_modes_as_they_were() -> None:
    model = trained()
    statistics, before = copied(dict(model.named_buffers())), settings(model)
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(model, [*images(), torch.zeros(4, 5, 7, 7)])
    assert states_equal(copied(dict(model.named_buffers())), statistics)
    assert settings(model) == before


def test_no_gradients_and_no_random_numbers_are_left() -> None:
    model = trained()
    state = torch.get_rng_state()
    reestimate_batchnorm(model, images())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_normalization_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = copied(model.state_dict())
    reestimate_batchnorm(model, [torch.ones(2, 3)])
    assert states_equal(copied(model.state_dict()), before)
