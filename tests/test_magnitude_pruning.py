"""The sparsity that comes out, exact to one weight whatever the weights are, and the selection behind it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
import vanishing
from vanishing import NM, Binary, Global, Gradient, LinearSchedule, MagnitudePruning, PerChannel, PerTensor, Recipe
from vanishing.compressors.selection import keep_largest

# Few different values, so that most weights are tied, and often none, or all, are zero.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0, 0.5, -0.5, 2.0, 1e-30])


@st.composite
def matrices(draw: st.DrawFn, rows: int = 6, columns: int = 8) -> Tensor:
    """A random weight, one with ties and zeros, or a constant one."""
    kind = draw(st.sampled_from(["random", "tied", "constant"]))
    shape = draw(st.integers(1, rows)), draw(st.integers(1, columns))
    if kind == "random":
        return torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if kind == "constant":
        return torch.full(shape, draw(VALUES))
    return torch.tensor(draw(st.lists(VALUES, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))).reshape(
        shape
    )


def layer_with(matrix: Tensor) -> nn.Linear:
    """A linear layer with a weight."""
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    return layer


def finished(compressor: vanishing.Compressor, *matrices: Tensor) -> list[Tensor]:
    """The weights of linear layers after a whole transition without training."""
    model = nn.ModuleList(map(layer_with, matrices))
    recipe = Recipe({nn.Linear: compressor}, schedule=LinearSchedule(steps=3))
    transition = vanishing.prepare(model, recipe)
    for _ in range(3):
        transition.step()
    transition.finish()
    return [layer.weight.detach() for layer in model]  # type: ignore[operator]


def assert_pruned(got: Tensor, matrix: Tensor, zeros: int) -> None:
    """Compare with the matrix: that many zeros (those it had may be more), the others as they were and the largest."""
    kept = got != 0
    assert int((~kept).sum()) == max(zeros, int((matrix == 0).sum()))
    assert torch.equal(got[kept], matrix[kept])
    if kept.any() and not kept.all():
        assert matrix[kept].abs().min() >= matrix[~kept].abs().max()


@given(matrix=matrices(), sparsity=st.floats(0, 1))
def test_a_tensor_has_its_zeros_to_one_weight(matrix: Tensor, sparsity: float) -> None:
    (got,) = finished(MagnitudePruning(sparsity=sparsity), matrix)
    assert_pruned(got, matrix, round(sparsity * matrix.numel()))


@given(matrix=matrices(), sparsity=st.floats(0, 1))
def test_every_channel_has_its_zeros_to_one_weight(matrix: Tensor, sparsity: float) -> None:
    (got,) = finished(MagnitudePruning(sparsity=sparsity, granularity=PerChannel()), matrix)
    for row, original in zip(got, matrix, strict=True):
        assert_pruned(row, original, round(sparsity * len(row)))


@given(several=st.lists(matrices(), min_size=1, max_size=3), sparsity=st.floats(0, 1))
def test_all_layers_together_have_their_zeros_to_one_weight(several: list[Tensor], sparsity: float) -> None:
    got = finished(MagnitudePruning(sparsity=sparsity, granularity=Global()), *several)
    everything = torch.cat([matrix.flatten() for matrix in several])
    assert_pruned(torch.cat([weight.flatten() for weight in got]), everything, round(sparsity * everything.numel()))


@given(matrix=matrices(rows=4, columns=4), n=st.integers(1, 3), m=st.integers(2, 4))
def test_every_group_has_its_zeros_to_one_weight(matrix: Tensor, n: int, m: int) -> None:
    matrix = matrix.repeat(1, m)
    if n >= m:
        return
    (got,) = finished(MagnitudePruning(granularity=NM(n=n, m=m)), matrix)
    for group, original in zip(got.reshape(-1, m), matrix.reshape(-1, m), strict=True):
        assert_pruned(group, original, m - n)


@given(matrix=matrices(), sparsity=st.floats(0, 1))
def test_the_zeros_survive_a_quantizer_without_a_zero(matrix: Tensor, sparsity: float) -> None:
    (got,) = finished(MagnitudePruning(sparsity=sparsity) | Binary(granularity=PerTensor()), matrix)
    zeros = max(round(sparsity * matrix.numel()), int((matrix == 0).sum()))
    assert int((got == 0).sum()) == zeros
    kept = got[got != 0]
    if kept.numel():
        largest = reference.kept_magnitudes(matrix, matrix.numel() - zeros)
        torch.testing.assert_close(kept.abs(), largest.mean().expand_as(kept))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), Global(), NM(n=1, m=4)], ids=repr)
@pytest.mark.parametrize("gradient", [Gradient.STRAIGHT_THROUGH, Gradient.EXACT])
@pytest.mark.parametrize("freeze", [True, False])
def test_the_sparsity_is_exact_after_training(
    granularity: PerTensor | PerChannel | Global | NM, gradient: Gradient, freeze: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 20))
    sparsity = 0.75 if isinstance(granularity, NM) else 0.83
    compressor = MagnitudePruning(
        None if isinstance(granularity, NM) else sparsity, granularity=granularity, gradient=gradient, freeze=freeze
    )
    transition = vanishing.prepare(model, compressor, steps=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(11):
        model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
        with transition.compressed():
            assert_counts(model, granularity, sparsity)
        assert step < 5 or transition.done
    transition.finish()
    assert_counts(model, granularity, sparsity)


def assert_counts(model: nn.Sequential, granularity: PerTensor | PerChannel | Global | NM, sparsity: float) -> None:
    """Count the zeros of both layers."""
    weights = [model[0].weight.flatten(1), model[3].weight]  # type: ignore[operator]
    if isinstance(granularity, PerTensor):
        groups = [weight.flatten() for weight in weights]  # type: ignore[operator]
    elif isinstance(granularity, PerChannel):
        groups = [row for weight in weights for row in weight]  # type: ignore[union-attr]
    elif isinstance(granularity, Global):
        groups = [torch.cat([weight.flatten() for weight in weights])]  # type: ignore[operator]
    else:
        groups = [group for weight in weights for group in weight.reshape(-1, 4)]  # type: ignore[operator]
    for group in groups:
        assert int((group == 0).sum()) == round(sparsity * group.numel())


@given(
    several=st.lists(matrices(), min_size=1, max_size=3),
    share=st.floats(0, 1),
    guess=st.one_of(st.none(), st.floats(0, 3)),
    transposed=st.booleans(),
)
def test_the_selection_is_exact_whatever_is_guessed(
    several: list[Tensor], share: float, guess: float | None, transposed: bool
) -> None:
    magnitudes = [(matrix.t() if transposed else matrix).abs() for matrix in several]
    everything = torch.cat([m.flatten() for m in magnitudes])
    keep = round(share * everything.numel())
    masks, border = keep_largest(magnitudes, keep, guess)
    assert [mask.shape for mask in masks] == [m.shape for m in magnitudes]
    chosen = torch.cat([mask.flatten() for mask in masks])
    assert int(chosen.sum()) == keep
    assert torch.equal(everything[chosen].sort().values, reference.kept_magnitudes(everything, keep))
    if 0 < keep < everything.numel():
        assert border == everything[chosen].min()
    without, _ = keep_largest(magnitudes, keep)
    assert all(torch.equal(mask, other) for mask, other in zip(masks, without, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_selection_is_exact_in_every_type(dtype: torch.dtype) -> None:
    magnitudes = torch.rand(50, 40).to(dtype)
    (mask,), _ = keep_largest([magnitudes], 123)
    assert int(mask.sum()) == 123
    assert magnitudes[mask].min() >= magnitudes[~mask].max()


def test_a_weight_that_diverged_does_not_break_the_clock() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    transition = vanishing.prepare(model, MagnitudePruning(sparsity=0.5), steps=4)
    with torch.no_grad():
        latent: Tensor = model.get_parameter("0.parametrizations.weight.original")
        latent[:, :6] = torch.nan
    transition.step()
    assert int(next(b for n, b in model.named_buffers() if n.endswith("mask")).sum()) <= 32
