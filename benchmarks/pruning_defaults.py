"""How often a mask is selected anew, whether it is frozen after the fade, and which gradient pruned weights get.

A small vision transformer on scikit-learn's digits, pruned by VCON with the budget of `vanishing demo`; every variant
starts from the same dense models. Test accuracy of the finished, saved and reloaded models.

    python benchmarks/pruning_defaults.py --sparsity 0.95 --seeds 5
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from vanishing import Gradient, MagnitudePruning
from vanishing.bench.arms import VCON
from vanishing.bench.digits import digits_task
from vanishing.bench.study import Design, Study, run_study
from vanishing.bench.wording import percent
from vanishing.cli.demo import BUDGET, DENSE_BUDGET

FIRST_SEED = 10
"""Seeds below are those of the demo, whose settings were chosen before."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--seeds", type=int, default=5, help="number of random starts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tasks = [digits_task(FIRST_SEED + seed) for seed in range(options.seeds)]
    design = Design(tasks, variants(options.sparsity), (VCON,), DENSE_BUDGET, BUDGET)
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=design.steps)
        print_table(run_study(design, Path(folder), lambda what: progress.update(bar, advance=1, description=what)))


def variants(sparsity: float) -> dict[str, MagnitudePruning]:
    """Return the techniques to compare by their names in the table."""
    settings = itertools.product(Gradient, (False, True), (1, 2, 4, 8))
    return {
        f"{gradient.value}, {'frozen after the fade' if freeze else 'never frozen'}, every {every}": MagnitudePruning(
            sparsity, gradient=gradient, freeze=freeze, update_every=every
        )
        for gradient, freeze, every in settings
        if gradient is not Gradient.CLIPPED
    }


def print_table(study: Study) -> None:
    """Print mean and spread of each variant, and its accuracy for each seed."""
    print(f"dense {percent(study.dense_accuracy)} %")
    for name in study.design.techniques:
        each = "  ".join(f"{100 * run.outcome.accuracy:.1f}" for run in study.of(name, VCON.name))
        print(f"{name:50} {percent(study.accuracy(name, VCON.name)):>12} %   {each}")


if __name__ == "__main__":
    main()
