"""`vanishing compress`: a model and data in, a small model, its card and a report out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vanishing.cli.display import LineDisplay, TerminalDisplay
from vanishing.cli.outcome import one_line_errors
from vanishing.cli.quiet import be_quiet
from vanishing.cli.wording import megabytes
from vanishing.workflow.tasks import TaskName

if TYPE_CHECKING:
    from vanishing.workflow.estimate import Estimate
    from vanishing.workflow.job import Result
    from vanishing.workflow.settings import Settings
    from vanishing.workflow.training import Display

_TECHNIQUE, _DATA, _TRAINING, _RUN = "Technique", "Data", "Training", "Run"


def run(
    model: Annotated[str, typer.Argument(help="Folder of a model of transformers, or its name on the hub.")],
    data: Annotated[
        str, typer.Option(help="CSV, TSV, JSON, Parquet or text file, folder of images or of such files, or hub name.")
    ],
    output: Annotated[Path, typer.Option(help="New folder for the small model.")],
    prune: Annotated[
        str | None, typer.Option(help="Share of zeros, as in 0.9; or 2:4.", rich_help_panel=_TECHNIQUE)
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a weight, 1 to 8.", rich_help_panel=_TECHNIQUE)] = None,
    binary: Annotated[bool, typer.Option("--binary", help="One bit a weight.", rich_help_panel=_TECHNIQUE)] = False,
    ternary: Annotated[
        bool, typer.Option("--ternary", help="Weights -1, 0 and 1 times a scale.", rich_help_panel=_TECHNIQUE)
    ] = False,
    activations: Annotated[
        int | None,
        typer.Option(help="Bits of what goes into a layer, 2 to 8; with --bits 8, W8A8.", rich_help_panel=_TECHNIQUE),
    ] = None,
    low_rank: Annotated[
        str | None,
        typer.Option(help="Share of the weights that is kept, as in 0.25; or the rank.", rich_help_panel=_TECHNIQUE),
    ] = None,
    heads: Annotated[
        float | None, typer.Option(help="Share of attention heads that vanish, as in 0.5.", rich_help_panel=_TECHNIQUE)
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(help="Share of the hidden units of feed-forwards that vanish.", rich_help_panel=_TECHNIQUE),
    ] = None,
    channels: Annotated[
        float | None,
        typer.Option(
            help="Share of the channels inside of blocks of convolutions that vanish.", rich_help_panel=_TECHNIQUE
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Glob of layers to leave alone; repeatable.", rich_help_panel=_TECHNIQUE)
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Recipe file in the place of the flags above; see vanishing recipe.", rich_help_panel=_TECHNIQUE
        ),
    ] = None,
    fade: Annotated[
        str | None,
        typer.Option(
            help="Length of the fade: a share of the run, 40% if not given, or steps.", rich_help_panel=_TECHNIQUE
        ),
    ] = None,
    test_data: Annotated[
        str | None, typer.Option(help="Data to measure on; else a part of DATA.", rich_help_panel=_DATA)
    ] = None,
    task: Annotated[TaskName | None, typer.Option(help="Found if not given.", rich_help_panel=_DATA)] = None,
    input_column: Annotated[
        list[str] | None,
        typer.Option(help="Column of the text, words or image; twice for pairs of texts.", rich_help_panel=_DATA),
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.", rich_help_panel=_DATA)] = None,
    new_head: Annotated[
        bool, typer.Option("--new-head", help="Train a new classifier for the data's labels.", rich_help_panel=_DATA)
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an example at most; 256 if not given.", rich_help_panel=_DATA)
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=_TRAINING)] = 3.0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Examples at a time on each device.", rich_help_panel=_TRAINING)
    ] = 32,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Batches in an optimizer step.", rich_help_panel=_TRAINING)
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="Its peak.", rich_help_panel=_TRAINING)] = 1e-4,
    seed: Annotated[int, typer.Option(min=0, help="Of the order, dropout, new head.", rich_help_panel=_TRAINING)] = 0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute products in bfloat16.", rich_help_panel=_TRAINING)
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option("--recompute", help="Compute activations twice, to save memory.", rich_help_panel=_TRAINING),
    ] = False,
    freeze_original: Annotated[
        bool,
        typer.Option(
            "--freeze-original",
            help="With --low-rank: do not train the original, to save memory.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that was broken off.", rich_help_panel=_RUN)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and stop.", rich_help_panel=_RUN)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.", rich_help_panel=_RUN)] = False,
) -> None:
    """Make a model small while it is fine-tuned, and say what that cost.

    The original fades out of every layer that is compressed. The small model is saved, loaded again, and measured
    against the original on examples that neither was trained on.

    Exit codes: 0 done; 1 broken off, what was saved is there; 2 cannot be done, nothing was changed; 130 interrupted,
    go on with --resume.
    """
    with one_line_errors("compress"):
        from vanishing.cli.techniques import recipe_from_file, recipe_from_flags
        from vanishing.workflow.problems import InputProblem, Interrupted
        from vanishing.workflow.settings import Settings

        if epochs <= 0 or learning_rate <= 0:
            raise InputProblem("--epochs and --learning-rate are numbers above 0.")
        flags = (
            prune,
            bits,
            activations,
            low_rank,
            heads,
            width,
            channels,
            fade,
            *(ignore or ()),
            binary or None,
            ternary or None,
            freeze_original or None,
        )
        if recipe is not None and any(flag is not None for flag in flags):
            raise InputProblem("a --recipe says it all: leave out the technique's flags, --ignore and --fade.")
        chosen = (
            recipe_from_file(recipe)
            if recipe is not None
            else recipe_from_flags(
                prune=prune,
                bits=bits,
                activations=activations,
                binary=binary,
                ternary=ternary,
                low_rank=low_rank,
                heads=heads,
                width=width,
                channels=channels,
                fade=fade or "40%",
                ignore=ignore or [],
                freeze_original=freeze_original,
            )
        )
        settings = Settings(
            model=model,
            data=data,
            test_data=test_data,
            task=task,
            recipe=chosen.to_dict(),
            keep_head=recipe is None,
            input_columns=tuple(input_column or ()),
            label_column=label_column,
            new_head=new_head,
            epochs=epochs,
            batch_size=batch_size,
            accumulate=accumulate,
            learning_rate=learning_rate,
            max_length=max_length,
            seed=seed,
            bf16=bf16,
            recompute=recompute,
            processes=int(os.environ.get("WORLD_SIZE", "1")),
        )
        display = _display()
        be_quiet()
        if dry_run:
            _show_plan(settings, output, as_json)
            return
        from vanishing.workflow.job import run as run_job

        try:
            result = run_job(settings, output, resume=resume, display=display)
        except Interrupted as error:
            raise Interrupted(f"{error}. Go on with the same command and --resume.", error.signal) from None
        if result is not None:
            _show_result(result, output, as_json)


def _display() -> Display:
    # One process speaks for all.
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    return TerminalDisplay(console) if console.is_terminal else LineDisplay(console)


def _show_plan(settings: Settings, output: Path, as_json: bool) -> None:
    from vanishing.workflow.estimate import estimate

    planned = estimate(settings, output)
    if as_json:
        typer.echo(json.dumps(planned.to_dict(), indent=2))
        return
    typer.echo(str(planned.plan))
    console = Console()
    for line in _plan_lines(planned):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _plan_lines(planned: Estimate) -> list[str]:
    facts = planned.to_dict()
    lines = [
        f"Task: {facts['task']}; {facts['train_examples']:,} examples to train on, {facts['held_out_examples']:,} to "
        f"measure on ({facts['held_out']}).",
        *facts["notes"],
        f"Steps: {facts['steps']:,}; the original is gone after step {facts['fade_ends_at']:,}.",
        f"Size of the weights: {megabytes(facts['bytes']['original'])} now, {megabytes(facts['bytes']['compressed'])} "
        f"in the end.",
        f"Peak memory of {facts['memory_of']}: about {facts['peak_memory_bytes'] / 1e9:.1f} GB.",
    ]
    if facts["new_head"]:
        lines.insert(1, "The classifier is new: the original is trained first, for as many steps.")
    return lines


def _show_result(result: Result, output: Path, as_json: bool) -> None:
    from vanishing.workflow.figures import figures

    facts: dict[str, Any] = result.to_dict()
    if as_json:
        typer.echo(json.dumps({"output": str(output)} | facts, indent=2))
        return
    table = Table("", "original", "small")
    for row in figures(result, megabytes):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(
        f"Measured on {facts['held_out_examples']:,} held-out examples: {facts['held_out']}.", highlight=False
    )
    for line in (f"The model: {output}", f"The report: {output / 'report.html'}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
