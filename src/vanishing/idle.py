"""Parameters that are not trained while another form runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from vanishing.distributed import is_distributed
from vanishing.errors import RecipeError
from vanishing.sites import Site, WeightSite


def freeze_originals(model: nn.Module, sites: Sequence[Site]) -> list[nn.Parameter]:
    """Stop training what only original forms have, and return it.

    Raises:
        RecipeError: there is nothing of that kind, or nothing else is trained; nothing was changed.
    """
    running = _parameters_outside(model, sites)
    mine = [p for site in sites for p in site.replaced_parameters]
    weights = [p for site in sites if isinstance(site, WeightSite) for p in site.replaced_parameters]
    shared = running - {id(p) for p in weights}
    frozen = [p for p in mine if p.requires_grad and id(p) not in shared]
    if not frozen:
        raise RecipeError(
            "freeze_original: every technique of the recipe shares the original's weights, so none is left to freeze. "
            "Leave it out."
        )
    idle = {id(p) for p in frozen} | {id(p) for site in sites for p in site.new_parameters}
    if not any(p.requires_grad and id(p) not in idle for p in model.parameters()):
        raise RecipeError(
            "freeze_original: nothing of the model would be trained while beta is 1. Leave it out, or leave a layer, "
            "its bias or the head in training."
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def drop_idle_gradients(model: nn.Module, sites: Sequence[Site]) -> None:
    """Leave parameters of the form that does not run without a gradient, not with the zeros of `with_idle`."""
    if not is_distributed():
        return
    idle = [p for site in sites if isinstance(site, WeightSite) for p in site.idle_parameters]
    blocks = [site for site in sites if not isinstance(site, WeightSite) and site.idle_parameters]
    if blocks:
        # A block may share parameters with what is outside of it and runs.
        running = _parameters_outside(model, blocks)
        idle += [p for site in blocks for p in site.idle_parameters if id(p) not in running]
    for parameter in idle:
        parameter.grad = None


def _parameters_outside(model: nn.Module, sites: Iterable[Site]) -> set[int]:
    """Identities of the parameters that modules outside of the replaced blocks among these sites have."""
    inside = {id(m) for site in sites if not isinstance(site, WeightSite) for m in site.blend.modules()}
    outside = (module for module in model.modules() if id(module) not in inside)
    return {id(p) for module in outside for p in module.parameters(recurse=False)}
