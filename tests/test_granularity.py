"""What the granularities accept and refuse."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vanishing.config import Config, concrete_kinds
from vanishing.errors import ConfigError
from vanishing.granularity import NM, Global, Granularity, PerChannel, PerGroup, PerTensor

ANY = st.one_of(
    st.just(PerTensor()),
    st.just(PerChannel()),
    st.just(Global()),
    st.builds(PerGroup, size=st.integers(1, 10**6)),
    st.integers(2, 64).flatmap(lambda m: st.builds(NM, n=st.integers(1, m - 1), m=st.just(m))),
)


@given(ANY)
def test_a_granularity_round_trips_through_json(granularity: Granularity) -> None:
    assert Granularity.from_dict(json.loads(json.dumps(granularity.to_dict()))) == granularity


def test_granularities_of_equal_fields_are_equal_and_others_are_not() -> None:
    assert PerGroup() == PerGroup(size=64) != PerGroup(size=32)
    assert NM() == NM(n=2, m=4)
    kinds: set[Granularity] = {PerTensor(), PerTensor(), PerChannel(), Global()}
    assert len(kinds) == 3


def test_only_fields_that_differ_from_the_default_are_written() -> None:
    assert PerGroup(size=64).to_dict() == {"kind": "per_group"}
    assert NM(n=1, m=4).to_dict() == {"kind": "nm", "n": 1}


def test_the_base_is_no_granularity() -> None:
    assert Granularity not in concrete_kinds(Config)
    with pytest.raises(ConfigError, match="'granularity' is not a known Granularity"):
        Granularity.from_dict({"kind": "granularity"})


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (PerGroup, {"size": 0}, ["PerGroup(size=0)", "at least 1"]),
        (PerGroup, {"size": "64"}, ["PerGroup(size='64')", "at least 1", "str"]),
        (NM, {"n": 0, "m": 4}, ["NM(n=0)", "at least 1"]),
        (NM, {"n": 1, "m": 1}, ["NM(m=1)", "at least 2"]),
        (NM, {"n": 4, "m": 4}, ["NM(n=4, m=4)", "n is smaller than m", "Lower n or raise m"]),
        (NM, {"n": 5, "m": 4}, ["NM(n=5, m=4)", "n is smaller than m"]),
    ],
)
def test_a_bad_value_says_who_what_was_expected_and_what_came(
    kind: type[Config], fields: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**fields)
    for word in words:
        assert word in str(caught.value)
