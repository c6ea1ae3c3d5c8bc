"""The catalogue: what every entry must say of itself."""

import inspect
import types

import pytest

import addenda as ad
from addenda.cli.methods import _full, catalogue_page
from addenda.core.base.errors import AddendaError
from addenda.core.method import catalogue
from addenda.core.method.catalogue import info

NAMES = [i.name for i in ad.catalogue() if i.cls.__module__.startswith("addenda.")]
AS_HERE = {"bitfit", "trainable-tokens"}  # nothing in them to set


@pytest.mark.parametrize("name", NAMES)
def test_where_the_papers_setting_differs_it_is_said(name):
    entry = info(name)
    assert entry.paper_setting is not None, "say what the paper's main setting is, or '' where it is the default here"
    assert bool(entry.paper_setting) != (name in AS_HERE)
    if entry.paper_setting:
        assert f"  paper has   {entry.paper_setting}" in _full(entry)
        assert entry.paper_setting.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_class_begins_with_what_it_is(name):
    cls = info(name).cls
    entry, (first, _, options) = info(cls.name), (inspect.getdoc(cls) or "").partition("\n\n")
    assert first == f"{entry.title}: {entry.equation} ({entry.paper})."
    assert options and options in _full(entry) and first not in _full(entry)


def test_the_page_says_it():
    page = catalogue_page()
    assert page.count("- The paper's setting: ") == len(NAMES) - len(AS_HERE)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora", "query and value"),
        ("pissa", "r = 128"),
        ("dora", "α = 64"),
        ("c3a", "768 and 128"),
        ("nola", "512 matrices"),
        ("rslora", "this library's choice"),
        ("olora", "author"),
        ("loreft", "first=7,last=7"),
        ("fusion", "identity"),
        ("compacter", "reduction factor"),
        ("adaptformer", "dropout 0.1"),
        ("dylora", "frozen=True"),
        ("mosa", "norm=True"),
        ("mosa-houlsby", "release"),
        ("svft", "with replacement"),
    ],
)
def test_what_a_reproduction_must_set(name, words):
    assert words in info(name).paper_setting


def test_a_plug_in_that_cannot_be_taken_is_an_error_that_names_its_package(monkeypatch):
    class Entry:
        name, value = "mine", "their_package.mine"
        dist = types.SimpleNamespace(name="their-package")

        def load(self):
            raise ad.AddendaError("Mine: factor is no hook.")

    monkeypatch.setattr(catalogue, "entry_points", lambda group: [Entry()])
    catalogue._import_all.cache_clear()
    with pytest.raises(ad.AddendaError, match=r"package their-package .*'mine'.*Mine: factor is no hook\. Mend it"):
        ad.catalogue()
    monkeypatch.undo()
    assert "lora" in ad.catalogue()


@pytest.mark.parametrize("name", [i.name for i in ad.catalogue() if "alpha" in i.cls.__dataclass_fields__])
def test_a_scale_of_nothing_is_refused_by_every_method(name):
    with pytest.raises(AddendaError, match="alpha must"):
        info(name).build(alpha=0.0)
