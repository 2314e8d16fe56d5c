"""A saved structure goes into a fresh model as a whole or not at all; ties, types and modes stay."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from saved_models import MANIFEST, NOW, WEIGHTS, compressed, net, outputs
from vanishing import (
    Binary,
    BlockCompressor,
    Compressor,
    FileError,
    LowRank,
    MagnitudePruning,
    Recipe,
    Replace,
    prepare,
)
from vanishing.layers import Factored, factor
from vanishing.serialization import load, save


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    save(net(), tmp_path / "small")
    assert json.loads((tmp_path / "small" / MANIFEST).read_text())["ties"] == {"head.weight": "embedding.weight"}
    with safe_open(tmp_path / "small" / WEIGHTS, framework="pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118


def test_a_tie_of_the_file_that_the_model_does_not_have_gives_both_the_values(tmp_path: Path) -> None:
    save(net(), tmp_path / "small")
    untied = net(seed=5)
    untied.head.weight = nn.Parameter(torch.randn(30, 64))
    loaded = load(tmp_path / "small", untied)
    assert torch.equal(loaded.get_parameter("head.weight"), loaded.get_parameter("embedding.weight"))
    assert loaded.get_parameter("head.weight") is not loaded.get_parameter("embedding.weight")


def test_a_tie_of_the_model_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    untied = net()
    untied.head.weight = nn.Parameter(torch.randn(30, 64))
    save(untied, tmp_path / "small")
    with pytest.raises(
        FileError, match=r"'head.weight' and 'embedding.weight' are one tensor in the model, two in the file"
    ):
        load(tmp_path / "small", net())


class Twice(nn.Module):
    """One layer that is used under two names, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList([self.first, nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, *self.blocks):
            x = torch.tanh(block(x))
        return x


@pytest.mark.parametrize("compressor", [LowRank(rank=2), Binary(), MagnitudePruning(sparsity=0.5)])
def test_a_layer_under_two_names_stays_one(compressor: Compressor, tmp_path: Path) -> None:
    model = Twice()
    prepare(model, Recipe({"first": compressor}, schedule=NOW)).finish()
    save(model, tmp_path / "small")
    loaded: Any = load(tmp_path / "small", Twice())
    assert loaded.first is loaded.blocks[0] and loaded.first is not loaded.blocks[1]
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model(x))


def test_factored_layers_are_found_without_a_receipt(tmp_path: Path) -> None:
    model = net()
    model.first = factor(model.first, 3)  # type: ignore[assignment]
    for parameter in model.first.parameters():
        nn.init.normal_(parameter)
    save(model, tmp_path / "small")
    loaded = load(tmp_path / "small", net(seed=5))
    assert isinstance(loaded.get_submodule("first"), Factored)
    assert torch.equal(outputs(loaded), outputs(model))


def smaller(block: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 128))


def test_a_replaced_block_is_made_anew_by_its_factory(tmp_path: Path) -> None:
    model = compressed(Recipe({"first": Replace(smaller)}, schedule=NOW))
    save(model, tmp_path / "small")
    fresh = net(seed=5)
    loaded = load(tmp_path / "small", fresh)
    assert torch.equal(outputs(loaded), outputs(model))
    assert isinstance(fresh.get_submodule("first"), nn.Sequential)


@dataclass(frozen=True)
class Narrow(BlockCompressor):
    width: int = 8

    def build(self, block: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(64, self.width), nn.Linear(self.width, 128))


def test_a_block_technique_of_the_users_own_makes_its_block_anew(tmp_path: Path) -> None:
    model = compressed(Recipe({"first": Narrow(width=5)}, schedule=NOW))
    save(model, tmp_path / "small")
    assert torch.equal(outputs(load(tmp_path / "small", net(seed=5))), outputs(model))


def test_a_block_that_was_replaced_and_then_compressed_is_rebuilt_in_that_order(tmp_path: Path) -> None:
    model = compressed(Recipe({"first": Replace(smaller)}, schedule=NOW))
    model = compressed(Recipe({"first.2": LowRank(rank=3), "second": Binary()}, schedule=NOW), model)
    save(model, tmp_path / "small")
    loaded = load(tmp_path / "small", net(seed=5))
    assert isinstance(loaded.get_submodule("first.2"), Factored)
    assert torch.equal(outputs(loaded), outputs(model))


