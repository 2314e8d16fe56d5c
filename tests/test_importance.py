"""Which units stay, against the formulas that `Importance` names, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import vanishing
from vanishing import Calibration, ChannelPruning, HeadPruning, Importance, RecipeError, StepSchedule, WidthPruning

BATCHES = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
Score = Callable[[nn.Module, nn.Module], Tensor]


def vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=4, num_classes=5)


def resnet() -> Any:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5, channels=(8, 16, 24, 32), stem_width=8)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    result: Tensor = model(batch).square().sum()
    return result


def inputs_of(model: nn.Module, layer: nn.Module) -> list[Tensor]:
    """What goes into a layer, batch by batch."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    handle.remove()
    return seen


def gradients_of(model: nn.Module, layer: Any) -> list[Tensor]:
    """The gradients of its weight, batch by batch."""
    gradients = []
    for batch in BATCHES:
        (gradient,) = torch.autograd.grad(loss(model, batch), [layer.weight])
        gradients.append(gradient)
    return gradients


def activation(model: nn.Module, layer: Any, units: int) -> Tensor:
    inputs = torch.cat(inputs_of(model, layer))
    if isinstance(layer, nn.Conv2d):
        # Every position of the kernel sees the image, with zeros around it.
        inputs = functional.unfold(inputs, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT  # type: ignore[arg-type]
    rows = inputs.reshape(-1, units, inputs.shape[-1] // units)
    return rows.square().sum((0, 2)).sqrt()


def first_order(model: nn.Module, layer: Any, units: int) -> Tensor:
    scores = torch.zeros(units)
    for gradient in gradients_of(model, layer):
        for unit, (w, g) in enumerate(zip(layer.weight.chunk(units, 1), gradient.chunk(units, 1), strict=True)):
            scores[unit] += (w * g).abs().sum() / len(BATCHES)
    return scores.detach()


CASES: dict[str, tuple[Callable[[], Any], type[Any], str, str, int]] = {
    "heads": (vit, HeadPruning, "blocks.0.attn.proj", "*attn*", 4),
    "width": (vit, WidthPruning, "blocks.0.mlp.fc2", "*mlp*", 128),
    "channels": (resnet, ChannelPruning, "layer2.0.conv2", "layer2.0*", 16),
}


@pytest.mark.parametrize(
    ("importance", "formula"), [(Importance.ACTIVATION, activation), (Importance.FIRST_ORDER, first_order)]
)
@pytest.mark.parametrize("case", CASES)
def test_those_units_stay_that_the_formula_says(case: str, importance: Importance, formula: Any) -> None:
    build, technique, layer, pattern, units = CASES[case]
    model = build().eval()
    scores = formula(model, model.get_submodule(layer), units)
    expected = scores.topk(units // 2).indices.sort().values
    recipe = vanishing.Recipe({pattern: technique(0.5, importance=importance)}, schedule=StepSchedule(at=0))
    transition = vanishing.prepare(model, recipe, calibration=Calibration(batches=BATCHES, loss=loss))
    mask = model.state_dict()[f"{layer}.parametrizations.weight.0.form.mask"]
    assert torch.equal(mask.nonzero()[:, 0], expected)
    magnitudes = build()
    vanishing.prepare(magnitudes, vanishing.Recipe({pattern: technique(0.5)}, schedule=StepSchedule(at=0)))
    assert units < 10 or not torch.equal(magnitudes.state_dict()[f"{layer}.parametrizations.weight.0.form.mask"], mask)
    transition.finish()


def test_without_batches_it_is_refused() -> None:
    with pytest.raises(RecipeError, match="looks at batches, and none were given"):
        vanishing.prepare(vit(), WidthPruning(0.5, importance=Importance.ACTIVATION), steps=4)
