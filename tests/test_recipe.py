"""Recipes: which module a key means, which rule wins, and files that give the same recipe back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jsonschema
import pytest
import torch
import yaml
from hypothesis import given, settings
from torch import Tensor, nn

import vanishing
from loops import mlp, train
from vanishing import (
    NM,
    Binary,
    Compressor,
    ConfigError,
    CosineSchedule,
    ExponentialSchedule,
    Global,
    Gradient,
    LinearSchedule,
    LocalLoss,
    LowRank,
    MagnitudePruning,
    PerChannel,
    PerGroup,
    PerTensor,
    PolynomialSchedule,
    Quantization,
    Recipe,
    Replace,
    Rule,
    SigmoidSchedule,
    StepSchedule,
    Teacher,
    Ternary,
)
from vanishing.schedules import Schedule

FADE = LinearSchedule(steps=4)
PUBLISHED = Path(__file__).parents[1] / "docs" / "recipe.schema.json"


def shown(value: object) -> str:
    """Return what a test is called by, the same in every process: a function's address is not."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.query(x) * self.key(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(x))


class Wide(nn.Linear):
    """A subclass that adds nothing."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.stem = nn.Conv1d(8, 8, 1)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = Wide(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.embed(x).mT).mT
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


ALL = [
    "stem",
    *(f"layers.{i}.{n}" for i in (0, 1) for n in ("attention.query", "attention.key", "mlp.0", "mlp.2")),
    "head",
]


def rules(rules: dict[Any, Any], **options: Any) -> Recipe:
    return Recipe(rules, schedule=FADE, **options)


def compressed(recipe: Recipe, model: nn.Module | None = None) -> dict[str, Compressor]:
    """Name of every weight's layer that is compressed, and the technique that it gets."""
    plan = recipe.match(model or Model())
    assert not plan.problems
    return {w.names[0]: w.compressor for w in plan.weights}


# What a key means


def test_the_short_form_takes_every_linear_and_convolution_but_no_norm_and_no_embedding() -> None:
    assert list(compressed(rules({"*": Binary()}))) == ALL


@pytest.mark.parametrize(
    "key, names",
    [
        ("*", ALL),
        ("head", ["head"]),
        ("layers.*", ALL[1:9]),
        ("*.attention.*", [n for n in ALL if "attention" in n]),
        ("*0*", [n for n in ALL if "0" in n]),
        ("layers.?.mlp.[02]", [n for n in ALL if "mlp" in n]),
        ("layers.1*", ALL[5:9]),
        ("*.[!m]*.key", ["layers.0.attention.key", "layers.1.attention.key"]),
        (re.compile(r"^layers\.\d+\.mlp"), [n for n in ALL if "mlp" in n]),
        (re.compile("QUERY$", re.IGNORECASE), ["layers.0.attention.query", "layers.1.attention.query"]),
        (re.compile("head | stem", re.VERBOSE), ["stem", "head"]),
        (nn.Conv1d, ["stem"]),
        (nn.Linear, ALL[1:]),
        (Wide, ["head"]),
        (nn.Module, ["embed", *ALL]),
        (nn.Embedding, ["embed"]),
        ("embed", ["embed"]),
        (
            lambda name, module: name.endswith("0") and isinstance(module, nn.Linear),
            ["layers.0.mlp.0", "layers.1.mlp.0"],
        ),
    ],
    ids=shown,
)
def test_a_key_is_a_glob_a_regex_a_type_or_a_predicate(key: Any, names: list[str]) -> None:
    assert list(compressed(rules({key: Binary()}))) == names


def test_globs_know_upper_and_lower_case() -> None:
    assert rules({"HEAD": Binary()}).match(Model()).problems


def test_the_first_rule_that_matches_wins() -> None:
    chosen = compressed(
        rules({"*.key": Binary(), "layers.0.*": Ternary(), nn.Linear: LowRank(rank=2), "*": Quantization(4)})
    )
    assert chosen == {
        "stem": Quantization(4),
        "layers.0.attention.query": Ternary(),
        "layers.0.attention.key": Binary(),
        "layers.0.mlp.0": Ternary(),
        "layers.0.mlp.2": Ternary(),
        "layers.1.attention.query": LowRank(rank=2),
        "layers.1.attention.key": Binary(),
        "layers.1.mlp.0": LowRank(rank=2),
        "layers.1.mlp.2": LowRank(rank=2),
        "head": LowRank(rank=2),
    }


