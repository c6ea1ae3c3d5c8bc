"""One number for most sites, patterns for the rest, in PEFT's own matching."""

import pytest

from addenda import AddendaError
from addenda.exporting.peft.patterns import patterned, ranked, ranks_of


def test_what_most_sites_have_stands_alone_and_whole_numbers_are_whole():
    assert patterned({"a.q": 4, "a.k": 8, "b.q": 4}, "r", "rank_pattern") == {"r": 4, "rank_pattern": {"a.k": 8}}
    assert patterned({"a": 2.0, "b": 2.5}, "alpha", "alpha_pattern") == {"alpha": 2, "alpha_pattern": {"b": 2.5}}


def test_peft_finds_the_same_numbers_even_where_one_path_ends_another():
    from peft.utils.other import get_pattern_key

    ranks = {"layers.0.q": (2, 3.0), "encoder.layers.0.q": (4, 4.0), "layers.1.q": (4, 4.0), "k": (5, 1.5)}
    config = ranked(ranks)
    for path, (rank, alpha) in ranks.items():
        key, other = (get_pattern_key(config[f"{n}_pattern"].keys(), path) for n in ("rank", "alpha"))
        assert config["rank_pattern"].get(key, config["r"]) == rank
        assert config["alpha_pattern"].get(other, config["alpha"]) == alpha
        assert ranks_of(config, path) == (rank, alpha)


def test_a_rank_below_one_is_none():
    for config in ({"r": 0}, {"r": 4, "rank_pattern": {"a": -1}}, {"r": "4"}, {"r": 4, "alpha": None}):
        with pytest.raises(AddendaError, match=r"rank|number"):
            ranks_of(config, "a")
