"""Examples as a model takes them, and what its outputs are worth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, default_data_collator

from vanishing.workflow.data import Columns, Splits, class_label, hold_out
from vanishing.workflow.problems import InputProblem
from vanishing.workflow.tasks import Task, TaskName

_IGNORED = -100
"""The label of what has no part in the loss, in PyTorch and transformers."""
_LONGEST = 256


@dataclass(frozen=True)
class Encoded:
    """Examples that a Trainer can take.

    Args:
        train: examples to learn from.
        test: examples to measure on.
        held_out: in words, where `test` comes from.
        collate: makes a batch of examples.
        metrics: of an `EvalPrediction`; None where the loss says all.
        notes: what the user should know about the examples.
        longest: an example of `train` that takes as much memory as any.
    """

    train: Any
    test: Any
    held_out: str
    collate: Callable[[list[Any]], dict[str, Any]]
    metrics: Callable[[Any], dict[str, float]] | None
    notes: tuple[str, ...] = ()
    longest: int = 0


def encode(
    task: Task,
    splits: Splits,
    columns: Columns,
    label_ids: Mapping[str | int, int],
    processor: Any,
    config: Any,
    max_length: int | None,
) -> Encoded:
    """Turn the columns of the data into the inputs of a model.

    Args:
        task: the task.
        splits: the data.
        columns: its columns.
        label_ids: number of the model's class for every label.
        processor: the model's tokenizer or image processor.
        config: the model's configuration.
        max_length: tokens of an example at most; None for 256, or fewer if the model takes fewer.

    Raises:
        InputProblem: the data cannot be encoded.
    """
    if task.name is TaskName.IMAGE_CLASSIFICATION:
        return _encode_images(hold_out(splits), columns, label_ids, processor, config)
    length = _length(processor, config, max_length)
    if task.name is TaskName.CAUSAL_LM:
        return _encode_language(splits, columns, processor, length)
    _give_padding(processor)
    splits = hold_out(splits)
    if task.name is TaskName.TOKEN_CLASSIFICATION:
        return _encode_tokens(splits, columns, label_ids, processor, length)
    return _encode_texts(splits, columns, label_ids, processor, length)


def _length(tokenizer: Any, config: Any, asked: int | None) -> int:
    # Some tokenizers have no limit and say so by an enormous number. RoBERTa's positions begin behind the padding's.
    positions = getattr(config, "max_position_embeddings", None) or 10**9
    positions -= 2 if config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer") else 0
    most = min(tokenizer.model_max_length, positions)
    if asked is not None and asked > most:
        raise InputProblem(f"--max-length {asked}: the model takes at most {most} tokens.")
    return int(min(most, _LONGEST if asked is None else asked))


def _give_padding(tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputProblem("the tokenizer has neither a token for padding nor one for the end. Add one to it.")
        tokenizer.pad_token = tokenizer.eos_token


def _column(label_ids: Mapping[str | int, int], split: Any, name: str) -> Mapping[Any, int]:
    """Numbers of the classes by what stands in the column, which for named classes are numbers too."""
    names = class_label(split, name)
    return label_ids if names is None else {i: label_ids[each] for i, each in enumerate(names)}


def _encode_images(
    splits: Splits, columns: Columns, label_ids: Mapping[str | int, int], processor: Any, config: Any
) -> Encoded:
    (image,), label = columns.inputs, columns.label
    assert label is not None
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

    def prepared(split: Any) -> Any:
        numbers = _column(label_ids, split, label)

        def transform(rows: dict[str, list[Any]]) -> dict[str, Any]:
            try:
                pictures = [each.convert(mode) for each in rows[image]]
            except OSError as error:
                raise InputProblem(f"an image cannot be read: {error}. Remove it from the data.") from None
            pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
            return {"pixel_values": list(pixels), "labels": [numbers[each] for each in rows[label]]}

        return split.select_columns([image, label]).with_transform(transform)

    return Encoded(prepared(splits.train), prepared(splits.test), splits.held_out, default_data_collator, accuracy)


def _encode_texts(
    splits: Splits, columns: Columns, label_ids: Mapping[str | int, int], tokenizer: Any, length: int
) -> Encoded:
    label = columns.label
    assert label is not None

    def encode_rows(rows: dict[str, list[Any]], numbers: Mapping[Any, int]) -> dict[str, Any]:
        texts = [[text or "" for text in rows[name]] for name in columns.inputs]
        encoded = tokenizer(*texts, truncation=True, max_length=length)
        return {**encoded, "labels": [numbers[each] for each in rows[label]]}

    train, test = _both(splits, label_ids, label, encode_rows)
    notes, longest = _cut(train, length)
    collate = DataCollatorWithPadding(tokenizer)
    return Encoded(train, test, splits.held_out, collate, accuracy, notes, longest)


def _encode_tokens(
    splits: Splits, columns: Columns, label_ids: Mapping[str | int, int], tokenizer: Any, length: int
) -> Encoded:
    (words,), tags = columns.inputs, columns.label
    assert tags is not None
    if not tokenizer.is_fast:
        raise InputProblem("the tokenizer is a slow one, which cannot tell the words that tokens come from.")

    def encode_rows(rows: dict[str, list[Any]], numbers: Mapping[Any, int]) -> dict[str, Any]:
        encoded = tokenizer(rows[words], truncation=True, max_length=length, is_split_into_words=True)
        labels = []
        for row, row_tags in enumerate(rows[tags]):
            if len(row_tags) != len(rows[words][row]):
                raise InputProblem(f"an example has {len(rows[words][row])} words and {len(row_tags)} tags.")
            of_word = encoded.word_ids(row)
            # A word is judged by its first token.
            firsts = [w is not None and (i == 0 or of_word[i - 1] != w) for i, w in enumerate(of_word)]
            pairs = zip(firsts, of_word, strict=True)
            labels.append([numbers[row_tags[w]] if first else _IGNORED for first, w in pairs])
        return {**encoded, "labels": labels}

    train, test = _both(splits, label_ids, tags, encode_rows)
    notes, longest = _cut(train, length)
    collate = DataCollatorForTokenClassification(tokenizer)
    return Encoded(train, test, splits.held_out, collate, token_accuracy, notes, longest)


def _encode_language(splits: Splits, columns: Columns, tokenizer: Any, length: int) -> Encoded:
    (text,) = columns.inputs

    def encode_rows(rows: dict[str, list[Any]]) -> dict[str, Any]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # Lines of a text file belong together; texts of a table end.
        encoded = tokenizer([each or "" for each in rows[text]], add_special_tokens=False)["input_ids"]
        ends = ([] if each and each.endswith("\n") else end for each in rows[text])
        stream = list(itertools.chain.from_iterable([*ids, *last] for ids, last in zip(encoded, ends, strict=True)))
        blocks = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
        return {"input_ids": blocks, "labels": blocks}

    train = _mapped(splits.train, encode_rows)
    test = None if splits.test is None else _mapped(splits.test, encode_rows)
    if test is None and len(train) > 1:
        # The end of the text, as neighbors are alike.
        held_out = max(1, round(len(train) / 10))
        train, test = train.select(range(len(train) - held_out)), train.select(range(len(train) - held_out, len(train)))
    if test is None or not len(train) or not len(test):
        raise InputProblem(f"the text is too short for blocks of {length} tokens. Give more, or a lower --max-length.")
    return Encoded(train, test, splits.held_out, default_data_collator, None)


def _both(
    splits: Splits, label_ids: Mapping[str | int, int], label: str, encode_rows: Callable[..., dict[str, Any]]
) -> tuple[Any, Any]:
    """Both splits encoded, each by its own numbers of the classes."""
    train, test = (
        _mapped(split, partial(encode_rows, numbers=_column(label_ids, split, label)))
        for split in (splits.train, splits.test)
    )
    return train, test


def _mapped(split: Any, encode_rows: Callable[[dict[str, list[Any]]], dict[str, Any]]) -> Any:
    # In memory, as a cache on the disk would be one more thing to fill it.
    return split.map(encode_rows, batched=True, remove_columns=split.column_names, keep_in_memory=True)


def _cut(train: Any, length: int) -> tuple[tuple[str, ...], int]:
    """Say how many examples fill the length, and which one is the longest."""
    lengths = [len(ids) for ids in train["input_ids"]]
    full = sum(each == length for each in lengths)
    note = f"{full / len(lengths):.0%} of the texts are cut to {length} tokens; see --max-length."
    return (note,) if full else (), int(np.argmax(lengths))


def classes(logits: Any, labels: Tensor) -> Tensor:
    """Return the class of the highest score, so that scores need not be kept."""
    scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
    return scores.argmax(-1)


def accuracy(outputs: Any) -> dict[str, float]:
    """Return the share of examples that are put into the right class."""
    return {"accuracy": float((outputs.predictions == outputs.label_ids).mean())}


def token_accuracy(outputs: Any) -> dict[str, float]:
    """Return the share of words that get the right tag."""
    counted = outputs.label_ids != _IGNORED
    return {"token_accuracy": float((outputs.predictions == outputs.label_ids)[counted].mean())}


def measures(task: Task, evaluated: Mapping[str, float], prefix: str = "eval") -> dict[str, float]:
    """Return the measures of an evaluation: the loss, and the task's own."""
    loss = evaluated[f"{prefix}_loss"]
    value = math.exp(min(loss, 700.0)) if task.name is TaskName.CAUSAL_LM else evaluated[f"{prefix}_{task.metric}"]
    return {"loss": loss, task.metric: value}


def batch_of(encoded: Encoded, size: int) -> dict[str, Any]:
    """Return a batch of the longest example, so many times."""
    example = encoded.train[encoded.longest]
    return encoded.collate([dict(example) for _ in range(size)])