def test_a_module_that_the_first_rule_cannot_take_falls_to_the_next() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    chosen = compressed(rules({"*": LowRank(rank=2), nn.LSTM: Binary()}), model)
    assert chosen == {"0": LowRank(rank=2), "1": Binary()}


@pytest.mark.parametrize(
    "ignore, names",
    [
        ("head", ALL[:-1]),
        (["head", "stem"], ALL[1:-1]),
        ("layers", ["stem", "head"]),
        (["layers.0"], ["stem", *ALL[5:]]),
        (["*attention"], [n for n in ALL if "attention" not in n]),
        ([re.compile(r"\.1$")], ["stem", *ALL[1:5], "head"]),
        (Layer, ["stem", "head"]),
        (lambda name, module: isinstance(module, nn.Sequential), [n for n in ALL if "mlp" not in n]),
        (lambda name, module: not name.startswith(("layers.0", "head")) and name != "layers", [*ALL[1:5], "head"]),
    ],
    ids=shown,
)
def test_ignore_leaves_a_module_alone_with_everything_below_it(ignore: Any, names: list[str]) -> None:
    assert list(compressed(rules({"*": Binary()}, ignore=ignore))) == names
    model = Model()
    transition = vanishing.prepare(model, Binary(), steps=1, ignore=ignore)
    transition.step()
    transition.finish()
    weights = {name: model.get_parameter(f"{name}.weight") for name in ALL}
    assert [name for name, w in weights.items() if len(w.abs().unique()) <= len(w)] == names


def test_ignore_is_stronger_than_an_exact_name() -> None:
    assert list(
        compressed(rules({"head": Binary(), "stem": Ternary(), "layers.0*": Binary()}, ignore=["layers.?.mlp"]))
    )
    plan = rules({"head": Binary(), "stem": Ternary()}, ignore=["head"]).match(Model())
    assert len(plan.problems) == 1


# Schedules


