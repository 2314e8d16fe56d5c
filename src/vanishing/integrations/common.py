"""What the callbacks for frameworks share."""

from __future__ import annotations

from typing import Any

from torch import nn

from vanishing.errors import TransitionError
from vanishing.transition import Transition


def check_model(transition: Transition, model: nn.Module) -> None:
    """Raise `TransitionError` if a framework trains another model than the transition's."""
    if not any(module is transition.model for module in model.modules()):
        raise TransitionError(
            "the Trainer trains another model than the one that this transition was prepared for. Give it the prepared "
            "model itself, or what holds that one."
        )


def refuse_deepspeed() -> TransitionError:
    """Return the error for a training by DeepSpeed."""
    return TransitionError(
        "DeepSpeed's ZeRO trains flat pieces of its own in the place of a model's weights, which a transition cannot "
        "follow where it adds weights and takes them out. Train with DistributedDataParallel or FSDP2."
    )


def lay_out(transition: Transition, length: int) -> None:
    """Give a transition the length of the training; raise `TransitionError` if it is the shorter one."""
    transition.set_length(length)
    if transition.end > length:
        raise TransitionError(
            f"the transition ends at optimizer step {transition.end} and the training at step {length}. Train longer, "
            f"or shorten the schedule, for instance to steps='40%'."
        )


def no_transition(step: int) -> TransitionError:
    """Return the error for a checkpoint in which no callback has left a transition."""
    return TransitionError(
        f"the checkpoint of step {step} was written without a TransitionCallback, so it holds no transition. Resume "
        f"from one that does, or start anew."
    )


def take_no_step(trainer: Any, control: Any) -> None:
    """Stop transformers' Trainer where an epoch begins after the last step: it would take one step too many."""
    control.should_training_stop = True
    trainer.get_batch_samples = no_batches


def no_batches(*_: Any) -> tuple[list[Any], None]:
    """Return no batches, and no number of items in them."""
    return [], None
