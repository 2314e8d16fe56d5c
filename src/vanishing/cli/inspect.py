"""`vanishing inspect`: what a model weighs, layer by layer, and what could be compressed in it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated

import typer

from vanishing.cli.outcome import one_line_errors
from vanishing.cli.quiet import be_quiet
from vanishing.cli.wording import megabytes

if TYPE_CHECKING:
    from torch import nn

    from vanishing.summary import Summary


def run(
    model: Annotated[str, typer.Argument(help="Folder of a model, compressed or not, or its name on the hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show the layers of a model, their sizes, and what could be done with them.

    Exit codes: 0 done; 2 the model cannot be read.
    """
    with one_line_errors("inspect"):
        from vanishing.summary import summary
        from vanishing.workflow.models import read_for_inspection

        be_quiet()
        read = read_for_inspection(model)
        sizes = summary(read)
        options = _options(read)
        if as_json:
            typer.echo(json.dumps(_plain(sizes, options), indent=2))
            return
        typer.echo(_table(sizes, options))
        typer.echo(_total(sizes, options))


@dataclass(frozen=True)
class Options:
    """What could be done with a layer: names of techniques, and why others could not."""

    techniques: tuple[str, ...]
    reason: str


def _options(model: nn.Module) -> dict[str, Options]:
    """What could be done with every layer by a rule that names it."""
    from vanishing.compressors import (
        ActivationQuantization,
        ChannelPruning,
        HeadPruning,
        LowRank,
        MagnitudePruning,
        Quantization,
        WidthPruning,
    )
    from vanishing.recipe import Recipe
    from vanishing.schedules import StepSchedule

    techniques = {
        "prune": MagnitudePruning(sparsity=0.5),
        "quantize": Quantization(bits=4),
        "activations": ActivationQuantization(bits=8),
        "low rank": LowRank(ratio=0.5),
        "heads": HeadPruning(0.5),
        "width": WidthPruning(0.5),
        "channels": ChannelPruning(0.5),
    }
    found: dict[str, dict[str, str]] = {}
    for name, technique in techniques.items():
        for row in Recipe({"*": technique}, schedule=StepSchedule(at=0)).match(model).rows:
            found.setdefault(row.name, {})[name] = "" if row.outcome == "compress" else row.detail
    options = {}
    for layer, reasons in found.items():
        possible = tuple(name for name, reason in reasons.items() if not reason)
        options[layer] = Options(possible, next((reason for reason in reasons.values() if reason), ""))
    return options


def _table(sizes: Summary, options: dict[str, Options]) -> str:
    from rich.markup import escape
    from rich.table import Table

    from vanishing.text import as_text

    table = Table("layer", "type")
    for title in ("parameters", "not zero", "bytes", "of all"):
        table.add_column(title, justify="right")
    table.add_column("done")
    table.add_column("could")
    total = sizes.after.bytes
    for row in sizes.rows:
        after = row.after
        nonzeros = "" if after.nonzeros is None or not after.parameters else f"{after.nonzeros / after.parameters:.0%}"
        could = options.get(row.name)
        table.add_row(
            escape(row.name or "(the model)"),
            row.layer,
            f"{after.parameters:,}",
            nonzeros,
            f"{after.bytes:,}",
            f"{after.bytes / total:.1%}",
            escape(row.technique),
            "" if could is None else escape(_in_words(could)),
        )
    return as_text(table, width=max(100, shutil.get_terminal_size((200, 24)).columns)).rstrip()


def _in_words(options: Options) -> str:
    return ", ".join(options.techniques) or shorten(options.reason, 45, placeholder=" ...")


def _total(sizes: Summary, options: dict[str, Options]) -> str:
    able = sum(row.after.bytes for row in sizes.rows if options.get(row.name, Options((), "")).techniques)
    before, after = sizes.before, sizes.after
    lines = [f"{after.parameters:,} parameters, {megabytes(after.bytes)} as vanishing.save would write them."]
    if before.bytes != after.bytes:
        lines.append(f"Before it was compressed: {before.parameters:,} parameters, {megabytes(before.bytes)}.")
    else:
        lines.append(f"Layers that could be compressed hold {able / after.bytes:.0%} of that.")
    if any(row.layer == "Embedding" for row in sizes.rows):
        lines.append("An embedding is compressed where a recipe gives its exact name or its type.")
    return "\n".join(lines)


def _plain(sizes: Summary, options: dict[str, Options]) -> dict[str, object]:
    return {
        "before": asdict(sizes.before),
        "after": asdict(sizes.after),
        "layers": [
            {
                "name": row.name,
                "type": row.layer,
                "technique": row.technique,
                "before": asdict(row.before),
                "after": asdict(row.after),
                "could": list(options[row.name].techniques) if row.name in options else [],
            }
            for row in sizes.rows
        ],
    }
