"""The strategies that are compared: one training loop, and only the recipe differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vanishing.compressors import Compressor
from vanishing.distillation import Distillation
from vanishing.recipe import Recipe
from vanishing.schedules import LinearSchedule, PolynomialSchedule, Schedule, StepSchedule


@dataclass(frozen=True)
class Arm:
    """A strategy: how beta, and the strength of the technique, move over the length Q of the fade.

    Args:
        name: what the strategy is called in tables.
        meaning: one sentence for a reader who does not know it.
        schedule: Q, in optimizer steps -> beta.
        ramp: Q -> what the technique's strength is still short of; None for full strength from the start.
        distillation: what is learned from the original besides the task.
    """

    name: str
    meaning: str
    schedule: Callable[[int], Schedule]
    ramp: Callable[[int], Schedule] | None = None
    distillation: tuple[Distillation, ...] = ()

    def recipe(self, rules: Mapping[str, Compressor], fade_steps: int) -> Recipe:
        """Return the recipe of this strategy.

        Args:
            rules: key -> technique, as in `Recipe`.
            fade_steps: the length Q of the fade, in optimizer steps.
        """
        ramp = None if self.ramp is None else self.ramp(fade_steps)
        return Recipe(rules, schedule=self.schedule(fade_steps), ramp=ramp, distillation=self.distillation)


POST_SHOT = Arm(
    name="post-shot",
    meaning="The model is compressed at once, then trained.",
    schedule=lambda fade_steps: StepSchedule(at=0),
)
DENSE_THEN_COMPRESS = Arm(
    name="dense, then compress",
    meaning="The original is trained a while longer, then compressed at once and trained.",
    schedule=lambda fade_steps: StepSchedule(at=fade_steps),
)
ITERATIVE = Arm(
    name="iterative",
    meaning="The technique's own gradual way: ever more weights pruned, ever fewer bits, an ever lower rank.",
    schedule=lambda fade_steps: StepSchedule(at=0),
    ramp=lambda fade_steps: PolynomialSchedule(steps=fade_steps, power=3),
)
VCON = Arm(
    name="VCON",
    meaning="Both forms run as one; the original's share falls in a straight line from all to nothing.",
    schedule=lambda fade_steps: LinearSchedule(steps=fade_steps),
)
ARMS = (POST_SHOT, DENSE_THEN_COMPRESS, ITERATIVE, VCON)
