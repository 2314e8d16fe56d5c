"""What each schedule of a recipe drives, and where it stands."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from vanishing.schedules import Adaptive, Schedule

if TYPE_CHECKING:
    from vanishing.recipe import Recipe
    from vanishing.sites import Site

Target = tuple["Site", int]
"""A place and the number of one of its stages."""


class Drive:
    """A schedule and all that it drives.

    It has a state only where the schedule is adaptive: `slow`, the spans of optimizer steps at the lower speed.

    Args:
        schedule: a schedule, its lengths known.
        targets: what it drives, in the model's order; layers of one name count as one.
    """

    def __init__(self, schedule: Schedule, targets: Sequence[Target]) -> None:
        self.schedule = schedule
        self.targets = targets
        self.slow: list[tuple[int, int]] = []
        names = list(dict.fromkeys(site.name for site, _ in targets))
        # What drives nothing has the value of a single layer.
        each = schedule.spread(names or [""])
        self._schedules = list(dict.fromkeys(each))
        numbers = {name: self._schedules.index(own) for name, own in zip(names, each, strict=False)}
        self._numbers = [numbers[site.name] for site, _ in targets]

    def betas(self, step: int) -> list[float]:
        """Return beta of every target at a step."""
        values = self._values(step)
        return [values[number] for number in self._numbers]

    def by_target(self, step: int) -> dict[Target, float]:
        """Return beta of every target at a step, by the target."""
        return dict(zip(self.targets, self.betas(step), strict=True))

    def largest(self, step: int) -> float:
        """Return the largest beta at a step."""
        return max(self._values(step))

    def is_over(self, step: int) -> bool:
        """Whether every beta is 0 from a step on."""
        return self._clock(step) >= max(each.end for each in self._schedules)

    def end(self, step: int) -> int:
        """Return the first step at which it is over for certain, as known at a step: until it is over, the deadline."""
        if not isinstance(self.schedule, Adaptive) or not self.is_over(step):
            return self.schedule.end
        return bisect.bisect_left(range(self.schedule.end), True, key=self.is_over)

    def decide(self, step: int, measure: Callable[[], float | None]) -> None:
        """Decide after an optimizer step how fast the next ones go; what was decided for these before is forgotten.

        Args:
            step: optimizer steps done.
            measure: returns the gap, None if there is none; called only where it is time to decide.
        """
        if not isinstance(self.schedule, Adaptive) or step % self.schedule.every:
            return
        self.slow = [(start, min(stop, step)) for start, stop in self.slow if start < step]
        if step < self.schedule.begin or self.is_over(step):
            return
        gap = measure()
        if gap is not None and gap > self.schedule.limit:
            joins = bool(self.slow) and self.slow[-1][1] == step
            start = self.slow.pop()[0] if joins else step
            self.slow.append((start, step + self.schedule.every))

    def _values(self, step: int) -> list[float]:
        clock = self._clock(step)
        return [each(clock) for each in self._schedules]

    def _clock(self, step: int) -> float:
        if not isinstance(self.schedule, Adaptive):
            return step
        return self.schedule.clock(step, sum(min(stop, step) - start for start, stop in self.slow if start < step))


class Timetable:
    """When what fades: the schedules and ramps of a recipe, over all that they drive.

    Args:
        recipe: with all lengths known.
        sites: the places in the model's order.

    Attributes:
        groups: see `make_drives`.
        adaptive: the drives that have a state.
    """

    def __init__(self, recipe: Recipe, sites: Sequence[Site]) -> None:
        self.groups = make_drives(recipe, sites)
        drives = [drive for group in self.groups for drive in group]
        self.adaptive = [drive for drive in drives if isinstance(drive.schedule, Adaptive)]
        self._driven_by = {(site.rule, stage): drive for drive in drives for site, stage in drive.targets}
        self._ramps = [rule.ramp or recipe.ramp for _, rule in recipe.rules]
        self._sites = sites

    def beta(self, step: int) -> float:
        """Return the largest beta of the recipe's own schedule at a step."""
        return self.groups[0][0].largest(step)

    def betas(self, step: int) -> dict[str, tuple[float, ...]]:
        """Return every beta at a step, those of the stages of one place in their order, by full name."""
        found: dict[str, tuple[float, ...]] = {}
        for group in self.groups:
            # Layers of one name have one beta, and drives of a group are in the order of the techniques.
            by_stage = [
                {site.name: beta for (site, _), beta in zip(drive.targets, drive.betas(step), strict=True)}
                for drive in group
            ]
            found |= {name: tuple(betas[name] for betas in by_stage) for name in by_stage[0]}
        return {site.name: found[site.name] for site in self._sites}

    def by_target(self, rule: int, stage: int, step: int) -> dict[Target, float]:
        """Return beta at a step of all that the schedule of a rule's stage drives."""
        return self._driven_by[rule, stage].by_target(step)

    def end(self, step: int) -> int:
        """Return the first step at which all is over, as known at a step; see `Drive.end`."""
        ramps = [ramp for number in {site.rule for site in self._sites} if (ramp := self._ramps[number]) is not None]
        drives = [drive for group in self.groups for drive in group if drive.targets]
        return max((*(drive.end(step) for drive in drives), *(ramp.end for ramp in ramps)), default=0)

    def is_settled(self, rule: int, stage: int, step: int) -> bool:
        """Whether the fade and the ramp of a rule's stage are over at a step."""
        ramp = self._ramps[rule]
        return self._driven_by[rule, stage].is_over(step) and (ramp is None or step >= ramp.end)

    def strength(self, rule: int, step: int) -> float:
        """Return how much of a rule's technique is applied at a step."""
        ramp = self._ramps[rule]
        return 1.0 if ramp is None else 1.0 - ramp(step)

    def strengths(self, step: int) -> dict[tuple[int, int], tuple[float, bool]]:
        """Return of each stage of each rule at a step how much of it is applied, and whether it is settled."""
        ramped = [self.strength(rule, step) for rule in range(len(self._ramps))]
        return {(rule, stage): (ramped[rule], self.is_settled(rule, stage, step)) for rule, stage in self._driven_by}


