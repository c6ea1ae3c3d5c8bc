"""Options that cannot work are refused before anything is computed."""

import pytest

from addenda.compressing.settings import CompressionSettings
from addenda.core.base.errors import AddendaError


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("floor", (1.5, -0.1, float("nan"))), ("share", (0.0, 5.0, float("nan"))),
        ("rise", (-2.0, -0.01, float("inf"), float("nan"))), ("remove", (0.0, 1.0)),
        ("multiple", (0,)), ("batch", (0,)), ("samples", (0,)), ("length", (1,)), ("judge", (0,)),
    ],
)  # fmt: skip
def test_out_of_range(option, values):
    for value in values:
        with pytest.raises(AddendaError, match=rf"{option} (is|must be) .*got {value}"):
            CompressionSettings(**{option: value})


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("remove", "x", "remove must be a number, got 'x'. It is the share"),
        ("floor", None, "floor must be a number, got None. It is a share of the uniform rank"),
        ("rise", True, "rise must be a number, got True"), ("length", "a", "length must be a whole number, got 'a'"),
        ("length", 32.5, "length must be a whole number"), ("multiple", 2.5, "multiple must be a whole number"),
        ("batch", 1.5, "batch must be a whole number"), ("seed", -1, "seed must be at least 0"),
        ("how", 3, "no route 3"), ("how", ["lord"], "no route"), ("allocate", None, "no allocation None"),
        ("of", ["flops"], "of must be"),
    ],
)  # fmt: skip
def test_values_of_another_kind(option, value, said):
    with pytest.raises(AddendaError, match=said):
        CompressionSettings(**{option: value})


def test_the_bounds_themselves_are_options():
    lowest = CompressionSettings(floor=0, share=1, rise=0)
    assert (lowest.floor, lowest.share, lowest.rise) == (0, 1, 0)
    assert CompressionSettings(floor=1).floor == 1


def test_ranks_are_no_matter_of_the_pieces():
    other = CompressionSettings(
        remove=0.5, of="flops", allocate="energy", floor=0.1, share=0.5, rise=1, multiple=1, weigh="error",
        split="sqrt", sequential=True, judge=3,
    )  # fmt: skip
    assert other.of_pieces() == CompressionSettings().of_pieces()
    for option in (
        {"how": "drone"},
        {"storage": "pivot"},
        {"center": True},
        {"samples": 3},
        {"length": 9},
        {"seed": 1},
    ):
        assert CompressionSettings(**option).of_pieces() != CompressionSettings().of_pieces()
