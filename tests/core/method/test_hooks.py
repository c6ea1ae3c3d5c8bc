"""Public names of method classes: a misspelt hook is refused where it stands, and no method has one."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method, WeightMethod
from addenda.core.method.hidden import HiddenMethod
from addenda.core.method.hooks import ASKED, hooks_of
from shared import EVERY, METHODS

CONTRIBUTING = Path(__file__).parents[3] / "CONTRIBUTING.md"


def function(self, *given):
    """Stands for any hook."""


def define(base: type, **names):
    """A class with these names, an annotation where the value is a pair (annotation, value)."""
    hints = {n: v[0] for n, v in names.items() if isinstance(v, tuple)}
    values = {n: v[1] if isinstance(v, tuple) else v for n, v in names.items()}
    return dataclass(frozen=True)(type("Mine", (base,), values | {"__annotations__": hints, "__module__": __name__}))


MISSPELT = {  # on a weight method; what is meant
    "factor": "factors",
    "delt": "delta",
    "aply": "apply",
    "spars": "sparse",
    "on_steps": "on_step",
    "callibrate": "calibrate",
    "derived": "derive",
    "trainabel": "trainable",
    "efective": "effective",
    "Pool": "pool",
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_hook_is_refused_where_it_is_defined(name):
    with pytest.raises(AddendaError, match=rf"Mine: {name} is no hook.*Did you mean.*'{MISSPELT[name]}'"):
        define(WeightMethod, **{name: function})
    with pytest.raises(AddendaError, match=MISSPELT[name]):
        define(WeightMethod, **{name: property(function)})
    with pytest.raises(AddendaError, match=MISSPELT[name]):
        define(ad.LoRA, **{name: staticmethod(function)})
    with pytest.raises(AddendaError, match=rf"'{name}' is no hook of a WeightMethod. Did you mean.*'{MISSPELT[name]}'"):
        ad.LoRA().has(name)


@pytest.mark.parametrize(
    ("name", "meant"), [("chang", "change"), ("fused", "fuse"), ("undone", "undo"), ("rea", "reads")]
)
def test_hidden_methods_have_hooks_of_their_own(name, meant):
    with pytest.raises(AddendaError, match=rf"{name} is no hook.*'{meant}'"):
        define(HiddenMethod, **{name: function})
    with pytest.raises(AddendaError, match="factors is no hook"):
        define(HiddenMethod, factors=function)
    with pytest.raises(AddendaError, match="change is no hook"):
        define(WeightMethod, change=function)
    with pytest.raises(AddendaError, match="'factors' is no hook of a HiddenMethod"):
        METHODS["houlsby"].has("factors")


def test_a_misspelt_setting_is_refused_with_its_annotation_and_without():
    with pytest.raises(AddendaError, match=r"sized_bi is no hook.*'sized_by'"):
        define(WeightMethod, sized_bi=(ClassVar[str], "rank"))
    with pytest.raises(AddendaError, match=r"target is no hook.*'targets'"):
        define(WeightMethod, target="linear")
    with pytest.raises(AddendaError, match=r"elementwize is no hook.*'elementwise'"):
        define(WeightMethod, elementwize=("ClassVar[bool]", True))  # as text


def test_an_option_wants_its_annotation():
    with pytest.raises(AddendaError, match=r"depth is no hook.*needs an annotation"):
        define(WeightMethod, depth=3)
    with pytest.raises(AddendaError, match=r"rank = 16 stands without the annotation.*Write rank: int = 16"):
        define(ad.LoRA, rank=16)  # a dataclass would make LoRA's own default, 8, of it
    with pytest.raises(AddendaError, match=r"rang is no hook.*'rank'"):
        define(ad.LoRA, rang=16)
    assert define(ad.LoRA, rank=(int, 16))().rank == 16
    with pytest.raises(AddendaError, match="sparse is a hook, and no option can have its name"):
        define(WeightMethod, sparse=(bool, True))


@pytest.mark.parametrize("kind", [WeightMethod, HiddenMethod])
def test_a_dataclass_may_have_slots(kind):
    """Python makes the class a second time, with a descriptor for each option, those of its base class too."""

    @dataclass(frozen=True, slots=True)
    class Mine(kind):
        rank: int = 8

    assert {"bits", "ste", "rank"} <= set(Mine.__slots__)
    assert (Mine(rank=4).rank, Mine(rank=4).bits) == (4, None)
    with pytest.raises(AddendaError, match=r"factor is no hook"):
        dataclass(frozen=True, slots=True)(type("Mine", (kind,), {"factor": function}))


def test_helpers_are_private_or_listed():
    with pytest.raises(AddendaError, match=r"turn is no hook.*begins with an underscore.*helpers: ClassVar"):
        define(WeightMethod, turn=function)
    cls = define(WeightMethod, turn=function, _other=function, helpers=["turn"])
    assert define(cls, turn=function, factors=function)().has("factors")
    with pytest.raises(AddendaError, match="helpers names 'trun', which the class does not define"):
        define(WeightMethod, helpers=["trun"])


def test_problems_of_a_class_come_together():
    with pytest.raises(AddendaError, match=r"factor is no hook.*aply is no hook"):
        define(WeightMethod, factor=function, aply=function)


@pytest.mark.parametrize("name", EVERY)
def test_every_method_answers_for_every_hook(name):
    method = METHODS[name]
    kind = WeightMethod if isinstance(method, WeightMethod) else HiddenMethod
    for hook in hooks_of(kind):
        assert isinstance(method.has(hook), bool)
        assert not kind().has(hook)
    assert method.has("init") and method.has("trainable")
    options = {f.name for f in dataclasses.fields(method)}
    assert not options & hooks_of(kind)


def test_hooks_are_what_the_base_classes_define():
    assert {"init", "derive", "on_step", "calibration", "pair"} <= hooks_of(Method)
    assert {"delta", "factors", "sparse", "apply", "magnitude", "blocks"} <= hooks_of(WeightMethod) - hooks_of(Method)
    assert {"change", "fuse", "undo"} == hooks_of(HiddenMethod) - hooks_of(Method)
    assert not {*ASKED, "targets", "bits", "name"} & hooks_of(WeightMethod)


def test_the_page_on_writing_a_method_names_hooks_that_exist():
    """The first column of its table: hooks and settings of weight methods, and none is left out."""
    table = re.findall(r"^\s*\| (`.+?) \|", CONTRIBUTING.read_text(), re.M)
    named = {n for cell in table for n in re.findall(r"`(\w+)", cell)}
    assert named <= {n for n in dir(WeightMethod) if not n.startswith("_")}
    elsewhere = {"init", "delta", "trainable", "start"}  # shown in the class above it; a property of few bits
    assert hooks_of(WeightMethod) - elsewhere == named & hooks_of(WeightMethod)