def test_an_unknown_factory_is_named_with_the_block_and_what_to_do(tmp_path: Path) -> None:
    model = compressed(Recipe({"first": Replace(smaller, name="gone")}, schedule=NOW))
    save(model, tmp_path / "small")
    from vanishing.compressors import replace as module

    fresh = net(seed=5)
    before = outputs(fresh)
    factory = module._FACTORIES.pop("gone")
    try:
        with pytest.raises(
            FileError, match=r"the replaced module 'first' cannot be rebuilt: .*'gone'.*make vanishing.Replace"
        ):
            load(tmp_path / "small", fresh)
    finally:
        module._FACTORIES["gone"] = factory
    assert torch.equal(outputs(fresh), before)
    assert isinstance(fresh.first, nn.Linear)


def test_a_factory_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = compressed(Recipe({"first": LowRank(rank=4), "second": Replace(breaks, name="breaks")}, schedule=NOW))
    save(model, tmp_path / "small")
    fresh = net(seed=5)
    before, modules = outputs(fresh), list(fresh.modules())
    broken.append(True)
    try:
        with pytest.raises(ZeroDivisionError):
            load(tmp_path / "small", fresh)
    finally:
        broken.clear()
    assert list(fresh.modules()) == modules
    assert torch.equal(outputs(fresh), before)


broken: list[bool] = []


def breaks(block: nn.Module) -> nn.Module:
    if broken:
        raise ZeroDivisionError
    return nn.Linear(128, 64)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_and_requires_grad_stay(training: bool, tmp_path: Path) -> None:
    save(compressed(LowRank(rank=4)), tmp_path / "small")
    fresh = net(seed=5).train(training)
    fresh.norm.weight.requires_grad = False
    load(tmp_path / "small", fresh)
    assert {module.training for module in fresh.modules()} == {training}
    assert not fresh.norm.weight.requires_grad and fresh.norm.bias.requires_grad


def test_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    save(compressed(Binary()), tmp_path / "small")
    fresh = net(seed=5)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    load(tmp_path / "small", fresh)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in fresh.parameters()]


def test_a_module_that_is_the_model_itself(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    prepare(model, Recipe({"": MagnitudePruning(sparsity=0.9)}, schedule=NOW)).finish()
    save(model, tmp_path / "small")
    loaded = load(tmp_path / "small", nn.Linear(64, 64))
    assert torch.equal(loaded.get_parameter("weight"), model.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m, "first", nn.Linear(64, 100)),
            r"'first.weight' has shape \[128, 64\] in the file and \[100",
        ),
        (lambda m: setattr(m, "extra", nn.Linear(2, 2)), "'extra.bias' is not in the file; 'extra.weight' is not"),
        (lambda m: delattr(m, "second"), "'second.bias' is not in the model"),
        (
            lambda m: m.norm.register_buffer("num_batches_tracked", torch.tensor(0.0)),
            "is int64 in the file and float32",
        ),
        (lambda m: m.to("meta"), "is on the meta device"),
    ],
)
def test_a_model_that_the_file_does_not_fit_is_untouched(
    change: Callable[[nn.Module], Any], message: str, tmp_path: Path
) -> None:
    save(compressed(Recipe({"head": Binary(), "embedding": Binary()}, schedule=NOW)), tmp_path / "small")
    fresh = net(seed=5)
    change(fresh)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(FileError, match=message):
        load(tmp_path / "small", fresh)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items() if not tensor.is_meta)


def test_structure_is_put_back_when_the_weights_do_not_fit(tmp_path: Path) -> None:
    save(compressed(LowRank(rank=4)), tmp_path / "small")
    fresh = net(seed=5)
    fresh.extra = nn.Linear(2, 2)
    hooks = fresh.first.register_forward_hook(lambda *_: None)
    modules = list(fresh.named_modules())
    with pytest.raises(FileError, match=r"Build the original architecture"):
        load(tmp_path / "small", fresh)
    assert list(fresh.named_modules()) == modules
    assert hooks.id in fresh.first._forward_hooks


def test_a_module_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    save(compressed(LowRank(rank=4)), tmp_path / "small")
    with pytest.raises(FileError, match=r"has a module 'convolution' and the model has none"):
        load(tmp_path / "small", nn.Linear(2, 2))


def test_a_model_that_was_compressed_before_is_not_loaded_into(tmp_path: Path) -> None:
    model = compressed(LowRank(rank=4))
    save(model, tmp_path / "small")
    with pytest.raises(FileError, match=r"the model was compressed before. Build the original architecture anew"):
        load(tmp_path / "small", model)


def test_loading_imports_nothing_and_leaves_the_files_unused(tmp_path: Path) -> None:
    save(compressed(MagnitudePruning(sparsity=0.9)), tmp_path / "small")
    fresh = net(seed=5)
    before = set(sys.modules)
    load(tmp_path / "small", fresh)
    assert set(sys.modules) == before
    expected = outputs(fresh)
    for file in (tmp_path / "small").iterdir():
        file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(outputs(fresh), expected)
