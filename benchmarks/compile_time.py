"""What `torch.compile` makes of a whole transition, ViT-Tiny/16: how many graphs, and how fast.

Each arm is walked from beta = 1 over a fade to beyond its end, compiled and, step beside step in the same process,
eager; the dense model is there for comparison. Of each third of the way are reported: how many graphs were traced up to
its end (one while beta moves and one when the original is gone, if all is well), the first compiled step, in which a
new graph is compiled, and after the warm-up the ratios of the times of a training step, compiled / eager. Compiled
kernels are not taken over from earlier runs.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --size 224 --pairs 8 --recompute --arms dense binary
    python benchmarks/compile_time.py --bf16 --device cuda
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from paired import Ratios, Step, machine, seconds_of, time_pairs, write_record
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from workload import Advance, Workload, dense, make_step

import vanishing

PHASES = ("beta = 1", "fading", "after")
ARMS: dict[str, vanishing.Compressor | None] = {
    "dense": None,
    "pruning 90 %": vanishing.MagnitudePruning(sparsity=0.9),
    "binary": vanishing.Binary(),
    "low rank 16": vanishing.LowRank(rank=16),
}


@dataclass(frozen=True)
class Phase:
    """A third of a transition: graphs and graph breaks since its beginning, seconds of the first compiled step."""

    arm: str
    phase: str
    graphs: int
    graph_breaks: int
    first_seconds: float
    compiled_to_eager: Ratios


def main() -> None:
    options = _options()
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
        _require_compiler()
    autocast = torch.bfloat16 if options.bf16 else None
    workload = Workload(size=options.size, batch=options.batch, device=options.device, autocast=autocast)
    settings = f"{'bfloat16' if options.bf16 else 'float32'}{', activations recomputed' if options.recompute else ''}"
    print(f"ViT-Tiny/16 at {options.size} px, batch {options.batch}, {settings}, {machine(options.device)}")
    titles = f"{'graphs':>7}{'breaks':>7}{'first s':>9}{Ratios.titles('eager ms', 'compiled')}"
    print(f"{'arm':13}{'':9}{titles}")
    phases = []
    for arm in options.arms:
        for phase in measure(workload, arm, options):
            phases.append(phase)
            print(_line(phase), flush=True)
    write_record(options, {"phases": [asdict(phase) for phase in phases]})


def measure(workload: Workload, arm: str, options: argparse.Namespace) -> Iterator[Phase]:
    """Yield what is seen in each phase of a transition; the dense model has one."""
    torch._dynamo.reset()
    counters.clear()
    length = options.warm_up + options.pairs
    with fresh_cache():
        eager, compiled = (_step(workload, arm, length, options.recompute, compile=way) for way in (False, True))
        for phase in PHASES if ARMS[arm] else ("",):
            first = seconds_of(compiled, workload.device)
            eager()
            for _ in range(options.warm_up - 1):
                compiled()
                eager()
            ratios = time_pairs(eager, compiled, pairs=options.pairs, device=workload.device)
            breaks = sum(counters["graph_break"].values())
            yield Phase(arm, phase, counters["stats"]["unique_graphs"], breaks, first, ratios)


def _step(workload: Workload, arm: str, length: int, recompute: bool, *, compile: bool) -> Step:
    """Return the training step of an arm with `length` steps at beta = 1, and as many over which it falls to 0."""
    compressor = ARMS[arm]

    def prepare(model: nn.Module) -> Advance:
        advance = dense(model)
        if compressor is not None:
            schedule = vanishing.LinearSchedule(start=length, steps=length)
            recipe = vanishing.Recipe(rules={nn.Linear: compressor}, ignore=["classifier"], schedule=schedule)
            advance = vanishing.prepare(model, recipe).step
        if recompute:
            model.activation_checkpointing_enable()  # type: ignore[operator]
        if compile:
            model.compile()
        return advance

    return make_step(workload, prepare)


def _line(phase: Phase) -> str:
    compiling = f"{phase.graphs:7}{phase.graph_breaks:7}{phase.first_seconds:9.1f}"
    return f"{phase.arm:13}{phase.phase:9}{compiling}{phase.compiled_to_eager}"


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise SystemExit(f"torch.compile needs a C++ compiler on a CPU, and {compiler} is not there. Install g++.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels, a multiple of 16")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16, which is slow on many CPUs")
    parser.add_argument("--recompute", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--pairs", type=int, default=20, help="measured pairs of steps per arm and phase")
    parser.add_argument("--warm-up", type=int, default=3, help="pairs of steps before the measurement, at least 1")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), metavar="ARM")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
