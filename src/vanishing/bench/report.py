"""The report of a study: one page that needs no network."""

from __future__ import annotations

from html import escape
from importlib import resources
from string import Template

import torch

import vanishing
from vanishing.bench.arms import ARMS, VCON
from vanishing.bench.statistics import summarize
from vanishing.bench.study import Study
from vanishing.bench.wording import cells, kilobytes, percent, verdict
from vanishing.charts import get_plotlyjs, graph_objects, to_html

# Colors that color-blind readers can tell apart (Okabe and Ito); the line of each has a width or a dash of its own too.
_COLORS = dict(zip((arm.name for arm in ARMS), ("#0072b2", "#009e73", "#cc79a7", "#d55e00"), strict=True))
_DENSE_COLOR = "#888888"


def render_report(study: Study) -> str:
    """Return the page: tables, accuracy on the way, beta and sizes."""
    design = study.design
    task = design.tasks[0]
    seeds = len(design.tasks)
    return Template(resources.files(__package__).joinpath("report_template.html").read_text("utf-8")).substitute(
        task=escape(task.name),
        plotly=get_plotlyjs(),
        examples_train=f"{len(task.train.targets):,}",
        examples_test=f"{len(task.test.targets):,}",
        dense_accuracy=percent(study.dense_accuracy),
        dense_bytes=kilobytes(study.dense_bytes),
        technique_count=len(design.techniques),
        arm_count=len(design.arms),
        seeds_text="from one random start" if seeds == 1 else f"from {seeds} random starts (seeds)",
        steps=f"{design.budget.steps:,}",
        arms="".join(f"<dt>{escape(arm.name)}</dt><dd>{escape(arm.meaning)}</dd>" for arm in design.arms),
        sections="".join(_section(study, technique) for technique in design.techniques),
        beta_chart=_beta_chart(study),
        size_chart=_size_chart(study),
        version=vanishing.__version__,
        torch_version=torch.__version__,
    )


def _section(study: Study, technique: str) -> str:
    rows = []
    for arm in study.design.arms:
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells(study, technique, arm.name))
        rows.append(f"<tr{' class=vcon' if arm is VCON else ''}><td>{escape(arm.name)}</td>{numbers}</tr>")
    return (
        f"<h2>{escape(technique[0].upper() + technique[1:])}</h2>"
        f'<p class="verdict">{escape(verdict(study.lead(technique), len(study.design.tasks)))}</p>'
        '<div class="wide"><table><tr><th></th><th class="number">right, %</th><th class="number">on disk</th>'
        f'<th class="number">smaller</th></tr>{"".join(rows)}</table></div>'
        "<p>Below, solid: what the model would score if it were shipped at that step. Dotted: what the model in "
        "training scores, as long as the original still has a share. Means over the seeds.</p>"
        f"{_accuracy_chart(study, technique)}"
    )


def _accuracy_chart(study: Study, technique: str) -> str:
    figure = graph_objects.Figure()
    for arm in study.design.arms:
        points = list(zip(*(run.curve for run in study.of(technique, arm.name)), strict=True))
        steps = [at[0].step for at in points]
        shipped = [100 * summarize([p.shipped for p in at]).mean for at in points]
        line = {"color": _COLORS[arm.name], "width": 4 if arm is VCON else 2}
        figure.add_scatter(x=steps, y=shipped, name=arm.name, mode="lines", line=line)
        # One point past the fade, where the two are the same, so that the dotted line ends on the solid one.
        blended = sum(at[0].beta > 0 for at in points)
        if blended:
            blend = [100 * summarize([p.blend for p in at]).mean for at in points[: blended + 1]]
            name = f"{arm.name}, in training"
            figure.add_scatter(
                x=steps, y=blend, name=name, mode="lines", showlegend=False, line=line | {"dash": "dot", "width": 2}
            )
    figure.add_hline(
        y=100 * study.dense_accuracy.mean,
        line={"color": _DENSE_COLOR, "dash": "dash", "width": 1},
        annotation={"text": "the original", "font": {"color": _DENSE_COLOR}},
    )
    figure.update_yaxes(title="test images right, %")
    return to_html(figure, xaxis="training step")


def _beta_chart(study: Study) -> str:
    budget = study.design.budget
    steps = list(range(budget.steps + 1))
    figure = graph_objects.Figure()
    for arm in study.design.arms:
        schedule = arm.schedule(budget.fade_steps)
        line = {"color": _COLORS[arm.name], "width": 4 if arm is VCON else 2}
        figure.add_scatter(x=steps, y=[schedule(t) for t in steps], name=arm.name, mode="lines", line=line)
        if arm.ramp is not None:
            ramp = arm.ramp(budget.fade_steps)
            figure.add_scatter(
                x=steps,
                y=[ramp(t) for t in steps],
                name=f"{arm.name}, strength missing",
                mode="lines",
                line=line | {"dash": "dot"},
            )
    figure.update_yaxes(title="share", range=[-0.05, 1.05])
    return to_html(figure, xaxis="training step")


def _size_chart(study: Study) -> str:
    sizes = {"the original": study.dense_bytes}
    sizes |= {technique: study.file_bytes(technique, VCON.name) for technique in study.design.techniques}
    figure = graph_objects.Figure()
    figure.add_bar(
        x=[size / 1000 for size in sizes.values()],
        y=[f"{escape(name)}<br>{kilobytes(size)}" for name, size in sizes.items()],
        orientation="h",
        marker={"color": [_DENSE_COLOR] + [_COLORS[VCON.name]] * len(study.design.techniques)},
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    return to_html(figure, xaxis="kB on disk")
