"""The dry run: what `Recipe.match` says about every module, and that it is what `prepare` then does."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vanishing
from loops import copied, states_equal
from vanishing import Binary, LinearSchedule, LowRank, MagnitudePruning, Quantization, Recipe, Replace, Ternary
from vanishing.plan import Plan, PlanRow

FADE = LinearSchedule(steps=4)


class Model(nn.Module):
    """One of everything; `shared` is used twice, `head` is tied to `embed`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(3, 6, 3, groups=3)
        self.up = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.norm = nn.LayerNorm(8)
        self.batch_norm = nn.BatchNorm2d(6)
        self.attention = nn.MultiheadAttention(8, 2)
        self.separate = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.lstm = nn.LSTM(8, 4, bidirectional=True)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])
        self.shared = nn.Linear(8, 5)
        self.again = nn.ModuleDict({"same": self.shared})
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def match(rules: dict[Any, Any], model: nn.Module | None = None, **options: Any) -> Plan:
    return Recipe(rules, schedule=FADE, **options).match(model or Model())


def rows(plan: Plan) -> dict[str, tuple[str, str, str]]:
    """Rows by name; several of one module, a weight each, in one."""
    found: dict[str, tuple[str, str, str]] = {}
    for row in plan.rows:
        detail = f"{found[row.name][2]} + {row.detail}" if row.name in found else row.detail
        found[row.name] = (row.module, row.outcome, detail)
    return found


def test_every_layer_has_a_row_with_its_size_and_what_becomes_of_it() -> None:
    plan = match({"*": Binary()})
    assert plan.problems == []
    tied = "its weight is tied to 'embed', which no rule takes: name both to compress them together"
    bare = "an embedding is compressed only if a rule gives its type or exact name"
    gates = ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]
    assert rows(plan) == {
        "embed": ("Embedding", "left", bare),
        "conv": ("Conv2d 27 -> 6", "compress", "Binary()"),
        "up": ("ConvTranspose1d 12 -> 6", "compress", "Binary()"),
        "attention": ("MultiheadAttention 8 -> 24", "compress", "Binary() on in_proj_weight"),
        "attention.out_proj": ("NonDynamicallyQuantizableLinear 8 -> 8", "compress", "Binary()"),
        "separate": (
            "MultiheadAttention 6 -> 8",
            "compress",
            "Binary() on q_proj_weight + Binary() on k_proj_weight + Binary() on v_proj_weight",
        ),
        "separate.out_proj": ("NonDynamicallyQuantizableLinear 8 -> 8", "compress", "Binary()"),
        "lstm": ("LSTM 4 -> 16", "compress", " + ".join(f"Binary() on {gate}" for gate in gates)),
        "blocks.0.0": ("Linear 8 -> 8", "compress", "Binary()"),
        "blocks.1.0": ("Linear 8 -> 8", "compress", "Binary()"),
        "shared": ("Linear 8 -> 5", "compress", "Binary()"),
        "head": ("Linear", "left", tied),
    }


def test_norms_containers_and_activations_have_no_row() -> None:
    names = {row.name for row in match({"*": Binary()}).rows}
    assert not names & {"", "norm", "batch_norm", "blocks", "blocks.0", "blocks.0.1", "again"}


def test_what_no_rule_matches_and_what_a_technique_refuses() -> None:
    found = rows(match({"shared": Binary(), "[sl]*": LowRank(rank=2), "attention": LowRank(rank=2), "up": Binary()}))
    assert found["conv"] == ("Conv2d", "left", "no rule matches it")
    assert found["lstm"][1:] == (
        "left",
        "a recurrent layer multiplies with its gates' weights itself, so two layers cannot take its place",
    )
    assert found["attention"][1] == "left"
    assert found["attention.out_proj"][1:] == ("left", "no rule matches it")


def test_ignored_layers_have_a_row_where_a_rule_would_take_them() -> None:
    plan = match({"*": Binary(), "embed": Ternary()}, ignore=["blocks", "lstm", "*norm*", "embed"])
    found = rows(plan)
    ignored = {name for name, (_, outcome, _) in found.items() if outcome == "ignored"}
    assert ignored == {"blocks.0.0", "blocks.1.0", "lstm", "embed"}
    assert found["blocks.0.0"] == ("Linear", "ignored", "the recipe's ignore names it or a module around it")


def test_tied_weights_are_compressed_together_and_counted_once() -> None:
    plan = match({"*": Quantization(4), "embed": Quantization(4)})
    found = rows(plan)
    assert found["embed"] == ("Embedding 8 -> 10", "compress", "Quantization(bits=4)")
    assert found["head"] == ("Linear 8 -> 10", "compress", "Quantization(bits=4)")
    (tied,) = [weight for weight in plan.weights if len(weight.names) > 1]
    assert tied.names == ("embed", "head")
    assert len({id(weight.layer.weight) for weight in plan.weights}) == len(plan.weights)


def test_a_module_under_two_names_is_found_by_either_and_planned_once() -> None:
    for key in ("shared", "again.same", "again.*", "*s*e*"):
        plan = match({key: Binary()}, ignore=["separate"])
        (weight,) = [weight for weight in plan.weights if "shared" in weight.names]
        assert weight.names == ("shared",)
        assert [row.name for row in plan.rows].count("shared") == 1
        assert "again.same" not in {row.name for row in plan.rows}


