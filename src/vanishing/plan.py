"""The dry run of a recipe: which module gets what, and everything that keeps it from being applied."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vanishing.blended_block import BlendedBlock
from vanishing.blended_weight import blended_weights
from vanishing.calibration import Observed, Observer
from vanishing.channels import groups_of, problem_of
from vanishing.compressors import BlockCompressor, Compressor, LayerView, Replace, StructuredPruning, WeightCompressor
from vanishing.distillation import Teacher
from vanishing.drives import schedule_problems
from vanishing.errors import RecipeError
from vanishing.layers import Factored, LayerKind, QuantizedInput, find_kind
from vanishing.patterns import Glob, Pattern
from vanishing.places import is_below
from vanishing.receipt import read_receipt
from vanishing.recipe import Recipe, Rule
from vanishing.suitability import (
    block_problem,
    cut_problem,
    input_problem,
    layers_that_are_read,
    replacement_problem,
    weight_problem,
)
from vanishing.tally import Tally, nearest_names, rule_problem
from vanishing.teacher import find_features
from vanishing.text import as_text

_UNCALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


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
        observer: what looks at it in the calibration pass, None for a technique that needs none.
    """

    name: str
    block: nn.Module
    rule: int
    compressor: BlockCompressor
    observer: Observer | None = None


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

    def places(self) -> list[tuple[str, list[Tensor]]]:
        """Return name and parameters of all that will be compressed."""
        weights: list[tuple[str, list[Tensor]]] = [(w.names[0], [w.layer.weight]) for w in self.weights]
        return weights + [(b.name, list(b.block.parameters())) for b in self.blocks]

    def observed(self) -> list[Observed]:
        """Return what techniques will look at in a calibration pass."""
        weights = [(w.names[0], w.layer.observed, [m for m, _ in w.owners]) for w in self.weights]
        blocks = [(b.name, b.observer, [b.block]) for b in self.blocks]
        return [Observed(name, each, modules) for name, each, modules in (*weights, *blocks) if each is not None]

    def check(self) -> None:
        """Raise `RecipeError` with all problems, if there are any."""
        if len(self.problems) == 1:
            raise RecipeError(self.problems[0])
        if self.problems:
            listed = "\n".join(f"  - {problem}" for problem in self.problems)
            raise RecipeError(f"the recipe does not fit the model, for {len(self.problems)} reasons:\n{listed}")

    def __str__(self) -> str:
        titles = ("module", "layer", "outcome", "technique or reason")
        table = Table(*(Column(title, overflow="fold") for title in titles))
        for row in self.rows:
            table.add_row(*map(escape, (row.name or "(the model)", row.module, row.outcome, row.detail)))
        return as_text(table, *(escape(f"problem: {problem}") for problem in self.problems), width=140)


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

    def within(self, modules: set[str]) -> bool:
        """Whether it is one of the modules, or inside of one."""
        return any(around in modules for name in self.names for around in _modules_around(name))

    def describe(self) -> str:
        kind = type(self.module).__name__
        return kind.removeprefix("Parametrized") if parametrize.is_parametrized(self.module) else kind


