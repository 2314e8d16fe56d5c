"""Torch-Pruning: channels of a whole network that depend on each other, also across residual connections."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from vanishing.channels import vary
from vanishing.compressors import ChannelPruning, LayerView
from vanishing.drives import schedule_problems
from vanishing.equality import difference_beyond_rounding
from vanishing.errors import RecipeError
from vanishing.inputs import call, evaluation
from vanishing.layers import Factored, find_kind
from vanishing.narrowing import features_shape, is_depthwise, is_narrowable
from vanishing.optimizers import unheld_problems
from vanishing.plan import Plan, PlannedWeight
from vanishing.random_state import random_state_kept
from vanishing.recipe import Recipe
from vanishing.schedules import Schedule
from vanishing.structure import Group, Part, Unit, cut, mask
from vanishing.suitability import cut_problem
from vanishing.transition import Transition, begin

try:
    import torch_pruning
except ImportError as error:
    raise ImportError(
        "vanishing.integrations.torch_pruning needs Torch-Pruning: pip install 'vanishing[structured]'."
    ) from error

logger = logging.getLogger(__name__)
_TOLERANCE = 1e-4
Ranking = Callable[[Any], Tensor | None]


def prepare(
    model: nn.Module,
    example_inputs: Any,
    *,
    sparsity: float,
    schedule: Schedule,
    importance: Ranking | None = None,
    ignore: Iterable[Any] = (),
    optimizer: Optimizer | None = None,
) -> Transition:
    """Change a model in place so that channels of the whole network fade out of it while it is trained.

    Torch-Pruning (Fang et al., arXiv 2301.12900) finds which layers depend on each other: those of a residual stream
    lose the same channels. The blend is that of `ChannelPruning`: in every layer that takes channels up, the columns of
    the vanishing ones times beta. `finish` cuts them out, and the file is that of any narrower model. What the network
    puts out stays whole, and so do channels that are concatenated, split, grouped or normalized together.

    Args:
        model: a network of linear layers, convolutions and batch normalization, above all.
        example_inputs: one batch (a tensor, a tuple of arguments or a mapping of keywords).
        sparsity: share of the channels that vanish in each set of layers that depend on each other, in [0, 1).
        schedule: beta, over optimizer steps.
        importance: an importance of Torch-Pruning, such as `torch_pruning.importance.GroupTaylorImportance()`, which
            reads the gradients that are there; None for the magnitudes of all the layers together.
        ignore: keys of layers whose channels all stay, as in `Recipe`.
        optimizer: an optimizer that was made for the model already.

    Returns:
        The transition, at step 0.

    Raises:
        ConfigError: the share is out of range.
        RecipeError: there is nothing to take out, a key of `ignore` matches nothing, or the importance says nothing;
            nothing was changed.
    """
    technique = ChannelPruning(sparsity)
    recipe = Recipe({"*": technique}, ignore=ignore, schedule=schedule)
    for pattern in recipe.ignore:
        if not any(pattern.matches(name, module) for name, module in model.named_modules()):
            raise RecipeError(f"ignore: nothing matched {pattern.text}. Correct it, or leave it out.")
    with random_state_kept(next((p.device for p in model.parameters()), torch.device("cpu"))):
        groups = [g for g in _groups(model, example_inputs, importance) if not _ignored(g, model, recipe)]
        groups = [group for group in groups if technique.units_kept(group.count) < group.count or not sparsity]
        groups = _sound(groups, example_inputs)
    if not groups:
        raise RecipeError(
            "Torch-Pruning finds no channels that could be taken out of the model. Name what can be compressed in a "
            "Recipe instead."
        )
    plan = Plan(weights=[_planned(group, technique) for group in groups])
    plan.problems += [] if optimizer is None else unheld_problems(optimizer, plan.places())
    plan.problems += schedule_problems(recipe, {planned.names[0]: 0 for planned in plan.weights}, {})
    plan.check()
    return begin(model, plan, recipe, [], optimizer, example_inputs, distillation=())


def _planned(group: Group, technique: ChannelPruning) -> PlannedWeight:
    layer, kind = group.taker.layer, find_kind(group.taker.layer)
    assert kind is not None
    weight = layer.get_parameter("weight")
    view = LayerView(layer, kind, weight, kind.layout(layer, tuple(weight.shape)), group)
    return PlannedWeight((group.taker.name,), ((layer, "weight"),), view, 0, technique)


def _groups(model: nn.Module, example_inputs: Any, importance: Ranking | None) -> Iterator[Group]:
    ranking = torch_pruning.importance.GroupMagnitudeImportance() if importance is None else importance
    names = {module: name for name, module in model.named_modules()}
    given = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    with evaluation(model), torch.enable_grad(), _trainable(model):
        graph = torch_pruning.DependencyGraph().build_dependency(
            model, dict(given) if isinstance(given, Mapping) else given, verbose=False
        )
    for found in graph.get_all_groups():
        group = _translated(found, graph, model, names)
        if group is None:
            continue
        try:
            scores = ranking(found)
        except AttributeError:
            # Of gradients that are not there.
            scores = None
        if scores is None or scores.shape != (group.count,):
            raise RecipeError(
                f"{type(ranking).__name__} says nothing about the channels that {group.makers[0].name!r} makes. If it "
                f"reads gradients, call loss.backward() first."
            )
        yield dataclasses.replace(group, scores=scores.detach())


@contextlib.contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """Let every parameter have a gradient: the graph is read from what autograd records."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _translated(found: Any, graph: Any, model: nn.Module, names: Mapping[nn.Module, str]) -> Group | None:
    """The layers of a group of Torch-Pruning; None where not all of them can be cut, unit by unit."""
    count = len(found[0].idxs)
    holders = Counter(p for module in names for p in module.parameters(recurse=False))
    makers: dict[str, Part] = {}
    takers: dict[str, Part] = {}
    for item in found:
        layer, handler = item.dep.target.module, item.dep.handler
        if layer not in names:
            if isinstance(layer, nn.Parameter):
                return None
            # An operation without weights.
            continue
        tied = any(holders[p] > 1 for p in layer.parameters(recurse=False))
        inside = any(isinstance(model.get_submodule(name), Factored) for name in _above(names[layer]))
        if inside or not is_narrowable(layer) or tied or cut_problem(layer) is not None:
            return None
        both = is_depthwise(layer) or len(features_shape(layer)) == 1
        outputs = both or graph.is_out_channel_pruning_fn(handler)
        size = len(item.idxs) // count
        features = features_shape(layer)[0 if outputs else 1]
        units = [unit for unit in range(count) for _ in range(size)]
        if list(item.idxs) != list(range(features)) or list(item.root_idxs) != units:
            return None
        (makers if outputs else takers)[names[layer]] = Part(names[layer], layer, size)
    if not makers or not takers:
        return None
    return Group(Unit.CHANNEL, count, tuple(makers.values()), tuple(takers.values()), model, "", ())


