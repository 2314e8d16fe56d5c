"""A run of `vanishing compress`: checked before anything is written, and safe to break off anywhere."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vanishing.errors import VanishingError
from vanishing.preparation import prepare
from vanishing.recipe import Recipe
from vanishing.serialization import save
from vanishing.summary import Summary, summary
from vanishing.transition import Transition
from vanishing.workflow.data import class_names, find_columns, find_labels, read_splits
from vanishing.workflow.disk import (
    SETTINGS,
    check_places,
    check_space,
    is_full,
    remove_incomplete,
    work_folder,
    write_whole,
)
from vanishing.workflow.encoding import Encoded, encode, measures
from vanishing.workflow.measuring import peak_bytes, time_ratio
from vanishing.workflow.models import (
    Source,
    build,
    first_line,
    head_names,
    map_labels,
    read_processor,
    read_small,
    read_source,
)
from vanishing.workflow.problems import InputProblem, Interrupted, RunProblem
from vanishing.workflow.settings import Settings
from vanishing.workflow.tasks import Task, choose_task, task_of_architecture
from vanishing.workflow.training import Display, arguments, make_trainer, step_count, train

RESULTS = "results.json"
_CALIBRATION_BATCHES = 16
_RECALIBRATION_BATCHES = 20


@dataclass(frozen=True)
class Job:
    """All that a run needs, read and checked.

    Args:
        settings: of the run.
        source: the model.
        task: the task.
        processor: its tokenizer or image processor.
        encoded: the examples.
        labels: names of the classes of a new head; None to keep the model's own.
    """

    settings: Settings
    source: Source
    task: Task
    processor: Any
    encoded: Encoded
    labels: list[str] | None

    @property
    def new_head(self) -> bool:
        """Whether the classifier is trained anew, so that the original has to be trained first."""
        return self.labels is not None

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return step_count(self.settings, len(self.encoded.train))

    def build(self, folder: str | None = None) -> Any:
        """Return the original, from its source or from the folder where it was trained."""
        transformers.set_seed(self.settings.seed)
        source = self.source if folder is None else Source(folder, self.source.config)
        anew = self.new_head and folder is None
        model = build(source, self.task, self.labels if anew else None, new_head=anew)
        padding = getattr(self.processor, "pad_token_id", None)
        if padding is not None and model.config.get_text_config().pad_token_id is None:
            # Classifiers on decoders look for the last token that is none.
            model.config.get_text_config().pad_token_id = padding
        return model

    def recipe(self, model: Any) -> Recipe:
        """Return the recipe as it is applied to a model, its head left out where flags say the technique."""
        recipe = Recipe.from_dict(self.settings.recipe)
        return without_head(recipe, model) if self.settings.keep_head else recipe

    @property
    def dtype(self) -> torch.dtype:
        """The type of the original's weights, in which the small model is saved; training is in single precision."""
        given = getattr(torch, str(self.source.config.dtype).removeprefix("torch."), None)
        return given if isinstance(given, torch.dtype) else torch.float32

    def dense_bytes(self, model: nn.Module) -> int:
        """Return what the weights of the original take in its own type."""
        return sum(p.numel() for p in model.parameters()) * self.dtype.itemsize

    def prepare(self, model: nn.Module) -> Transition:
        """Put a model into transition, laid out for the length of the run.

        Raises:
            RecipeError: the recipe does not fit the model; it is unchanged.
            InputProblem: the run is shorter than the transition.
        """
        if self.settings.recompute and not getattr(model, "supports_gradient_checkpointing", False):
            raise InputProblem(f"--recompute: {type(model).__name__} cannot compute its activations twice.")
        recipe = self.recipe(model)
        looks = bool(recipe.match(model).observed())
        calibration = some_batches(self, model, _CALIBRATION_BATCHES) if looks else None
        transition = prepare(model, recipe, calibration=calibration)
        transition.set_length(self.steps)
        if transition.end > self.steps:
            raise InputProblem(
                f"the fade ends at step {transition.end} and the run at step {self.steps}. Train for more --epochs, or "
                f"shorten the --fade."
            )
        return transition


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Args:
        job: the run.
        before: measures of the original on held-out examples.
        after: of the finished, saved and reloaded model.
        summary: sizes of every layer.
        dense_bytes: of the original's weights.
        small_bytes: of the files that hold the small model.
        fade: the optimizer step at which the original's share is 0.
        steps: optimizer steps of the run.
        seconds: of all trainings of this process.
        time_ratio: time of a forward pass, small to original: the median over pairs.
        peak_bytes: the process's peak memory, or the device's.
        log: what the training logged.
        recipe: as it was applied.
    """

    job: Job
    before: dict[str, float]
    after: dict[str, float]
    summary: Summary
    dense_bytes: int
    small_bytes: int
    fade: int
    steps: int
    seconds: float
    time_ratio: float
    peak_bytes: int
    log: Sequence[Mapping[str, float]]
    recipe: Recipe

    @property
    def compressed_bytes(self) -> tuple[int, int]:
        """What the compressed layers take, before and after."""
        rows = [row for row in self.summary.rows if row.technique]
        return sum(row.before.bytes for row in rows), sum(row.after.bytes for row in rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        total = self.summary
        return {
            "task": self.job.task.name.value,
            "metric": self.job.task.metric,
            "original": self.before,
            "compressed": self.after,
            "bytes": {"original": self.dense_bytes, "compressed": self.small_bytes},
            "compressed_layers_bytes": dict(zip(("original", "compressed"), self.compressed_bytes, strict=True)),
            "parameters": {"original": total.before.parameters, "compressed": total.after.parameters},
            "nonzeros": total.after.nonzeros,
            "time_ratio": round(self.time_ratio, 3),
            "steps": self.steps,
            "fade_ends_at": self.fade,
            "training_seconds": round(self.seconds, 1),
            "peak_memory_bytes": self.peak_bytes,
            "held_out": self.job.encoded.held_out,
            "held_out_examples": len(self.job.encoded.test),
            "settings": self.job.settings.model_dump(mode="json"),
            "log": list(self.log),
        }


def read_job(settings: Settings) -> Job:
    """Read model and data, and check that they fit each other.

    Raises:
        InputProblem: they do not, or something cannot be read.
    """
    source = read_source(settings.model)
    splits = read_splits(settings.data, settings.test_data)
    task = choose_task(settings.task, source.architectures, splits.train.features)
    if not task.classifies and task_of_architecture(source.architectures) is not task:
        raise InputProblem(f"{settings.model} is no language model that predicts the next token, as {task.name} needs.")
    columns = find_columns(splits.train, task, settings.input_columns, settings.label_column)
    processor = read_processor(source, task)
    labels: list[str] | None = None
    label_ids: Mapping[str | int, int] = {}
    if columns.label is not None:
        found = find_labels(splits, task, columns.label)
        own = None if settings.new_head else source.labels(task)
        labels = class_names(found) if own is None else None
        label_ids = {label: i for i, label in enumerate(found)} if own is None else map_labels(source, task, own, found)
    elif settings.new_head:
        raise InputProblem(f"--new-head: {task.name} has no classifier.")
    encoded = encode(task, splits, columns, label_ids, processor, source.config, settings.max_length)
    return Job(settings, source, task, processor, encoded, labels)


def without_head(recipe: Recipe, model: nn.Module) -> Recipe:
    """Return a recipe that leaves a model's head alone, too."""
    data = recipe.to_dict()
    return Recipe.from_dict(data | {"ignore": [*data.get("ignore", []), *head_names(model)]})