def test_a_rule_has_a_schedule_and_a_ramp_of_its_own() -> None:
    recipe = Recipe(
        {
            "0": Rule(MagnitudePruning(0.5, update_every=1), schedule=StepSchedule(at=0), ramp=LinearSchedule(steps=2)),
            "2": Rule(Quantization(4), schedule=LinearSchedule(steps=2, start=4)),
            "4": LowRank(rank=2),
        },
        schedule=LinearSchedule(steps=4),
    )
    layers = [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    originals = [layer.weight.detach().clone() for layer in layers]
    transition = vanishing.prepare(model, recipe)
    seen = []
    for _ in range(7):
        zeros = int((layers[0].weight == 0).sum())
        same = [torch.equal(layer.weight, weight) for layer, weight in zip(layers, originals, strict=True)]
        seen.append((transition.beta, zeros, same[1], same[2], transition.done))
        transition.step()
    assert seen == [
        (1.0, 0, True, True, False),
        (0.75, 16, True, False, False),
        (0.5, 32, True, False, False),
        (0.25, 32, True, False, False),
        (0.0, 32, True, False, False),
        (0.0, 32, False, False, False),
        (0.0, 32, False, False, True),
    ]
    assert transition.end == 6


# Files


def test_the_dictionary_leaves_out_what_has_its_default() -> None:
    recipe = Recipe({"*.mlp.*": MagnitudePruning(sparsity=0.9)}, ignore="*head*", schedule=LinearSchedule(steps=2_000))
    assert recipe.to_dict() == {
        "rules": [{"match": "*.mlp.*", "compressor": {"kind": "magnitude_pruning", "sparsity": 0.9}}],
        "schedule": {"kind": "linear_schedule", "steps": 2000},
        "ignore": ["*head*"],
    }


def test_yaml_reads_as_a_person_would_write_it() -> None:
    recipe = Recipe.from_yaml(
        """
        rules:
          - match: "*.attention.*"
            compressor: {kind: low_rank, rank: 64}
          - match: {kind: regex, pattern: "mlp\\\\.\\\\d"}
            compressor:
              kind: chain
              compressors:
                - {kind: magnitude_pruning, sparsity: 0.5}
                - {kind: quantization, bits: 4, granularity: {kind: per_group, size: 32}}
            schedule: {kind: step_schedule, at: 100}
          - match: {kind: of_type, type: torch.nn.modules.linear.Linear}
            compressor: {kind: binary, gradient: clipped}
        ignore: ["*classifier*"]
        schedule: {kind: linear_schedule, steps: 2000}
        """
    )
    assert recipe == Recipe(
        {
            "*.attention.*": LowRank(rank=64),
            re.compile(r"mlp\.\d"): Rule(
                MagnitudePruning(0.5) | Quantization(4, granularity=PerGroup(size=32)), schedule=StepSchedule(at=100)
            ),
            nn.Linear: Binary(gradient=Gradient.CLIPPED),
        },
        ignore=["*classifier*"],
        schedule=LinearSchedule(steps=2000),
    )


def shrunk(block: nn.Module) -> nn.Module:
    return nn.Linear(8, 8)


def test_a_replacement_is_written_as_the_name_of_its_factory() -> None:
    recipe = rules({"layers.0": Replace(shrunk), "layers.1": Replace(lambda block: nn.Linear(8, 8), name="tiny layer")})
    text = recipe.to_yaml()
    assert "factory: test_recipe:shrunk" in text.replace("tests.", "")
    assert "factory: tiny layer" in text
    assert Recipe.from_yaml(text) == recipe == Recipe.from_json(recipe.to_json())
    unknown = text.replace("tiny layer", "os:system")
    with pytest.raises(ConfigError, match=r"names the factory 'os:system', which is not known here"):
        Recipe.from_yaml(unknown)


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8)
GLOBS = NAMES | st.sampled_from(["*", "*.mlp.*", "layers.[0-9]*", "?", "yes", "null", "1", "1e3", "- a", "a: b", "#"])
REGEXES = st.builds(
    lambda text, flags: re.compile(re.escape(text), flags), NAMES, st.sampled_from([0, re.I, re.S | re.M])
)
KEYS = GLOBS | REGEXES | st.sampled_from([nn.Linear, nn.Conv2d, Wide, nn.Module])
STEPS = st.integers(1, 10**9)
STARTS = st.integers(0, 10**9)
SCHEDULES: st.SearchStrategy[Schedule] = st.one_of(
    st.builds(LinearSchedule, steps=STEPS, start=STARTS),
    st.builds(CosineSchedule, steps=STEPS, start=STARTS),
    st.builds(PolynomialSchedule, steps=STEPS, power=st.floats(0.01, 100)),
    st.builds(ExponentialSchedule, steps=STEPS, rate=st.floats(0.01, 500)),
    st.builds(SigmoidSchedule, steps=STEPS, steepness=st.floats(0.01, 500)),
    st.builds(StepSchedule, at=STARTS),
)
SCALES = st.just(PerTensor()) | st.just(PerChannel()) | st.builds(PerGroup, size=st.integers(1, 512))
QUANTIZER_GRADIENTS = st.sampled_from([Gradient.STRAIGHT_THROUGH, Gradient.CLIPPED])
PRUNINGS = st.builds(
    MagnitudePruning,
    sparsity=st.floats(0, 1),
    granularity=st.sampled_from([PerTensor(), PerChannel(), Global()]),
    gradient=st.sampled_from([Gradient.STRAIGHT_THROUGH, Gradient.EXACT, Gradient.DECAYING]),
    decay=st.floats(0, 1),
    freeze=st.booleans(),
    update_every=st.integers(1, 100),
) | st.builds(MagnitudePruning, granularity=st.builds(NM, n=st.integers(1, 3), m=st.integers(4, 8)))
QUANTIZERS = st.one_of(
    st.builds(
        Quantization,
        bits=st.integers(2, 8),
        granularity=SCALES,
        symmetric=st.booleans(),
        gradient=QUANTIZER_GRADIENTS,
        damping=st.floats(0, 1),
        clip=st.floats(0.1, 1),
    ),
    st.builds(Binary, granularity=SCALES, gradient=QUANTIZER_GRADIENTS),
    st.builds(Ternary, granularity=SCALES, gradient=QUANTIZER_GRADIENTS),
)
FACTORS = st.one_of(
    st.builds(LowRank, rank=st.integers(1, 10**6)),
    st.builds(LowRank, ratio=st.floats(1e-6, 1)),
    st.builds(LowRank, energy=st.floats(1e-6, 1)),
)
TECHNIQUES = st.one_of(PRUNINGS, QUANTIZERS, FACTORS)
CHAINS = st.one_of(
    st.builds(lambda a, b: a | b, PRUNINGS, QUANTIZERS),
    st.builds(lambda a, b: a | b, FACTORS, QUANTIZERS),
    st.builds(lambda a, b, c: a | b | c, FACTORS, PRUNINGS, QUANTIZERS),
)
WEIGHT_RULES = st.builds(Rule, compressor=TECHNIQUES, schedule=st.none() | SCHEDULES, ramp=st.none() | SCHEDULES)
WEIGHT_RULES |= st.builds(Rule, compressor=CHAINS, schedule=SCHEDULES)
RULES = TECHNIQUES | CHAINS | WEIGHT_RULES | st.just(Replace(shrunk))
RECIPES = st.builds(
    Recipe,
    st.dictionaries(KEYS, RULES, min_size=1, max_size=4),
    ignore=st.lists(KEYS, max_size=3),
    schedule=SCHEDULES,
    distillation=st.sampled_from([(), LocalLoss(every=2), [Teacher(features=("*.mlp",)), LocalLoss(weight=0.5)]]),
) | st.builds(Recipe, st.dictionaries(KEYS, TECHNIQUES, min_size=1, max_size=2), schedule=SCHEDULES, ramp=SCHEDULES)


