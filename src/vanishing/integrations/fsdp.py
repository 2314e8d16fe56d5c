"""PyTorch's FSDP2: a model in transition whose weights are spread over processes."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from vanishing.errors import TransitionError
from vanishing.preparation import prepare_for_state
from vanishing.transition import Transition


def finish_gathered(transition: Transition, build: Callable[[], nn.Module]) -> nn.Module | None:
    """Gather the weights of a sharded model and finish a plain copy of it in the first process.

    To be called in every process. `Transition.finish` cannot turn a sharded model into plain modules, as FSDP2 holds on
    to the parameters that it has sharded.

    Args:
        transition: of a model that `torch.distributed.fsdp.fully_shard` has sharded, at its end.
        build: returns the original architecture with any weights, as it was given to `prepare`; called in the first
            process alone.

    Returns:
        The finished model in the first process, on the device on which `build` makes it, and None in the others.

    Raises:
        TransitionError: the original has not vanished yet, the transition was finished, or there is one process alone.
    """
    if not dist.is_initialized():
        raise TransitionError("finish_gathered: the model is in one process. Call transition.finish() instead.")
    if not transition.done:
        raise TransitionError(
            f"finish_gathered: {transition.end - transition.steps_done} of {transition.end} optimizer steps remain "
            f"until the compressed form stands alone. Train on."
        )
    clock = transition.state_dict()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(transition.model, options=whole)
    if dist.get_rank() != 0:
        return None
    model = build()
    plain = prepare_for_state(model, transition.recipe)
    model.load_state_dict(state)
    plain.load_state_dict(clock)
    return plain.finish()
