"""Saving and loading real finished models: same outputs, small files, ties, and folders that are whole or not there."""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from vanishing import (
    Binary,
    BlockCompressor,
    Compressor,
    FileError,
    LowRank,
    MagnitudePruning,
    PerGroup,
    ProjectionCompressor,
    Quantization,
    Recipe,
    Replace,
    StepSchedule,
    Ternary,
    TransitionError,
    prepare,
)
from vanishing.layers import Factored, factor
from vanishing.receipt import Receipt, attach_receipt, read_receipt
from vanishing.serialization import load, save

WEIGHTS, MANIFEST = "model.safetensors", "vanishing.json"
NOW = StepSchedule(at=0)


class Net(nn.Module):
    """A convolution, a norm with buffers, two linears and a tied pair."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.embedding = nn.Embedding(30, width)
        self.head = nn.Linear(width, 30, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("places", torch.arange(5.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(x)).mean(-1)
        x = self.second(torch.relu(self.first(x))) + self.embedding(torch.zeros(len(x), dtype=torch.int64))
        output: Tensor = self.head(x)
        return output


def net(seed: int = 0, width: int = 64) -> Net:
    torch.manual_seed(seed)
    return Net(width)


def batch() -> Tensor:
    return torch.randn(8, 4, 10, generator=torch.Generator().manual_seed(1))


def compressed(recipe: Recipe | Compressor, model: nn.Module | None = None, steps: int = 3) -> Any:
    """A model that was trained for a few steps in transition and finished."""
    model = net() if model is None else model
    if isinstance(recipe, Compressor):
        recipe = Recipe({"*first": recipe, "*second": recipe, "*convolution": recipe}, schedule=NOW)
    transition = prepare(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        transition.step()
    return transition.finish().eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result = model.eval()(batch())
    assert isinstance(result, Tensor)
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def encodings(folder: Path) -> dict[str, str]:
    return {n: entry["encoding"] for n, entry in json.loads((folder / MANIFEST).read_text())["tensors"].items()}


def stored_bytes(folder: Path, tensor: str) -> int:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        parts = [file.get_tensor(k) for k in file.keys() if k == tensor or k.startswith(f"{tensor}.")]  # noqa: SIM118
    return sum(part.nbytes for part in parts)


COMPRESSORS = {
    "pruning": MagnitudePruning(sparsity=0.9),
    "binary": Binary(),
    "ternary": Ternary(),
    "8 bits": Quantization(bits=8),
    "3 bits, asymmetric": Quantization(bits=3, symmetric=False),
    "4 bits in groups": Quantization(bits=4, granularity=PerGroup(64)),
    "5 bits in ragged groups": Quantization(bits=5, granularity=PerGroup(48), symmetric=False),
    "low rank": LowRank(rank=4),
    "pruning | 4 bits": MagnitudePruning(sparsity=0.7) | Quantization(bits=4),
    "pruning | binary": MagnitudePruning(sparsity=0.7) | Binary(),
    "low rank | 4 bits": LowRank(rank=12) | Quantization(bits=4),
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_loaded_model_computes_what_the_finished_one_did(name: str, tmp_path: Path) -> None:
    model = compressed(COMPRESSORS[name])
    expected = outputs(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    save(model, tmp_path / "small")
    fresh = net(seed=5)
    loaded = load(tmp_path / "small", fresh)
    assert loaded is fresh
    assert torch.equal(outputs(loaded), expected)
    assert loaded.state_dict().keys() == state.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]) and tensor.dtype == state[key].dtype, key
    assert loaded.get_parameter("head.weight") is loaded.get_parameter("embedding.weight")


@pytest.mark.parametrize("name", COMPRESSORS)
def test_saving_again_or_after_loading_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    model = compressed(COMPRESSORS[name])
    save(model, tmp_path / "one")
    save(model, tmp_path / "two")
    save(load(tmp_path / "one", net(seed=5)), tmp_path / "three")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


@pytest.mark.parametrize(
    ("name", "encoding", "share"),
    [("pruning", "sparse", 0.14), ("binary", "packed", 0.035), ("4 bits in groups", "packed", 0.14)],
)
def test_compressed_weights_take_their_share_of_dense_float32(
    name: str, encoding: str, share: float, tmp_path: Path
) -> None:
    model = compressed(COMPRESSORS[name], net(width=384))
    save(model, tmp_path / "small")
    assert encodings(tmp_path / "small")["first.weight"] == encoding
    assert stored_bytes(tmp_path / "small", "first.weight") <= share * model.first.weight.nbytes


def test_low_rank_takes_its_factors_and_one_percent(tmp_path: Path) -> None:
    model = compressed(LowRank(rank=16), net(width=768))
    save(model, tmp_path / "small")
    factors = sum(p.nbytes for n, p in model.named_parameters() if n != "embedding.weight")
    shipped = sum(p.stat().st_size for p in (tmp_path / "small").iterdir()) - model.embedding.weight.nbytes
    assert shipped <= 1.01 * factors + 8_000
    assert stored_bytes(tmp_path / "small", "first.0.weight") == model.first[0].weight.nbytes


def test_the_file_holds_no_original_weight(tmp_path: Path) -> None:
    original = net()
    model = compressed(LowRank(rank=4), copy.deepcopy(original), steps=0)
    save(model, tmp_path / "small")
    everything = (tmp_path / "small" / WEIGHTS).read_bytes()
    assert original.first.weight.detach()[0, :8].numpy().tobytes() not in everything
    assert original.norm.weight.detach().numpy().tobytes() in everything


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["4 bits in groups", "binary", "pruning", "low rank | 4 bits"])
def test_a_model_that_was_cast_after_finish_is_still_small_and_exact(
    name: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = compressed(COMPRESSORS[name]).to(dtype)
    save(model, tmp_path / "small")
    assert not caplog.records
    loaded = load(tmp_path / "small", net(seed=5))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        got = loaded.state_dict()[key]
        assert torch.equal(got, tensor) and got.dtype == tensor.dtype, key
    assert loaded.get_buffer("places").dtype == dtype
    x = batch().to(dtype)
    assert torch.equal(loaded.eval()(x), model(x))


def test_weights_that_changed_since_finish_are_stored_in_full_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = compressed(Quantization(bits=4))
    with torch.no_grad():
        model.first.weight[0, 0] += 0.01
    save(model, tmp_path / "small")
    assert encodings(tmp_path / "small")["first.weight"] != "packed"
    assert encodings(tmp_path / "small")["second.weight"] == "packed"
    (record,) = caplog.records
    assert record.name == "vanishing.serialization"
    assert record.getMessage().startswith("first.weight: its weights changed since finish")
    assert torch.equal(outputs(load(tmp_path / "small", net(seed=5))), outputs(model))


def test_a_model_that_was_never_compressed_is_saved_too(tmp_path: Path) -> None:
    model = net()
    save(model, tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / MANIFEST).read_text())["recipe"] is None
    loaded = load(tmp_path / "dense", net(seed=5))
    assert torch.equal(outputs(loaded), outputs(model))
    assert read_receipt(loaded) is None


def test_the_receipt_comes_back(tmp_path: Path) -> None:
    recipe = Recipe(
        {"first": LowRank(rank=4) | Quantization(bits=4), "second": MagnitudePruning(sparsity=0.9), "head": Binary()},
        schedule=NOW,
    )
    model = compressed(recipe)
    save(model, tmp_path / "small")
    before, after = read_receipt(model), read_receipt(load(tmp_path / "small", net(seed=5)))
    assert before is not None and after is not None
    assert after.recipe == recipe
    assert after.layers.keys() == before.layers.keys()
    for name, layer in before.layers.items():
        again = after.layers[name]
        assert (again.compressor, again.structure) == (layer.compressor, layer.structure)
        assert (again.parameters_before, again.bytes_before) == (layer.parameters_before, layer.bytes_before)
        assert again.grids.keys() == layer.grids.keys()
        assert all(torch.equal(again.grids[key].scale, grid.scale) for key, grid in layer.grids.items())


# Transition, folders, atomicity


@pytest.mark.parametrize("compressor", [MagnitudePruning(sparsity=0.5), LowRank(rank=2), "replace"])
def test_a_model_in_transition_is_refused(compressor: Any, tmp_path: Path) -> None:
    compressor = Replace(smaller) if compressor == "replace" else compressor
    model = net()
    transition = prepare(model, Recipe({"first": compressor}, schedule=NOW))
    with pytest.raises(
        TransitionError, match=r"'first' is still in transition, call transition.finish\(\) before save"
    ):
        save(model, tmp_path / "small")
    assert not list(tmp_path.iterdir())
    transition.finish()
    save(model, tmp_path / "small")


def test_an_old_model_is_replaced_and_the_users_files_stay(tmp_path: Path) -> None:
    small = tmp_path / "small"
    save(compressed(Binary()), small)
    (small / "notes.md").write_text("mine")
    (small / "runs").mkdir()
    (small / "runs" / "log.txt").write_text("mine too")
    small.chmod(0o750)
    model = compressed(LowRank(rank=4))
    save(model, small)
    assert (small / "notes.md").read_text() == "mine"
    assert (small / "runs" / "log.txt").read_text() == "mine too"
    assert small.stat().st_mode & 0o777 == 0o750
    assert torch.equal(outputs(load(small, net(seed=5))), outputs(model))
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_model_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    save(net(), tmp_path / "small")
    (tmp_path / "small" / MANIFEST).write_bytes(b'{"format": "van')
    save(net(), tmp_path / "small")
    load(tmp_path / "small", net(seed=5))


def test_new_parents_are_made_and_an_empty_folder_is_filled(tmp_path: Path) -> None:
    save(net(), tmp_path / "a" / "b" / "c")
    (tmp_path / "empty").mkdir()
    save(net(), str(tmp_path / "empty"))
    assert contents(tmp_path / "a" / "b" / "c") == contents(tmp_path / "empty")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    save(compressed(Binary()), tmp_path / "run-1")
    (tmp_path / "latest").symlink_to("run-1")
    save(net(), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert torch.equal(outputs(load(tmp_path / "run-1", net(seed=5))), outputs(net()))


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileError, match="thesis holds files and no saved model. Give a new or an empty folder"):
        save(net(), tmp_path / "thesis")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(FileError, match="file is a file. Give the name of a new folder"):
        save(net(), tmp_path / "file")
    assert contents(tmp_path) == {"thesis/chapter.tex": b"years of work", "file": b"a file"}


def test_the_current_folder_is_not_exchanged_under_the_users_feet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match="is the current folder"):
        save(net(), ".")
    save(net(), "below")
    load("below", net())


def test_a_users_file_with_a_name_that_save_needs_is_not_lost(tmp_path: Path) -> None:
    save(net(), tmp_path / "small")
    (tmp_path / "small" / "config.json").write_text("mine")
    with pytest.raises(FileError, match=r"config.json is not a file of the saved model there.*Move it away"):
        save(bert(), tmp_path / "small")
    assert (tmp_path / "small" / "config.json").read_text() == "mine"
    load(tmp_path / "small", net())


@pytest.mark.parametrize("where", ["save_file", "write_manifest", "fsync", "second rename", "interrupt"])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(compressed(Binary()), tmp_path / "small")
    before = contents(tmp_path)
    error: BaseException = KeyboardInterrupt() if where == "interrupt" else OSError(28, "No space left on device")

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise error

    rename = Path.rename
    failed: list[Path] = []

    def rename_that_fails_once(self: Path, target: Path) -> Path:
        if target.name == "small" and not failed:
            failed.append(target)
            raise error
        return rename(self, target)

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif where == "second rename":
        monkeypatch.setattr(Path, "rename", rename_that_fails_once)
    else:
        monkeypatch.setattr(f"vanishing.serialization.{'save_file' if where == 'interrupt' else where}", fail)
    with pytest.raises(type(error) if where == "interrupt" else FileError):
        save(net(), tmp_path / "small")
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_model(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "600k"):
        save(compressed(Binary()), tmp_path / "disk" / "small")
        before = contents(tmp_path / "disk")
        with pytest.raises(FileError, match="could not be written: .*No space left on device.*free some space"):
            save(net(width=400), tmp_path / "disk" / "small")
        assert contents(tmp_path / "disk") == before
        load(tmp_path / "disk" / "small", net(seed=5))


# Ties, structure, types


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
        FileError, match="'head.weight' and 'embedding.weight' are one tensor in the model, two in the file"
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


def test_memory_that_is_shared_in_part_is_stored_apart(tmp_path: Path) -> None:
    memory = torch.randn(10, 4)
    model, fresh = nn.Linear(4, 6), nn.Linear(4, 6)
    model.weight = nn.Parameter(memory[:6])
    model.bias = nn.Parameter(memory.view(-1)[:6])
    save(model, tmp_path / "small")
    load(tmp_path / "small", fresh)
    assert torch.equal(fresh.weight, model.weight) and torch.equal(fresh.bias, model.bias)


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


@dataclass(frozen=True)
class Rounded(ProjectionCompressor):
    """A technique of a user's own."""

    digits: int = 2

    def project(self, matrix: Tensor, strength: float) -> Tensor:
        return matrix.mul(10**self.digits).round_().div_(10**self.digits)