def run(settings: Settings, output: Path, *, resume: bool, display: Display) -> Result | None:
    """Train, finish, save, load, measure; then the output folder appears, complete.

    Until then everything is in a folder beside it, `OUTPUT.work`, from which a run that was broken off goes on.

    Args:
        settings: of the run.
        output: folder of the small model; must not exist, or be empty.
        resume: go on with the run in `OUTPUT.work`, if there is one.
        display: where to show the progress.

    Returns:
        What the run came to; None in all processes but the first.

    Raises:
        InputProblem: something about the input is wrong; nothing was changed.
        Interrupted: a signal came; where the run stands is saved.
        RunProblem: the disk is full, or the training diverged.
    """
    # What is written in the end must not fail for what is not installed.
    from vanishing.workflow import card, report  # noqa: F401

    output = output.absolute()
    work = work_folder(output)
    # Several processes without accelerators are only found by who says that there are none.
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_places(output, work, resume)
    job = read_job(settings)
    for note in job.encoded.notes:
        display.say(note)
    check_device(job)
    tried = job.build()
    check_space(tried, work, job.new_head)
    job.prepare(tried)
    del tried
    if (work / SETTINGS).exists():
        settings.check_same(work / SETTINGS)
    # Nothing is written before every process has checked everything.
    state.wait_for_everyone()
    try:
        if state.is_main_process and not (work / SETTINGS).exists():
            work.mkdir(parents=True, exist_ok=True)
            write_whole(work / SETTINGS, settings.model_dump_json(indent=2) + "\n")
        state.wait_for_everyone()
        return _run(job, output, work, display, state)
    except KeyboardInterrupt:
        raise Interrupted("stopped between two trainings", signal.SIGINT) from None
    except torch.OutOfMemoryError:
        raise RunProblem("the device is out of memory. Lower --batch-size, or give --recompute or --bf16.") from None
    except (OSError, RuntimeError, SafetensorError, VanishingError) as error:
        if is_full(error, work):
            remove_incomplete(work)
            raise RunProblem(
                f"the disk of {work} is full ({first_line(error)}). What was saved before is there: free some space "
                f"and go on with --resume."
            ) from error
        if isinstance(error, VanishingError) and not isinstance(error, (Interrupted, RunProblem)):
            raise RunProblem(str(error)) from error
        raise


