"""A run of the Trainer that is killed again and again, each time resumed from its last complete checkpoint.

As a program: `python killed_runs.py FOLDER KILLS SEED` kills KILLS attempts at random moments, lets one more come to an
end, and leaves the finished model in `FOLDER/small`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import logging

import vanishing
from vanishing.integrations.transformers import TransitionCallback, last_complete_checkpoint

STEPS = 150
MOST_CHECKPOINTS = 6
"""An attempt is killed a moment after it has written at most so many."""
MOMENT = 0.2
"""Seconds."""


def run(folder: Path) -> None:
    """Train from the last complete checkpoint, finish and save."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=16, problem_type="single_label_classification",
        )
    )  # fmt: skip
    recipe = vanishing.Recipe(
        {"*.attention.*": vanishing.LowRank(rank=4), "*": vanishing.MagnitudePruning(0.5)},
        ignore=["classifier"],
        schedule=vanishing.LinearSchedule(start="10%", steps="50%"),
    )
    transition = vanishing.prepare(model, recipe)
    words = torch.randint(5, 60, (96, 12), generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            per_device_train_batch_size=8,
            max_steps=STEPS,
            lr_scheduler_type="constant",
            save_strategy="steps",
            save_steps=3,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": row, "labels": (row[0] < 32).long()} for row in words],
        callbacks=[TransitionCallback(transition)],
    )
    checkpoint = last_complete_checkpoint(folder / "checkpoints")
    (folder / "began").open("a").write(f"{checkpoint or 'the beginning'}\n")
    trainer.train(resume_from_checkpoint=checkpoint)
    transition.finish()
    if (folder / "small").exists():
        shutil.rmtree(folder / "small")
    vanishing.save(model, folder / "small")


def attempt(folder: Path, chance: random.Random | None) -> None:
    """Run in a process of its own, which is killed at a random moment where there is a chance."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(folder)
            status = 0
        finally:
            os._exit(status)
    if chance is None:
        _, status = os.waitpid(child, 0)
    else:
        status = _kill(child, folder / "checkpoints", chance)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise SystemExit("an attempt failed by itself")


def _kill(child: int, checkpoints: Path, chance: random.Random) -> int:
    """Wait for some checkpoints and a moment more, kill the process unless it has ended, and return its status."""
    before = set(checkpoints.glob("*"))
    written: set[Path] = set()
    wanted = chance.randint(0, MOST_CHECKPOINTS)
    while len(written) < wanted:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        written |= set(checkpoints.glob("*")) - before
        time.sleep(0.002)
    time.sleep(chance.uniform(0.0, MOMENT))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    for _ in range(kills):
        attempt(folder, chance)
    attempt(folder, None)


if __name__ == "__main__":
    main()
