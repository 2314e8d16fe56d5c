"""What became of the modules that a rule matches, and what to tell the user if it took none of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from vanishing.compressors import SkipBlock
from vanishing.patterns import Glob, OfType, Pattern, Regex, nearest, type_name
from vanishing.recipe import Rule


@dataclass
class Tally:
    """The modules that one rule matches, by what became of them.

    Args:
        matched: all of them.
        taken: layers and blocks that the rule compresses, or would but for a problem that is reported.
        ignored: those that the recipe ignores.
        shadowed: those that an earlier rule takes.
        refused: layers and blocks that the technique cannot take, with the reason.
        unfit: modules that are no layers, with what to do.
    """

    matched: int = 0
    taken: int = 0
    ignored: int = 0
    shadowed: int = 0
    refused: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)


def rule_problem(pattern: Pattern, rule: Rule, tally: Tally, modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Return what is wrong with a rule that takes nothing, or far more than anybody means, None where nothing is.

    Args:
        pattern: the rule's key.
        rule: the rule.
        tally: what became of the modules that it matches.
        modules: all modules of the model, by name.
    """
    if tally.taken:
        if isinstance(rule.compressor, SkipBlock) and pattern.text == repr("*"):
            return (
                f"'*' with {rule.compressor!r} would take out every residual block, {_counted(tally.taken)}. Name "
                f"those that can be missed, as in '*.layer.[3-5]'."
            )
        return None
    if not tally.matched:
        return f"nothing matched {pattern.text}.{nearest_names(pattern, modules)} Recipe.match(model) lists all layers."
    if not tally.refused and tally.ignored and tally.shadowed:
        return (
            f"of what {pattern.text} matched, the recipe ignores {_counted(tally.ignored)} and an earlier rule takes "
            f"{_counted(tally.shadowed)}. Narrow `ignore`, or drop the rule."
        )
    if not tally.refused and tally.ignored:
        return (
            f"everything that {pattern.text} matched was ignored ({_counted(tally.ignored)}). Narrow `ignore`, or drop "
            f"the rule."
        )
    if not tally.refused and tally.shadowed:
        return (
            f"{pattern.text} matched only modules that an earlier rule takes, so {rule.compressor!r} has nothing left "
            f"to do. Put this rule first, or drop it."
        )
    reasons = list(dict.fromkeys(tally.refused + tally.unfit))
    # One module of each kind of reason comes first.
    kinds = {reason.partition(": ")[2]: reason for reason in reversed(reasons)}
    reasons.sort(key=lambda reason: kinds[reason.partition(": ")[2]] != reason)
    more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
    if tally.ignored and not tally.shadowed:
        return (
            f"of what {pattern.text} matched, the recipe ignores {_counted(tally.ignored)}, and "
            f"{type(rule.compressor).__name__} can take none of the others: {'; '.join(reasons[:3])}{more}."
        )
    more += f"; the recipe ignores {_counted(tally.ignored)}" if tally.ignored else ""
    more += f"; an earlier rule takes {_counted(tally.shadowed)}" if tally.shadowed else ""
    return (
        f"{pattern.text} matched {_counted(tally.matched)}, none of which {type(rule.compressor).__name__} can take: "
        f"{'; '.join(reasons[:3])}{more}."
    )


def nearest_names(pattern: Pattern, modules: Iterable[tuple[str, nn.Module]]) -> str:
    """What may have been meant by a pattern that matches nothing."""
    if isinstance(pattern, OfType):
        types = {type(module).__name__: type_name(type(module)) for _, module in modules}
        near = [types[name] for name in nearest(pattern.type.rpartition(".")[2], types)]
        return f" The nearest types are {', '.join(near)}." if near else ""
    if not isinstance(pattern, (Glob, Regex)):
        return ""
    near = nearest(pattern.pattern, (name for name, _ in modules))
    return f" The nearest names are {', '.join(map(repr, near))}." if near else ""


def _counted(modules: int) -> str:
    return f"{modules} module" if modules == 1 else f"{modules} modules"