def test_a_weight_technique_of_the_users_own_is_not_needed_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = compressed(Recipe({"first": Rounded(), "second": LowRank(rank=4)}, schedule=NOW))
    save(model, tmp_path / "small")
    receipt = read_receipt(load(tmp_path / "small", net(seed=5)))
    assert receipt is not None and receipt.layers["first"].compressor == Rounded()
    monkeypatch.delitem(sys.modules["vanishing.config"]._KINDS, "rounded")
    loaded = load(tmp_path / "small", net(seed=5))
    assert torch.equal(outputs(loaded), outputs(model))
    receipt = read_receipt(loaded)
    assert receipt is not None and list(receipt.layers) == ["second"]
    assert "the technique of 'first' is left out of the loaded model's receipt: 'rounded' is not a known" in caplog.text
    save(loaded, tmp_path / "again")
    assert torch.equal(outputs(load(tmp_path / "again", net(seed=5))), outputs(model))


def test_a_recipe_with_a_predicate_is_left_out_and_the_layers_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = compressed(Recipe({(lambda name, module: name == "first"): LowRank(rank=4)}, schedule=NOW))
    save(model, tmp_path / "small")
    loaded = load(tmp_path / "small", net(seed=5))
    receipt = read_receipt(loaded)
    assert receipt is not None and list(receipt.layers) == ["first"]
    assert "the recipe is left out" in caplog.text
    save(loaded, tmp_path / "again")
    assert (tmp_path / "small" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()


def test_a_layer_that_the_user_took_out_after_finish_is_not_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = compressed(LowRank(rank=4))
    model.first = nn.Identity()
    model.second = nn.Linear(64, 64)
    save(model, tmp_path / "small")
    assert "first: is not the layer that finish left there" in caplog.text
    fresh = net(seed=5)
    fresh.first, fresh.second = nn.Identity(), nn.Linear(64, 64)  # type: ignore[assignment]
    assert torch.equal(outputs(load(tmp_path / "small", fresh)), outputs(model))


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


# What does not fit, is too new, or is not there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "first", nn.Linear(64, 100)), r"'first.weight' has shape \[128, 64\] in the file and \[100, 64\]"),
        (lambda m: setattr(m, "extra", nn.Linear(2, 2)), "'extra.bias' is not in the file; 'extra.weight' is not in the file"),
        (lambda m: delattr(m, "second"), "'second.bias' is not in the model"),
        (lambda m: m.norm.register_buffer("num_batches_tracked", torch.tensor(0.0)), "is int64 in the file and float32 in the model"),
        (lambda m: m.to("meta"), "is on the meta device"),
    ],
)  # fmt: skip
def test_a_model_that_the_file_does_not_fit_is_untouched(
    change: Callable[[nn.Module], Any], message: str, tmp_path: Path
) -> None:
    save(compressed(Recipe({"head": Binary()}, schedule=NOW)), tmp_path / "small")
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
    with pytest.raises(FileError, match="has a module 'convolution' and the model has none"):
        load(tmp_path / "small", nn.Linear(2, 2))


