"""Peak memory of a training step during the fade, against the dense step, ViT-Tiny/16.

Every arm runs in a process of its own. On a CPU two figures are taken: the peak of the bytes that live tensors hold
(every allocation and release of PyTorch's allocator from the first on, read from its profiler; the same in every run),
and the growth of the process's resident set (what the operating system saw, with the memory that the allocator keeps).
On a GPU it is the peak of the caching allocator.

    python benchmarks/memory.py --size 224
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from workload import ARMS, Workload, dense, make_step

WARM_UP = 2
MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """Peak memory of an arm's step, in bytes: held by tensors, and growth of the resident set (CPU only)."""

    arm: str
    tensor_bytes: int
    resident_bytes: int


def main() -> None:
    options = _options()
    workload = Workload(size=options.size, batch=options.batch, device=options.device)
    print(f"ViT-Tiny/16 at {options.size} px, batch {options.batch}, {options.device}, torch {torch.__version__}")
    print(f"{'arm':34}{'tensors MiB':>12}{'ratio':>8}{'resident MiB':>14}{'ratio':>8}")
    peaks: list[Peak] = []
    for arm in ("dense", *options.arms):
        tensor_bytes = _in_new_process(_tensor_peak, workload, arm)
        resident_bytes = 0 if options.device == "cuda" else _in_new_process(_resident_growth, workload, arm)
        peaks.append(Peak(arm=arm, tensor_bytes=tensor_bytes, resident_bytes=resident_bytes))
        print(_line(peaks[-1], peaks[0]), flush=True)
    if options.json:
        record = {"settings": vars(options) | {"json": str(options.json)}, "arms": [asdict(p) for p in peaks]}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def _line(peak: Peak, baseline: Peak) -> str:
    tensors = f"{peak.tensor_bytes / MIB:12.1f}{peak.tensor_bytes / baseline.tensor_bytes:8.3f}"
    if not baseline.resident_bytes:
        return f"{peak.arm:34}{tensors}"
    return (
        f"{peak.arm:34}{tensors}{peak.resident_bytes / MIB:14.1f}{peak.resident_bytes / baseline.resident_bytes:8.3f}"
    )


def _in_new_process(measure: Callable[[Workload, str], int], workload: Workload, arm: str) -> int:
    # A new process for every figure: the resident set's maximum never falls, and the profiler costs memory itself.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (workload, arm))


def _prepared(workload: Workload, arm: str) -> Callable[[], None]:
    return make_step(workload, dense if arm == "dense" else ARMS[arm])


def _tensor_peak(workload: Workload, arm: str) -> int:
    """The most bytes that tensors hold at once in the third step."""
    if workload.device == "cuda":
        step = _prepared(workload, arm)
        for _ in range(WARM_UP):
            step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = _prepared(workload, arm)
        for _ in range(WARM_UP):
            step()
        with record_function("measured step"):
            step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    window = next(event for event in events if event.name() == "measured step")
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        if window.start_ns() <= event.start_ns() <= window.end_ns():
            peak = max(peak, live)
    return peak


def _resident_growth(workload: Workload, arm: str) -> int:
    """Growth of the largest resident set from before the model is made to after the third step."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = _prepared(workload, arm)
    for _ in range(WARM_UP + 1):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels, a multiple of 16")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), metavar="ARM")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
