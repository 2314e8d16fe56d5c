"""Techniques from the flags of the command line."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator
from pathlib import Path

from vanishing.compressors import (
    ActivationQuantization,
    Binary,
    ChannelPruning,
    HeadPruning,
    LowRank,
    MagnitudePruning,
    Quantization,
    Ternary,
    WeightCompressor,
    WidthPruning,
)
from vanishing.errors import ConfigError
from vanishing.granularity import NM
from vanishing.recipe import Recipe
from vanishing.schedules import LinearSchedule
from vanishing.workflow.problems import InputProblem


def recipe_from_flags(
    *,
    prune: str | None,
    bits: int | None,
    activations: int | None,
    binary: bool,
    ternary: bool,
    low_rank: str | None,
    heads: float | None,
    width: float | None,
    channels: float | None,
    fade: str,
    ignore: list[str],
    freeze_original: bool,
) -> Recipe:
    """Return the recipe for every linear and convolution layer that flags describe.

    Args:
        prune: the share of zeros, as in "0.9", or "2:4".
        bits: of a weight.
        activations: bits of a number that goes into a layer, with a range for each token.
        binary: whether weights are binary.
        ternary: whether they are ternary.
        low_rank: the share of weights that is kept, as in "0.25", or the rank, as in "16".
        heads: the share of attention heads that vanish.
        width: the share of the hidden units of feed-forward blocks that vanish.
        channels: the share of the inner channels of blocks of convolutions that vanish.
        fade: steps, as in "1000", or a share of the run, as in "40%".
        ignore: globs of layers to leave alone.
        freeze_original: whether the originals of factored layers are not trained.

    Raises:
        InputProblem: no technique, two that exclude each other, or a value that is none.
    """
    values = [name for name, given in (("--bits", bits), ("--binary", binary), ("--ternary", ternary)) if given]
    if len(values) > 1:
        raise InputProblem(f"{' and '.join(values)} exclude each other. Give one of them.")
    chain: list[WeightCompressor] = []
    structure: list[WeightCompressor] = []
    if heads is not None:
        with _said_of(f"--heads {heads}"):
            structure.append(HeadPruning(heads))
    if width is not None:
        with _said_of(f"--width {width}"):
            structure.append(WidthPruning(width))
    if channels is not None:
        with _said_of(f"--channels {channels}"):
            structure.append(ChannelPruning(channels))
    if low_rank is not None:
        with _said_of(f"--low-rank {low_rank}"):
            chain.append(_low_rank(low_rank))
    if prune is not None:
        with _said_of(f"--prune {prune}"):
            chain.append(_pruning(prune))
    if bits is not None:
        with _said_of(f"--bits {bits}"):
            chain.append(Quantization(bits=bits))
    if binary or ternary:
        chain.append(Binary() if binary else Ternary())
    if activations is not None:
        with _said_of(f"--activations {activations}"):
            if low_rank is not None:
                raise InputProblem(
                    "--low-rank and --activations exclude each other: there are two layers afterwards, which a run of "
                    "its own can take. Give one of them."
                )
            chain.append(ActivationQuantization(bits=activations))
    if chain and structure:
        raise InputProblem(
            "--heads, --width and --channels cut layers, and nothing else can be done to them in the same run."
        )
    if not chain and not structure:
        raise InputProblem(
            "no technique. Give --prune, --bits, --binary, --ternary, --activations, --low-rank, --heads, --width or "
            "--channels, or a --recipe."
        )
    steps: int | str = int(fade) if fade.isdecimal() else fade
    with _said_of(f"--fade {fade}"):
        schedule = LinearSchedule(steps=steps)
    # All stand for every module: of two keys that are the same a mapping would keep one.
    rules = dict(zip(("*", "**", "***"), structure, strict=False)) or {"*": functools.reduce(operator.or_, chain)}
    return Recipe(rules, ignore=ignore, schedule=schedule, freeze_original=freeze_original)


@contextlib.contextmanager
def _said_of(flag: str) -> Iterator[None]:
    """Let an error name the flag that it comes from in the place of a class of the library."""
    try:
        yield
    except ConfigError as error:
        raise InputProblem(f"{flag}: {str(error).partition('): ')[2]}") from None


def _pruning(text: str) -> MagnitudePruning:
    kept, _, of = text.partition(":")
    if kept.isdecimal() and of.isdecimal():
        return MagnitudePruning(granularity=NM(int(kept), int(of)))
    return MagnitudePruning(sparsity=_number("--prune", text))


def _low_rank(text: str) -> LowRank:
    if text.isdecimal() and int(text) > 1:
        return LowRank(rank=int(text))
    return LowRank(ratio=_number("--low-rank", text))


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputProblem(f"{flag} {text}: expected a number.") from None


def recipe_from_file(file: Path) -> Recipe:
    """Return the recipe in a YAML or JSON file.

    Raises:
        InputProblem: there is none.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputProblem(f"--recipe {file} cannot be read: {error}") from None
    try:
        return Recipe.from_yaml(text)
    except ConfigError as error:
        raise InputProblem(f"--recipe {file}: {' '.join(str(error).split())}") from None
