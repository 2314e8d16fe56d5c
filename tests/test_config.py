"""Settings of every registered kind: they round-trip, compare by value, and refuse what is wrong in our own words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field
from torch import nn

from vanishing.compressors import (
    Binary,
    Chain,
    Compressor,
    DepthwiseSeparable,
    Gradient,
    HeadPruning,
    LowRank,
    MagnitudePruning,
    NarrowFeedForward,
    Quantization,
    Replace,
    Score,
    SkipBlock,
    Ternary,
    WeightCompressor,
    WidthPruning,
)
from vanishing.config import Config, concrete_kinds, json_schema
from vanishing.distillation import LocalLoss, Teacher
from vanishing.errors import ConfigError, VanishingError
from vanishing.granularity import NM, Global, PerChannel, PerGroup, PerTensor
from vanishing.layers import Split
from vanishing.patterns import Glob, OfType, Regex, Where
from vanishing.recipe import Rule
from vanishing.schedules import (
    Adaptive,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    Order,
    PolynomialSchedule,
    Schedule,
    SigmoidSchedule,
    Staggered,
    StepSchedule,
)


def halve(block: nn.Module) -> nn.Module:
    """A factory for `Replace`; it is never called here."""
    return nn.Identity()


EXAMPLES: list[Config] = [
    LinearSchedule(steps=10),
    LinearSchedule(steps=10, start=5),
    CosineSchedule(steps=10, start=1),
    PolynomialSchedule(steps=10, power=2.5),
    ExponentialSchedule(steps=10, rate=0.1),
    SigmoidSchedule(steps=10, steepness=7),
    StepSchedule(at=0),
    Staggered(LinearSchedule(steps=10)),
    Staggered(CosineSchedule(steps="40%"), order=Order.LAST_TO_FIRST, overlap=0.5),
    Staggered(LinearSchedule(steps=10), order=("*.head", "*")),
    Adaptive(Staggered(LinearSchedule(steps=10)), limit=0.5, deadline=20, speed=0, every=1),
    Adaptive(LinearSchedule(steps="40%"), limit=0.5, deadline="80%"),
    MagnitudePruning(sparsity=0.5, score=Score.WANDA, granularity=PerChannel()),
    LowRank(ratio=0.5, split=Split.TUCKER),
    LowRank(rank=4, whitened=True),
    PerTensor(),
    PerChannel(),
    PerGroup(),
    PerGroup(size=32),
    Global(),
    NM(),
    NM(n=1, m=8),
    MagnitudePruning(sparsity=0.9),
    MagnitudePruning(sparsity=0, granularity=PerChannel(), gradient=Gradient.EXACT, freeze=False, update_every=1),
    MagnitudePruning(sparsity=0.5, gradient=Gradient.DECAYING, decay=2e-4),
    MagnitudePruning(sparsity=1, granularity=Global()),
    MagnitudePruning(granularity=NM(n=2, m=4)),
    Quantization(bits=4),
    Quantization(bits=8, granularity=PerGroup(size=32), symmetric=False, gradient=Gradient.CLIPPED),
    Quantization(bits=2, damping=1e-3),
    Quantization(bits=3, clip=0.5, weighted=True),
    Binary(),
    Binary(granularity=PerTensor()),
    Ternary(),
    Ternary(granularity=PerGroup(), gradient=Gradient.CLIPPED),
    LowRank(rank=16),
    LowRank(ratio=0.25),
    LowRank(energy=0.9),
    HeadPruning(sparsity=0.5),
    WidthPruning(sparsity=0.25),
    SkipBlock(),
    NarrowFeedForward(ratio=0.25),
    NarrowFeedForward(ratio=0.5, calibrated=True),
    DepthwiseSeparable(),
    Replace(halve),
    Replace(halve, name="half"),
    MagnitudePruning(sparsity=0.5) | Quantization(bits=4),
    LowRank(rank=4) | MagnitudePruning(granularity=NM()) | Binary(granularity=PerGroup()),
    Glob("*.mlp.*"),
    Regex(r"layers\.\d+"),
    OfType("torch.nn.modules.linear.Linear"),
    LocalLoss(),
    LocalLoss(weight=0.5, every=4),
    Teacher(),
    Teacher(logits=0, temperature=4, features=("*.layers.*",), feature_weight=0.1, bfloat16=True),
    Rule(Binary()),
    Rule(MagnitudePruning(0.5) | Binary(), schedules=(LinearSchedule(steps=2), StepSchedule(at=4))),
    Rule(LowRank(rank=2), schedule=StepSchedule(at=0), ramp=PolynomialSchedule(steps=9)),
]
each_example = pytest.mark.parametrize("config", EXAMPLES, ids=repr)


def plain_values(value: Any) -> Iterator[Any]:
    """Every value inside nested dictionaries and lists."""
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        for item in value.values():
            yield from plain_values(item)
    elif isinstance(value, list):
        for item in value:
            yield from plain_values(item)
    else:
        yield value


def shipped_kinds() -> set[type[Config]]:
    """Every kind of the library itself."""
    return {kind for kind in concrete_kinds(Config) if kind.__module__.startswith("vanishing.")}


def test_every_shipped_kind_has_an_example() -> None:
    assert shipped_kinds() - {Where} == {type(config) for config in EXAMPLES}


@each_example
def test_settings_round_trip_through_dictionaries_json_and_yaml(config: Config) -> None:
    data = config.to_dict()
    assert {type(value) for value in plain_values(data)} <= {str, int, float, bool, type(None)}
    for copy in (data, json.loads(json.dumps(data)), yaml.safe_load(yaml.safe_dump(data))):
        back = Config.from_dict(copy)
        assert back == config
        assert type(back) is type(config)
        assert hash(back) == hash(config)
        assert back.to_dict() == data


@each_example
def test_only_what_differs_from_a_default_is_written(config: Config) -> None:
    written = set(config.to_dict()) - {"kind"}
    for field in dataclasses.fields(config):
        if field.name not in written:
            assert field.default == getattr(config, field.name) or type(config) is Replace


@each_example
def test_settings_are_frozen(config: Config) -> None:
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


def test_kinds_are_class_names_in_snake_case() -> None:
    kinds = {kind.__name__: kind.kind for kind in shipped_kinds()}
    assert kinds["LinearSchedule"] == "linear_schedule"
    assert kinds["MagnitudePruning"] == "magnitude_pruning"
    assert kinds["LowRank"] == "low_rank"
    assert kinds["NM"] == "nm"
    assert len(set(kinds.values())) == len(kinds)


def test_base_classes_are_no_kinds() -> None:
    for base in (Config, Schedule, Compressor, WeightCompressor):
        with pytest.raises(ConfigError, match="is not a known"):
            Config.from_dict({"kind": base.kind})


@pytest.mark.parametrize(
    ("base", "data", "words"),
    [
        (Compressor, {"kind": "magnitude_prunning"}, ["'magnitude_prunning'", "Compressor", "'magnitude_pruning'"]),
        (Schedule, {"kind": "linear"}, ["'linear'", "Schedule", "linear_schedule"]),
        (Schedule, {"kind": "zzz"}, ["'zzz'", "Known: adaptive, cosine_schedule, exponential_schedule", "imported"]),
        (Schedule, {"kind": "low_rank", "rank": 3}, ["'low_rank' is not a known Schedule"]),
        (LowRank, {"kind": "binary"}, ["'binary' is not a known LowRank"]),
        (Schedule, {"steps": 3}, ["expected a mapping with `kind` for a Schedule", "{'steps': 3}"]),
        (Schedule, {"kind": 3}, ["expected a mapping with `kind`", "{'kind': 3}"]),
        (Schedule, [], ["expected a mapping with `kind`", "[]"]),
        (Schedule, None, ["expected a mapping with `kind`", "None"]),
        (Schedule, "linear_schedule", ["expected a mapping with `kind`", "'linear_schedule'"]),
        (Schedule, {"kind": "linear_schedule", "step": 3}, ["LinearSchedule", "'step'", "start, steps"]),
        (Schedule, {"kind": "linear_schedule", "steps": 3, 4: 5}, ["LinearSchedule", "'4'"]),
        (Schedule, {"kind": "linear_schedule"}, ["LinearSchedule needs 'steps'"]),
        (Schedule, {"kind": "linear_schedule", "steps": "ten"}, ["LinearSchedule(steps='ten')", "integer"]),
        (Schedule, {"kind": "linear_schedule", "steps": "10"}, ["LinearSchedule(steps='10')", "str"]),
        (Schedule, {"kind": "linear_schedule", "steps": True}, ["LinearSchedule(steps=True)", "bool"]),
        (Schedule, {"kind": "linear_schedule", "steps": [1]}, ["LinearSchedule(steps=(1,))", "integer"]),
        (Schedule, {"kind": "linear_schedule", "steps": {"kind": "nm"}}, ["LinearSchedule(steps=NM(", "integer"]),
        (Schedule, {"kind": "linear_schedule", "steps": 0}, ["LinearSchedule(steps=0)", "at least 1"]),
        (Compressor, {"kind": "magnitude_pruning", "sparsity": 1.5}, ["sparsity=1.5", "in [0, 1]"]),
        (Compressor, {"kind": "quantization", "bits": 9}, ["Quantization(bits=9)", "1 to 8"]),
        (Compressor, {"kind": "quantization", "bits": 4, "symmetric": "yes"}, ["symmetric='yes'", "str"]),
        (
            Compressor,
            {"kind": "quantization", "bits": 4, "granularity": "per_tensor"},
            ["granularity='per_tensor'", "PerTensor or PerChannel"],
        ),
        (
            Compressor,
            {"kind": "quantization", "bits": 4, "granularity": {"kind": "nm"}},
            ["granularity=NM()", "PerTensor or PerChannel"],
        ),
        (Compressor, {"kind": "quantization", "bits": 4, "gradient": "steep"}, ["gradient='steep'", "'clipped'"]),
        (Compressor, {"kind": "low_rank"}, ["LowRank", "exactly one of rank, ratio and energy"]),
        (Compressor, {"kind": "low_rank", "rank": 3, "ratio": 0.5}, ["rank and ratio"]),
        (Compressor, {"kind": "chain", "compressors": []}, ["Chain"]),
        (Compressor, {"kind": "chain", "compressors": [{"kind": "nm"}]}, ["Chain(compressors=(NM("]),
        (Compressor, {"kind": "replace", "factory": "os:system"}, ["'os:system'", "not known here"]),
    ],
)
def test_what_is_wrong_in_a_file_is_said(base: type[Config], data: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        base.from_dict(data)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, VanishingError)
    for word in words:
        assert word in str(caught.value)


def test_a_chain_flattens_and_refuses_an_order_that_cannot_work() -> None:
    pruning, quantization, low_rank = MagnitudePruning(sparsity=0.5), Quantization(bits=4), LowRank(rank=2)
    assert low_rank | pruning | quantization == low_rank | (pruning | quantization)
    assert (low_rank | (pruning | quantization)).to_dict()["compressors"] == [
        low_rank.to_dict(),
        pruning.to_dict(),
        quantization.to_dict(),
    ]
    for wrong in ((quantization, pruning), (pruning, low_rank), (quantization, Binary()), (pruning, pruning)):
        with pytest.raises(ConfigError, match="order low rank, pruning, quantization"):
            Chain(compressors=wrong)


class Mode(Enum):
    """Something that a user's technique distinguishes."""

    FAST = "fast"
    EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class Palette(Config):
    """Settings of a user's own, with every sort of field."""

    size: Annotated[int, Field(ge=2, description="the number of code words, at least 2")]
    mode: Mode = Mode.FAST
    where: PerTensor | PerGroup | None = None
    levels: tuple[float, ...] = ()
    label: str = ""
    tied: bool = False