@pytest.mark.parametrize("ignore", ["shared", "again", "again.same"])
def test_a_module_under_two_names_is_ignored_by_either(ignore: str) -> None:
    assert rows(match({"*": Binary()}, ignore=[ignore]))["shared"][1] == "ignored"


def test_blocks_that_are_replaced_and_what_is_in_them() -> None:
    replace = Replace(lambda block: nn.Linear(8, 8), name="plain")
    plan = match({"blocks.*": replace, "*": Binary()})
    found = rows(plan)
    assert found["blocks.0"] == ("Sequential", "compress", repr(replace))
    assert found["blocks.0.0"] == ("Linear", "left", "it is inside a block that is replaced as a whole")
    assert [block.name for block in plan.blocks] == ["blocks.0", "blocks.1"]
    assert "blocks" not in found


def test_a_block_used_twice_is_planned_once() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    model = nn.Sequential(block, nn.ReLU(), block)
    plan = match({"2": Replace(lambda block: nn.Linear(4, 4), name="plain")}, model)
    assert [b.name for b in plan.blocks] == ["0"]
    assert plan.problems == []


def test_a_layer_at_the_root_is_compressed_in_place() -> None:
    plan = match({"*": Binary()}, nn.Linear(3, 4))
    assert plan.rows == [PlanRow("", "Linear 3 -> 4", "compress", "Binary()")]
    assert "│ (the model) │ Linear 3 -> 4 │ compress │ Binary()" in str(plan)


def test_parametrizations_of_others_are_no_layers_of_the_model() -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, weight: Tensor) -> Tensor:
            return self.mix(weight)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Rotated())
    plan = match({"*": Binary()}, model)
    assert [row.name for row in plan.rows] == ["1"]
    assert len(plan.problems) == 1 and "'0' (Linear): its weight is parametrized by Rotated" in plan.problems[0]


def test_matching_changes_nothing_and_needs_no_sound_model() -> None:
    model = Model()
    before, state = copied(model.state_dict()), torch.get_rng_state()
    classes = [type(module) for module in model.modules()]
    match({"*": LowRank(rank=3), "nothing": Binary()}, model)
    assert states_equal(copied(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(module) for module in model.modules()] == classes
    with torch.device("meta"):
        assert len(match({"*": Binary()}).problems) > 5


def test_the_plan_is_what_prepare_does() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Conv1d(5, 5, 3), nn.GRU(6, 6)), nn.Linear(6, 4))
    recipe = Recipe({"*": MagnitudePruning(0.5)}, ignore=["2"], schedule=FADE)
    planned = {
        (name, owner[1]) for w in recipe.match(model).weights for name, owner in zip(w.names, w.owners, strict=True)
    }
    vanishing.prepare(model, recipe)
    done = {
        (name, weight)
        for name, module in model.named_modules()
        if nn.utils.parametrize.is_parametrized(module)
        for weight in module.parametrizations
    }
    assert planned == done == {("0", "weight"), ("1.0", "weight"), ("1.1", "weight_ih_l0"), ("1.1", "weight_hh_l0")}


# Printed


def test_printed_it_is_a_table() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    bare = "an embedding is compressed only if a rule gives its type or exact name"
    lines = str(match({"*": MagnitudePruning(0.5)}, model)).splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        ["0", "Linear 4 -> 4", "compress", "MagnitudePruning(sparsity=0.5)"],
        ["1", "Embedding", "left", bare],
    ]
    assert [title.strip() for title in lines[1].split("┃")[1:-1]] == [
        "module",
        "layer",
        "outcome",
        "technique or reason",
    ]
    assert all(len(line) == len(lines[0]) for line in lines)


def test_problems_are_printed_below_the_table() -> None:
    text = str(match({"*": LowRank(rank=6), "[x]": Binary()}, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))))
    assert "│ 0      │ Linear 8 -> 8 │ compress │ LowRank(rank=6)" in text
    assert "problem: LowRank(rank=6) cannot compress '1' (Linear 8 -> 4): rank is at most 4" in text
    assert "problem: nothing matched '[x]'." in text


def test_names_are_printed_as_they_are_and_without_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = nn.ModuleDict({"[red]a[/red]": nn.Linear(3, 3), "[link=x]": nn.Linear(3, 3)})
    text = str(match({"*": Binary()}, model))
    assert "[red]a[/red]" in text and "[link=x]" in text and "\x1b" not in text


def test_long_names_are_not_cut() -> None:
    name = "encoder_" * 20
    text = str(match({"*": Binary()}, nn.ModuleDict({name: nn.Linear(3, 3)})))
    pieces = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert "".join(pieces) == name


def test_a_model_of_thousands_of_layers_is_matched_in_seconds() -> None:
    experts = nn.ModuleList(nn.ModuleDict({n: nn.Linear(2, 2) for n in ("up", "down", "gate")}) for _ in range(1_000))
    recipe = Recipe(
        {f"*.{n}": Binary() for n in ("up", "down", "gate", "other")},
        ignore=[f"{i}.up" for i in range(20)],
        schedule=FADE,
    )
    start = time.process_time()
    plan = recipe.match(experts)
    assert len(plan.weights) == 2_980 and len(plan.problems) == 1
    assert time.process_time() - start < 5