def _above(name: str) -> list[str]:
    """The full names of the modules that a module is in."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _ignored(group: Group, model: nn.Module, recipe: Recipe) -> bool:
    """Whether the recipe leaves a layer alone, or a module around it, that makes the channels of a group."""
    modules = dict(model.named_modules())
    return any(
        pattern.matches(name, modules[name])
        for part in group.makers
        for name in (part.name.rsplit(".", n)[0] for n in range(part.name.count(".") + 1))
        for pattern in recipe.ignore
    )


def _sound(groups: Sequence[Group], example_inputs: Any) -> list[Group]:
    """Those groups that can be cut: then the network computes what it computes without their channels."""
    if not groups or _follows(groups, example_inputs):
        return list(groups)
    sound = []
    for group in groups:
        if _follows([group], example_inputs):
            sound.append(group)
        else:
            logger.warning("%s: left as it is, as the network does not follow when it is cut.", group.makers[0].name)
    return sound


@torch.no_grad()
def _follows(groups: Sequence[Group], example_inputs: Any) -> bool:
    whole = copy.deepcopy(list(groups))
    vary(whole[0].owner)
    smaller = copy.deepcopy(whole)
    for one, other in zip(whole, smaller, strict=True):
        keep = torch.arange(0, one.count, 2, device=one.taker.layer.get_parameter("weight").device)
        mask(one, keep)
        cut(other, keep)
    expected = _outputs(whole[0].owner, example_inputs)
    try:
        got = _outputs(smaller[0].owner, example_inputs)
    except Exception:
        return False
    shapes = [[tuple(each.shape) for each in outputs] for outputs in (expected, got)]
    return shapes[0] == shapes[1] and difference_beyond_rounding(expected, got, _TOLERANCE) is None


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    leaves = tree_leaves(call(model, example_inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
