"""Sizes against PyTorch's own counter of operations, the bytes of saved files, and plain counting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vanishing


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 3, groups=4),
        nn.ConvTranspose2d(32, 8, 2, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 12 * 12, 10),
    )


def finished(model: nn.Module, compressor: vanishing.Compressor) -> nn.Module:
    transition = vanishing.prepare(model, compressor, steps=1)
    transition.step()
    return transition.finish()


def counted_products(model: nn.Module, images: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(images)
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("compressor", [None, vanishing.LowRank(ratio=0.5), vanishing.MagnitudePruning(sparsity=0.5)])
def test_multiply_accumulates_are_those_that_pytorch_counts(compressor: vanishing.Compressor | None) -> None:
    images = torch.randn(2, 3, 16, 16)
    model = convolutional()
    dense = counted_products(model, images)
    if compressor is not None:
        finished(model, compressor)
    report = vanishing.summary(model, images)
    assert report.before.multiply_accumulates == dense
    assert report.after.multiply_accumulates == counted_products(model, images)


def test_without_example_inputs_a_layer_counts_one_position() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
    rows = vanishing.summary(model).rows
    assert [row.after.multiply_accumulates for row in rows] == [0, 32]


def test_parameters_and_nonzeros_are_counted_and_ties_only_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10))
    model[1].weight = model[0].weight
    before = vanishing.summary(model).before
    assert before.parameters == sum(p.numel() for p in model.parameters()) == 90
    pruned = finished(nn.Sequential(nn.Linear(20, 10)), vanishing.MagnitudePruning(sparsity=0.9))
    assert vanishing.summary(pruned).after.nonzeros == sum(int(p.count_nonzero()) for p in pruned.parameters())


@pytest.mark.parametrize(
    "compressor",
    [
        vanishing.MagnitudePruning(sparsity=0.9),
        vanishing.Binary(),
        vanishing.Quantization(4, granularity=vanishing.PerGroup(size=32)),
        vanishing.LowRank(rank=4) | vanishing.Quantization(8),
        vanishing.MagnitudePruning(sparsity=0.5) | vanishing.Quantization(4),
    ],
    ids=repr,
)
def test_bytes_are_those_of_the_file_and_a_transition_foretells_them(
    compressor: vanishing.Compressor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    dense = sum(p.nbytes for p in model.parameters())
    transition = vanishing.prepare(model, compressor, steps=1)
    transition.step()
    foretold = vanishing.summary(model)
    transition.finish()
    report = vanishing.summary(model)
    assert report.before.bytes == foretold.before.bytes == dense
    assert report.after == foretold.after
    vanishing.save(model, tmp_path / "small")
    with safe_open(tmp_path / "small" / "model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert report.after.bytes == stored
    fresh = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    assert vanishing.summary(vanishing.load(tmp_path / "small", fresh)).after == report.after


def test_a_replaced_block_is_one_row() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), nn.Linear(8, 2))
    recipe = vanishing.Recipe({"0": vanishing.Replace(small_block)}, schedule=vanishing.StepSchedule(at=0))
    transition = vanishing.prepare(model, recipe)
    during = vanishing.summary(model)
    transition.finish()
    after = vanishing.summary(model)
    for report in (during, after):
        row = report.rows[0]
        assert (row.name, row.before.parameters, row.after.parameters) == ("0", 552, 72)
        assert len(report.rows) == 2


def small_block(block: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8))


def test_it_prints_every_layer_and_the_total() -> None:
    text = str(vanishing.summary(finished(nn.Sequential(nn.Linear(20, 10)), vanishing.LowRank(rank=2))))
    assert "LowRank(rank=2)" in text and "210 → 70" in text and "total" in text


def test_a_model_without_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        vanishing.summary(nn.ReLU())


def test_tables_are_plain_text_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"[cls]": nn.Linear(2, 2), "[/x]": nn.Linear(2, 2)})
    plain = str(vanishing.summary(model))
    assert "[cls]" in plain and "[/x]" in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(vanishing.summary(model)) == plain
    assert "[cls]" in str(
        vanishing.Recipe({"*": vanishing.Binary()}, schedule=vanishing.StepSchedule(at=0)).match(model)
    )
