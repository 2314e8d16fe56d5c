"""Units of a network that can be taken out: which layers make them, which layer takes them up, and how they are cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vanishing.equality import difference_beyond_rounding
from vanishing.places import join
from vanishing.random_state import random_state_kept

_TOLERANCE = 1e-5


class Unit(Enum):
    """What is taken out as a whole."""

    HEAD = "attention heads"
    """Heads of an attention; with grouped queries, a head of keys and values with all queries that read it."""
    WIDTH = "hidden units of a feed-forward"


@dataclass(frozen=True)
class Part:
    """One layer of a group.

    Args:
        name: its full name.
        layer: a linear layer.
        size: features of a unit, next to each other.
        repeats: how often the units follow each other, as in a layer that makes queries, keys and values at once.
    """

    name: str
    layer: nn.Linear
    size: int
    repeats: int = 1

    def features(self, units: Tensor) -> Tensor:
        """Return the positions of the features of some units, in their order.

        Args:
            units: (count,), numbers of units, in rising order.
        """
        one = (units[:, None] * self.size + torch.arange(self.size, device=units.device)).flatten()
        length = self.layer.out_features // self.repeats
        return torch.cat([one + length * repeat for repeat in range(self.repeats)])


@dataclass(frozen=True)
class Group:
    """Layers whose features are the same units.

    Args:
        unit: what the units are.
        count: how many there are.
        makers: layers whose outputs are the units.
        taker: the layer whose inputs they are.
        owner: the module that they are in; of an attention, the one that knows how many heads it has.
        owner_name: its full name.
        counters: attributes of it that are multiples of the number of units.
    """

    unit: Unit
    count: int
    makers: tuple[Part, ...]
    taker: Part
    owner: nn.Module
    owner_name: str
    counters: tuple[str, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All layers."""
        return (*self.makers, self.taker)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the importance of every unit by the size of its weights, (count,).

        The norm of the weights that take the unit up times the norm of those that make what it passes on: of the
        values of a head, of the last linear layer before a hidden unit. It is the same whichever side a scale is on.
        """
        taking = self.taker.layer.weight.float().reshape(-1, self.count, self.taker.size).norm(dim=(0, 2))
        maker = self.makers[-1]
        rows = maker.layer.weight.float().reshape(maker.repeats, self.count, -1)
        return taking * rows[-1].norm(dim=1)


_HEAD_SIZES = ("head_dim", "attention_head_size")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
_OTHER_COUNTS = ("num_key_value_heads", "all_head_size", "attn_dim")

# Names below a module: of queries, keys and values, then of what takes the heads up.
_ATTENTIONS = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("q_lin", "k_lin", "v_lin"), "out_lin"),
    (("self.query", "self.key", "self.value"), "output.dense"),
    (("attention.query", "attention.key", "attention.value"), "output.dense"),
    (("qkv",), "proj"),
)
_FEED_FORWARDS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("fc1",), "fc2"),
    (("intermediate.dense",), "output.dense"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
    (("w1", "w3"), "w2"),
)


def find_groups(model: nn.Module, unit: Unit) -> Iterator[Group]:
    """Yield the groups of a model that are known by the names of their layers, as transformers and timm write them."""
    for name, module in model.named_modules():
        for makers, taker in _ATTENTIONS if unit is Unit.HEAD else _FEED_FORWARDS:
            layers = {path: _linear(module, path) for path in (*makers, taker)}
            if all(layers.values()):
                group = _group(unit, name, module, layers, makers, taker)  # type: ignore[arg-type]
                if group is not None:
                    yield group
                    break


def _linear(module: nn.Module, path: str) -> nn.Linear | None:
    for part in path.split("."):
        found = module._modules.get(part)
        if found is None:
            return None
        module = found
    return module if isinstance(module, nn.Linear) else None


def _group(
    unit: Unit, name: str, module: nn.Module, layers: dict[str, nn.Linear], makers: Sequence[str], taker: str
) -> Group | None:
    outer = name
    counters: tuple[str, ...] = ()
    if unit is Unit.WIDTH:
        count, sizes = layers[taker].in_features, dict.fromkeys(layers, 1)
        repeats, owner_name = 1, name
        if any(layers[path].out_features != count for path in makers):
            return None
    else:
        # The queries' layer stands in the module that knows the size of a head.
        inner = makers[0].rpartition(".")[0]
        attention = module.get_submodule(inner)
        repeats = 3 if len(makers) == 1 else 1
        width = layers[taker].in_features
        queries = next((n for each in _HEAD_COUNTS if isinstance(n := getattr(attention, each, None), int)), None)
        size = next((n for each in _HEAD_SIZES if isinstance(n := getattr(attention, each, None), int)), None)
        if size is None and queries:
            size = width // queries
        if not size or width % size:
            return None
        count = layers[makers[-1]].out_features // repeats // size
        if not count or width % (count * size) or layers[makers[0]].out_features // repeats != width:
            return None
        group_size = width // count
        sizes = dict.fromkeys(makers, size) | {makers[0]: group_size, taker: group_size}
        known = (*_HEAD_COUNTS, *_OTHER_COUNTS)
        multiples = {n: getattr(attention, n, None) for n in known}
        sized = (count, width // size, width)
        counters = tuple(n for n, v in multiples.items() if isinstance(v, int) and v in sized)
        module, owner_name = attention, join(name, inner)

    def part(path: str, times: int = 1) -> Part:
        return Part(join(outer, path), layers[path], sizes[path], times)

    return Group(unit, count, tuple(part(p, repeats) for p in makers), part(taker), module, owner_name, counters)


def group_problem(group: Group) -> str | None:
    """Return why units cannot be taken out of a group, None where they can.

    Where the module around the layers can be called with what such modules take, two copies of it are compared: every
    other unit ignored, and every other unit cut out.
    """
    reason = f"{type(group.owner).__name__} does not follow when units are cut out of its layers"
    return _other_parameters(group) or _probe(group, reason)


def _other_parameters(group: Group) -> str | None:
    """Why parameters of an attention beside those that are cut count heads; None if there are none."""
    if group.unit is not Unit.HEAD:
        return None
    cut_too = {id(p) for part in group.parts for p in part.layer.parameters()}
    width = group.taker.layer.in_features
    heads = width // group.makers[-1].size
    counted = {group.count, heads, width, group.count * group.makers[-1].size} - {1}
    for name, parameter in group.owner.named_parameters():
        if id(parameter) not in cut_too and counted & set(parameter.shape):
            return f"its {name!r} has a part for every head, which would not be cut"
    return None


def _probe(group: Group, reason: str) -> str | None:
    keep = torch.arange(0, group.count, 2, device=group.taker.layer.weight.device)
    maker = group.makers[0].layer
    probe = torch.randn(2, 3, maker.in_features).to(maker.weight)
    rotation = torch.ones(2, 3, group.makers[-1].size).to(probe)
    rotary = {"position_embeddings": (rotation, 0 * rotation), "attention_mask": None}
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]]
    calls = [((probe,), {}), ((probe,), rotary), ((probe,) * 2, {}), ((probe,) * 3, {})]
    inside = any(module is group.taker.layer for module in group.owner.modules())
    with random_state_kept(probe.device), torch.no_grad():
        whole = _with_columns(group, keep) if inside else copy.deepcopy(group)
        smaller = copy.deepcopy(group)
        cut(smaller, keep)
        recount(smaller, len(keep))
        for each in (whole, smaller):
            each.owner.eval()
        for arguments, keywords in calls:
            try:
                expected = _first(whole.owner(*arguments, **keywords))
            except Exception:
                # It takes something else.
                continue
            if not inside:
                # What it returns goes on to the layer that takes the heads up.
                expected = expected[..., group.taker.features(keep)]
            try:
                got = _first(smaller.owner(*arguments, **keywords))
            except Exception as error:
                return f"{reason} ({' '.join(str(error).split()):.100})"
            same = expected.shape == got.shape
            return None if same and difference_beyond_rounding([expected], [got], _TOLERANCE) is None else reason
    # It cannot be tried. One that knows its own width may shape what it computes by it.
    width = group.taker.layer.in_features
    told = [
        name
        for name, value in vars(group.owner).items()
        if type(value) is int and value == width and name not in group.counters
    ]
    return f"its {told[0]!r} would not follow" if told and group.unit is Unit.HEAD else None


def _first(outputs: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))


def _with_columns(group: Group, keep: Tensor) -> Group:
    """A copy of a group in which the other units count nothing."""
    result = copy.deepcopy(group)
    weight = result.taker.layer.weight
    kept = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    kept[result.taker.features(keep)] = True
    weight.mul_(kept)
    return result


def recount(group: Group, kept: int) -> dict[str, int]:
    """Tell the module around the layers how many units there are; return its attributes."""
    counts = {name: getattr(group.owner, name) * kept // group.count for name in group.counters}
    for name, count in counts.items():
        setattr(group.owner, name, count)
    return counts


def narrowed(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of a linear layer with parameters of smaller shapes and of no meaning; the rest is shared.

    Args:
        module: the layer.
        shapes: by the name of the parameter.

    Raises:
        ValueError: it is no linear layer, or a shape is no smaller one.
    """
    if not isinstance(module, nn.Linear):
        raise ValueError(f"a {type(module).__name__} cannot be narrowed.")
    result = copy.copy(module)
    result._parameters = dict(module._parameters)
    for name, shape in shapes.items():
        old = module._parameters.get(name)
        if old is None or len(shape) != old.ndim or any(a > b for a, b in zip(shape, old.shape, strict=True)):
            raise ValueError(f"its {name} cannot have the shape {list(shape)}.")
        result._parameters[name] = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
    result.out_features, result.in_features = result.weight.shape
    return result


