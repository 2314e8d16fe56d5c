"""What is trained on and measured on, and which class a label is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from tiny_models import write_bert, write_csv
from vanishing.workflow.data import find_columns, find_labels, hold_out, read_splits
from vanishing.workflow.encoding import encode
from vanishing.workflow.models import Source, map_labels, read_processor, read_source
from vanishing.workflow.problems import InputProblem
from vanishing.workflow.tasks import TASKS, TaskName, choose_task

TEXTS = TASKS[TaskName.TEXT_CLASSIFICATION]
ROWS = [(f"the bread {i}", "food" if i % 2 else "music") for i in range(20)]


@pytest.mark.parametrize("name", ["validation.csv", "test.csv", "train.csv", "data.csv"])
def test_nothing_is_measured_on_that_was_trained_on(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    write_csv(tmp_path / "data" / name, ROWS)
    splits = hold_out(read_splits(str(tmp_path / "data"), None))
    train, test = set(splits.train["text"]), set(splits.test["text"])
    assert len(test) == 2
    assert train | test == {text for text, _ in ROWS}
    assert not train & test


def test_a_part_without_labels_is_not_measured_on(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    labeled = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    hidden = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [-1, -1]}, features=features)
    parts = datasets.DatasetDict({"train": labeled, "validation": labeled, "test": hidden})
    parts.save_to_disk(tmp_path / "saved")
    splits = read_splits(str(tmp_path / "saved"), None)
    assert splits.held_out == "its part 'validation'"


@pytest.mark.parametrize("name", ["train.csv", "train.txt"])
def test_a_folder_with_one_file_is_that_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / name
    file.write_text("text,label\nNA,food\n,music\n" * (name == "train.csv") or "a line\nNA\n")
    alone, inside = (read_splits(str(path), None).train for path in (file, tmp_path / "data"))
    assert alone.to_list() == inside.to_list()
    assert "NA" in {each.strip() for each in alone["text"]}


def encoded_labels(tmp_path: Path, train_names: list[str], test_names: list[str]) -> tuple[Any, Any]:
    """Numbers of the classes after encoding texts that are named by their class."""
    for part, names in (("train", train_names), ("test", test_names)):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = {"text": names, "label": list(range(len(names)))}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / part)
    source = read_source(str(write_bert(tmp_path / "bert")))
    splits = read_splits(str(tmp_path / "train"), str(tmp_path / "test"))
    columns = find_columns(splits.train, TEXTS, (), None)
    labels = find_labels(splits, TEXTS, "label")
    ids = {label: i for i, label in enumerate(labels)}
    encoded = encode(TEXTS, splits, columns, ids, read_processor(source, TEXTS), source.config, None)
    return encoded.train["labels"], encoded.test["labels"]


def test_the_parts_may_number_their_classes_differently(tmp_path: Path) -> None:
    train, test = encoded_labels(tmp_path, ["bread", "song"], ["song", "bread"])
    assert list(train) == [0, 1]
    assert list(test) == [1, 0]


def test_a_class_that_is_only_measured_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputProblem, match="'goal' is measured on and never trained on"):
        encoded_labels(tmp_path, ["bread", "song"], ["song", "goal"])


@pytest.mark.parametrize("missing", [None, -1])
def test_an_example_without_a_label_is_refused(tmp_path: Path, missing: int | None) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, missing]}, features=features)
    data.save_to_disk(tmp_path / "data")
    with pytest.raises(InputProblem, match="rows without a label"):
        find_labels(read_splits(str(tmp_path / "data"), None), TEXTS, "label")


SOURCE = Source("it", SimpleNamespace())


def test_labels_are_matched_by_name_before_number() -> None:
    assert map_labels(SOURCE, TEXTS, ["1", "2", "3"], [1, 2, 3]) == {1: 0, 2: 1, 3: 2}
    assert map_labels(SOURCE, TEXTS, ["food", "music"], [0, 1]) == {0: 0, 1: 1}
    assert map_labels(SOURCE, TEXTS, ["Food", "MUSIC"], ["music", "food"]) == {"music": 1, "food": 0}


@pytest.mark.parametrize(
    ("own", "found", "said"),
    [
        (["food", "music"], [0, 1, 2], "has the label 2"),
        (["food", "music"], ["food", "sport"], "has the labels food, sport"),
        (["crane", "crane", "bus"], ["crane", "bus"], "several labels 'crane'"),
        (["Cat", "cat"], ["CAT", "cat"], "several labels"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(own: list[str], found: list[Any], said: str) -> None:
    with pytest.raises(InputProblem, match=said):
        map_labels(SOURCE, TEXTS, own, found)


def test_the_task_is_asked_for_or_the_models_or_the_datas(tmp_path: Path) -> None:
    words = datasets.Features({"words": datasets.List(datasets.Value("string")), "tags": datasets.Value("string")})
    texts = datasets.Features({"text": datasets.Value("string"), "topic": datasets.Value("string")})
    alone = datasets.Features({"text": datasets.Value("string")})
    pictures = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    assert choose_task(None, ["BertModel"], words).name is TaskName.TOKEN_CLASSIFICATION
    assert choose_task(None, ["BertModel"], texts).name is TaskName.TEXT_CLASSIFICATION
    with pytest.raises(InputProblem, match="with the column 'text', tells the task"):
        choose_task(None, ["BertModel"], alone)
    assert choose_task(None, ["ViTModel"], pictures).name is TaskName.IMAGE_CLASSIFICATION
    assert choose_task(None, ["LlamaForCausalLM"], texts).name is TaskName.CAUSAL_LM
    assert choose_task(TaskName.TEXT_CLASSIFICATION, ["LlamaForCausalLM"], texts).name is TaskName.TEXT_CLASSIFICATION


def test_json_lines_and_parquet_hold_the_same(tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in ROWS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    write_csv(tmp_path / "a.csv", ROWS)
    for ending in ("jsonl", "parquet", "csv"):
        assert read_splits(str(tmp_path / f"a.{ending}"), None).train.to_list() == rows
