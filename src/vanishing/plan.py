"""The dry run of a recipe: which module gets what, and everything that keeps it from being applied."""

from __future__ import annotations

import difflib
import io
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from vanishing.blend import BlendedBlock, BlendedWeight
from vanishing.compressors import BlockCompressor, Compressor, LayerView, WeightCompressor
from vanishing.errors import RecipeError
from vanishing.layers import LayerKind, find_kind
from vanishing.patterns import Glob, Pattern
from vanishing.recipe import Recipe, Rule

_UNCALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_PROBE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class PlanRow:
    """One line of a plan.

    Args:
        name: the module's full name; further names of the same module are not repeated.
        module: its type and size.
        outcome: "compress", "ignored" or "left".
        detail: the technique, or the reason.
    """

    name: str
    module: str
    outcome: str
    detail: str


@dataclass(frozen=True)
class PlannedWeight:
    """One weight that will be compressed; a tied one has several owners.

    Args:
        names: full names of the layers that hold it, one for each owner.
        owners: the layers and the name of the weight in each.
        layer: the weight as the technique sees it.
        rule: number of the rule.
        compressor: the technique.
    """

    names: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...]
    layer: LayerView
    rule: int
    compressor: WeightCompressor


@dataclass(frozen=True)
class PlannedBlock:
    """One block that will be replaced.

    Args:
        name: its full name.
        block: the module.
        rule: number of the rule.
        compressor: the technique.
    """

    name: str
    block: nn.Module
    rule: int
    compressor: BlockCompressor


