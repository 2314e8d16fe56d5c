"""Which gradient the latent weights get, whether they are drawn to zero or to where they are rounded to, and scales.

A small vision transformer on scikit-learn's digits, compressed by VCON with the budget of `vanishing demo`; every
variant of a technique starts from the same dense models. Test accuracy of the finished, saved and reloaded models.

    python benchmarks/gradient_routes.py --seeds 5
    python benchmarks/gradient_routes.py --only "pruned 95 %" "2 bits"
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from vanishing import Compressor, Gradient, MagnitudePruning, Quantization
from vanishing.bench.arms import VCON
from vanishing.bench.digits import digits_task
from vanishing.bench.study import Design, Study, run_study
from vanishing.bench.wording import percent
from vanishing.cli.demo import BUDGET, DENSE_BUDGET

FIRST_SEED = 10
"""Seeds below are those of the demo, whose settings were chosen before."""
DECAYS = (2e-4, 2e-3, 2e-2)
DAMPINGS = (1e-4, 1e-3, 1e-2)
CLIP = 0.3
"""The least share of the range where scales are searched for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of random starts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=list(TECHNIQUES), choices=TECHNIQUES, help="techniques")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    variants = {f"{name}, {how}": each for name in options.only for how, each in TECHNIQUES[name].items()}
    tasks = [digits_task(FIRST_SEED + seed) for seed in range(options.seeds)]
    design = Design(tasks, variants, (VCON,), DENSE_BUDGET, BUDGET)
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=design.steps)
        print_table(run_study(design, Path(folder), lambda what: progress.update(bar, advance=1, description=what)))


def prunings(sparsity: float) -> dict[str, Compressor]:
    """Return the variants of pruning by what they are called in the table."""
    routes = (Gradient.STRAIGHT_THROUGH, Gradient.EXACT, Gradient.DECAYING)
    return {route.value: MagnitudePruning(sparsity, gradient=route) for route in routes} | {
        f"straight-through, decay {decay:g}": MagnitudePruning(sparsity, decay=decay) for decay in DECAYS
    }


def quantizations(bits: int) -> dict[str, Compressor]:
    """Return the variants of quantization by what they are called in the table."""
    routes = (Gradient.STRAIGHT_THROUGH, Gradient.CLIPPED)
    variants: dict[str, Compressor] = {route.value: Quantization(bits, gradient=route) for route in routes}
    variants |= {f"straight-through, damping {damping:g}": Quantization(bits, damping=damping) for damping in DAMPINGS}
    if bits > 1:
        variants |= {
            f"{route.value}, scales searched for": Quantization(bits, gradient=route, clip=CLIP) for route in routes
        }
    return variants


TECHNIQUES = {f"pruned {share:.0%}".replace("%", " %"): prunings(share) for share in (0.9, 0.95)} | {
    f"{bits} bit{'s' if bits > 1 else ''}": quantizations(bits) for bits in (1, 2, 4)
}


def print_table(study: Study) -> None:
    """Print mean and spread of each variant, and its accuracy for each seed."""
    print(f"dense {percent(study.dense_accuracy)} %")
    for name in study.design.techniques:
        each = "  ".join(f"{100 * run.outcome.accuracy:.1f}" for run in study.of(name, VCON.name))
        print(f"{name:45} {percent(study.accuracy(name, VCON.name)):>12} %   {each}")


if __name__ == "__main__":
    main()
