"""Models of transformers, from a folder or the hub, with the label names that a run needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vanishing.manifest import MANIFEST
from vanishing.serialization import load
from vanishing.workflow.problems import InputProblem
from vanishing.workflow.tasks import Task, TaskName, task_of_architecture

try:
    import transformers
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
except ImportError as error:
    raise ImportError("models are read with transformers: pip install 'vanishing[compress]'.") from error

_UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, HfHubHTTPError, HFValidationError)
"""What transformers raises for a model that is not there, or that it cannot read."""


@dataclass(frozen=True)
class Source:
    """A model as it was named, before any weight of it is read.

    Args:
        name: a folder, or a name on the hub.
        config: its configuration.
    """

    name: str
    config: Any

    @property
    def architectures(self) -> list[str]:
        """The names of the classes that it was saved from."""
        return list(getattr(self.config, "architectures", None) or ())

    def labels(self, task: Task) -> list[str] | None:
        """Return the names of the classes that its head tells apart; None if it has no head for the task."""
        own = task_of_architecture(self.architectures)
        # A checkpoint of timm is a classifier, though its configuration does not name a class of transformers.
        is_timm = self.config.model_type == "timm_wrapper" and task.name is TaskName.IMAGE_CLASSIFICATION
        if not task.classifies or (own is not task and not is_timm):
            return None
        if self.config.num_labels < 2 or self.config.problem_type in ("regression", "multi_label_classification"):
            raise InputProblem(
                f"{self.name} does not put examples into one class each. Train a classifier that does, with --new-head."
            )
        return [self.config.id2label[i] for i in range(self.config.num_labels)]


def read_source(name: str) -> Source:
    """Read the configuration of a model.

    Args:
        name: a folder, or a name on the hub.

    Raises:
        InputProblem: there is no such model, or it is a compressed one.
    """
    if os.path.isfile(name):
        raise InputProblem(f"{name} is a file. Give the folder of a model of transformers, or a name on the hub.")
    if os.path.isdir(name):
        if (Path(name) / MANIFEST).exists():
            raise InputProblem(f"{name} holds a model that is compressed already. Give the original one.")
        if not (Path(name) / "config.json").is_file():
            raise InputProblem(f"{name} has no config.json, so it is not the folder of a model of transformers.")
    elif is_path(name):
        raise InputProblem(f"there is no folder {name}. Give the folder of a model, or a name on the hub.")
    return Source(name, read_config(name))


def read_config(name: str) -> Any:
    """Return the configuration of a model.

    Raises:
        InputProblem: it cannot be had.
    """
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except _UNREADABLE as error:
        if os.path.isdir(name):
            raise InputProblem(f"{name} is no model that transformers can read: {first_line(error)}") from None
        raise InputProblem(f"{name} is no folder, and could not be had from the hub: {first_line(error)}") from None


def is_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder, not of something on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def shown_name(model: str) -> str:
    """Return the name of a model without the place where it lies."""
    return Path(model).absolute().name if is_path(model) or os.path.isdir(model) else model


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's message, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def build(source: Source, task: Task, labels: Sequence[str] | None, *, new_head: bool) -> Any:
    """Read a model with its weights.

    Args:
        source: which.
        task: what it is for.
        labels: names of the classes of a new head; None to keep the model's own.
        new_head: whether the head is drawn anew, from torch's random state.

    Raises:
        InputProblem: it cannot be read, or a part of it other than the head has no weights.
    """
    settings: dict[str, Any] = {}
    if new_head and labels is not None:
        settings = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,
            # An earlier head may have been for several labels at once.
            "problem_type": "single_label_classification",
        }
    auto_class = getattr(transformers, task.auto_class)
    try:
        model, loading = auto_class.from_pretrained(source.name, output_loading_info=True, **settings)
    except _UNREADABLE as error:
        raise InputProblem(f"{source.name} cannot be read as a model for {task.name}: {first_line(error)}") from None
    heads = head_names(model)
    missing = [name for name in loading["missing_keys"] if not is_below_any(name, heads)]
    # A body without weights would be trained from scratch without a word. Poolers are part of a new head's training.
    if missing and not (new_head and all("pooler" in name for name in missing)):
        raise InputProblem(
            f"{source.name} has no weights for {len(missing)} parts of {type(model).__name__}, such as {missing[0]}. "
            f"Give a complete checkpoint, or the task that it is for with --task."
        )
    if new_head:
        _draw_anew(model, heads)
    return model.float()


def _draw_anew(model: Any, heads: Sequence[str]) -> None:
    """Draw the weights of a head, as one of as many classes would be kept otherwise."""
    spread = getattr(model.config, "initializer_range", 0.02)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_below_any(name, heads):
            nn.init.normal_(module.weight, std=spread)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def head_names(model: Any) -> list[str]:
    """Return the full names of the modules outside of a model's body: its classifier, or its output embeddings."""
    prefix = getattr(model, "base_model_prefix", "")
    body: Any = getattr(model, prefix, None) if prefix else None
    if body is None:
        return []
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outside = [name for name, module in model.named_children() if module is not body]
    # The classifiers of timm are inside of what transformers calls the body.
    get_classifier = getattr(body, "get_classifier", None)
    output = output if get_classifier is None else get_classifier()
    return outside + [n for n, m in model.named_modules() if m is output and n and n not in outside]


