"""Where a run writes: what must not be in the way, how much room it needs, and files that are there whole or not."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from torch import nn

from vanishing.integrations.transformers import last_complete_checkpoint
from vanishing.workflow.problems import InputProblem

SETTINGS = "run.json"


def work_folder(output: Path) -> Path:
    """Return the folder of a run that is under way."""
    return output.with_name(f"{output.name}.work")


def write_whole(file: Path, text: str) -> None:
    """Write a file that appears when it is complete."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def check_places(output: Path, work: Path, resume: bool) -> None:
    """Raise `InputProblem` if the output, or an earlier run's folder, is in the way."""
    if os.path.ismount(output) or Path.cwd().is_relative_to(output):
        raise InputProblem(f"{output} is a place that cannot be exchanged. Give a new folder below or beside it.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputProblem(f"{output} exists and is not an empty folder. Give another --output.")
    if resume and not (work / SETTINGS).exists():
        raise InputProblem(f"there is no run to go on with: {work} is not there. Leave out --resume.")
    if work.exists() and not (work / SETTINGS).exists() and any(work.iterdir()):
        raise InputProblem(f"{work} is needed for checkpoints and holds something else. Give another --output.")
    if not resume and (work / SETTINGS).exists():
        raise InputProblem(f"{work} holds a run that was broken off. Go on with --resume, or remove it.")
    parent = next((each for each in output.absolute().parents if each.exists()), Path("/"))
    if not os.access(parent, os.W_OK):
        raise InputProblem(f"{parent} cannot be written to. Give another --output.")


def check_space(model: nn.Module, work: Path, new_head: bool) -> None:
    """Raise `InputProblem` if the disk has no room for what a run saves on its way."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # Weights and AdamW's two moments, of the old checkpoint and of the new one; the trained original.
    held = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    needed = (6 + new_head) * weights - held
    parent = next(each for each in work.absolute().parents if each.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputProblem(
            f"the checkpoints of the run need {needed / 1e6:,.0f} MB and the disk of {parent} has "
            f"{free / 1e6:,.0f} MB left. Free some space, or give another --output."
        )


def is_full(error: BaseException, work: Path) -> bool:
    """Whether an error comes from a full disk; PyTorch's own does not say so."""
    told = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    writing = "PytorchStreamWriter" in str(error)
    return told or (writing and work.exists())


def remove_incomplete(work: Path) -> None:
    """Remove what a full disk left of a checkpoint, so that there is room to go on."""
    for folder in (work / "checkpoints", work / "original-checkpoints"):
        kept = last_complete_checkpoint(folder)
        for checkpoint in folder.glob("checkpoint-*"):
            if str(checkpoint) != kept:
                shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.rmtree(work / "original-unfinished", ignore_errors=True)
