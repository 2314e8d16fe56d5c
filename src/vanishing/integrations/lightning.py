"""Lightning: the clock, the checkpoints, and the evaluation of the model that will be shipped."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from vanishing.integrations.common import check_model, lay_out, no_transition, refuse_deepspeed
from vanishing.transition import Transition

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.strategies import DeepSpeedStrategy
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as error:
    raise ImportError(
        "vanishing.integrations.lightning needs Lightning: pip install 'vanishing[lightning]'."
    ) from error


class TransitionCallback(Callback):
    """Drives a transition in Lightning's Trainer.

    - The clock stands at the Trainer's `global_step`, the number of optimizer steps; lengths such as "40%" are shares
      of the Trainer's own length.
    - Checkpoints hold the transition. Lightning itself goes on exactly from an epoch's end, without dropout: its
      checkpoints hold neither the state of a plain `DataLoader` nor that of the random numbers.
    - Validation, test and prediction run what will be shipped (beta = 0).
    - `beta` and `gap` (`Transition.gap`) are logged as often as the Trainer logs.
    - `ModelCheckpoint` and `EarlyStopping` forget what they saw before the end of the transition.

    Prepare the `LightningModule` or a module inside of it, with an optimizer that is made in `configure_optimizers`.
    Afterwards call `transition.finish()`.

    Args:
        transition: what `prepare` returned.
    """

    def __init__(self, transition: Transition) -> None:
        self.transition = transition
        self._saved: dict[str, Any] | None = None
        self._step_logged = 0
        self._evaluation = contextlib.ExitStack()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the transition, for the Trainer's checkpoints."""
        return {"transition": self.transition.state_dict() if self.transition.active else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state from a checkpoint until the length of the training is known."""
        self._saved = state_dict["transition"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay the transition out for the length of the training.

        Raises:
            TransitionError: the model is not the transition's, the training is shorter than the transition, or
                DeepSpeed trains the model.
        """
        if not self.transition.active:
            return
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise refuse_deepspeed()
        check_model(self.transition, pl_module)
        length = trainer.estimated_stepping_batches
        if not 1 <= length < float("inf"):
            # It is not known. Where a schedule is a share of it, the transition says so at the first step.
            return
        lay_out(self.transition, int(length))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the clock to where the Trainer begins.

        Raises:
            TransitionError: the checkpoint was written without this callback, or with another recipe.
        """
        if not self.transition.active:
            return
        resumed = trainer.ckpt_path is not None
        saved, self._saved = self._saved, None
        if resumed and saved is not None:
            self.transition.load_state_dict(saved)
        elif resumed and trainer.global_step:
            raise no_transition(trainer.global_step)
        else:
            self.transition.seek(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Move the clock, and let no evaluation from before the end of the transition be the best."""
        step: int = trainer.global_step
        if not self.transition.active:
            return
        self.transition.seek(step)
        # This step's own evaluation is still to come.
        if step <= self.transition.end:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                _forget_best(callback, trainer)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0 and step != self._step_logged:
            self._step_logged = step
            gap = self.transition.gap()
            values = {"beta": self.transition.beta} | ({} if gap is None else {"gap": gap})
            pl_module.log_dict({name: torch.tensor(value) for name, value in values.items()})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate what will be shipped."""
        self._begin_evaluation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the blend."""
        self._evaluation.close()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Go back to the blend, where an evaluation was broken off."""
        self._evaluation.close()

    def _begin_evaluation(self, trainer: Trainer) -> None:
        if not self.transition.active:
            return
        is_alone = trainer.state.fn != TrainerFn.FITTING and trainer.ckpt_path is not None
        if is_alone and self._saved is not None:
            self.transition.load_state_dict(self._saved)
            self._saved = None
        self._evaluation.enter_context(self.transition.compressed())


def _forget_best(callback: Callback, trainer: Trainer) -> None:
    """Let a callback that keeps the best value have seen none; remove the checkpoints that it kept for it."""
    if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.best_k_models:
        if callback.save_top_k > 0:
            for path in set(callback.best_k_models) - {trainer.ckpt_path}:
                trainer.strategy.remove_checkpoint(path)
        callback.best_k_models = {}
        callback.best_model_path = callback.kth_best_model_path = ""
        callback.best_model_score = None
        callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
    elif isinstance(callback, EarlyStopping):
        callback.wait_count = 0
        callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