def test_a_model_that_was_compressed_before_is_not_loaded_into(tmp_path: Path) -> None:
    model = compressed(LowRank(rank=4))
    save(model, tmp_path / "small")
    with pytest.raises(FileError, match="the model was compressed before. Build the original architecture anew"):
        load(tmp_path / "small", model)


def test_a_missing_folder_a_wrong_folder_and_a_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"absent is not a folder"):
        load(tmp_path / "absent", net())
    with pytest.raises(FileError, match=r"has no vanishing.json"):
        load(tmp_path, net())
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match=r"file is not a folder"):
        load(tmp_path / "file", net())
    with pytest.raises(TypeError, match="load takes the model as an nn.Module, got str"):
        load(tmp_path, "model")  # type: ignore[arg-type]


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    save(net(), tmp_path / "small")
    manifest = tmp_path / "small" / MANIFEST
    data = json.loads(manifest.read_text()) | {"format_version": 2, "novelty": {}}
    manifest.write_text(json.dumps(data))
    with pytest.raises(FileError, match=r"written by a newer vanishing \(format 2, this one reads 1\). Upgrade"):
        load(tmp_path / "small", net())


def test_a_model_that_is_not_of_transformers_cannot_be_built_from_the_folder(tmp_path: Path) -> None:
    save(net(), tmp_path / "small")
    with pytest.raises(FileError, match=r"does not say how the model is built.*vanishing.load\(path, model\)"):
        load(tmp_path / "small")


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: nn.Linear(3, 3, device="meta"), lambda: Extra()])
def test_what_is_no_plain_tensor_is_not_saved(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(FileError, match="only plain tensors can be saved"):
        save(make(), tmp_path / "small")
    assert not list(tmp_path.iterdir())


class Extra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}


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