@dataclass
class Plan:
    """What a recipe does to a model; printed, a table.

    Args:
        rows: one for every module that a rule reached or that could be compressed.
        problems: everything that keeps the recipe from being applied, in words.
        weights: the weights that will be compressed.
        blocks: the blocks that will be replaced.
    """

    rows: list[PlanRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    weights: list[PlannedWeight] = field(default_factory=list)
    blocks: list[PlannedBlock] = field(default_factory=list)

    def check(self) -> None:
        """Raise `RecipeError` with all problems, if there are any."""
        if len(self.problems) == 1:
            raise RecipeError(self.problems[0])
        if self.problems:
            listed = "\n".join(f"  - {problem}" for problem in self.problems)
            raise RecipeError(f"the recipe does not fit the model, for {len(self.problems)} reasons:\n{listed}")

    def __str__(self) -> str:
        table = Table("module", "layer", "outcome", "technique or reason")
        for row in self.rows:
            table.add_row(row.name, row.module, row.outcome, row.detail)
        console = Console(file=io.StringIO(), width=140)
        console.print(table)
        for problem in self.problems:
            console.print(f"problem: {problem}", markup=False, highlight=False)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text


@dataclass(frozen=True)
class _Candidate:
    """A module of the model with everything that the matching asks about it."""

    names: tuple[str, ...]
    module: nn.Module
    kind: LayerKind | None

    @property
    def name(self) -> str:
        return self.names[0]

    def matched_by(self, pattern: Pattern) -> bool:
        return any(pattern.matches(name, self.module) for name in self.names)

    def within(self, prefixes: set[str]) -> bool:
        return any(name == p or name.startswith(f"{p}.") for name in self.names for p in prefixes)

    def describe(self) -> str:
        kind = type(self.module).__name__
        return kind.removeprefix("Parametrized") if parametrize.is_parametrized(self.module) else kind


class _Planner:
    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        self.plan = Plan()
        names: dict[int, list[str]] = defaultdict(list)
        modules: dict[int, nn.Module] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names[id(module)].append(name)
            modules[id(module)] = module
        self.candidates = [_Candidate(tuple(names[i]), m, find_kind(m)) for i, m in modules.items()]
        self.ignored: set[str] = set()
        self.replaced: set[str] = set()
        self.selected: dict[int, list[tuple[_Candidate, str, int, Rule]]] = defaultdict(list)
        self.matched = [0] * len(recipe.rules)
        self.taken = [0] * len(recipe.rules)
        self.refusals: list[list[str]] = [[] for _ in recipe.rules]

    def make(self) -> Plan:
        for candidate in self.candidates:
            self._place(candidate)
        for uses in self.selected.values():
            self._plan_weight(uses)
        self._check_rules()
        return self.plan

    def _row(self, candidate: _Candidate, outcome: str, detail: str) -> None:
        self.plan.rows.append(PlanRow(candidate.name, candidate.describe(), outcome, detail))

    def _place(self, candidate: _Candidate) -> None:
        if candidate.within(self.replaced - {""}):
            if candidate.kind is not None:
                self._row(candidate, "left", "it is inside a block that is replaced as a whole")
            return
        is_ignored = any(candidate.matched_by(pattern) for pattern in self.recipe.ignore)
        if is_ignored:
            self.ignored.update(candidate.names)
        reasons = []
        matching = [n for n, (pattern, _) in enumerate(self.recipe.rules) if candidate.matched_by(pattern)]
        for number in matching:
            self.matched[number] += 1
        for number in matching:
            pattern, rule = self.recipe.rules[number]
            reason = self._refusal(candidate, pattern, rule.compressor)
            if reason is None and (is_ignored or candidate.within(self.ignored - {""})):
                self._row(candidate, "ignored", "the recipe's ignore names it or a module around it")
                self.refusals[number].append("ignored")
                return
            if reason is None:
                self._take(candidate, number, rule)
                return
            self.refusals[number].append(f"{candidate.name or 'the model'} ({candidate.describe()}): {reason}")
            reasons.append(reason)
        if candidate.kind is not None:
            self._row(candidate, "left", reasons[0] if reasons else "no rule matches it")

    def _refusal(self, candidate: _Candidate, pattern: Pattern, compressor: Compressor) -> str | None:
        """Why a rule does not choose a module that its pattern matches; None where it does."""
        if isinstance(compressor, BlockCompressor):
            if isinstance(candidate.module, _UNCALLED):
                return "it only holds other modules and is never called"
            return None
        assert isinstance(compressor, WeightCompressor)
        if candidate.kind is None:
            hint = f", or write {candidate.name + '.*'!r} for the layers below" if isinstance(pattern, Glob) else ""
            return f"it is not a layer with a weight that can be compressed{hint}"
        if candidate.kind.explicit_only and not pattern.explicit:
            return "an embedding is compressed only if a rule gives its type or exact name"
        return compressor.refusal(candidate.kind)

    def _take(self, candidate: _Candidate, number: int, rule: Rule) -> None:
        self.taken[number] += 1
        compressor = rule.compressor
        if isinstance(compressor, BlockCompressor):
            self.replaced.update(candidate.names)
            problem = _block_problem(candidate)
            if problem:
                self._problem(compressor, candidate.name, candidate.describe(), problem)
                return
            self._row(candidate, "compress", repr(compressor))
            self.plan.blocks.append(PlannedBlock(candidate.name, candidate.module, number, compressor))
            return
        assert candidate.kind is not None
        for weight_name in candidate.kind.weight_names(candidate.module):
            weight = _parameter(candidate.module, weight_name)
            self.selected[id(candidate.module) if weight is None else id(weight)].append(
                (candidate, weight_name, number, rule)
            )

    def _plan_weight(self, uses: list[tuple[_Candidate, str, int, Rule]]) -> None:
        """Plan one weight, with all the layers that hold it, if it is tied."""
        candidate, weight_name, number, rule = uses[0]
        compressor = rule.compressor
        assert isinstance(compressor, WeightCompressor) and candidate.kind is not None
        weight = _parameter(candidate.module, weight_name)
        problem = _weight_problem(candidate, weight_name, weight)
        if problem or weight is None:
            self._problem(compressor, candidate.name, candidate.describe(), problem or "it has no such parameter")
            return
        outside = self._owners_outside(weight, {(id(use[0].module), use[1]) for use in uses})
        if outside:
            reason = f"its weight is tied to {outside[0]!r}, which no rule takes: name both to compress them together"
            self._row(candidate, "left", reason)
            self.taken[number] -= 1
            self.refusals[number].append(f"{candidate.name}: {reason}")
            return
        shape = tuple(weight.shape)
        layers = [LayerView(c.module, c.kind, weight, c.kind.layout(c.module, shape)) for c, *_ in uses if c.kind]
        layer = layers[0]
        problem = self._fit_problem(uses, layers)
        if problem:
            self._problem(compressor, candidate.name, layer.describe(), problem)
            return
        for use, view in zip(uses, layers, strict=True):
            suffix = "" if use[1] == "weight" else f" on {use[1]}"
            self.plan.rows.append(PlanRow(use[0].name, view.describe(), "compress", f"{compressor!r}{suffix}"))
        names = tuple(use[0].name for use in uses)
        owners = tuple((use[0].module, use[1]) for use in uses)
        self.plan.weights.append(PlannedWeight(names, owners, layer, number, compressor))

    def _fit_problem(self, uses: list[tuple[_Candidate, str, int, Rule]], layers: list[LayerView]) -> str | None:
        """Why a weight and its technique do not fit together; None where they do."""
        candidate, _, _, rule = uses[0]
        compressor, layer = rule.compressor, layers[0]
        assert isinstance(compressor, WeightCompressor)
        own = layer.kind.problem(layer.module) or compressor.problem(layer)
        if own:
            return own
        if len(uses) > 1:
            others = ", ".join(repr(use[0].name) for use in uses[1:])
            if any(use[3] != rule for use in uses):
                return f"its weight is tied to {others}, which another rule compresses differently. Use one rule for all"
            if compressor.replaces_layer or any(view.layout != layer.layout for view in layers):
                return f"its weight is tied to {others}, and factors cannot be shared so. Add them to ignore"
        return _replacement_problem(candidate, layer) if compressor.replaces_layer else None

    def _owners_outside(self, weight: Tensor, chosen: set[tuple[int, str]]) -> list[str]:
        return [
            candidate.name
            for candidate in self.candidates
            for name, parameter in candidate.module._parameters.items()
            if parameter is weight and (id(candidate.module), name) not in chosen
        ]

    def _problem(self, compressor: Compressor, name: str, what: str, problem: str) -> None:
        where = repr(name) if name else "the model itself"
        self.plan.problems.append(f"{compressor!r} cannot compress {where} ({what}): {problem}.")

    def _check_rules(self) -> None:
        """Add a problem for every rule that took nothing."""
        names = [name for c in self.candidates for name in c.names if name]
        for number, (pattern, rule) in enumerate(self.recipe.rules):
            if self.taken[number]:
                continue
            refused = self.refusals[number]
            if not self.matched[number]:
                near = difflib.get_close_matches(pattern.text.strip("'"), names, n=3, cutoff=0.3)
                hint = f" The nearest names are {', '.join(map(repr, near))}." if near else ""
                self.plan.problems.append(f"nothing matched {pattern.text}.{hint} Recipe.match(model) lists all modules.")
            elif not refused:
                self.plan.problems.append(
                    f"{pattern.text} matched only modules that an earlier rule takes, so {rule.compressor!r} has nothing "
                    f"left to do. Put this rule first, or drop it."
                )
            elif all(reason == "ignored" for reason in refused):
                self.plan.problems.append(
                    f"everything that {pattern.text} matched was ignored ({len(refused)} layers). Narrow `ignore`."
                )
            else:
                reasons = list(dict.fromkeys(reason for reason in refused if reason != "ignored"))
                ignored = f"; {refused.count('ignored')} others are ignored" if "ignored" in refused else ""
                more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
                self.plan.problems.append(
                    f"{pattern.text} matched {self.matched[number]} modules, none of which "
                    f"{type(rule.compressor).__name__} can take: {'; '.join(reasons[:3])}{more}{ignored}."
                )


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Return what a recipe would do to a model, with every problem; the model is not changed."""
    return _Planner(model, recipe).make()


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters.get(name)


def _block_problem(candidate: _Candidate) -> str | None:
    if not candidate.name:
        return "the whole model has no place to be replaced in. Wrap it in nn.Sequential, or name a block of it"
    if isinstance(candidate.module, BlendedBlock):
        return "it is in a transition already. Finish or cancel that one first"
    parameters = list(candidate.module.parameters())
    return _tensors_problem(parameters) if parameters else None


def _weight_problem(candidate: _Candidate, name: str, weight: Tensor | None) -> str | None:
    """Why a weight cannot be compressed by anything; None where it can."""
    if parametrize.is_parametrized(candidate.module, name):
        first = candidate.module.parametrizations[name][0]  # type: ignore[index,union-attr]
        if isinstance(first, BlendedWeight):
            return "it is in a transition already. Finish or cancel that one first"
        return f"its {name} is parametrized by {type(first).__name__}. Remove that parametrization first"
    if weight is None:
        return f"it has no parameter {name!r} of its own (weight norm, or a quantized layer?). Add it to ignore"
    return _tensors_problem([weight])


def _tensors_problem(tensors: list[Tensor]) -> str | None:
    if any(is_lazy(t) for t in tensors):
        return "it is lazy and has no weights yet. Run one batch through the model first"
    if any(t.is_meta for t in tensors):
        return "its weights are on the meta device. Load them first"
    floating = [t for t in tensors if t.is_floating_point()]
    if not floating:
        return f"its weights are {tensors[0].dtype}, not floating. Add it to ignore"
    if not any(t.requires_grad for t in floating):
        return "all its weights are frozen. Call requires_grad_(True) on it, or add it to ignore"
    if not all(bool(torch.isfinite(t.detach()).all()) for t in floating):
        return "its weights contain NaN or infinite values. Load a sound checkpoint, or add it to ignore"
    return None


def _replacement_problem(candidate: _Candidate, layer: LayerView) -> str | None:
    """Why two plain layers cannot take the place of a layer that is to be factored; None where they can."""
    if not candidate.name:
        return "the whole model has no place to be replaced in. Wrap it in nn.Sequential"
    if "forward" in vars(layer.module):
        return "its forward was patched on the object, which a replacement would lose. Remove the patch first"
    base_forward = layer.kind.base_forward(layer.module)
    if base_forward is None or type(layer.module).forward is base_forward:
        return None
    if _computes(layer, base_forward):
        return None
    return (
        f"{type(layer.module).__name__} does not compute what the plain layer with its weight computes, so two plain "
        f"layers cannot take its place. Add it to ignore"
    )


def _computes(layer: LayerView, base_forward: object) -> bool:
    """Whether a subclass gives the plain layer's outputs for random inputs, in training and in evaluation."""
    was_training = layer.module.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        probe = layer.kind.probe_input(layer.module)
        try:
            for mode in (True, False):
                layer.module.train(mode)
                plain = base_forward(layer.module, probe)  # type: ignore[operator]
                output = layer.module.forward(probe)
                if not isinstance(output, Tensor) or output.shape != plain.shape:
                    return False
                if (output - plain).abs().max() > _PROBE_TOLERANCE * plain.abs().max():
                    return False
        except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
            # A forward that does not even take the plain layer's input is not the plain layer's.
            return False
        finally:
            layer.module.train(was_training)
    return True
