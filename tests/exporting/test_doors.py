"""How methods pass doors: told before training, and as the page has it."""

from pathlib import Path

import pytest

import addenda as ad
from addenda import AddendaError
from addenda.exporting.doors import DOORS
from addenda.exporting.table import error_of, kinds, page, route_of, usual
from shared import HIDDEN, METHODS, NAMES
from toys import make_bert, make_llama

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_code_says():
    assert (ROOT / "docs" / "doors.md").read_text(encoding="utf-8") == page(), "addenda methods --doors docs/doors.md"


def test_every_method_has_a_route_with_a_reason_at_every_door():
    for entry in ad.catalogue():
        method = entry.build()
        for door in DOORS.values():
            for kind in {usual(method), *kinds()}:
                route = route_of(door, method, kind)
                assert route is None or (route.kind in ("exact", "approximate", "refused") and (route.why or door.name))
    passing = {(d.name, name) for name in HIDDEN for d in DOORS.values()
               if route_of(d, ad.catalogue()[name].build(), "linear").kind != "refused"}  # fmt: skip
    assert passing == {("peft", "ia3-output")}


def test_errors_of_approximations_are_those_of_the_best_rank():
    assert error_of(ad.catalogue()["lora"].build()) < 1e-6
    assert {n for n in NAMES if (error_of(ad.catalogue()[n].build()) or 0) > 0.99} == set()


def test_a_plan_says_how_it_would_leave():
    model = make_llama()
    passage = ad.passage(model, "lora:rank=2", "peft")
    assert not passage.refused and len(passage.routes) == 14 and "would pass" in str(passage)
    assert ad.passage(model, METHODS["houlsby"], "peft").refused
    heads = ad.passage(make_bert(), "lora:rank=2", "peft", also_train=["classifier"]).routes
    assert {heads["classifier.weight"].kind, heads["classifier.bias"].kind} == {"exact"}
    with pytest.raises(AddendaError, match="no door"):
        ad.passage(model, "lora:rank=2", "gguff")
