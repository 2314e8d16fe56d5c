"""From a model and a recipe to a transition."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from vanishing.calibration import Calibration, calibrate
from vanishing.compressors import Compressor
from vanishing.optimizers import unheld_problems
from vanishing.plan import make_plan
from vanishing.random_state import random_state_restored_on_error
from vanishing.recipe import Recipe
from vanishing.schedules import LinearSchedule
from vanishing.sites import build_block_sites
from vanishing.transition import Transition, begin


def prepare(
    model: nn.Module,
    recipe: Recipe | Compressor,
    *,
    steps: int | str | None = None,
    ignore: Iterable[Any] = (),
    optimizer: Optimizer | None = None,
    example_inputs: Any = None,
    calibration: Iterable[Any] | Calibration | None = None,
) -> Transition:
    """Change a model in place so that its original form fades into a compressed one while it is trained.

    At this point (beta = 1) the model computes what it computed before, bit for bit.

    Args:
        model: any module; its parameters keep their identity.
        recipe: a recipe, or one technique for every linear and convolution layer.
        steps: with a single technique, the length of its linear fade in optimizer steps, or as a share of the training
            ("40%"), whose length a framework's callback or `Transition.set_length` gives.
        ignore: with a single technique, keys of modules to leave alone, as in `Recipe`.
        optimizer: an optimizer that was made for the model already; new parameters join the group of the weight they
            come from, and at the end those that are gone leave it. Not needed if the optimizer is made afterwards.
        example_inputs: one batch for the model (a tensor, a tuple of arguments or a mapping of keywords); with it the
            whole model is tried between the two forms now, and compared before and after `finish`.
        calibration: batches for techniques that look at activations or gradients (each a tensor, a tuple or list whose
            first item is the input, or a mapping of keywords), gone through once, in evaluation mode; or a
            `Calibration`, which has a loss too.

    Returns:
        The transition, at step 0.

    Raises:
        RecipeError: the recipe does not fit the model; every problem is listed and nothing was changed.
        TransitionError: a replacement does not return for the example inputs what its block does; nothing was changed.
        TypeError: arguments of the wrong type, or that contradict each other.

    >>> from vanishing import MagnitudePruning
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> transition = prepare(model, MagnitudePruning(sparsity=0.5), steps=10, ignore=["2"])
    >>> transition.beta
    1.0
    """
    resolved = _resolve_recipe(recipe, steps, ignore)
    plan = make_plan(model, resolved)
    observed = plan.observed()
    if calibration is not None and not observed:
        plan.problems.append("calibration batches were given, but no technique of the recipe looks at activations.")
    if observed and calibration is None:
        plan.problems.append(
            f"the technique for {observed[0].name!r} looks at batches, and none were given. Call "
            f"prepare(..., calibration=batches) with some of the training data."
        )
    if optimizer is not None:
        plan.problems += unheld_problems(optimizer, plan.places())
    with random_state_restored_on_error():
        blocks = build_block_sites(plan)
        plan.check()
        if observed and calibration is not None:
            given = calibration if isinstance(calibration, Calibration) else Calibration(batches=calibration)
            calibrate(model, observed, given)
            for block in blocks:
                block.calibrate()
        return begin(model, plan, resolved, blocks, optimizer, example_inputs, distillation=resolved.distillation)


def prepare_for_state(model: nn.Module, recipe: Recipe) -> Transition:
    """Change a model as `prepare` does, for a state of a calibrated model in transition that is then loaded into it.

    No batches are needed: what techniques took from them is in the state. It has no teacher: it is not trained.
    """
    plan = make_plan(model, recipe)
    with random_state_restored_on_error():
        blocks = build_block_sites(plan)
        plan.check()
        return begin(model, plan, recipe, blocks, None, None, distillation=())


def _resolve_recipe(recipe: Recipe | Compressor, steps: int | str | None, ignore: Iterable[Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        if steps is not None or ignore:
            raise TypeError("prepare: a Recipe holds its own schedule and ignore. Set them there, not in prepare.")
        return recipe
    if not isinstance(recipe, Compressor):
        raise TypeError(f"prepare: expected a Recipe or a compressor such as LowRank(rank=16), got {recipe!r}.")
    if steps is None:
        raise TypeError(f"prepare: {recipe!r} needs steps=, the length of its fade in optimizer steps.")
    return Recipe({"*": recipe}, ignore=ignore, schedule=LinearSchedule(steps=steps))