# Models of transformers


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 60,
    }
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **changes)).eval()


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 60,
    }
    config = transformers.LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval()


def logits(model: Any) -> Tensor:
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result


def finished(model: Any, compressor: Compressor) -> Any:
    return prepare(model, Recipe({"*layer*": compressor}, schedule=NOW)).finish()


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("name", ["pruning", "4 bits in groups", "low rank"])
def test_a_model_of_transformers_is_rebuilt_from_the_folder_alone(
    make: Callable[[], Any], name: str, tmp_path: Path
) -> None:
    model = finished(make(), COMPRESSORS[name])
    save(model, tmp_path / "small")
    assert (tmp_path / "small" / "config.json").is_file()
    loaded: Any = load(tmp_path / "small")
    assert type(loaded) is type(model)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(logits(loaded), logits(model))
    expected = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    assert loaded.config.to_dict() | {"_name_or_path": ""} == expected
    save(loaded, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "small")


@pytest.mark.parametrize("make", [bert, llama])
def test_a_model_of_transformers_that_was_cast_comes_back_in_its_type(make: Callable[[], Any], tmp_path: Path) -> None:
    model = finished(make(), Quantization(bits=4)).to(torch.bfloat16)
    save(model, tmp_path / "small")
    loaded: Any = load(tmp_path / "small")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_generation_settings_come_along(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path / "small")
    loaded: Any = load(tmp_path / "small")
    assert loaded.generation_config.max_new_tokens == 7
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(loaded.generate(ids, do_sample=False), model.generate(ids, do_sample=False))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[UNK]", "small", "is", "beautiful"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def test_a_tokenizer_goes_along_and_stays_through_loading_and_saving(tmp_path: Path) -> None:
    save(bert(), tmp_path / "one", tokenizer=tokenizer())
    save(load(tmp_path / "one"), tmp_path / "two")
    save(load(tmp_path / "two"), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "two")
    assert again("small is beautiful")["input_ids"] == [1, 2, 3]


