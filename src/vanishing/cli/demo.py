"""`vanishing demo`: three techniques by four strategies on handwritten digits."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from vanishing.bench.arms import ARMS, VCON
from vanishing.bench.study import Design, Study, run_study
from vanishing.bench.training import Budget
from vanishing.bench.wording import cells, kilobytes, percent, verdict
from vanishing.compressors import Binary, LowRank, MagnitudePruning
from vanishing.granularity import PerTensor

if TYPE_CHECKING:
    from vanishing.bench.tasks import Task

TECHNIQUES = {
    # As many weights stay as a binary weight keeps of its bits.
    "1 weight in 32 kept": MagnitudePruning(sparsity=31 / 32),
    "binary weights": Binary(granularity=PerTensor()),
    "rank 3": LowRank(rank=3),
}
DENSE_BUDGET = Budget(steps=400, fade_steps=150, learning_rate=2e-3)
BUDGET = Budget(steps=180, fade_steps=72, learning_rate=1e-3)


def run(
    output: Annotated[Path, typer.Option(help="Folder for the models, results.json and report.html.")] = Path(
        "vanishing-demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Number of random starts.")] = 3,
) -> None:
    """Make a small vision transformer smaller, three techniques by four ways, and compare them.

    Takes a few minutes on two cores and no network.
    """
    console = Console()
    try:
        from vanishing.bench.digits import digits_task
        from vanishing.bench.report import render_report
    except ImportError as error:
        _fail(str(error))
    _check_writable(output)
    # More threads than this only wait for each other on a model of this size.
    torch.set_num_threads(min(2, torch.get_num_threads()))
    design = Design([digits_task(seed) for seed in range(seeds)], TECHNIQUES, ARMS, DENSE_BUDGET, BUDGET)
    console.print(_introduction(design.tasks[0], design))
    study = _run_with_progress(design, output / "models", console)
    _print_results(study, console)
    report = output / "report.html"
    report.write_text(render_report(study), encoding="utf-8")
    (output / "results.json").write_text(study.to_json(), encoding="utf-8")
    console.print(f"\nThe whole story with charts: [bold]{report.resolve()}[/]", soft_wrap=True)


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(f"vanishing demo: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _fail(f"cannot write to {folder} ({error.strerror}). Name another folder with --output.")


def _introduction(task: Task, design: Design) -> str:
    return (
        f"A small vision transformer on {task.name}, {len(design.tasks)} seeds: trained, then made smaller by "
        f"{len(design.techniques)} techniques in {len(design.arms)} ways, {design.budget.steps} steps each."
    )


def _run_with_progress(design: Design, folder: Path, console: Console) -> Study:
    columns = (BarColumn(bar_width=20), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, TextColumn("[dim]{task.description}"), console=console) as progress:
        bar = progress.add_task("", total=design.steps)
        return run_study(design, folder, lambda what: progress.update(bar, advance=1, description=what))


def _print_results(study: Study, console: Console) -> None:
    table = Table(title="Finished models, saved, loaded and tested: mean ± sample standard deviation over seeds")
    table.add_column("technique")
    table.add_column("way")
    table.add_column("accuracy, %", justify="right")
    table.add_column("on disk", justify="right")
    table.add_column("smaller", justify="right")
    table.add_row("none", "the original", percent(study.dense_accuracy), kilobytes(study.dense_bytes), "1.0×")
    for technique in study.design.techniques:
        table.add_section()
        for arm in study.design.arms:
            table.add_row(
                technique, arm.name, *cells(study, technique, arm.name), style="bold" if arm is VCON else None
            )
    console.print(table)
    for technique in study.design.techniques:
        console.print(
            f"[bold]{technique}[/]: {verdict(study.lead(technique), len(study.design.tasks))}", highlight=False
        )
