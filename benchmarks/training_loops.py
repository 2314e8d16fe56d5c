"""The same compression through four training loops: beta must be the same after every optimizer step of each.

MiniLM-L6 is fine-tuned on Reuters R8 while 90 % of the weights of its encoder's linear layers vanish over 40 % of the
optimizer steps: in a plain PyTorch loop, with transformers' Trainer, with Lightning and with Accelerate, each with
batches of 32 and with 4 micro-batches of 8, and with the Trainer in two processes of 16. Head, order of the data,
AdamW, learning rates and the loss (the mean over the examples of an optimizer step) are the same. The plain loop is
told the length of the fade in steps; the others are told "40%" and find it out.

The program fails where a loop's beta is not `max(1 - t / Q, 0)` after optimizer step t. It also shows how far the
losses are from those of the first loop, and the test accuracy of the finished, saved and reloaded models. What differs
there is rounding, which grows as a training goes on; and in two processes the last batch of an epoch has examples of
the first one besides, as processes need equal shares.

    python benchmarks/training_loops.py
    python benchmarks/training_loops.py --steps 12 --only plain trainer trainer-two-processes
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from torch import distributed

import vanishing
from loops import LOOPS, Loop, Record, Setup, trainer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from common import FADE_SHARE, Task, accuracy
from text_classification import make_task

PROCESSES = 2
ACCUMULATION = 4
FIRST_PROCESS = 0
SHOWN_OF_AN_ERROR = 2_000
"""Characters at its end."""


def run_here(loop: Loop, setup: Setup, folder: Path) -> Record:
    """Train in this process, and save the finished model to a folder."""
    record = Record()
    vanishing.save(loop(setup, record).finish(), folder / "model")
    return record


def run_in_processes(setup: Setup, folder: Path) -> Record:
    """Train with the Trainer in several processes; return what they saw together."""
    threads = max(torch.get_num_threads() // PROCESSES, 1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command = [*launcher, __file__, f"--process-of={folder}", f"--steps={setup.steps}", f"--threads={threads}"]
    finished = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stderr=subprocess.PIPE)
    if finished.returncode:
        raise SystemExit(f"trainer-two-processes failed:\n{finished.stderr.decode()[-SHOWN_OF_AN_ERROR:]}")
    records = [Record(**json.loads(_file_of_process(folder, rank).read_text())) for rank in range(PROCESSES)]
    if any(record.betas != records[0].betas for record in records):
        raise SystemExit("trainer-two-processes: beta is not the same in both processes.")
    return Record(records[0].betas, [sum(shares) for shares in zip(*(r.losses for r in records), strict=True)])


def run_as_process(setup: Setup, folder: Path) -> None:
    """Be one of the processes that `run_in_processes` started."""
    record = Record()
    model = trainer(setup, record).finish()
    rank = distributed.get_rank()
    if rank == FIRST_PROCESS:
        vanishing.save(model, folder / "model")
    _file_of_process(folder, rank).write_text(json.dumps(asdict(record)))
    distributed.destroy_process_group()


def _file_of_process(folder: Path, rank: int) -> Path:
    return folder / f"process-{rank}.json"


RUNS: dict[str, tuple[Loop | None, int]] = {name: (loop, 1) for name, loop in LOOPS.items()}
RUNS |= {f"{name}-accumulated": (loop, ACCUMULATION) for name, loop in LOOPS.items()}
RUNS |= {"trainer-two-processes": (None, 1)}
"""The loop of every run, None for several processes, and its micro-batches an optimizer step."""


@dataclass(frozen=True)
class Result:
    """One run: beta after each optimizer step, the loss of each, and what came out."""

    run: str
    betas: list[float]
    losses: list[float]
    test_accuracy: float
    seconds: float

    @property
    def gone(self) -> int | None:
        """The optimizer step after which beta is 0."""
        return next((step for step, beta in enumerate(self.betas, 1) if beta == 0.0), None)

    def largest_loss_difference(self, other: Result) -> float:
        return max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=False))


def main() -> None:
    options = _options()
    _be_quiet()
    torch.set_num_threads(options.threads)
    task = make_task()
    steps = task.steps if options.steps is None else options.steps
    if not 3 <= steps <= task.steps:
        raise SystemExit(f"--steps {steps}: a run has a fade and something after it. Give 3 to {task.steps}.")
    if options.process_of:
        run_as_process(Setup(task, steps, processes=PROCESSES), options.process_of)
        return
    console = Console()
    results: list[Result] = []
    for name in options.only:
        results.append(measure(name, task, steps))
        console.print(f"{name}: {results[-1].test_accuracy:.2%} in {results[-1].seconds:.0f} s")
    console.print(table(results))
    differences = deviations(results, steps)
    write(options.output, results, differences, {"steps": steps, "threads": options.threads})
    console.print(f"Written to {options.output}")
    if differences:
        raise SystemExit("\n".join(differences))
    console.print(f"beta is the same after each of {steps} optimizer steps in every loop.")


def measure(name: str, task: Task, steps: int) -> Result:
    """Return what a run saw, and the test accuracy of the model that it saved."""
    loop, accumulation = RUNS[name]
    setup = Setup(task, steps, accumulation)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        record = run_in_processes(setup, Path(folder)) if loop is None else run_here(loop, setup, Path(folder))
        seconds = time.perf_counter() - started
        shipped = vanishing.load(Path(folder) / "model", task.blank())
    return Result(name, record.betas, record.losses, accuracy(task, shipped), seconds)


def deviations(results: Sequence[Result], steps: int) -> list[str]:
    """Return a sentence for every run whose betas are not those of the paper's schedule."""
    fade = round(FADE_SHARE * steps)
    expected = [max(1 - step / fade, 0.0) for step in range(1, steps + 1)]
    found = []
    for result in results:
        if len(result.betas) != steps:
            found.append(f"{result.run}: made {len(result.betas)} optimizer steps, expected {steps}.")
        pairs = enumerate(zip(result.betas, expected, strict=False), 1)
        different = next((f"step {t} is {got}, expected {due}" for t, (got, due) in pairs if got != due), None)
        if different:
            found.append(f"{result.run}: beta after optimizer {different}.")
    return found


def table(results: Sequence[Result]) -> Table:
    """Return the runs as a table."""
    caption = (
        f"beta 0: the optimizer step after which beta is 0. loss: the largest difference of a step's loss from "
        f"{results[0].run}'s. test %: of the reloaded model."
    )
    shown = Table("run", caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("optimizer steps", "beta 0", "loss", "test %", "s"):
        shown.add_column(column, justify="right")
    for result in results:
        shown.add_row(
            result.run,
            str(len(result.betas)),
            "never" if result.gone is None else str(result.gone),
            f"{result.largest_loss_difference(results[0]):.1e}",
            f"{100 * result.test_accuracy:.2f}",
            f"{result.seconds:.0f}",
        )
    return shown


def write(path: Path, results: Sequence[Result], differences: Sequence[str], settings: dict[str, int]) -> None:
    """Write all runs with their betas and losses to a JSON file."""
    spread = max(one.largest_loss_difference(other) for one, other in itertools.product(results, repeat=2))
    record = {
        "settings": settings | {"torch": torch.__version__},
        "betas_equal": not differences,
        "largest_loss_difference": spread,
        "runs": [asdict(result) | {"step_of_beta_0": result.gone} for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def _be_quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Of missing workers for data that is in memory.
    warnings.filterwarnings("ignore", module="lightning")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), default=tuple(RUNS), metavar="NAME")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: two epochs; at least 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of all processes (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results/training_loops.json"), metavar="JSON")
    parser.add_argument("--process-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
