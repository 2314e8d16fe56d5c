"""Data to train and to measure on: files, folders and data sets of the hub, as two splits with known columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vanishing.workflow.models import first_line, is_path
from vanishing.workflow.problems import InputProblem
from vanishing.workflow.tasks import Task, TaskName

try:
    import datasets
    from datasets.exceptions import DatasetsError
except ImportError as error:
    raise ImportError("data is read with datasets: pip install 'vanishing[compress]'.") from error

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # "NA" and "null" are words, and an empty text is one.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"keep_linebreaks": True}),
}
_HELD_OUT = ("test", "validation", "valid", "val", "dev")
_LABEL_NAMES = ("label", "labels")
_TAG_NAMES = ("ner_tags", "tags", "labels", "label")
_HELD_OUT_SHARE = 0.1
_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, DatasetsError)


@dataclass(frozen=True)
class Splits:
    """What is trained on and what is measured on.

    Args:
        train: a `datasets.Dataset`.
        test: another; None if it is still to be split off.
        held_out: in words, where `test` comes from.
    """

    train: Any
    test: Any
    held_out: str


@dataclass(frozen=True)
class Columns:
    """The columns of a task.

    Args:
        inputs: of the image, the tokens, or one or two texts.
        label: of the label or the tags; None for a language model.
    """

    inputs: tuple[str, ...]
    label: str | None


def read_splits(source: str, test_source: str | None) -> Splits:
    """Read the data.

    Args:
        source: a file (CSV, TSV, JSON, JSON lines, Parquet, text), a folder of such or of images in one folder a
            class, a folder that `datasets` has saved, or the name of a data set on the hub.
        test_source: the same for the examples to measure on; None to take them from `source`.

    Raises:
        InputProblem: it is not there, cannot be read, or leaves open what to train on.
    """
    found = _read(source)
    train_name = "train" if "train" in found else next(iter(found)) if len(found) == 1 else None
    if train_name is None:
        raise InputProblem(f"{source} has the parts {', '.join(found)}, and none is called train. Rename one.")
    train = found[train_name]
    if test_source is not None:
        tests = _read(test_source)
        name = next(each for each in (*_HELD_OUT, *tests) if each in tests)
        test, held_out = tests[name], Path(test_source).name if os.path.exists(test_source) else test_source
    else:
        others = [each for each in _HELD_OUT if each in found and each != train_name]
        name = next((each for each in others if _is_labeled(found[each])), "")
        test, held_out = (found[name], f"its part {name!r}") if name else (None, "a tenth of it, never trained on")
    for split, where in ((train, source), (test, test_source or source)):
        if split is not None and len(split) == 0:
            raise InputProblem(f"{where} holds no examples.")
    if test is not None and set(test.column_names) != set(train.column_names):
        missing = sorted(set(train.column_names) - set(test.column_names))
        if missing:
            raise InputProblem(f"{test_source or source}: what is measured on has no column {missing[0]!r}.")
    return Splits(train, test, held_out)


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    try:
        if path.is_file():
            if path.suffix.lower() not in _READERS:
                raise InputProblem(f"{source}: expected a file that ends in one of {', '.join(_READERS)}.")
            reader, settings = _READERS[path.suffix.lower()]
            return dict(datasets.load_dataset(reader, data_files=str(path), **settings))
        if path.is_dir():
            if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
                saved = datasets.load_from_disk(str(path))
                return dict(saved) if isinstance(saved, dict) else {"train": saved}
            endings = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
            if not endings:
                raise InputProblem(f"{source} holds no files.")
            # Read as a file alone would be.
            reader, settings = _READERS.get(endings.pop(), (str(path), {})) if len(endings) == 1 else (str(path), {})
            place = {} if reader == str(path) else {"data_dir": str(path)}
            return dict(datasets.load_dataset(reader, **place, **settings))
        if is_path(source) or path.suffix.lower() in _READERS:
            raise InputProblem(f"there is no file or folder {source}.")
        return dict(datasets.load_dataset(source))
    except InputProblem:
        raise
    except _UNREADABLE as error:
        known = os.path.exists(source)
        where = "cannot be read as data" if known else "is no file or folder, nor a data set on the hub"
        # What went wrong with a file is in the error that the reader's own error was raised from.
        cause = error.__cause__ if known and error.__cause__ is not None else error
        raise InputProblem(f"{source} {where}: {first_line(cause)}") from None


def _is_labeled(split: Any) -> bool:
    """Whether a split has labels: where nobody is to know them they are -1 or missing."""
    known = [name for name in _LABEL_NAMES if name in split.column_names]
    return all(any(label is not None and label != -1 for label in split[name]) for name in known)


def find_columns(split: Any, task: Task, inputs: Sequence[str], label: str | None) -> Columns:
    """Return the columns of a task: those that are named, else those that can only be meant.

    Args:
        split: a `datasets.Dataset`.
        task: the task.
        inputs: names of the input's columns that the user has given.
        label: name of the label's column that the user has given.

    Raises:
        InputProblem: a named column is not there, or it is not clear which one is meant.
    """
    features = dict(split.features)
    there = ", ".join(features)
    for name in (*inputs, *([label] if label is not None else [])):
        if name not in features:
            raise InputProblem(f"the data has no column {name!r}. It has: {there}.")
    if task.classifies and label is None:
        label = _label_column(features, task)
        if label is None:
            raise InputProblem(f"which column holds the label? Name it with --label-column. There are: {there}.")
    chosen = tuple(inputs) or _input_columns(features, task, label)
    most = 2 if task.name is TaskName.TEXT_CLASSIFICATION else 1
    if not 1 <= len(chosen) <= most:
        what = "the image" if task.name is TaskName.IMAGE_CLASSIFICATION else "the text"
        raise InputProblem(f"which column holds {what}? Name it with --input-column. There are: {there}.")
    for name in chosen:
        problem = _input_problem(features[name], task)
        if problem:
            raise InputProblem(f"the column {name!r} {problem}, which {task.name} needs. There are: {there}.")
    return Columns(chosen, label if task.classifies else None)


def _label_column(features: dict[str, Any], task: Task) -> str | None:
    if task.name is TaskName.TOKEN_CLASSIFICATION:
        return next((name for name in _TAG_NAMES if isinstance(features.get(name), datasets.List)), None)
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    return next((name for name in _LABEL_NAMES if name in features), None)


def _input_columns(features: dict[str, Any], task: Task, label: str | None) -> tuple[str, ...]:
    fitting = [name for name, kind in features.items() if name != label and _input_problem(kind, task) is None]
    preferred = [name for name in ("image", "tokens", "text", "sentence") if name in fitting]
    return tuple(preferred[:1] or fitting)


def _input_problem(kind: Any, task: Task) -> str | None:
    """Return why a column cannot be the input of a task, None where it can."""
    if task.name is TaskName.IMAGE_CLASSIFICATION:
        return None if isinstance(kind, datasets.Image) else "holds no images"
    if task.name is TaskName.TOKEN_CLASSIFICATION:
        return None if isinstance(kind, datasets.List) and _is_text(kind.feature) else "holds no lists of words"
    return None if _is_text(kind) else "holds no texts"


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def find_labels(splits: Splits, task: Task, column: str) -> tuple[str | int, ...]:
    """Return the labels of the data in their order: names where it has names, else numbers.

    Raises:
        InputProblem: the labels cannot be classes, or those that are measured on are not all trained on.
    """
    train = _labels_of(splits.train, task, column)
    test = set() if splits.test is None else _labels_of(splits.test, task, column)
    names = class_label(splits.train, column)
    # A class that has a name need not have an example.
    unseen = test - train - set(() if names is None else names)
    if unseen:
        raise InputProblem(
            f"the label {sorted(unseen, key=str)[0]!r} is measured on and never trained on. Give data in which both "
            f"parts have the same labels."
        )
    return tuple(names) if names is not None else tuple(sorted(train, key=lambda v: (isinstance(v, str), v)))


def class_label(split: Any, column: str) -> list[str] | None:
    """Return the names of the classes that a column numbers, None where it holds the labels themselves."""
    kind = split.features[column]
    kind = kind.feature if isinstance(kind, datasets.List) else kind
    return list(kind.names) if isinstance(kind, datasets.ClassLabel) else None


def _labels_of(split: Any, task: Task, column: str) -> set[str | int]:
    """The labels that stand in a column, by name where it has names."""
    values = split[column]
    found = {tag for tags in values for tag in tags} if task.name is TaskName.TOKEN_CLASSIFICATION else set(values)
    names = class_label(split, column)
    if any(value is None or value == "" or (names is not None and value == -1) for value in found):
        raise InputProblem(f"the column {column!r} has rows without a label. Remove or complete them.")
    if not all(isinstance(value, (str, int)) for value in found):
        kind = split.features[column]
        raise InputProblem(f"the column {column!r} holds {kind}, and a label is a name or a whole number.")
    return found if names is None else {names[value] for value in found}


def class_names(labels: Sequence[str | int]) -> list[str]:
    """Return the names of the classes of a new head.

    Raises:
        InputProblem: there are fewer than two classes.
    """
    if len(labels) < 2:
        raise InputProblem(f"the data has {len(labels)} class, and a classifier needs at least 2.")
    return [str(label) for label in labels]


def hold_out(splits: Splits) -> Splits:
    """Return the splits with a tenth of the examples held out, the same ones in every run, if none were.

    Raises:
        InputProblem: there are too few examples.
    """
    if splits.test is not None:
        return splits
    if len(splits.train) < 2:
        raise InputProblem("one example is not enough: some are trained on, others are measured on.")
    parts = splits.train.train_test_split(test_size=_HELD_OUT_SHARE, seed=0)
    return Splits(parts["train"], parts["test"], splits.held_out)