class _Planner:
    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        self.plan = Plan()
        names: dict[int, list[str]] = defaultdict(list)
        modules: dict[int, nn.Module] = {}
        for name, module in _layers_of(model):
            names[id(module)].append(name)
            modules[id(module)] = module
        self.names = names
        self.candidates = [_Candidate(tuple(names[i]), m, find_kind(m)) for i, m in modules.items()]
        self.fading = [
            c for c in self.candidates if isinstance(c.module, BlendedBlock) or any(blended_weights(c.module))
        ]
        ignored = [c for c in self.candidates if any(c.matched_by(pattern) for pattern in recipe.ignore)]
        self.ignored = {name for candidate in ignored for name in candidate.names}
        self.factored = {n for c in self.candidates if isinstance(c.module, Factored) for n in c.names}
        self.quantized = {n for c in self.candidates if isinstance(c.module, QuantizedInput) for n in c.names}
        self.read = layers_that_are_read(model)
        self.replaced: set[str] = set()
        units = {c.unit for _, rule in recipe.rules if isinstance(c := rule.compressor, StructuredPruning)}
        self.groups = {unit: {id(g.taker.layer): g for g in groups_of(model, unit)} for unit in units}
        self.makers: dict[int, str] = {}
        self.takers: set[int] = set()
        self.probed: dict[Hashable, str | None] = {}
        receipt = read_receipt(model)
        self.finished = {} if receipt is None else receipt.layers
        self.selected: dict[int, list[tuple[_Candidate, str, int, Rule]]] = defaultdict(list)
        self.tallies = [Tally() for _ in recipe.rules]
        self.owners: dict[int, list[tuple[_Candidate, str]]] = defaultdict(list)
        for candidate in self.candidates:
            for name, parameter in candidate.module._parameters.items():
                self.owners[id(parameter)].append((candidate, name))

    def make(self) -> Plan:
        if self.fading:
            named = ", ".join(repr(c.name) for c in self.fading[:3])
            more = f" and {len(self.fading) - 3} more" if len(self.fading) > 3 else ""
            self.plan.problems.append(
                f"the model is in a transition already, at {named}{more}. Finish or cancel that one first."
            )
            return self.plan
        self._check_factories()
        for candidate in self.candidates:
            self._claim(candidate)
        for candidate in self.candidates:
            self._place(candidate)
        for uses in self.selected.values():
            self._plan_weight(uses)
        order = {candidate.name: number for number, candidate in enumerate(self.candidates)}
        self.plan.rows.sort(key=lambda row: order[row.name])
        modules = [(name, candidate.module) for candidate in self.candidates for name in candidate.names]
        self.plan.problems += [
            f"ignore: nothing matched {pattern.text}.{nearest_names(pattern, modules)} Correct it, or leave it out."
            for pattern in self.recipe.ignore
            if not any(candidate.matched_by(pattern) for candidate in self.candidates)
        ]
        for (pattern, rule), tally in zip(self.recipe.rules, self.tallies, strict=True):
            problem = rule_problem(pattern, rule, tally, modules)
            if problem:
                self.plan.problems.append(problem)
        weights = {name: planned.rule for planned in self.plan.weights for name in planned.names[:1]}
        blocks = {block.name: block.rule for block in self.plan.blocks}
        self.plan.problems += schedule_problems(self.recipe, weights, blocks)
        for each in self.recipe.distillation:
            if isinstance(each, Teacher):
                self.plan.problems += find_features(dict(modules), each, blocks)[1]
        return self.plan

    def _check_factories(self) -> None:
        """Report a name that stands for two factories: a file holds names only."""
        known: dict[str, object] = {}
        techniques = [rule.compressor for _, rule in self.recipe.rules]
        for each in [*techniques, *(layer.compressor for layer in self.finished.values())]:
            if isinstance(each, Replace) and known.setdefault(str(each.name), each.factory) != each.factory:
                self.plan.problems.append(
                    f"two different factories are called {each.name!r}, and a file could not tell them apart. Give one "
                    f"of them another name=."
                )

    def _claim(self, candidate: _Candidate) -> None:
        """Note the layers that will be cut along with one from which a rule takes units."""
        if not any(id(candidate.module) in groups for groups in self.groups.values()) or candidate.within(self.ignored):
            return
        for pattern, rule in self.recipe.rules:
            if candidate.matched_by(pattern) and self._refusal(candidate, pattern, rule.compressor) is None:
                if isinstance(rule.compressor, StructuredPruning):
                    group = self.groups[rule.compressor.unit][id(candidate.module)]
                    others = (part for part in group.parts if part is not group.taker)
                    self.makers.update((id(part.layer), candidate.name) for part in others)
                    self.takers.add(id(candidate.module))
                return

    def _row(self, candidate: _Candidate, outcome: str, detail: str) -> None:
        self.plan.rows.append(PlanRow(candidate.name, candidate.describe(), outcome, detail))

    def _place(self, candidate: _Candidate) -> None:
        matching = [n for n, (pattern, _) in enumerate(self.recipe.rules) if candidate.matched_by(pattern)]
        for number in matching:
            self.tallies[number].matched += 1
        if candidate.within(self.replaced):
            reason = "it is inside a block that is replaced as a whole"
            for number in matching:
                self._refuse(number, candidate, reason)
            if candidate.kind is not None:
                self._row(candidate, "left", reason)
            return
        # The layer that takes channels up may make others: it is cut on both sides.
        if id(candidate.module) in self.makers and id(candidate.module) not in self.takers:
            reason = f"units are cut out of it along with {self.makers[id(candidate.module)]!r}"
            for number in matching:
                self._refuse(number, candidate, reason)
            self._row(candidate, "compress", reason)
            return
        reasons = []
        for place, number in enumerate(matching):
            pattern, rule = self.recipe.rules[number]
            refusal = self._refusal(candidate, pattern, rule.compressor)
            if refusal is not None:
                self._refuse(number, candidate, refusal)
                reasons.append(refusal)
            elif candidate.within(self.ignored):
                self._row(candidate, "ignored", "the recipe's ignore names it or a module around it")
                for each in matching[place:]:
                    self.tallies[each].ignored += 1
                return
            else:
                self._take(candidate, number, rule)
                for each in matching[place + 1 :]:
                    self.tallies[each].shadowed += 1
                return
        if candidate.kind is not None:
            self._row(candidate, "left", reasons[0] if reasons else "no rule matches it")

    def _refuse(self, number: int, candidate: _Candidate, reason: str) -> None:
        is_block = isinstance(self.recipe.rules[number][1].compressor, BlockCompressor)
        tally = self.tallies[number]
        reasons = tally.unfit if candidate.kind is None and not is_block else tally.refused
        reasons.append(f"{candidate.name or 'the model'} ({candidate.describe()}): {reason}")

    def _refusal(self, candidate: _Candidate, pattern: Pattern, compressor: Compressor) -> str | None:
        """Why a rule does not choose a module that its pattern matches; None where it does."""
        earlier = self._rebuilt_earlier(candidate, isinstance(compressor, BlockCompressor))
        if earlier is not None:
            return earlier
        if isinstance(compressor, BlockCompressor):
            if isinstance(candidate.module, _UNCALLED):
                return "it only holds other modules and is never called"
            return compressor.refusal(candidate.module)
        assert isinstance(compressor, WeightCompressor)
        if candidate.kind is None:
            below = isinstance(pattern, Glob) and candidate.name and next(candidate.module.children(), None) is not None
            hint = f", or write {candidate.name + '.*'!r} for the layers below" if below else ""
            return f"it is not a layer with a weight that can be compressed{hint}"
        if candidate.kind.explicit_only and not pattern.explicit:
            return "an embedding is compressed only if a rule gives its type or exact name"
        if isinstance(compressor, StructuredPruning):
            return self._structure_refusal(candidate, compressor)
        if compressor.replaces_layer and candidate.within(self.factored):
            return "it is one of the two layers that a factored one is made of already"
        if compressor.quantizes_input and candidate.within(self.quantized):
            return "its input is quantized already"
        if compressor.quantizes_input and id(candidate.module) in self.read:
            return self.read[id(candidate.module)]
        return compressor.refusal(candidate.kind)

    def _structure_refusal(self, candidate: _Candidate, compressor: StructuredPruning) -> str | None:
        """Why no units can be taken from a layer and those before it; None where they can."""
        group = self.groups[compressor.unit].get(id(candidate.module))
        if group is None:
            return f"it takes up no {compressor.unit.value} of a kind that is known"
        places = len(self.names[id(group.taker.layer)])
        for part in group.parts:
            tied = any(len(self.owners[id(parameter)]) > 1 for parameter in part.layer.parameters())
            shared = len(self.names[id(part.layer)]) != places
            problem = "its weight is tied" if tied else "other blocks use it too" if shared else cut_problem(part.layer)
            if problem:
                return f"of {part.name!r}, which would be cut along with it: {problem}"
        # A probe copies a block, and a model has many that are alike.
        sizes = [(part.name.removeprefix(group.owner_name), part.size) for part in group.parts]
        alike = (type(group.owner), repr(group.owner), group.unit, group.count, *sizes)
        if alike not in self.probed:
            self.probed[alike] = problem_of(group)
        return self.probed[alike]

    def _rebuilt_earlier(self, candidate: _Candidate, is_block: bool) -> str | None:
        """Why a module that an earlier transition built cannot be compressed again; None where it can."""
        for name, layer in self.finished.items():
            standing = {"factored": self.factored, "quantized_input": self.quantized}.get(layer.structure)
            if standing is not None and name not in standing:
                # Somebody has put another module there since.
                continue
            if layer.structure == "replaced" and name in candidate.names:
                return "an earlier transition put it there, and load could not do both. Let its factory do it all"
            rebuilt = layer.structure != "weight" or layer.narrowed_from is not None or layer.counts
            if rebuilt and is_block and any(is_below(name, own) for own in candidate.names):
                return f"an earlier transition built {name!r} in it, which load could not repeat. Replace the original"
        return None

    def _take(self, candidate: _Candidate, number: int, rule: Rule) -> None:
        compressor = rule.compressor
        if isinstance(compressor, BlockCompressor):
            self.tallies[number].taken += 1
            self.replaced.update(candidate.names)
            problem = block_problem(candidate.name, candidate.module)
            if problem:
                self._problem(compressor, candidate.name, candidate.describe(), problem)
                return
            self._row(candidate, "compress", repr(compressor))
            observer = compressor.observer(candidate.module)
            self.plan.blocks.append(PlannedBlock(candidate.name, candidate.module, number, compressor, observer))
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
        chosen = {(id(use[0].module), use[1]) for use in uses}
        outside = [c.name for c, name in self.owners[id(weight)] if (id(c.module), name) not in chosen]
        if weight is not None and outside:
            reason = f"its weight is tied to {outside[0]!r}, which no rule takes: name both to compress them together"
            for use in uses:
                self._row(use[0], "left", reason)
                self._refuse(use[2], use[0], reason)
            return
        for use in uses:
            self.tallies[use[2]].taken += 1
        problem = weight_problem(candidate.module, weight_name, weight)
        if problem or weight is None:
            self._problem(compressor, candidate.name, candidate.describe(), problem or "it has no such parameter")
            return
        shape = tuple(weight.shape)
        groups = self.groups[compressor.unit] if isinstance(compressor, StructuredPruning) else {}
        layers = [
            LayerView(c.module, c.kind, weight, c.kind.layout(c.module, shape), groups.get(id(c.module)))
            for c, *_ in uses
            if c.kind
        ]
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
        observed = dataclasses.replace(layer, observed=compressor.observer(layer))
        self.plan.weights.append(PlannedWeight(names, owners, observed, number, compressor))

    def _fit_problem(self, uses: list[tuple[_Candidate, str, int, Rule]], layers: list[LayerView]) -> str | None:
        """Why a weight and its technique do not fit together; None where they do."""
        candidate, _, _, rule = uses[0]
        compressor, layer = rule.compressor, layers[0]
        assert isinstance(compressor, WeightCompressor)
        own = next((p for view in layers if (p := view.kind.problem(view.module))), None) or compressor.problem(layer)
        if own:
            return own
        if len(uses) > 1:
            others = ", ".join(repr(use[0].name) for use in uses[1:])
            if any(use[3] != rule for use in uses):
                return f"its weight is tied to {others}, which another rule compresses. Use one rule for all"
            if compressor.replaces_layer or any(view.layout != layer.layout for view in layers):
                return f"its weight is tied to {others}, and factors cannot be shared so. Add them to ignore"
        if compressor.quantizes_input:
            return input_problem(candidate.name, layer)
        return replacement_problem(candidate.name, layer) if compressor.replaces_layer else None

    def _problem(self, compressor: Compressor, name: str, what: str, problem: str) -> None:
        where = repr(name) if name else "the model itself"
        self.plan.problems.append(f"{compressor!r} cannot compress {where} ({what}): {problem}.")


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Return what a recipe would do to a model, with every problem; the model is not changed.

    Raises:
        TypeError: the model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected the model as an nn.Module, got {type(model).__name__}.")
    return _Planner(model, recipe).make()


def _layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module under every name, but not what computes the weight of another one."""
    hidden: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if not any(around in hidden for around in _modules_around(name)):
            if parametrize.is_parametrized(module):
                hidden.add(f"{name}.parametrizations" if name else "parametrizations")
            yield name, module


def _modules_around(name: str) -> Iterator[str]:
    """Yield a module's name and those of the modules around it, but for the model itself."""
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters.get(name)
