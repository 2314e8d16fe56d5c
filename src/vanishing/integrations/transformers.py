"""transformers' Trainer: the clock, the checkpoints, and the evaluation of the model that will be shipped."""

from __future__ import annotations

import inspect
import json
import os
import re
import weakref
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vanishing.errors import TransitionError
from vanishing.integrations.common import (
    check_model,
    lay_out,
    no_batches,
    no_transition,
    refuse_deepspeed,
    take_no_step,
)
from vanishing.transition import Transition

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "vanishing.integrations.transformers needs transformers and accelerate: pip install 'vanishing[trainer]'."
    ) from error

_STATE = "vanishing"
"""The name of the transition's state in `trainer_state.json`."""


class TransitionCallback(TrainerCallback):  # type: ignore[misc]
    """Drives a transition in transformers' Trainer; a prepared model and this callback are all that it needs.

    - The clock stands at the Trainer's `global_step`: accumulation and several processes are counted right, and lengths
      such as "40%" are shares of the Trainer's own length.
    - Checkpoints hold the transition; resumed from one, on one CPU device, the run goes on bit for bit.
    - `eval_...` is what will be shipped (beta = 0), `eval_blend_...` what is being trained.
    - `Transition.auxiliary_loss` is added to the loss, whatever is accumulated; what computes the loss must not do so.
    - `beta` and `gap` (`Transition.gap`) are logged with the loss, and `auxiliary_loss` where the recipe has
      distillation, to every tracker.
    - `load_best_model_at_end` and early stopping see no model from before the end of the transition.

    Afterwards call `transition.finish()`.

    Args:
        transition: what `prepare` returned for the Trainer's model.
        evaluate_blend: whether to evaluate the blend too while it differs, which doubles the time of an evaluation.
    """

    def __init__(self, transition: Transition, *, evaluate_blend: bool = True) -> None:
        self.transition = transition
        self._evaluate_blend = evaluate_blend
        self._attached: weakref.WeakSet[Any] = weakref.WeakSet()
        self._tied_names: dict[str, Any] = {}
        self._auxiliary: tuple[Tensor | float, int] = (0.0, 0)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Put the loss, the evaluation and the log of the Trainer that was just made under this transition."""
        self._attach(_trainer_of(self))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Set the clock to where the Trainer begins.

        Raises:
            TransitionError: the model is not the transition's, the training is shorter than the transition, the
                checkpoint was written without this callback or with another recipe, or DeepSpeed trains the model.
        """
        self._attach(_trainer_of(self))
        if not self.transition.active:
            return
        if args.deepspeed or _trainer_of(self).is_deepspeed_enabled:
            raise refuse_deepspeed()
        model: nn.Module = keywords["model"]
        check_model(self.transition, model)
        lay_out(self.transition, state.max_steps)
        self._name_tied_weights(model)
        if state.global_step == 0:
            self.transition.seek(0)
            return
        saved = state.stateful_callbacks.get(_STATE)
        if saved is None:
            raise no_transition(state.global_step)
        self.transition.load_state_dict(saved)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Move the clock, and let no evaluation from before the end of the transition be the best."""
        if not self.transition.active:
            return
        self.transition.seek(state.global_step)
        state.stateful_callbacks[_STATE] = self.transition.state_dict()
        # This step's own evaluation is still to come.
        if state.global_step <= self.transition.end:
            _forget_best(state)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Let a training that is resumed at its very end be over."""
        if state.global_step >= state.max_steps:
            take_no_step(_trainer_of(self), control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Let the last evaluation of a training not count if the transition goes on."""
        if self.transition.active and not self.transition.done:
            _forget_best(state)
        trainer = vars(_trainer_of(self))
        if trainer.get("get_batch_samples") is no_batches:
            del trainer["get_batch_samples"]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Give the model its own names of tied weights back."""
        model: Any = keywords["model"]
        while self._tied_names:
            setattr(model, *self._tied_names.popitem())

    def _name_tied_weights(self, model: Any) -> None:
        """Let the model know its tied weights by the names that they have in transition, so that it can be saved."""
        present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            known: dict[str, str] = getattr(model, attribute, None) or {}
            renamed = {_name_in_transition(target): _name_in_transition(source) for target, source in known.items()}
            here = {target: source for target, source in renamed.items() if {target, source} <= present}
            if here:
                self._tied_names.setdefault(attribute, known)
                setattr(model, attribute, known | here)

    def _attach(self, trainer: Any) -> None:
        if trainer in self._attached:
            return
        self._attached.add(trainer)
        compute_loss, evaluation_loop, log = trainer.compute_loss, trainer.evaluation_loop, trainer.log

        def with_auxiliary_loss(model: nn.Module, inputs: Any, *arguments: Any, **settings: Any) -> Any:
            result = compute_loss(model, inputs, *arguments, **settings)
            if not (model.training and self.transition.active and self.transition.recipe.distillation):
                return result
            with trainer.accelerator.autocast():
                auxiliary = self.transition.auxiliary_loss()
            total, count = self._auxiliary
            self._auxiliary = total + auxiliary.detach(), count + 1
            if _is_scaled(trainer, settings.get("num_items_in_batch")):
                auxiliary = auxiliary / trainer.current_gradient_accumulation_steps
            return (result[0] + auxiliary, *result[1:]) if isinstance(result, tuple) else result + auxiliary

        def both_forms(*arguments: Any, metric_key_prefix: str = "eval", **settings: Any) -> Any:
            if not self.transition.active:
                return evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **settings)
            with self.transition.compressed():
                output = evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **settings)
            if self._evaluate_blend and metric_key_prefix.startswith("eval") and not self.transition.done:
                prefix = metric_key_prefix.replace("eval", "eval_blend", 1)
                output.metrics.update(evaluation_loop(*arguments, metric_key_prefix=prefix, **settings).metrics)
            return output

        def log_with_beta(logs: dict[str, float], *arguments: Any, **settings: Any) -> None:
            if self.transition.active and "loss" in logs:
                logs = logs | {"beta": self.transition.beta}
                gap = self.transition.gap()
                logs |= {} if gap is None else {"gap": gap}
                total, count = self._auxiliary
                logs |= {"auxiliary_loss": float(total) / count} if count else {}
                self._auxiliary = (0.0, 0)
            log(logs, *arguments, **settings)

        trainer.compute_loss = with_auxiliary_loss
        trainer.evaluation_loop, trainer.log = both_forms, log_with_beta


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the newest checkpoint in a Trainer's output folder that was written to its end, None without any.

    The Trainer writes a checkpoint file by file, so one that a killed process left behind may be incomplete:

        trainer.train(resume_from_checkpoint=last_complete_checkpoint("out"))

    Args:
        folder: the Trainer's `output_dir`; it need not exist yet.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted((int(m[1]) for name in names if (m := re.fullmatch(r"checkpoint-(\d+)", name))), reverse=True)
    paths = (Path(folder) / f"checkpoint-{step}" for step in steps)
    return next((str(path) for path in paths if _is_complete(path)), None)


def _is_scaled(trainer: Any, items: Any) -> bool:
    """Whether the Trainer takes the loss of a part of a step's examples as it is, and does not divide it by the parts.

    It does so where the loss is a sum over the part by the number of items in the whole step.
    """
    # Not every version has it.
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    if said is not None:
        return bool(said)
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


def _forget_best(state: TrainerState) -> None:
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _is_complete(folder: Path) -> bool:
    # The Trainer writes its state last, and removes older checkpoints only then.
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _name_in_transition(parameter: str) -> str:
    owner, _, name = parameter.rpartition(".")
    return f"{owner}.parametrizations.{name}.original"


def _trainer_of(callback: TransitionCallback) -> Any:
    """Return the Trainer that is calling a callback: it hands over its parts, but not itself."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    raise TransitionError(
        "a TransitionCallback must be called by transformers' Trainer. Give it to one: callbacks=[...]."
    )
