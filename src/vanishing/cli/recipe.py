"""`vanishing recipe`: a commented recipe to start from, made for a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vanishing.cli.outcome import one_line_errors
from vanishing.cli.quiet import be_quiet
from vanishing.cli.wording import megabytes

if TYPE_CHECKING:
    from torch import nn


def run(
    model: Annotated[str, typer.Argument(help="Folder of a model of transformers, or its name on the hub.")],
    output: Annotated[Path | None, typer.Option(help="New file for the recipe; printed if not given.")] = None,
) -> None:
    """Write a commented recipe for a model: its groups of layers, their sizes, and the techniques to choose from.

    Exit codes: 0 done; 2 the model cannot be read, or the file exists.
    """
    with one_line_errors("recipe"):
        from vanishing.workflow.models import read_for_inspection, read_source, shown_name
        from vanishing.workflow.problems import InputProblem

        if output is not None and output.exists():
            raise InputProblem(f"{output} exists. Give another --output.")
        be_quiet()
        read_source(model)
        text = commented_recipe(read_for_inspection(model), shown_name(model))
        if output is None:
            typer.echo(text, nl=False)
            return
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputProblem(f"{output} cannot be written: {error.strerror}.") from None
        typer.echo(f"{output}: edit it, then give it to vanishing compress with --recipe {output}.")


def commented_recipe(model: nn.Module, name: str) -> str:
    """Return a recipe for a model as YAML with comments; as it stands it prunes nine weights of ten.

    Args:
        model: the model.
        name: what to call it.

    Raises:
        InputProblem: nothing in it can be compressed.
    """
    from vanishing.workflow.models import head_names
    from vanishing.workflow.problems import InputProblem

    heads = head_names(model)
    groups = list(_groups(model, heads))
    if not groups:
        raise InputProblem(f"{name} has no layer that can be compressed.")
    rules = "".join(_rule(*group) for group in groups)
    return f"""\
# A recipe for {name}. To see what it would do, give it to vanishing compress with --recipe and --dry-run.

# The first rule that matches a layer wins; * stands for anything. Put names in quotes.
# Techniques, each with what it takes; chain several with kind: chain and compressors: [...]
#   {{kind: magnitude_pruning, sparsity: 0.9}}            nine of ten weights become zero
#   {{kind: magnitude_pruning, granularity: {{kind: nm, n: 2, m: 4}}}}
#   {{kind: quantization, bits: 4}}                       or with granularity: {{kind: per_group, size: 64}}
#   {{kind: binary}}  {{kind: ternary}}
#   {{kind: activation_quantization, bits: 8}}            of what goes into a layer; last in a chain
#   {{kind: low_rank, ratio: 0.25}}                       or rank: 16, or energy: 0.9
rules:
{rules}{_heads(heads)}
# The original's share falls from 1 to 0 over this part of the training. The rest is recovery.
schedule:
  kind: linear_schedule
  steps: "40%"
"""


def _groups(model: nn.Module, heads: Sequence[str]) -> Iterator[tuple[str, int, int, str]]:
    """Layers whose names differ in numbers alone: their glob, how many, their bytes, and their type."""
    from vanishing.layers import find_kind
    from vanishing.workflow.models import is_below_any

    groups: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        kind = find_kind(module)
        if kind is None or kind.explicit_only or is_below_any(name, heads):
            continue
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        # In a model for a task, a body without a head stands under a name of its own.
        groups.setdefault(pattern if heads else f"*{pattern}", []).append(module)
    for pattern, modules in groups.items():
        size = sum(p.nbytes for module in modules for p in module.parameters(recurse=False))
        yield pattern, len(modules), size, type(modules[0]).__name__


def _rule(pattern: str, count: int, size: int, layer: str) -> str:
    layers = f"{count} layers" if count > 1 else "1 layer"
    return f"""\
  # {layers} ({layer}), {megabytes(size)}
  - match: "{pattern}"
    compressor: {{kind: magnitude_pruning, sparsity: 0.9}}
"""


def _heads(heads: Sequence[str]) -> str:
    if not heads:
        return ""
    lines = "".join(f'  - "{head}"\n' for head in heads)
    return f"\n# The head: small, and what accuracy hangs on.\nignore:\n{lines}"
