"""What all conversions share: patterns, numbers, and options that nobody reads."""

import pytest

from addenda.core.base.errors import AddendaError
from addenda.exporting.peft.conversion import is_quick, matches, number, pattern_value
from addenda.exporting.peft.table import CONVERSIONS

PATH = "model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "hit"),
    [(PATH, True), ("q_proj", True), ("self_attn.q_proj", True), ("_proj", False), (r"^model\.layers\.11.*", True),
     (r"layers\.[0-9]\..*q_proj", False), (".*q_proj", True), ("v_proj|q_proj", True), ("^q_proj", False)],
)  # fmt: skip
def test_patterns_match_as_pefts_do(key, hit):
    from peft.utils.other import get_pattern_key

    assert (get_pattern_key([key], PATH) == key) == hit
    assert pattern_value({key: 3}, PATH, 8, "rank_pattern") == (3 if hit else 8)


def test_the_first_pattern_that_matches_counts():
    assert pattern_value({"k_proj": 1, "q_proj": 2, PATH: 3}, PATH, 8, "rank_pattern") == 2
    assert pattern_value(None, PATH, 8, "rank_pattern") == pattern_value({}, PATH, 8, "rank_pattern") == 8


@pytest.mark.parametrize(
    "key",
    ["(a+)+$", "(a*)*b", "(x+x+)+y", "(.*)*", "a" * 2000, ".*a.*a.*a.*a.*a.*", ".?" * 40 + "X", "(.|..)" * 40 + "X",
     "([)]|.|..)" * 40 + "X", "(?x:(a+)#\n+)b", "(a|b|c)?" * 12],
)  # fmt: skip
def test_expressions_that_could_take_for_ever_are_not_tried(key):
    assert not is_quick(key)
    with pytest.raises(AddendaError, match="could take for ever"):
        pattern_value({key: 3}, PATH, 8, "rank_pattern")


def test_expressions_of_people_are_tried():
    for key in (r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", r"model\.layers\.\d+\.self_attn\.(q|v)_proj"):
        assert is_quick(key)
    with pytest.raises(AddendaError, match="no path or expression"):
        matches("(", PATH, "rank_pattern")


@pytest.mark.parametrize("value", ["8", None, True, [], float("nan"), 1e300, 8.5])
def test_numbers_that_are_none_are_refused(value):
    with pytest.raises(AddendaError, match="where a number is wanted"):
        number({"r": value}, "r", int)


def test_options_that_nobody_reads_are_refused_by_every_conversion():
    for conversion in CONVERSIONS.values():
        conversion.check({"peft_type": conversion.type, "inference_mode": True, "runtime_config": {}, "other": None})
        with pytest.raises(AddendaError, match="sorcery='much', which addenda does not read"):
            conversion.check({"peft_type": conversion.type, "sorcery": "much"})
