import re

import pytest

from addenda.core.base.errors import AddendaError
from addenda.transferring.formats import format_of, inferred, pieces

NUMBERS = ["Sort ascending: -309 101 871", "Sort ascending: 609 -329 5", "Sort descending: 970 6 33",
           "Sort ascending: 815 325 -254"]  # fmt: skip
WORDS = ["Which is larger, a mouse or a barn?", "Which is larger, an ant or the moon?",
         "Which is larger, a cup or a very old oak?"]  # fmt: skip


@pytest.mark.parametrize(
    ("seeds", "yes", "no"),
    [
        (
            NUMBERS,
            ["Sort descending: 1 2 3", "Sort ascending: -1 -2 -3"],
            ["Sort randomly: 1 2 3", "Sort ascending: 1 2", "Sort ascending: 1 2 3 4", "Sort ascending: 1, 2, 3", "",
             "Order ascending: 1 2 3", "Sort ascending: 1 2 x", "Sort ascending:  1 2 ٣", "Sort ascending: 1 2 3\n"],
        ),
        (
            WORDS,
            ["Which is larger, a dog or a house?", "Which is larger, my very small dog or Rome?"],
            ["Which is larger, a dog or a house", "Who is larger, a dog or a house?", "Which is larger, a dog; a cat?",
             "Which is larger, 3 or 4?", "Which is larger, a dög or a house?", "Which is larger, " + "a " * 60 + "b?"],
        ),
        (["ab", "cd"], ["xy"], ["x1", "x y", "abcde"]),
        (["True and not False", "not True", "True or False and False"], ["False", "not False or True"], ["(True)"]),
    ],
)  # fmt: skip
def test_what_seeds_show(seeds, yes, no):
    check = inferred(seeds)
    assert all(map(check, seeds))
    assert {line: check(line) for line in yes} == dict.fromkeys(yes, True)
    assert {line: check(line) for line in no} == dict.fromkeys(no, False)


def test_pieces_put_together_are_the_line():
    line = "f(x)-3, 4-2 = -5.5 or 1,000?  naïve 2nd"
    assert "".join(pieces(line)) == line
    assert pieces("4-2 -5.5") == ["4", "-", "2", " ", "-5.5"]


@pytest.mark.parametrize("given", [r"[a-z ]+", re.compile(r"[a-z ]+"), str.islower])
def test_an_expression_holds_for_the_whole_line_and_a_function_is_asked(given):
    check = format_of(given, ["ab", "cd e"])
    assert check("x y") and not check("X y")
    assert format_of(check, ["ab"]) is check


def test_what_cannot_be():
    with pytest.raises(AddendaError, match="no regular expression: unterminated"):
        format_of("[a", ["a"])
    with pytest.raises(AddendaError, match=r"The expression \\d\+ refuses 1 of the 2 seeds, such as 'b'"):
        format_of(r"\d+", ["1", "b"])
    with pytest.raises(AddendaError, match=r"function or None .*, got int"):
        format_of(3, ["a"])
    with pytest.raises(AddendaError, match="fails at the line 'a': ZeroDivisionError"):
        format_of(lambda line: 1 / 0, ["a"])