@pytest.fixture(scope="module")
def schema() -> jsonschema.protocols.Validator:
    schema = Recipe.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@settings(max_examples=60)
@given(recipe=RECIPES)
def test_files_give_the_same_recipe_back_and_fit_the_schema(
    schema: jsonschema.protocols.Validator, recipe: Recipe
) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert hash(Recipe.from_json(recipe.to_json())) == hash(recipe)
    for data in (recipe.to_dict(), yaml.safe_load(recipe.to_yaml()), json.loads(recipe.to_json())):
        schema.validate(data)


GOOD: dict[str, Any] = {
    "rules": [{"match": "*", "compressor": {"kind": "magnitude_pruning", "sparsity": 0.9}}],
    "schedule": {"kind": "linear_schedule", "steps": 10},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """`GOOD` with another value at a path; None takes it away."""
    data: Any = json.loads(json.dumps(GOOD))
    *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place = data
    for key in way:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    "data, fact",
    [
        ([], "a recipe has the fields distillation, freeze_original, ignore, ramp, rules, schedule, got []"),
        (changed("extra", 1), "ignore, ramp, rules, schedule, got ['extra', 'rules', 'schedule']"),
        (changed("rules", None), "a recipe needs `schedule` and `rules`"),
        (changed("rules", {}), "a recipe needs `schedule` and `rules`, a list"),
        (changed("rules", []), "at least one rule"),
        (changed("schedule", None), "a recipe needs `schedule`"),
        (changed("schedule", "linear"), "expected a mapping with `kind` for a Schedule, got 'linear'"),
        (changed("schedule/kind", "linear"), "'linear' is not a known Schedule"),
        (changed("schedule/kind", "binary"), "'binary' is not a known Schedule"),
        (changed("schedule/steps", 0), "LinearSchedule(steps=0)"),
        (changed("schedule/steps", "10"), "LinearSchedule(steps='10')"),
        (changed("schedule/steps", None), "LinearSchedule needs 'steps'"),
        (changed("schedule/stop", 10), "LinearSchedule has no field 'stop'. It has: start, steps"),
        (changed("ignore", "head"), "a recipe's `ignore` is a list of patterns, got 'head'"),
        (changed("distillation", {"kind": "teacher"}), "a recipe's `distillation` is a list of losses"),
        (changed("distillation", [{"kind": "binary"}]), "'binary' is not a known Distillation"),
        (changed("distillation", [{"kind": "local_loss", "every": 0}]), "LocalLoss(every=0)"),
        (changed("ignore", [3]), "a pattern is a text, got the number 3. Put it in quotes, as in '3'"),
        (changed("rules/0/match", None), "rule 0 of the recipe needs `match` and `compressor`"),
        (changed("rules/0/compressor", None), "rule 0 of the recipe needs `match` and `compressor`"),
        (changed("rules/0", "binary"), "rule 0 of the recipe needs `match` and `compressor`, got 'binary'"),
        (changed("rules/0/when", 3), "Rule has no field 'when'"),
        (changed("rules/0/compressor", "binary"), "'binary'"),
        (changed("rules/0/compressor/kind", "magnitude_prunning"), "Did you mean 'magnitude_pruning'?"),
        (changed("rules/0/compressor/sparsity", 1.5), "MagnitudePruning(sparsity=1.5)"),
        (changed("rules/0/compressor/sparsity", True), "MagnitudePruning(sparsity=True)"),
        (changed("rules/0/compressor/gradient", "none"), "MagnitudePruning(gradient='none')"),
        (changed("rules/0/compressor/granularity", {"kind": "per_group"}), "MagnitudePruning(granularity=PerGroup())"),
        (changed("rules/0/compressor/granularity", "per_tensor"), "MagnitudePruning(granularity='per_tensor')"),
        (changed("rules/0/match", {"kind": "regex", "pattern": 3}), "Regex(pattern=3)"),
        (changed("rules/0/match", {"kind": "where", "predicate": "f"}), "a predicate cannot be read from a file"),
        (changed("rules/0/schedule", {"kind": "step_schedule"}), "StepSchedule needs 'at'"),
    ],
    ids=shown,
)  # fmt: skip
def test_bad_documents_are_refused_by_the_reader_and_by_the_schema(
    schema: jsonschema.protocols.Validator, data: Any, fact: str
) -> None:
    schema.validate(GOOD)
    assert not schema.is_valid(data)
    for text, read in ((json.dumps(data), Recipe.from_json), (yaml.safe_dump(data), Recipe.from_yaml)):
        with pytest.raises(ConfigError) as caught:
            read(text)
        assert fact in str(caught.value)