def recounted(module: nn.Module, counts: Mapping[str, int]) -> nn.Module:
    """Return a copy of a module that is told of fewer units; parameters and children are shared.

    Raises:
        ValueError: an attribute is none that counts units, or would grow.
    """
    result = copy.copy(module)
    for name, count in counts.items():
        before = getattr(module, name, None)
        if name not in (*_HEAD_COUNTS, *_OTHER_COUNTS) or not isinstance(before, int) or not 0 < count <= before:
            raise ValueError(f"its {name} cannot be {count}.")
        setattr(result, name, count)
    return result


@torch.no_grad()
def cut(group: Group, keep: Tensor) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Take the units that are not kept out of the layers; return every parameter that was cut, and what is left of it.

    Args:
        group: the layers, none of which is parametrized.
        keep: (count,), numbers of the units that stay, in rising order.
    """
    exchanged = []
    for part in group.makers:
        rows = part.features(keep)
        exchanged += [
            _exchange(part.layer, name, 0, rows)
            for name in ("weight", "bias")
            if part.layer._parameters[name] is not None
        ]
        part.layer.out_features = len(rows)
    columns = group.taker.features(keep)
    group.taker.layer.in_features = len(columns)
    return [*exchanged, _exchange(group.taker.layer, "weight", 1, columns)]


def _exchange(layer: nn.Linear, name: str, dimension: int, kept: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    old = layer.get_parameter(name)
    new = nn.Parameter(old.detach().index_select(dimension, kept), requires_grad=old.requires_grad)
    layer._parameters[name] = new
    return old, new
