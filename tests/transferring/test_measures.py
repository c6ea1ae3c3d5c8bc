"""Leakage, agreement and recovered gaps, against counts that are written out."""

import pytest

import addenda as ad
from addenda.transferring.measures import agreement, gap_recovered, leakage

SEEDS = ["Sort ascending: 61 -402 7", "Sort ascending: 9 12 -300", "Sort descending: 1 2 3"]


def test_copies_are_found_up_to_case_and_spacing_and_near_ones_by_what_a_text_has_alone():
    made = [
        "sort  ascending: 61 -402 7",
        "Sort ascending: 5 61 -402 7",
        "Sort ascending: 8 8 8",
        "Sort descending: 1 2 9",
    ]
    found = leakage(made, SEEDS)
    assert found.exact == ((0, 0),)
    # of the first seed's own triples (sort ascending 61, ascending 61 -402, 61 -402 7) the second text has one of three
    # triples of the third seed: sort descending 1, descending 1 2, 1 2 3; the last text has two of three
    assert found.near == ((3, 2),) and found.widest == pytest.approx(2 / 3)
    assert found.rate == 0.5 and found.count == 4
    assert leakage(made, SEEDS, share=0.3).near == ((1, 0), (3, 2))
    assert leakage([], SEEDS).rate == 0.0
    assert "1 of 4 are known texts, 1 have 50% or more of the 3-grams" in str(found)


def test_one_text_among_seeds_is_judged_by_its_triples():
    seeds = ["Sort ascending: 61 -402 7", "Sort ascending: 5 12 300"]
    for text in ("Sort ascending: 61 -402 8", "sort Ascending:  61, -402, 70"):
        assert leakage([text], seeds).near == ((0, 0),)
    assert leakage(["Sort ascending: 61 5 8"], seeds).near == leakage(["1+2=?"], ["1+2=?", "3+4=?"]).near == ()


def test_a_planted_copy_among_many_is_found_and_short_texts_by_exact_copies_only():
    known = [f"word{i} other{i} third{i} fourth{i}" for i in range(300)]
    made = [f"new{i} text{i} of{i} words{i}" for i in range(50)] + ["so word7 other7 third7 fourth7", known[250]]
    found = leakage(made, known)
    assert found.exact == ((51, 250),) and found.near == ((50, 7),) and found.widest == 1.0
    assert leakage(["a b", "A b"], ["a b"]).exact == ((0, 0), (1, 0))
    assert leakage(["a b c"], ["a b"]).near == ()
    assert leakage(["so word7 other7 third7 fourth7"], [*known, known[7].upper(), known[7]]).near == ((0, 7),)
    with pytest.raises(ad.AddendaError, match="share must be"):
        leakage(made, known, share=0.0)


def test_agreement_is_the_share_of_equal_answers():
    assert agreement(["1", " 2 ", "3", ""], ["1", "2", "4", ""]) == 0.75
    for left, right in ((["1"], []), ([], [])):
        with pytest.raises(ad.AddendaError, match="one by one"):
            agreement(left, right)


def test_the_gap_is_recovered_where_there_is_one():
    assert gap_recovered(0.916, 0.501, 0.973) == pytest.approx(0.8792, abs=1e-4)  # systems.md, 1.9
    assert gap_recovered(0.3, 0.5, 0.5) is None and gap_recovered(0.4, 0.5, 0.4) is None
    assert gap_recovered(0.4, 0.5, 0.6) == pytest.approx(-1.0)
    with pytest.raises(ad.AddendaError, match="real is an accuracy"):
        gap_recovered(0.5, 0.5, 1.5)
