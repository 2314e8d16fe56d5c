"""The report of a run: one page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from html import escape
from importlib import resources
from string import Template

import torch
import transformers

import vanishing
from vanishing.charts import get_plotlyjs, graph_objects, to_html
from vanishing.workflow.figures import figures, original_in_words
from vanishing.workflow.job import Result
from vanishing.workflow.models import shown_name

# Colors that color-blind readers can tell apart (Okabe and Ito).
_SHIPPED, _BLEND, _GRAY = "#d55e00", "#0072b2", "#888888"


def report_page(result: Result) -> str:
    """Return the page: figures before and after, the training, layers and settings."""
    settings = result.job.settings
    facts = result.to_dict()
    return Template(resources.files(__package__).joinpath("report_template.html").read_text("utf-8")).substitute(
        name=escape(shown_name(settings.model)),
        plotly=get_plotlyjs(),
        verdict=escape(verdict(result)),
        figures="".join(_row(row, 1) for row in figures(result, "{:,} bytes".format)),
        examples=f"{facts['held_out_examples']:,}",
        held_out=escape(facts["held_out"]),
        original=original_in_words(result),
        steps=f"{result.steps:,}",
        duration=str(timedelta(seconds=round(result.seconds))),
        fade=f"{result.fade:,}",
        loss_chart=_loss_chart(result),
        metric_section=_metric_section(result),
        beta_chart=_beta_chart(result),
        layers=_layers(result),
        settings=escape(settings.model_dump_json(indent=2)),
        version=vanishing.__version__,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
    )


def verdict(result: Result) -> str:
    """Return in one sentence how much smaller the model is and what that cost."""
    metric = result.job.task.metric
    before, after = result.before[metric], result.after[metric]
    worse = after - before if result.job.task.lower_is_better else before - after
    times = f"{result.dense_bytes / result.small_bytes:.1f} times smaller on disk"
    name = metric.replace("_", " ")
    if worse == 0:
        return f"{times}, with the same {name}."
    change = f"{abs(worse):.3g}" if result.job.task.lower_is_better else f"{100 * abs(worse):.2f} points"
    return f"{times}; its {name} is {change} {'worse' if worse > 0 else 'better'}."


def _row(cells: Sequence[str], numbers_from: int) -> str:
    columns = (f"<td{' class=number' if i >= numbers_from else ''}>{escape(c)}</td>" for i, c in enumerate(cells))
    return f"<tr>{''.join(columns)}</tr>"


def _layers(result: Result) -> str:
    rows = []
    for row in result.summary.rows:
        after = row.after
        nonzeros = "" if after.nonzeros is None else f"{after.nonzeros / max(1, after.parameters):.1%}"
        cells = (row.name, row.layer, row.technique, f"{row.before.bytes:,}", f"{after.bytes:,}", nonzeros)
        rows.append(_row(cells, 3))
    return "".join(rows)


def _points(result: Result, name: str) -> tuple[list[float], list[float]]:
    logged = [entry for entry in result.log if name in entry]
    return [entry["step"] for entry in logged], [entry[name] for entry in logged]


def _loss_chart(result: Result) -> str:
    figure = graph_objects.Figure()
    steps, losses = _points(result, "loss")
    figure.add_scatter(x=steps, y=losses, name="in training", mode="lines", line={"color": _BLEND, "width": 1.5})
    steps, losses = _points(result, "eval_loss")
    figure.add_scatter(x=steps, y=losses, name="held out, as shipped", mode="lines+markers", line={"color": _SHIPPED})
    figure.update_yaxes(title="loss")
    return to_html(figure, xaxis="optimizer step")


def _metric_section(result: Result) -> str:
    name = result.job.task.metric
    figure = graph_objects.Figure()
    drawn = False
    for key, label, color in ((f"eval_{name}", "as shipped", _SHIPPED), (f"eval_blend_{name}", "in training", _BLEND)):
        steps, values = _points(result, key)
        if steps:
            drawn = True
            figure.add_scatter(x=steps, y=values, name=label, mode="lines+markers", line={"color": color})
    if not drawn:
        return ""
    line = {"color": _GRAY, "dash": "dash", "width": 1}
    figure.add_hline(y=result.before[name], line=line, annotation={"text": "the original"})
    figure.update_yaxes(title=name.replace("_", " "))
    return to_html(figure, xaxis="optimizer step")


def _beta_chart(result: Result) -> str:
    figure = graph_objects.Figure()
    for name, label, color in (("beta", "beta, the original's share", _BLEND), ("gap", "gap between the forms", _GRAY)):
        steps, values = _points(result, name)
        figure.add_scatter(x=steps, y=values, name=label, mode="lines", line={"color": color})
    figure.update_yaxes(title="share", rangemode="tozero")
    return to_html(figure, xaxis="optimizer step")