def test_a_tokenizer_in_the_folder_that_the_model_came_from_is_copied(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    save(model, tmp_path / "small")
    base, small = contents(tmp_path / "base"), contents(tmp_path / "small")
    assert small["tokenizer.json"] == base["tokenizer.json"]
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    with pytest.raises(FileError, match=r"tokenizer.json has 2 bytes"):
        load(tmp_path / "small")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Net is not a model of transformers"):
        save(net(), tmp_path / "small", tokenizer=tokenizer())


def test_a_class_that_transformers_does_not_have_needs_the_model(tmp_path: Path) -> None:
    class Mine(transformers.BertForSequenceClassification):  # type: ignore[misc]
        pass

    model = Mine(bert().config).eval()
    save(model, tmp_path / "small")
    with pytest.raises(FileError, match=r"names the architecture 'Mine'.*vanishing.load\(path, model\)"):
        load(tmp_path / "small")
    assert torch.equal(logits(load(tmp_path / "small", Mine(bert().config).eval())), logits(model))


def reseal(folder: Path, config: dict[str, Any]) -> None:
    """Forge a folder: another configuration under fresh digests and a fresh seal."""
    from safetensors.torch import load_file, save_file

    from vanishing.manifest import read_manifest, seal, write_manifest
    from vanishing.stored import file_entry

    _, data = read_manifest(folder)
    (folder / "config.json").write_text(json.dumps(config))
    data["files"]["config.json"] = file_entry(folder / "config.json").model_dump()
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"vanishing": seal(data)})
    data["files"][WEIGHTS] = file_entry(folder / WEIGHTS).model_dump()
    write_manifest(folder, {key: value for key, value in data.items() if key != "digest"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 is far beyond the weights"),
        ({"num_hidden_layers": 10**6}, "describes a model that is far larger than the weights in the file"),
        ({"vocab_size": 10**12}, "vocab_size = 1000000000000 is far beyond"),
        ({"intermediate_size": 10**6}, "describes a model that is far larger|has shape"),
        ({"num_labels": 10**9}, "num_labels = 1000000000 is far beyond"),
        ({"hidden_size": -1}, "cannot build BertForSequenceClassification"),
        ({"hidden_size": "big"}, "cannot build BertForSequenceClassification"),
        ({"num_attention_heads": 0}, "cannot build BertForSequenceClassification"),
        ({"hidden_act": "no such"}, "cannot build BertForSequenceClassification"),
        ({"vocab_size": 61}, r"has shape \[60, 32\] in the file and \[61, 32\] in the model"),
        ({"_attn_implementation": "someone/kernel"}, "sets '_attn_implementation', which a file may not"),
        ({"attn_implementation": {"": "someone/kernel"}}, "sets 'attn_implementation', which a file may not"),
        ({"architectures": ["os"]}, "names the architecture 'os'"),
        ({"architectures": ["PreTrainedModel"]}, "is of the model type 'bert'"),
        ({"architectures": ["../x"]}, "names the architecture '../x'"),
        ({"architectures": []}, "names the architecture None"),
        ({"architectures": ["LlamaForCausalLM"]}, "is of the model type 'bert'; LlamaForCausalLM needs 'llama'"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, None),
    ],
)  # fmt: skip
def test_a_configuration_that_asks_for_too_much_is_refused(
    change: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    model = bert()
    save(model, tmp_path / "small")
    reseal(tmp_path / "small", json.loads((tmp_path / "small" / "config.json").read_text()) | change)
    if message is None:
        assert torch.equal(logits(load(tmp_path / "small")), logits(model))
        return
    with pytest.raises(FileError, match=message):
        load(tmp_path / "small")


def test_a_replaced_block_in_a_model_of_transformers(tmp_path: Path) -> None:
    model = bert()
    prepare(model, Recipe({"*.0.intermediate": Replace(narrow)}, schedule=NOW)).finish()
    save(model, tmp_path / "small")
    assert torch.equal(logits(load(tmp_path / "small")), logits(model))


def narrow(block: nn.Module) -> nn.Module:
    scale = float(next(block.parameters()).detach().abs().max())
    return nn.Sequential(nn.Linear(32, 3), nn.Linear(3, 64), nn.Softplus(beta=2 if scale else 1))


def test_a_receipt_does_not_need_a_recipe_to_be_saved(tmp_path: Path) -> None:
    model = net()
    attach_receipt(model, Receipt(recipe=Recipe({"first": Binary()}, schedule=NOW), layers={}))
    save(model, tmp_path / "small")
    receipt = read_receipt(load(tmp_path / "small", net(seed=5)))
    assert receipt is not None and receipt.layers == {}