def test_settings_of_a_users_own_round_trip() -> None:
    config = Palette(size=16, mode=Mode.EXACT, where=PerGroup(size=8), levels=(0.5, 1), label="x", tied=True)
    assert config.to_dict() == {
        "kind": "palette",
        "size": 16,
        "mode": "exact",
        "where": {"kind": "per_group", "size": 8},
        "levels": [0.5, 1.0],
        "label": "x",
        "tied": True,
    }
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Palette.from_dict({"kind": "palette", "size": 2, "where": None}) == Palette(size=2)
    with pytest.raises(ConfigError, match=r"Palette\(size=1\): size is the number of code words, at least 2"):
        Palette(size=1)
    with pytest.raises(ConfigError, match="label has the wrong type"):
        Palette(size=2, label=3)  # type: ignore[arg-type]


def test_two_classes_cannot_share_a_kind_but_one_can_be_defined_again() -> None:
    with pytest.raises(
        ConfigError, match=r"cannot have the kind 'linear_schedule'.*vanishing.schedules.LinearSchedule"
    ):
        type("LinearSchedule", (Config,), {})
    assert Config.from_dict({"kind": "linear_schedule", "steps": 2}) == LinearSchedule(steps=2)
    for _ in range(2):
        again = type("DefinedAgain", (Config,), {})
    assert type(Config.from_dict({"kind": "defined_again"})) is again