def test_what_only_the_reader_sees() -> None:
    twice = changed("rules", GOOD["rules"] * 2)
    with pytest.raises(ConfigError, match=r"rule 1 of the recipe is a second one for '\*'. Drop one of them."):
        Recipe.from_dict(twice)
    with pytest.raises(ConfigError, match=r"Regex\(pattern='\('\) is not a regular expression"):
        Recipe.from_dict(changed("rules/0/match", {"kind": "regex", "pattern": "("}))
    with pytest.raises(ConfigError, match="the recipe is not valid YAML"):
        Recipe.from_yaml("rules: [")
    with pytest.raises(ConfigError, match="the recipe is not valid JSON"):
        Recipe.from_json("{")
    with pytest.raises(ConfigError, match="the recipe is not valid YAML"):
        Recipe.from_yaml("!!python/object/apply:os.system ['true']")


def test_the_published_schema_is_current() -> None:
    # In a process of its own: the schema holds every technique that a process knows, those of tests too.
    program = "import json, vanishing; print(json.dumps(vanishing.Recipe.json_schema(), indent=2))"
    current = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert PUBLISHED.read_text() == current, f"write the output of python -c '{program}' to docs/recipe.schema.json"


# Used


def test_a_recipe_from_a_file_does_what_the_one_in_python_does() -> None:
    recipe = rules({"0": MagnitudePruning(0.5) | Quantization(4), nn.Linear: LowRank(rank=2)})
    outputs = []
    for each in (recipe, Recipe.from_yaml(recipe.to_yaml())):
        torch.manual_seed(0)
        model = mlp()
        transition = vanishing.prepare(model, each)
        train(model, transition, 4)
        transition.finish()
        outputs.append(model(torch.ones(2, 8)))
    assert torch.equal(*outputs)


def test_recipes_are_compared_by_value_and_cannot_be_changed() -> None:
    first, second = (
        rules({"*": Binary(), nn.Linear: LowRank(rank=2)}),
        rules({"*": Binary(), nn.Linear: LowRank(rank=2)}),
    )
    assert first == second and hash(first) == hash(second)
    assert first != rules({nn.Linear: LowRank(rank=2), "*": Binary()})
    with pytest.raises(AttributeError):
        first.schedule = FADE  # type: ignore[misc]
