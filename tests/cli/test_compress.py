"""`vanishing compress` on tiny models: a reader can measure again what it says; what goes wrong is one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import vanishing
from test_demo import Loads
from test_folder import small_disk
from tiny_models import sentences, write_bert, write_csv, write_images, write_llama, write_tagged, write_vit
from vanishing.cli import app
from vanishing.integrations.transformers import last_complete_checkpoint
from vanishing.layers import QuantizedInput

RUNNER = CliRunner()
LABELS = ["food", "music", "sport"]


def compress(*arguments: object) -> Result:
    return RUNNER.invoke(app, ["compress", *map(str, arguments)], env={"COLUMNS": "200"})


def outcome(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def one_line(result: Result, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """A BERT with a head for the labels, and a table."""
    return write_bert(tmp_path / "bert", LABELS), write_csv(tmp_path / "train.csv", sentences(120))


def settings(tmp_path: Path, *more: object) -> list[object]:
    return ["--output", tmp_path / "small", "--batch-size", 16, "--learning-rate", 5e-3, "--json", *more]


def test_a_text_classifier_with_a_new_head(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    train = write_csv(tmp_path / "train.csv", sentences(120))
    test = write_csv(tmp_path / "test.csv", sentences(40, seed=1))
    found = outcome(
        compress(bert, "--data", train, "--test-data", test, *settings(tmp_path, "--prune", 0.5, "--epochs", 4))
    )
    assert found["task"] == "text-classification"
    assert found["steps"] == 4 * 8
    assert found["fade_ends_at"] == 13
    assert found["original"]["accuracy"] > 0.6

    # What a reader can measure again, with transformers alone but for the loading.
    small: Any = vanishing.load(tmp_path / "small")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    rows = sentences(40, seed=1)
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    with torch.inference_mode():
        answers = [small.config.id2label[i] for i in small(**batch).logits.argmax(-1).tolist()]
    right = sum(answer == topic for answer, (_, topic) in zip(answers, rows, strict=True)) / len(rows)
    assert found["compressed"]["accuracy"] == pytest.approx(right)
    assert found["held_out_examples"] == 40

    names = [n for n, p in small.named_parameters() if p.ndim == 2 and "layer" in n and "LayerNorm" not in n]
    assert names
    for name in names:
        assert (small.get_parameter(name) == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert (small.get_parameter("classifier.weight") == 0).float().mean() < 0.1
    files = ("model.safetensors", "vanishing.json")
    assert found["bytes"]["compressed"] == sum((tmp_path / "small" / file).stat().st_size for file in files)
    assert not (tmp_path / "small.work").exists()
    assert json.loads((tmp_path / "small" / "results.json").read_text()) == {
        name: value for name, value in found.items() if name != "output"
    }


def test_the_card_and_the_report_tell_the_figures(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    bert, table = texts
    found = outcome(compress(bert, "--data", table, *settings(tmp_path, "--low-rank", 4, "--epochs", 2)))
    accuracy = f"{found['compressed']['accuracy']:.4g}"
    card = (tmp_path / "small" / "README.md").read_text()
    report = (tmp_path / "small" / "report.html").read_text()
    assert f"| accuracy | {found['original']['accuracy']:.4g} | {accuracy} |" in card
    assert f"<td class=number>{accuracy}</td>" in report
    # Both go where the model goes; where they were made is nobody's business.
    assert str(tmp_path) not in card
    page = Loads()
    page.feed(report)
    assert page.loads == []
    usage = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert usage is not None
    names: dict[str, Any] = {}
    exec(usage[1].replace("path/to/this/folder", str(tmp_path / "small")), names)
    assert isinstance(names["model"], transformers.BertForSequenceClassification)
    # The recipe of the card is the one that was applied.
    recipe = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert recipe is not None
    plan = vanishing.Recipe.from_yaml(recipe[1]).match(transformers.BertForSequenceClassification.from_pretrained(bert))
    assert next(row.outcome for row in plan.rows if row.name == "classifier") == "ignored"
    # Its own head is kept, and it is the model as it was given that is the original.
    before = load_file(bert / "model.safetensors")["classifier.weight"]
    assert (before - names["model"].classifier.weight).abs().max() < 0.2
    assert "not trained any further" in card


def test_a_token_classifier(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert", ["O", *LABELS], kind="ForTokenClassification")
    data = write_tagged(tmp_path / "train.jsonl", 120)
    found = outcome(compress(bert, "--data", data, *settings(tmp_path, "--bits", 4, "--epochs", 4)))
    assert found["task"] == "token-classification"
    assert found["compressed"]["token_accuracy"] > 0.9 > found["original"]["token_accuracy"]


def test_a_language_model(tmp_path: Path) -> None:
    llama = write_llama(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{text} .\n" for text, _ in sentences(200)))
    found = outcome(
        compress(llama, "--data", text, *settings(tmp_path, "--bits", 8, "--epochs", 4, "--max-length", 16))
    )
    assert found["task"] == "causal-lm"
    assert found["compressed"]["perplexity"] < found["original"]["perplexity"]
    # The perplexity is that of the text's last tenth.
    small: Any = vanishing.load(tmp_path / "small")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokens = tokenizer(text.read_text())["input_ids"]
    blocks = torch.tensor(tokens[: len(tokens) // 16 * 16]).view(-1, 16)
    held_out = blocks[-round(len(blocks) / 10) :]
    with torch.inference_mode():
        loss = small(input_ids=held_out, labels=held_out).loss
    assert found["compressed"]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_an_image_classifier(tmp_path: Path) -> None:
    vit = write_vit(tmp_path / "vit")
    images = write_images(tmp_path / "images", 30)
    found = outcome(compress(vit, "--data", images, *settings(tmp_path, "--binary", "--epochs", 6)))
    assert found["task"] == "image-classification"
    assert found["compressed"]["accuracy"] == 1.0
    small: Any = vanishing.load(tmp_path / "small")
    assert small.config.id2label == {0: "dark", 1: "light"}
    assert (tmp_path / "small" / "preprocessor_config.json").exists()


def test_a_model_in_half_precision_stays_in_it(tmp_path: Path) -> None:
    llama = write_llama(tmp_path / "llama")
    transformers.LlamaForCausalLM.from_pretrained(llama).to(torch.bfloat16).save_pretrained(llama)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{text} .\n" for text, _ in sentences(60)))
    run = ["--data", text, "--bits", 4, "--epochs", 1, "--max-length", 16, *settings(tmp_path)]
    planned = outcome(compress(llama, *run, "--dry-run"))
    found = outcome(compress(llama, *run))
    given = sum(t.nbytes for t in load_file(llama / "model.safetensors").values())
    assert found["bytes"]["original"] == planned["bytes"]["original"] == given
    assert planned["bytes"]["compressed"] < given
    small: Any = vanishing.load(tmp_path / "small")
    assert small.dtype == torch.bfloat16


def test_a_classifier_on_a_decoder_gets_a_padding_token(tmp_path: Path) -> None:
    llama = write_llama(tmp_path / "llama")
    table = write_csv(tmp_path / "train.csv", sentences(60))
    run = ["--data", table, "--task", "text-classification", "--prune", 0.5, "--epochs", 1]
    found = outcome(compress(llama, *run, *settings(tmp_path)))
    assert found["task"] == "text-classification"
    small: Any = vanishing.load(tmp_path / "small")
    assert small.config.pad_token_id is not None


def test_a_new_head_takes_the_place_of_one_with_as_many_classes(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    bert, _table = texts
    other = write_csv(tmp_path / "other.csv", [(text, f"not {topic}") for text, topic in sentences(60)])
    assert "--new-head" in one_line(compress(bert, "--data", other, "--binary", "--output", tmp_path / "small"))
    run = ["--data", other, "--new-head", "--binary", "--epochs", 1]
    outcome(compress(bert, *run, *settings(tmp_path, "--learning-rate", 1e-9)))
    small: Any = vanishing.load(tmp_path / "small")
    before = load_file(bert / "model.safetensors")["classifier.weight"]
    assert (small.classifier.weight - before).abs().max() > 1e-3
    assert set(small.config.label2id) == {f"not {label}" for label in LABELS}


def test_a_dry_run_changes_nothing_and_tells_the_size(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    bert, table = texts
    before = sorted(tmp_path.rglob("*"))
    run = ["--data", table, "--prune", 0.9, "--epochs", 2, *settings(tmp_path)]
    planned = outcome(compress(bert, *run, "--dry-run"))
    assert sorted(tmp_path.rglob("*")) == before
    done = outcome(compress(bert, *run))
    assert (planned["steps"], planned["fade_ends_at"]) == (done["steps"], done["fade_ends_at"])
    # A bias of zeros takes less than it will after the training; in a model as small as this one that shows.
    stored = sum(t.nbytes for t in load_file(tmp_path / "small" / "model.safetensors").values())
    assert planned["bytes"]["compressed"] == pytest.approx(stored, rel=0.15)
    compressed = {row["module"] for row in planned["plan"] if row["outcome"] == "compress"}
    assert "bert.encoder.layer.1.output.dense" in compressed
    assert "classifier" not in compressed


def test_a_recipe_file_says_it_all(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    bert, table = texts
    recipe = vanishing.Recipe(
        {
            # Two that look at examples of the data first.
            "*.attention.*": vanishing.LowRank(rank=4, whitened=True),
            "*.intermediate.*": vanishing.MagnitudePruning(0.75, score=vanishing.Score.FIRST_ORDER),
            "classifier": vanishing.Quantization(bits=8),
        },
        schedule=vanishing.LinearSchedule(steps=5),
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    found = outcome(compress(bert, "--data", table, "--recipe", file, "--epochs", 1, *settings(tmp_path)))
    assert found["fade_ends_at"] == 5
    small: Any = vanishing.load(tmp_path / "small")
    assert small.bert.encoder.layer[0].attention.self.query.rank == 4
    assert (small.bert.encoder.layer[0].intermediate.dense.weight == 0).float().mean() == 0.75
    assert "classifier" in json.loads((tmp_path / "small" / "vanishing.json").read_text())["modules"]


def test_a_recipe_file_has_schedules_of_single_layers_and_techniques(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    bert, table = texts
    linear = vanishing.LinearSchedule
    chain = vanishing.Rule(
        vanishing.MagnitudePruning(0.5) | vanishing.Quantization(bits=4),
        schedules=(linear(steps="30%"), linear(start="30%", steps="30%")),
    )
    slow = vanishing.Adaptive(vanishing.Staggered(linear(steps="40%")), limit=1e-3, deadline="80%", every=1)
    recipe = vanishing.Recipe({"*.attention.*": chain, "*.dense": vanishing.Binary()}, schedule=slow)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    found = outcome(compress(bert, "--data", table, "--recipe", file, "--epochs", 1, *settings(tmp_path)))
    assert found["fade_ends_at"] == round(0.8 * found["steps"])
    small: Any = vanishing.load(tmp_path / "small")
    assert (small.bert.encoder.layer[0].attention.self.query.weight == 0).float().mean() >= 0.5
    assert len(small.bert.encoder.layer[1].output.dense.weight[0].abs().unique()) == 1
    early = vanishing.Adaptive(linear(steps=5), limit=0.1, deadline="1%")
    file.write_text(vanishing.Recipe({"*": vanishing.Binary()}, schedule=early).to_yaml())
    refused = compress(bert, "--data", table, "--recipe", file, "--epochs", 1, *settings(tmp_path / "other"))
    assert refused.exit_code == 2
    assert "Give a later deadline" in " ".join(refused.output.split())


def test_heads_and_hidden_units_are_cut(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    found = outcome(
        compress(texts[0], "--data", texts[1], *settings(tmp_path, "--heads", 0.5, "--width", 0.75, "--epochs", 2))
    )
    small: Any = vanishing.load(tmp_path / "small")
    layer = small.bert.encoder.layer[1]
    assert layer.attention.self.query.weight.shape == (16, 32)
    assert layer.output.dense.weight.shape == (32, 16)
    before, after = found["parameters"]["original"], found["parameters"]["compressed"]
    # Of each of two layers: half of four attention matrices with three biases, three quarters of the two others.
    assert before - after == 2 * (2 * 32 * 32 + 3 * 16 + 2 * 48 * 32 + 48)
    assert found["bytes"]["compressed"] < found["bytes"]["original"]


def test_weights_and_activations_have_8_bits(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    flags = ("--bits", 8, "--activations", 8, "--epochs", 1)
    found = outcome(compress(texts[0], "--data", texts[1], *settings(tmp_path, *flags)))
    small: Any = vanishing.load(tmp_path / "small")
    query = small.bert.encoder.layer[0].attention.self.query
    assert isinstance(query, QuantizedInput) and query.quantizer.bits == 8
    assert not any(isinstance(module, QuantizedInput) for module in small.classifier.modules())
    assert found["parameters"]["compressed"] == found["parameters"]["original"]
    assert found["bytes"]["compressed"] < found["bytes"]["original"]


WRONG: dict[str, tuple[list[object], str]] = {
    "a model that is not there": (["./nothing", "--data", "DATA", "--binary"], "there is no folder ./nothing"),
    "data that is not there": (["MODEL", "--data", "./nothing.csv", "--binary"], "there is no file or folder"),
    "a column that is not there": (
        ["MODEL", "--data", "DATA", "--label-column", "topic", "--binary"],
        "no column 'topic'. It has: text, label.",
    ),
    "no technique": (["MODEL", "--data", "DATA"], "Give --prune, --bits"),
    "two that exclude each other": (["MODEL", "--data", "DATA", "--bits", 4, "--binary"], "exclude each other"),
    "a share above 1": (["MODEL", "--data", "DATA", "--prune", 1.5], "--prune 1.5: sparsity is the share"),
    "bits that are too many": (["MODEL", "--data", "DATA", "--bits", 9], "--bits 9: bits is the width"),
    "activations of one bit": (["MODEL", "--data", "DATA", "--activations", 1], "--activations 1: bits is the width"),
    "activations of factors": (
        ["MODEL", "--data", "DATA", "--low-rank", 0.5, "--activations", 8],
        "--low-rank and --activations exclude each other",
    ),
    "all heads": (["MODEL", "--data", "DATA", "--heads", 1], "--heads 1.0: sparsity is the share of units"),
    "no channels": (["MODEL", "--data", "DATA", "--channels", 0.5], "none of which ChannelPruning can take"),
    "units and bits": (["MODEL", "--data", "DATA", "--heads", 0.5, "--bits", 4], "in the same run"),
    "no fade": (["MODEL", "--data", "DATA", "--binary", "--fade", 0], "--fade 0: steps is the length of the fall"),
    "groups that cannot be": (["MODEL", "--data", "DATA", "--prune", "4:2"], "--prune 4:2: n is smaller than m"),
    "no number": (["MODEL", "--data", "DATA", "--prune", "much"], "--prune much: expected a number"),
    "a rank above the highest": (["MODEL", "--data", "DATA", "--low-rank", 1000], "rank is at most"),
    "no layer left": (
        ["MODEL", "--data", "DATA", "--prune", 0.5, "--ignore", "*"],
        "the recipe ignores 14 modules",
    ),
    "a name that matches nothing": (
        ["MODEL", "--data", "DATA", "--prune", 0.5, "--ignore", "bert.decoder*"],
        "ignore: nothing matched 'bert.decoder*'",
    ),
    "a fade that is too long": (
        ["MODEL", "--data", "DATA", "--prune", 0.5, "--fade", 999],
        "the fade ends at step 999",
    ),
    "a task that the model is not for": (
        ["MODEL", "--data", "DATA", "--task", "image-classification", "--prune", 0.5],
        "holds the image?",
    ),
    "a language model's task for another model": (
        ["MODEL", "--data", "DATA", "--task", "causal-lm", "--prune", 0.5],
        "is no language model that predicts the next token",
    ),
    "too many tokens": (["MODEL", "--data", "DATA", "--binary", "--max-length", 99], "at most 32 tokens"),
    "a run to go on with": (["MODEL", "--data", "DATA", "--binary", "--resume"], "no run to go on with"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, texts: tuple[Path, Path], case: str) -> None:
    places = {"MODEL": texts[0], "DATA": texts[1]}
    arguments, said = WRONG[case]
    before = sorted(tmp_path.rglob("*"))
    line = one_line(compress(*(places.get(str(a), a) for a in arguments), "--output", tmp_path / "small"))
    assert said in line
    assert sorted(tmp_path.rglob("*")) == before


def test_labels_that_differ(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert", ["good", "bad"])
    table = write_csv(tmp_path / "train.csv", sentences(20))
    line = one_line(compress(bert, "--data", table, "--binary", "--output", tmp_path / "small"))
    assert "the data has the labels food, music, sport" in line
    assert "knows good, bad" in line
    assert "--new-head" in line


def test_a_label_that_is_only_measured_on(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    test = write_csv(tmp_path / "test.csv", [("the opera", "opera")])
    line = one_line(
        compress(texts[0], "--data", texts[1], "--test-data", test, "--binary", "--output", tmp_path / "small")
    )
    assert "'opera' is measured on and never trained on" in line


def test_an_output_that_is_in_use(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    line = one_line(compress(texts[0], "--data", texts[1], "--binary", "--output", tmp_path / "small"))
    assert "is not an empty folder" in line


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vanishing", "compress", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, number: int) -> None:
    bert = write_bert(tmp_path / "bert")
    table = write_csv(tmp_path / "train.csv", sentences(400))
    run = [bert, "--data", table, "--prune", 0.9, "--epochs", 4, "--batch-size", 4, "--json"]
    outcome(compress(*run, "--output", tmp_path / "whole"))
    process = start(*run, "--output", tmp_path / "small")
    wait_for(tmp_path / "small.work" / "checkpoints")
    process.send_signal(number)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert printed == ""
    assert "--resume" in said.strip().splitlines()[-1]
    assert not (tmp_path / "small").exists()

    # Other settings would give another model under the same name.
    line = one_line(compress(*run, "--seed", 5, "--output", tmp_path / "small", "--resume"))
    assert "the run began with seed 0, not 5" in line
    assert "go on with --resume" in one_line(compress(*run, "--output", tmp_path / "small")).lower()

    outcome(compress(*run, "--output", tmp_path / "small", "--resume"))
    ours, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("small", "whole"))
    assert ours == whole


def test_a_disk_that_is_too_small_is_said_before_the_run(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    with small_disk(tmp_path / "disk", "300k"):
        line = one_line(compress(texts[0], "--data", texts[1], "--binary", "--output", tmp_path / "disk" / "small"))
        assert "Free some space, or give another --output" in line
        assert list((tmp_path / "disk").iterdir()) == []


def test_a_disk_that_fills_up_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert", LABELS)
    table = write_csv(tmp_path / "train.csv", sentences(400))
    run = [bert, "--data", table, "--binary", "--epochs", 4, "--batch-size", 4, "--json", "--output"]
    with small_disk(tmp_path / "disk", "6m"):
        small, filler = tmp_path / "disk" / "small", tmp_path / "disk" / "filler"
        process = start(*run, small)
        wait_for(small.with_name("small.work") / "checkpoints")
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        printed, said = process.communicate(timeout=120)
        assert process.returncode == 1, said
        assert printed == ""
        last = said.strip().splitlines()[-1]
        assert "is full" in last
        assert "--resume" in last
        assert not small.exists()
        filler.unlink()
        outcome(compress(*run, small, "--resume"))
        outcome(compress(*run, tmp_path / "whole"))
        ours, whole = ((folder / "model.safetensors").read_bytes() for folder in (small, tmp_path / "whole"))
        assert ours == whole


def wait_for(checkpoints: Path) -> None:
    """Wait until a run has saved where it stands."""
    until = time.monotonic() + 120
    while last_complete_checkpoint(checkpoints) is None and time.monotonic() < until:
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_make_one_model(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    table = write_csv(tmp_path / "train.csv", sentences(200))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vanishing", "compress"]
    run = [bert, "--data", table, "--prune", 0.5, "--epochs", 4, "--batch-size", 8, "--learning-rate", 5e-3, "--json"]
    arguments = [*map(str, run), "--output", str(tmp_path / "small")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # 180 examples in batches of 8 by two.
    assert found["steps"] == 4 * 12
    assert found["fade_ends_at"] == 19
    assert found["compressed"]["accuracy"] > 0.6
    assert not (tmp_path / "small.work").exists()
    vanishing.load(tmp_path / "small")
