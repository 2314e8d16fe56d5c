"""What a model is worth, and what it takes."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vanishing.workflow.encoding import Encoded

_TIMED_PAIRS = 10


@torch.inference_mode()
def time_ratio(encoded: Encoded, batch_size: int, original: nn.Module, small: nn.Module) -> float:
    """Return the time of a forward pass of the small model as a share of the original's."""
    device = next(small.parameters()).device
    rows = [encoded.test[i] for i in range(min(batch_size, len(encoded.test)))]
    batch = {n: v.to(device) for n, v in encoded.collate(rows).items() if n != "labels"}
    models = [original.to(device).eval(), small.eval()]
    seconds = [[_seconds(model, batch, device) for model in models] for _ in range(_TIMED_PAIRS + 1)]
    return statistics.median(after / before for before, after in seconds[1:])


def _seconds(model: nn.Module, batch: dict[str, Any], device: torch.device) -> float:
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    model(**batch)
    wait()
    return time.perf_counter() - started


def peak_bytes() -> int:
    """Return the peak of the device's memory, or of the process's."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Return the memory that the process has now."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes()
