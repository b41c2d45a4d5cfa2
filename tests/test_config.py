"""From mappings to dataclasses: what is allowed in each field, and errors that name the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from pydantic import Field

from lomo_ds.config import AtLeastOne, Fraction, NonNegative, Positive, PositiveShare, from_mapping


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: str
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: AtLeastOne = 1
    lr: NonNegative | None = None
    eps: Positive = 1.0
    ratio: Fraction = 0.0
    share: PositiveShare = 1.0
    flag: bool = False
    names: Annotated[tuple[str, ...], Field(min_length=1)] = ("a",)
    one: Inner | str = "x"
    many: tuple[Inner, ...] = ()

    def __post_init__(self) -> None:
        if self.flag and self.count > 1:
            raise ValueError("flag needs a count of 1")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"count": 0}, "count has to be at least 1, not 0"),
        ({"count": "many"}, "count has to be a whole number, not 'many'"),
        ({"count": 1.5}, "count has to be a whole number, not 1.5"),
        ({"count": "9" * 5000}, "count has to be a whole number, not '99"),
        ({"lr": -1}, "lr has to be at least 0, not -1"),
        ({"lr": float("nan")}, "lr has to be a finite number, not nan"),
        ({"lr": float("inf")}, "lr has to be a finite number, not inf"),
        ({"lr": []}, "lr has to be a number, not []"),
        ({"eps": 0}, "eps has to be above 0, not 0"),
        ({"eps": float("inf")}, "eps has to be a finite number, not inf"),
        ({"ratio": 1}, "ratio has to be below 1, not 1"),
        ({"ratio": -0.5}, "ratio has to be at least 0, not -0.5"),
        ({"ratio": float("nan")}, "ratio has to be a finite number, not nan"),
        ({"share": 0}, "share has to be above 0, not 0"),
        ({"share": 1.5}, "share has to be at most 1, not 1.5"),
        ({"share": float("nan")}, "share has to be a finite number, not nan"),
        ({"flag": "perhaps"}, "flag has to be true or false, not 'perhaps'"),
        ({"names": []}, "names has to be a list of at least 1, not []"),
        ({"names": "a"}, "names has to be a list, not 'a'"),
        ({"names": ["a", 3]}, "names.1 has to be a string, not 3"),
        ({"one": 3}, "one has to be a mapping of keys to values or a string, not 3"),
        ({"one": {"number": 1}}, "one.name is missing"),
        ({"one": {"nmae": "x"}}, "one: unknown key 'nmae'; did you mean 'name'? known: name, number"),
        ({"many": [{"name": "x", "number": "y"}]}, "many.0.number has to be a whole number, not 'y'"),
        ({"count": 2, "flag": True}, "flag needs a count of 1"),
        ({"cuont": 2}, "unknown key 'cuont'; did you mean 'count'?"),
        ({"count": 0, "eps": -1}, "count has to be at least 1, not 0; eps has to be above 0, not -1"),
        ({"many": [{}] * 7}, "many.4.name is missing; and 2 more"),
    ],
)
def test_an_error_names_the_key_the_value_and_what_is_allowed(mapping: dict[str, Any], message: str):
    with pytest.raises(ValueError) as raised:
        from_mapping(Outer, mapping, "file.yaml")
    assert str(raised.value).startswith("file.yaml: ") and message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_the_bounds_themselves_are_allowed():
    given = from_mapping(Outer, {"count": 1, "lr": 0, "eps": 1e-300, "ratio": 0.999}, "it")
    assert (given.count, given.lr, given.eps, given.ratio) == (1, 0.0, 1e-300, 0.999)
    assert from_mapping(Outer, {"lr": None, "one": {"name": "x"}}, "it").one == Inner(name="x")


def test_thousands_of_mistakes_are_one_short_line():
    with pytest.raises(ValueError) as raised:
        from_mapping(Outer, {"names": list(range(3000))}, "it")
    assert str(raised.value).endswith("names.4 has to be a string, not 4; and 2995 more")
