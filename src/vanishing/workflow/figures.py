"""What a run came to, in the words of its card, its report and the terminal."""

from __future__ import annotations

from collections.abc import Callable

from vanishing.workflow.job import Result


def figures(result: Result, size: Callable[[int], str]) -> list[tuple[str, str, str]]:
    """Return the rows of the table of a run: what is measured, of the original, of the small model.

    Args:
        result: of the run.
        size: a number of bytes in words.
    """
    metric = result.job.task.metric
    total = result.summary
    before, after = result.compressed_bytes
    return [
        (metric.replace("_", " "), f"{result.before[metric]:.4g}", f"{result.after[metric]:.4g}"),
        ("loss", f"{result.before['loss']:.4g}", f"{result.after['loss']:.4g}"),
        ("weights on disk", size(result.dense_bytes), size(result.small_bytes)),
        ("of these in compressed layers", size(before), size(after)),
        ("parameters", f"{total.before.parameters:,}", f"{total.after.parameters:,}"),
        ("of these not zero", "", f"{total.after.nonzeros:,}"),
        ("time of a forward pass, relative, where it was made", "1", f"{result.time_ratio:.2f}"),
    ]


def original_in_words(result: Result) -> str:
    """Return a sentence on what the original is that a model is compared with."""
    if result.job.new_head:
        return "The original was trained with the same settings before."
    return "The original is the model as it was given; it was not trained any further."
