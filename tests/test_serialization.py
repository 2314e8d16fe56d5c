"""Saving and loading real finished models: same outputs, small files, receipts."""

import copy
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

from damage import manifest, write
from saved_models import COMPRESSORS, MANIFEST, NOW, WEIGHTS, batch, compressed, contents, net, outputs
from vanishing import (
    Binary,
    FileError,
    LowRank,
    MagnitudePruning,
    ProjectionCompressor,
    Quantization,
    Recipe,
    Replace,
    TransitionError,
    prepare,
)
from vanishing.receipt import Receipt, attach_receipt, read_receipt
from vanishing.serialization import load, save


def encodings(folder: Path) -> dict[str, str]:
    return {n: entry["encoding"] for n, entry in json.loads((folder / MANIFEST).read_text())["tensors"].items()}


def stored_bytes(folder: Path, tensor: str) -> int:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        parts = [file.get_tensor(k) for k in file.keys() if k == tensor or k.startswith(f"{tensor}.")]  # noqa: SIM118
    return sum(part.nbytes for part in parts)


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
    model = compressed(Recipe({"first": LowRank(rank=16), "second": LowRank(rank=16)}, schedule=NOW), net(width=768))
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


def test_the_files_can_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save(net(), tmp_path / "small")
    assert {file.stat().st_mode for file in (tmp_path / "small").iterdir()} == {(tmp_path / "plain").stat().st_mode}


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
        {
            "first": LowRank(rank=4) | Quantization(bits=4),
            "second": MagnitudePruning(sparsity=0.9),
            "convolution": Binary(),
        },
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


@pytest.mark.parametrize("compressor", [MagnitudePruning(sparsity=0.5), LowRank(rank=2), "replace"])
def test_a_model_in_transition_is_refused(compressor: Any, tmp_path: Path) -> None:
    compressor = Replace(lambda block: nn.Linear(64, 128), name="smaller") if compressor == "replace" else compressor
    model = net()
    transition = prepare(model, Recipe({"first": compressor}, schedule=NOW))
    with pytest.raises(
        TransitionError, match=r"'first' is still in transition, call transition.finish\(\) before save"
    ):
        save(model, tmp_path / "small")
    assert not list(tmp_path.iterdir())
    transition.finish()
    save(model, tmp_path / "small")


def test_a_receipt_does_not_need_a_recipe_to_be_saved(tmp_path: Path) -> None:
    model = net()
    attach_receipt(model, Receipt(recipe=Recipe({"first": Binary()}, schedule=NOW), layers={}))
    save(model, tmp_path / "small")
    receipt = read_receipt(load(tmp_path / "small", net(seed=5)))
    assert receipt is not None and receipt.layers == {}


def test_memory_that_is_shared_in_part_is_stored_apart(tmp_path: Path) -> None:
    memory = torch.randn(10, 4)
    model, fresh = nn.Linear(4, 6), nn.Linear(4, 6)
    model.weight = nn.Parameter(memory[:6])
    model.bias = nn.Parameter(memory.view(-1)[:6])
    save(model, tmp_path / "small")
    load(tmp_path / "small", fresh)
    assert torch.equal(fresh.weight, model.weight) and torch.equal(fresh.bias, model.bias)


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


def test_a_missing_folder_a_wrong_folder_and_a_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"absent is not a folder"):
        load(tmp_path / "absent", net())
    with pytest.raises(FileError, match=r"has no vanishing.json"):
        load(tmp_path, net())
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match=r"file is not a folder"):
        load(tmp_path / "file", net())
    with pytest.raises(TypeError, match=r"load takes the model as an nn.Module, got str"):
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


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: Extra()])
def test_what_is_no_plain_tensor_is_not_saved(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"only plain tensors can be saved"):
        save(make(), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_model_without_values_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"'weight' is on the meta device"):
        save(nn.Linear(3, 3, device="meta"), tmp_path / "small")
    assert not list(tmp_path.iterdir())


class Extra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}


def test_factors_of_any_rank_are_not_made_before_they_are_known_to_fit(tmp_path: Path) -> None:
    save(compressed(LowRank(rank=4)), tmp_path / "small")
    data = manifest(tmp_path / "small")
    data["modules"]["first"]["rank"] = 2**36
    data["tensors"]["first.0.weight"]["shape"] = [2**36, 0]
    write(tmp_path / "small", data, level="forged")
    model = net(seed=5)
    with pytest.raises(FileError):
        load(tmp_path / "small", model)


def test_a_recipe_that_cannot_be_read_does_not_stop_a_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = compressed(Binary())
    save(model, tmp_path / "small")
    data = manifest(tmp_path / "small")
    data["recipe"]["rules"][0]["match"] = {"kind": "regex", "pattern": "a{99999999999999999999}"}
    write(tmp_path / "small", data, level="forged")
    loaded = load(tmp_path / "small", net(seed=5))
    assert torch.equal(outputs(loaded), outputs(model))
    assert "is not a regular expression" in caplog.text