def is_below_any(name: str, modules: Sequence[str]) -> bool:
    """Whether a full name is that of one of these modules, or of something inside of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def read_small(folder: str) -> nn.Module:
    """Return a model that was compressed and saved.

    Raises:
        FileError: it is damaged.
    """
    config = read_config(folder)
    # The library that holds this architecture makes it from a name, which is not in the folder.
    skeleton = transformers.TimmWrapperForImageClassification(config) if config.model_type == "timm_wrapper" else None
    return load(folder, skeleton).eval()


def read_for_inspection(name: str) -> nn.Module:
    """Return a model to look at: an original, or one that was compressed and saved.

    Raises:
        InputProblem: there is no such model.
        FileError: a saved model is damaged.
    """
    if (Path(name) / MANIFEST).is_file():
        if not (Path(name) / "config.json").is_file():
            raise InputProblem(f"{name} is no model of transformers. Use vanishing.summary in Python.")
        return read_small(name)
    source = read_source(name)
    task = task_of_architecture(source.architectures)
    if task is not None:
        model: nn.Module = build(source, task, None, new_head=False)
        return model
    try:
        found = transformers.AutoModel.from_pretrained(name)
    except _UNREADABLE as error:
        raise InputProblem(f"{name} cannot be read: {first_line(error)}") from None
    assert isinstance(found, nn.Module)
    return found


def read_processor(source: Source, task: Task) -> Any:
    """Return a model's tokenizer, or its image processor.

    Raises:
        InputProblem: it has none.
    """
    is_image = task.name is TaskName.IMAGE_CLASSIFICATION
    auto_class = transformers.AutoImageProcessor if is_image else transformers.AutoTokenizer
    try:
        return auto_class.from_pretrained(source.name)
    except _UNREADABLE as error:
        what = "image processor" if is_image else "tokenizer"
        raise InputProblem(f"{source.name} has no {what} that can be read: {first_line(error)}") from None


def map_labels(source: Source, task: Task, own: Sequence[str], found: Sequence[str | int]) -> dict[str | int, int]:
    """Return the number of the model's class for every label of the data.

    Args:
        source: the model.
        task: what it is for.
        own: names of the model's classes.
        found: the data's labels: names, or numbers where the data has no names.

    Raises:
        InputProblem: the two sets differ.
    """
    if len(set(own)) == len(own) and {str(label) for label in found} <= set(own):
        return {label: list(own).index(str(label)) for label in found}
    numbers = [label for label in found if isinstance(label, int)]
    if len(numbers) == len(found):
        outside = [number for number in numbers if not 0 <= number < len(own)]
        if not outside:
            return {number: number for number in numbers}
        raise InputProblem(
            f"the data has the label {outside[0]}, and {source.name} knows the labels 0 to {len(own) - 1}. Give data "
            f"with its labels, or train a new head with --new-head."
        )
    known = {name.casefold(): i for i, name in enumerate(own)}
    folded = [name.casefold() for name in own]
    doubtful = [label for label in found if folded.count(str(label).casefold()) > 1]
    if doubtful:
        raise InputProblem(
            f"{source.name} knows several labels {doubtful[0]!r}. Give the data's labels as their numbers, 0 to "
            f"{len(own) - 1}."
        )
    unknown = [label for label in found if str(label).casefold() not in known]
    if not unknown:
        return {label: known[str(label).casefold()] for label in found}
    raise InputProblem(
        f"the data has the labels {_listed(found)}, and {source.name} knows {_listed(own)}. Give data with its "
        f"labels, or train a new head with --new-head."
    )


def _listed(labels: Sequence[str | int]) -> str:
    shown = ", ".join(str(label) for label in labels[:5])
    return f"{shown} and {len(labels) - 5} more" if len(labels) > 5 else shown
