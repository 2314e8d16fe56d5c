"""Convolutions split between rows and columns of their kernel, or as Tucker decompositions, against other libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorly
import timm
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

import vanishing
from vanishing import LinearSchedule, LowRank, Quantization, Recipe, RecipeError, Split
from vanishing.layers import Factored, factor


def finished(module: nn.Module, technique: vanishing.Compressor) -> Factored:
    model = nn.Sequential(module)
    recipe = Recipe({"*": technique}, schedule=vanishing.StepSchedule(at=0))
    vanishing.prepare(model, recipe).finish()
    assert isinstance(model[0], Factored)
    return model[0]


def convolution(**settings: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 12, (3, 5), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [(3, 3), (8, 8)])
def test_a_tucker_split_is_as_near_as_tensorlys(ranks: tuple[int, int]) -> None:
    weight = convolution().weight.detach().double()
    tensorly.set_backend("pytorch")
    (core, (outer, inner)), _ = partial_tucker(weight, ranks, modes=[0, 1], init="svd", n_iter_max=200, tol=1e-12)
    theirs = torch.einsum("rshw,or,is->oihw", core, outer, inner)
    ours = finished(convolution().double(), LowRank(rank=ranks[0], split=Split.TUCKER))
    assert ours.ranks == ranks
    torch.testing.assert_close((ours.weight - weight).norm(), (theirs - weight).norm(), rtol=1e-3, atol=1e-12)


def test_a_spatial_split_is_the_best_of_its_rank() -> None:
    weight = convolution().weight.detach()
    # Rows: output channel and column of the kernel; columns: input channel and row (arXiv 1405.3866, section 2.2).
    matrix = weight.permute(0, 3, 1, 2).reshape(12 * 5, 8 * 3)
    split = finished(convolution(), LowRank(rank=6, split=Split.SPATIAL))
    best = torch.linalg.svdvals(matrix)[6:].norm()
    torch.testing.assert_close((split.weight - weight).norm(), best)
    assert [getattr(thin, "kernel_size", None) for thin in split] == [(3, 1), (1, 5)]


@pytest.mark.parametrize("split", [Split.SPATIAL, Split.TUCKER])
@pytest.mark.parametrize(
    "settings",
    [
        {"stride": (2, 1), "padding": (1, 3), "dilation": (1, 2)},
        {"padding": "same", "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular", "bias": False},
    ],
    ids=["strided", "same", "circular"],
)
def test_at_full_rank_the_layers_compute_what_the_convolution_computes(
    split: Split, settings: dict[str, object]
) -> None:
    x = torch.randn(2, 8, 11, 13, generator=torch.Generator().manual_seed(1))
    expected = convolution(**settings)(x)
    factored = finished(convolution(**settings), LowRank(energy=1.0, split=split))
    torch.testing.assert_close(factored(x), expected, rtol=1e-4, atol=1e-5)


def test_a_ratio_is_the_share_of_weights() -> None:
    for split in (Split.SPATIAL, Split.TUCKER):
        torch.manual_seed(0)
        factored = finished(nn.Conv2d(64, 48, 3, bias=False), LowRank(ratio=0.3, split=split))
        share = sum(p.numel() for p in factored.parameters()) / (64 * 48 * 9)
        assert 0.28 < share <= 0.3


def test_what_cannot_be_split_so_is_split_between_channels() -> None:
    torch.manual_seed(0)
    groups = nn.Conv2d(8, 8, 3, groups=2)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), groups, nn.Flatten(), nn.Linear(8 * 16, 4))
    recipe = Recipe({"*": LowRank(ratio=0.5, split=Split.TUCKER)}, schedule=LinearSchedule(steps=1))
    vanishing.prepare(model, recipe).finish(force=True)
    assert [m.split for m in model if isinstance(m, Factored)] == [Split.CHANNELS] * 3
    with pytest.raises(TypeError, match="cannot be factored into tucker"):
        factor(groups, 2, 2, split=Split.TUCKER)
    with pytest.raises(RecipeError, match="rank is at most 24"):
        finished(convolution(), LowRank(rank=25, split=Split.SPATIAL))


def macs_by_hand(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of every convolution and linear layer, from the shapes that they return."""
    counted = []

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        positions = output.numel() // module.weight.shape[0]
        counted.append(positions * module.weight.numel())

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model(x)
    for handle in handles:
        handle.remove()
    return sum(counted)


@pytest.mark.parametrize("split", list(Split))
def test_a_resnet_is_split_saved_and_counted(split: Split, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = timm.create_model("resnet18", num_classes=10)
        return made.eval()

    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = build()
    dense = macs_by_hand(model, x)
    recipe = Recipe(
        {"layer*": LowRank(ratio=0.25, split=split) | Quantization(bits=8)}, schedule=LinearSchedule(steps=4)
    )
    transition = vanishing.prepare(model, recipe)
    with transition.compressed():
        expected = model(x)
    before = vanishing.summary(model, x).after.multiply_accumulates
    transition.finish(force=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    counts = vanishing.summary(model, x)
    assert counts.after.multiply_accumulates == before == macs_by_hand(model, x)
    assert counts.before.multiply_accumulates == dense
    vanishing.save(model, tmp_path / "small")
    assert torch.equal(vanishing.load(tmp_path / "small", build()).eval()(x), model(x))
