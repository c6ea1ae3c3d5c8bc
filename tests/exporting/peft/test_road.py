"""ROAD of PEFT and road: the same logits, both ways."""

import pytest

from addenda import AddendaError
from addenda.exporting.peft.write import write
from peft_checks import attached, holds, passes, refused, rows, saved, spoil


@rows("ROAD")
def test_a_row_gives_the_same_logits(row, tmp_path):
    holds(row, tmp_path)


def test_a_bias_is_turned_by_peft_alone(tmp_path):
    folder = saved(tmp_path / "a", "ROAD", "bert", group_size=8, target_modules=["query"])
    refused(folder, "PEFT turns the layer's bias too.*merge it in PEFT", "bert")
    route = passes("road:group=8", "bert.encoder.layer.0.attention.self.query", "bert")
    assert route.kind == "approximate" and "bias" in route.why


def test_what_does_not_fit_is_refused(tmp_path):
    folder = saved(tmp_path / "a", "ROAD", group_size=8, target_modules=["q_proj"])
    refused(spoil(folder, group_size=24), "group=24 does not divide the output width 32")
    refused(spoil(folder, group_size=7), "group must be even")
    refused(spoil(folder, group_size=8, variant="road_2"), r"road_theta is \[16\], and the config .* say \[32\]")
    refused(spoil(folder, variant="road_3"), "variant")


def test_one_variant_and_one_group_for_an_adapter(tmp_path):
    for one, other, word in (("road", "road:variant=road_2", "variant"), ("road:group=4", "road:group=8", "group")):
        with pytest.raises(AddendaError, match=f"one {word} for a whole adapter"):
            write(attached({"*.q_proj": one, "*.k_proj": other}), tmp_path)
    assert not list(tmp_path.iterdir())