def make_drives(recipe: Recipe, sites: Sequence[Site]) -> list[list[Drive]]:
    """Return the drives of a recipe: first, alone, that of its own schedule, then those of each rule with its own.

    Args:
        recipe: with all lengths known.
        sites: the places in the model's order.
    """
    groups = []
    for rules, schedules in _schedules(recipe):
        driven = [site for site in sites if site.rule in rules]
        if len(schedules) == 1:
            groups.append([Drive(schedules[0], [(site, 0) for site in driven])])
        else:
            groups.append([Drive(own, [(site, stage) for site in driven]) for stage, own in enumerate(schedules)])
    return groups


def schedule_problems(recipe: Recipe, weights: Mapping[str, int], blocks: Mapping[str, int]) -> list[str]:
    """Return why schedules cannot drive what a recipe chooses; empty if they can.

    Args:
        recipe: the recipe.
        weights: full name of a layer -> number of its rule.
        blocks: the same of replaced blocks.
    """
    problems = []
    for rules, schedules in _schedules(recipe):
        measurable = [name for name, rule in weights.items() if rule in rules]
        names = [*measurable, *(name for name, rule in blocks.items() if rule in rules)]
        for schedule in schedules if names else ():
            problems += schedule.problems(names)
            if isinstance(schedule, Adaptive) and not measurable:
                problems.append(
                    f"Adaptive: it drives only replaced blocks, as {names[0]!r}, whose gap is not measured. Use the "
                    f"schedule inside of it."
                )
    return problems


def _schedules(recipe: Recipe) -> Iterator[tuple[set[int], tuple[Schedule, ...]]]:
    """The numbers of the rules that share schedules, with these; the recipe's own comes first."""
    own = {n: (rule.schedule,) if rule.schedule else rule.schedules for n, (_, rule) in enumerate(recipe.rules)}
    yield {number for number, schedules in own.items() if not schedules}, (recipe.schedule,)
    yield from (({number}, schedules) for number, schedules in own.items() if schedules)
