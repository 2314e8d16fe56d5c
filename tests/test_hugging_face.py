"""Models of transformers come back from their folder alone, and a configuration cannot ask for more than that."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from saved_models import COMPRESSORS, NOW, WEIGHTS, bert, contents, logits, net
from vanishing import Compressor, FileError, Quantization, Recipe, Replace, prepare
from vanishing.serialization import load, save


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


def test_a_file_beside_a_saved_model_that_is_not_a_part_of_it_is_not_copied(tmp_path: Path) -> None:
    model = bert()
    save(model, tmp_path / "one", tokenizer=tokenizer())
    (tmp_path / "secret").write_text("key")
    (tmp_path / "one" / "vocab.txt").symlink_to(tmp_path / "secret")
    save(load(tmp_path / "one"), tmp_path / "two")
    assert "vocab.txt" not in contents(tmp_path / "two")
    assert contents(tmp_path / "two")["tokenizer.json"] == contents(tmp_path / "one")["tokenizer.json"]


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
        ({"rope_theta": 10**9}, None),
        ({"backbone": "hf-hub:someone/weights"}, "has backbone = 'hf-hub:someone/weights', by which a part"),
        ({"backbone": None, "use_pretrained_backbone": True}, "has use_pretrained_backbone = True, by which a part"),
        ({"vision_config": {"model_type": "timm_wrapper"}}, "has model_type = 'timm_wrapper', by which a part"),
        ({"text_config": {"checkpoint_path": "/some/file"}}, "has checkpoint_path = '/some/file', by which a part"),
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
