"""What is different where several processes train one model."""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def agreed(value: float, device: torch.device) -> float:
    """Return the first process's number in every process; then every process has to call this."""
    if not is_distributed():
        return value
    shared = torch.tensor(value, dtype=torch.float32, device=device)
    torch.distributed.broadcast(shared, src=0)
    return float(shared)


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def spread_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return this process's part of a tensor that every process holds whole, spread as another one is."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = other
    # None: nothing is sent, as all hold the same.
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, of which each process may hold a part; then every process has to call this."""
    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return gathered