def test_a_class_can_set_its_own_kind() -> None:
    named = type("Named", (Config,), {"kind": "another_name"})
    assert type(Config.from_dict({"kind": "another_name"})) is named


@pytest.mark.parametrize("kind", sorted(shipped_kinds() - {Where}, key=repr), ids=lambda kind: kind.kind)
def test_a_kinds_schema_names_its_fields_and_what_must_be_given(kind: type[Config]) -> None:
    schema = json.loads(json.dumps(kind.schema()))
    names = {field.name for field in dataclasses.fields(kind)}
    assert schema["properties"]["kind"] == {"const": kind.kind}
    assert set(schema["properties"]) - {"kind"} <= names
    assert schema["additionalProperties"] is False
    assert schema["description"]
    missing = {name for name in names if name not in schema["required"]}
    defaults = {f.name for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    assert missing <= defaults


def test_a_fields_schema_carries_its_range_its_choices_and_its_kinds() -> None:
    properties = Palette.schema()["properties"]
    assert properties["size"]["minimum"] == 2
    assert properties["size"]["description"] == "the number of code words, at least 2"
    assert properties["mode"]["enum"] == ["fast", "exact"]
    references = [{"$ref": "#/$defs/per_group"}, {"$ref": "#/$defs/per_tensor"}]
    assert properties["where"] == {"oneOf": [*references, {"type": "null"}]}
    assert json_schema(tuple[Schedule, ...])["type"] == "array"
