"""Channels of whole networks, found by Torch-Pruning: what vanishes, and that Torch-Pruning would cut the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch_pruning
from torch import Tensor, nn

import vanishing
from vanishing import LinearSchedule, RecipeError, StepSchedule
from vanishing.integrations.torch_pruning import prepare

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def resnet() -> Any:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5, channels=(8, 16, 24, 32), stem_width=8, zero_init_last=False)


def mobile() -> Any:
    torch.manual_seed(0)
    return timm.create_model("mobilenetv3_small_100", num_classes=5)


def vgg() -> nn.Module:
    """Convolutions, and linear layers behind a flattened image of 4 x 4."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 5))


MODELS: dict[str, Callable[[], Any]] = {"resnet": resnet, "mobile": mobile, "vgg": vgg}


def train(model: nn.Module, transition: vanishing.Transition, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    for _ in range(steps):
        model(IMAGES).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_computes_what_was_computed_without_the_channels(name: str, tmp_path: Path) -> None:
    plain, model = MODELS[name](), MODELS[name]()
    transition = prepare(model, IMAGES, sparsity=0.5, schedule=LinearSchedule(steps=4))
    assert torch.equal(model.eval()(IMAGES), plain.eval()(IMAGES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, transition, optimizer, 5)
    with torch.no_grad():
        expected = model(IMAGES)
        transition.finish()
        finished = model(IMAGES)
    torch.testing.assert_close(finished, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert sum(p.numel() for p in model.parameters()) < 0.35 * sum(p.numel() for p in plain.parameters())

    vanishing.save(model, tmp_path / "small")
    loaded = vanishing.load(tmp_path / "small", MODELS[name]()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), finished)
    assert str(loaded) == str(model)
    whole = vanishing.summary(plain, IMAGES).after.multiply_accumulates
    assert vanishing.summary(loaded, IMAGES).before.multiply_accumulates == whole


@pytest.mark.parametrize("name", MODELS)
def test_torch_pruning_cuts_the_same(name: str) -> None:
    model = MODELS[name]().eval()
    theirs = copy.deepcopy(model)
    ranking = torch_pruning.importance.GroupMagnitudeImportance()
    graph = torch_pruning.DependencyGraph().build_dependency(theirs, (IMAGES,), verbose=False)
    last = list(theirs.modules())[-1] if name == "vgg" else theirs.get_classifier()
    groups = list(graph.get_all_groups(ignored_layers=[last]))
    removed = [ranking(group).argsort()[: len(group[0].idxs) // 2].tolist() for group in groups]
    for group, channels in zip(groups, removed, strict=True):
        graph.get_pruning_group(group[0].dep.target.module, group[0].dep.handler, channels).prune()
    prepare(model, IMAGES, sparsity=0.5, schedule=StepSchedule(at=0)).finish(force=True)
    mine = model.state_dict()
    assert list(mine) == list(theirs.state_dict())
    for path, value in theirs.state_dict().items():
        assert torch.equal(mine[path], value), path
    torch.testing.assert_close(model(IMAGES), theirs(IMAGES), rtol=1e-4, atol=1e-6)


def test_the_blend_is_that_of_every_layer_that_takes_channels_up() -> None:
    model: Any = vgg().eval()
    whole = copy.deepcopy(model)
    transition = prepare(model, IMAGES, sparsity=0.5, schedule=LinearSchedule(steps=4))
    transition.seek(1)
    with torch.no_grad():
        for layer, size in ((4, 1), (8, 1), (13, 16), (15, 1)):
            kept = model[layer].parametrizations.weight[0].form.mask.repeat_interleave(size)
            columns = (..., *[None] * (whole[layer].weight.dim() - 2))
            whole[layer].weight.mul_(torch.where(kept, 1.0, 0.75)[columns])
    torch.testing.assert_close(model(IMAGES), whole(IMAGES))


def test_an_importance_of_torch_pruning_ranks_the_channels() -> None:
    model: Any = resnet()
    model(IMAGES).square().mean().backward()
    scores = (model.layer1[0].conv1.weight * model.layer1[0].conv1.weight.grad).abs().flatten(1).sum(1)
    taylor = torch_pruning.importance.TaylorImportance(target_types=[nn.Conv2d])

    def first_layer_alone(group: Any) -> Tensor:
        result: Tensor = taylor(group[:1])
        return result

    prepare(model, IMAGES, sparsity=0.5, schedule=StepSchedule(at=0), importance=first_layer_alone)
    mask = model.layer1[0].conv2.parametrizations.weight[0].form.mask
    assert set(mask.nonzero()[:, 0].tolist()) == set(scores.topk(4).indices.tolist())


def test_layers_to_ignore_keep_their_channels() -> None:
    model: Any = resnet()
    recipe: dict[str, Any] = {"sparsity": 0.5, "schedule": StepSchedule(at=0)}
    prepare(model, IMAGES, ignore=["layer1*", "layer3.1.conv1"], **recipe).finish(force=True)
    assert (model.layer1[0].conv1.out_channels, model.layer1[1].conv2.out_channels) == (8, 8)
    assert (model.layer2[0].conv1.out_channels, model.layer3[1].conv1.out_channels) == (8, 24)
    with pytest.raises(RecipeError, match="ignore: nothing matched 'layer9"):
        prepare(model, IMAGES, ignore=["layer9"], **recipe)


class Mixed(nn.Module):
    """Channels that are concatenated, and channels that are normalized together, beside some that are neither."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.next, self.last = nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(torch.cat([self.left(x), self.right(x)], 1))
        result: Tensor = self.last(self.next(self.norm(both)))
        return result


def test_what_cannot_be_cut_unit_by_unit_is_left_whole() -> None:
    model = Mixed()
    prepare(model, IMAGES, sparsity=0.5, schedule=StepSchedule(at=0)).finish(force=True)
    sizes = [each.out_channels for each in model.children() if isinstance(each, nn.Conv2d)]
    assert sizes == [4, 4, 8, 3, 2]


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), {}, RecipeError, "finds no channels that could be taken out"),
        (vgg, {"sparsity": 1.0}, vanishing.ConfigError, "share of units that vanish"),
        (
            vgg,
            {"importance": torch_pruning.importance.GroupTaylorImportance()},
            RecipeError,
            "GroupTaylorImportance says nothing about the channels that '13' makes",
        ),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    model: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    built = model()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    given: dict[str, Any] = {"sparsity": 0.5, "schedule": StepSchedule(at=0)} | options
    with pytest.raises(error, match=message):
        prepare(built, IMAGES, **given)
    assert list(built.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
    assert built.training and all(p.requires_grad for p in built.parameters())


def test_a_resumed_run_changes_no_bit() -> None:
    def start(build: Callable[[], nn.Module]) -> tuple[nn.Module, vanishing.Transition, torch.optim.Optimizer]:
        model = build()
        transition = prepare(model, IMAGES, sparsity=0.5, schedule=LinearSchedule(steps=4))
        return model, transition, torch.optim.AdamW(model.parameters(), lr=1e-3)

    whole = start(resnet)
    split = start(lambda: timm.create_model("resnet18", num_classes=5, channels=(8, 16, 24, 32), stem_width=8))
    train(*whole, 2)
    mine: Any
    theirs: Any
    for mine, theirs in zip(split, whole, strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for run in (whole, split):
        train(*run, 3)
        run[1].finish()
    for one, other in zip(whole[0].state_dict().values(), split[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_layers_of_a_factored_one_are_left_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    vanishing.prepare(model, vanishing.LowRank(rank=2), steps=1, ignore=["2"]).finish(force=True)
    with pytest.raises(RecipeError, match="no channels that could be taken out"):
        prepare(model, torch.randn(2, 8), sparsity=0.5, schedule=LinearSchedule(steps=1))


def test_an_order_that_names_no_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    schedule = vanishing.Staggered(LinearSchedule(steps=6), order=("nonsense",))
    with pytest.raises(RecipeError, match="its order names 'nonsense', but it drives no such layer"):
        prepare(model, torch.randn(2, 8), sparsity=0.5, schedule=schedule)
