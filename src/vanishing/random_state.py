"""Random numbers that leave no trace in the streams that a user has seeded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def random_state_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which random numbers can be drawn on a device, and whose end takes them back."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def random_state_restored_on_error() -> Iterator[None]:
    """Take the random numbers back that were drawn inside, if it ends in an error."""
    state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        torch.cuda.set_rng_state_all(cuda_states)
        raise
