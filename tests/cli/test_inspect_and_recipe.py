"""`vanishing inspect` and `vanishing recipe`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from typer.testing import CliRunner

import vanishing
from tiny_models import write_bert, write_llama, write_vit
from vanishing import Recipe
from vanishing.cli import app
from vanishing.config import Config

RUNNER = CliRunner()
LABELS = ["food", "music", "sport"]


def invoke(*arguments: object) -> str:
    result = RUNNER.invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_inspect_counts_what_is_there(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert", LABELS)
    model = transformers.BertForSequenceClassification.from_pretrained(bert)
    found = json.loads(invoke("inspect", bert, "--json"))
    assert found["before"]["parameters"] == sum(p.numel() for p in model.parameters())
    rows = {row["name"]: row for row in found["layers"]}
    assert rows["bert.encoder.layer.0.attention.self.query"]["could"] == [
        "prune",
        "quantize",
        "activations",
        "low rank",
        "heads",
    ]
    assert rows["bert.embeddings.LayerNorm"]["could"] == []
    printed = invoke("inspect", bert)
    assert f"{found['before']['parameters']:,} parameters" in printed
    assert "an embedding is compressed only if" in printed


def test_inspect_a_compressed_model(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert", LABELS)
    model = transformers.BertForSequenceClassification.from_pretrained(bert)
    dense = sum(p.nbytes for p in model.parameters())
    recipe = Recipe({"*layer.0*": vanishing.Quantization(bits=4)}, schedule=vanishing.StepSchedule(at=0))
    vanishing.save(vanishing.prepare(model, recipe).finish(), tmp_path / "small")
    found = json.loads(invoke("inspect", tmp_path / "small", "--json"))
    assert found["after"]["bytes"] < found["before"]["bytes"] == pytest.approx(dense, rel=0.03)
    techniques = {row["name"]: row["technique"] for row in found["layers"]}
    assert techniques["bert.encoder.layer.0.output.dense"] == "Quantization(bits=4)"
    assert techniques["bert.encoder.layer.1.output.dense"] == ""
    assert "Before it was compressed" in invoke("inspect", tmp_path / "small")


def base_bert(folder: Path) -> Path:
    return write_bert(folder)


def bert_with_head(folder: Path) -> Path:
    return write_bert(folder, LABELS)


@pytest.mark.parametrize("write", [base_bert, bert_with_head, write_llama, write_vit])
def test_a_recipe_fits_the_model_that_it_was_made_for(tmp_path: Path, write: Any) -> None:
    folder = write(tmp_path / "model")
    text = invoke("recipe", folder)
    recipe = Recipe.from_yaml(text)
    config = transformers.AutoConfig.from_pretrained(folder)
    model: Any = getattr(transformers, config.architectures[0]).from_pretrained(folder)
    plan = recipe.match(model)
    assert plan.problems == []
    everything = Recipe({"*": vanishing.Binary()}, schedule=recipe.schedule).match(model)
    heads = {"classifier", "lm_head"}
    assert {w.names[0] for w in plan.weights} == {w.names[0] for w in everything.weights} - heads
    # Layers that differ in a number share a rule.
    assert len(recipe.rules) <= len(plan.weights) / 2 + 2


def test_a_recipe_for_a_body_fits_a_model_with_a_head(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(invoke("recipe", write_bert(tmp_path / "bert")))
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "bert")
    assert recipe.match(model).problems == []


def test_every_technique_in_the_comments_can_be_used(tmp_path: Path) -> None:
    text = invoke("recipe", write_bert(tmp_path / "bert", LABELS))
    shown = [each for line in text.splitlines() if line.startswith("#") for each in re.findall(r"\{kind.*?\}+", line)]
    assert len(shown) >= 5
    for each in shown:
        # A technique or a granularity.
        Config.from_dict(yaml.safe_load(each))


def test_a_recipe_goes_into_a_new_file_only(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert", LABELS)
    file = tmp_path / "recipe.yaml"
    assert f"--recipe {file}" in invoke("recipe", bert, "--output", file).replace("\n", "")
    before = file.read_text()
    result = RUNNER.invoke(app, ["recipe", str(bert), "--output", str(file)])
    assert result.exit_code == 2
    assert "exists" in result.stderr
    assert file.read_text() == before


@pytest.mark.parametrize("command", ["inspect", "recipe"])
def test_what_is_no_model_is_said_in_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    for given, said in (("empty", "has no config.json"), ("nothing", "there is no folder")):
        result = RUNNER.invoke(app, [command, str(tmp_path / given)])
        assert result.exit_code == 2
        assert result.stdout == ""
        assert len(result.stderr.strip().splitlines()) == 1
        assert said in result.stderr
