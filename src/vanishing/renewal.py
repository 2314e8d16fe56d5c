"""What techniques compute anew after an optimizer step, such as masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vanishing.compressors import Chain, Moment, WeightCompressor
from vanishing.drives import Timetable
from vanishing.recipe import Recipe
from vanishing.sites import Site, WeightSite


@torch.no_grad()
def renew(
    recipe: Recipe, sites: Sequence[Site], timetable: Timetable, step: int, *, previous: int | None, arriving: bool
) -> None:
    """Let every technique renew what it does not compute in every forward pass.

    Args:
        recipe: whose techniques.
        sites: where they work.
        timetable: the recipe's.
        step: optimizer steps done.
        previous: those done before; None at the beginning.
        arriving: whether the clock has not come here by a single step.
    """
    for number, (_, rule) in enumerate(recipe.rules):
        of_rule = [site for site in sites if site.rule == number and isinstance(site, WeightSite)]
        if not of_rule or not isinstance(rule.compressor, WeightCompressor):
            continue
        stages: Sequence[WeightCompressor] = (rule.compressor,)
        if rule.schedules and isinstance(rule.compressor, Chain):
            stages = rule.compressor.compressors
        for stage, compressor in enumerate(stages):
            # Asking every site for its weights costs more than most techniques' step of the clock.
            renews = type(compressor).update is not WeightCompressor.update
            follows = type(compressor).update_after_another is not WeightCompressor.update_after_another
            following = [pair for site in of_rule for pair in site.following(stage)] if follows else []
            selected = [(site, *pair) for site in of_rule for pair in site.selected(stage)] if renews else []
            if not selected and not following:
                continue
            settled = timetable.is_settled(number, stage, step)
            was_settled = previous is not None and timetable.is_settled(number, stage, previous)
            just_settled = settled and previous is not None and not was_settled
            strength = timetable.strength(number, step)
            betas = timetable.by_target(number, stage, step)
            left = tuple(1.0 - (1.0 - betas[site, stage]) * strength for site, *_ in selected)
            moment = Moment(step, arriving or just_settled, settled, was_settled, left)
            if selected:
                compressor.update([form for _, form, _ in selected], [weight for *_, weight in selected], moment)
            if following:
                compressor.update_after_another(
                    [form for form, _ in following], [seen for _, seen in following], moment
                )