def check_device(job: Job) -> None:
    """Raise `InputProblem` if the machine cannot do what was asked for."""
    try:
        arguments(job.settings, job.encoded, Path("unused"))
    except (ValueError, ImportError) as error:
        raise InputProblem(f"the training cannot be set up here: {first_line(error)}") from None


def _run(job: Job, output: Path, work: Path, display: Display, state: Any) -> Result | None:
    started = time.perf_counter()
    original = _original(job, work, display, state) if job.new_head else None
    model = job.build(original)
    dense_bytes = job.dense_bytes(model)
    recipe = job.recipe(model)
    before = _evaluated_once(job, model, work, display, state)
    transition = job.prepare(model)
    stage = train("compressing", model, transition, job.settings, job.encoded, work / "checkpoints", display)
    seconds = time.perf_counter() - started
    fade = transition.end
    display.say("Finishing, saving, and measuring what was saved.")
    transition.finish(recalibrate=_recalibration_batches(job, model))
    model.to(job.dtype)
    small = work / "small"
    if state.is_main_process:
        save(model, small, tokenizer=job.processor)
    state.wait_for_everyone()
    reloaded = read_small(str(small))
    after = _evaluate(job, reloaded, work)
    if not state.is_main_process:
        return None
    result = Result(
        job=job,
        before=before,
        after=after,
        summary=summary(reloaded),
        dense_bytes=dense_bytes,
        small_bytes=sum((small / name).stat().st_size for name in ("model.safetensors", "vanishing.json")),
        fade=fade,
        steps=stage.steps,
        seconds=seconds,
        time_ratio=time_ratio(job.encoded, job.settings.batch_size, job.build(original), reloaded),
        peak_bytes=peak_bytes(),
        log=stage.log,
        recipe=recipe,
    )
    _complete(result, small)
    if output.exists():
        output.rmdir()
    output.parent.mkdir(parents=True, exist_ok=True)
    small.rename(output)
    shutil.rmtree(work)
    return result


def _complete(result: Result, folder: Path) -> None:
    """Put everything else that the output holds beside the model."""
    from vanishing.workflow.card import model_card
    from vanishing.workflow.report import report_page

    (folder / "README.md").write_text(model_card(result), encoding="utf-8")
    (folder / "report.html").write_text(report_page(result), encoding="utf-8")
    (folder / RESULTS).write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")


def _original(job: Job, work: Path, display: Display, state: Any) -> str:
    """Train the original with its new head, unless that was done, and return its folder."""
    folder = work / "original"
    if not folder.exists():
        display.say("The classifier is new, so the original is trained first.")
        model = job.build()
        train("training the original", model, None, job.settings, job.encoded, work / "original-checkpoints", display)
        if state.is_main_process:
            unfinished = work / "original-unfinished"
            model.save_pretrained(unfinished)
            unfinished.rename(folder)
            shutil.rmtree(work / "original-checkpoints")
        state.wait_for_everyone()
    return str(folder)


def _evaluated_once(job: Job, model: Any, work: Path, display: Display, state: Any) -> dict[str, float]:
    file = work / "original.json"
    if file.exists():
        known: dict[str, float] = json.loads(file.read_text())
        return known
    display.say("Measuring the original.")
    measured = _evaluate(job, model, work)
    if state.is_main_process:
        write_whole(file, json.dumps(measured))
    state.wait_for_everyone()
    return measured


def _evaluate(job: Job, model: Any, work: Path) -> dict[str, float]:
    trainer = make_trainer(model, arguments(job.settings, job.encoded, work / "checkpoints"), job.encoded, [])
    return measures(job.task, trainer.evaluate())


def some_batches(job: Job, model: nn.Module, count: int) -> list[dict[str, Any]]:
    """Return batches of training examples from all over the data, on the model's device."""
    device = next(model.parameters()).device
    size = job.settings.batch_size
    # Every so manieth example, as files are often sorted by class.
    count = min(len(job.encoded.train), size * count)
    chosen = torch.linspace(0, len(job.encoded.train) - 1, count).round().int().tolist()
    rows = [chosen[i :: max(1, count // size)] for i in range(max(1, count // size))]
    batches = (job.encoded.collate([job.encoded.train[i] for i in indices]) for indices in rows)
    return [{name: values.to(device) for name, values in batch.items()} for batch in batches]


def _recalibration_batches(job: Job, model: nn.Module) -> list[dict[str, Any]] | None:
    """Batches to estimate BatchNorm's statistics from, None for a model without any."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return None
    batches = some_batches(job, model, _RECALIBRATION_BATCHES)
    return [{name: values for name, values in batch.items() if name != "labels"} for batch in batches]
