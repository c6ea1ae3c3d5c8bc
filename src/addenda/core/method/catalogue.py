"""The catalogue: every method by name, with what it claims.

A method registers itself with `@register(...)` beside its class; a named variant of it (other defaults, another claim)
with `variant(...)`. Other packages add theirs through the entry point group `addenda.methods`, whose modules are
imported the first time the catalogue is read. Nothing in the core knows a method by name.
"""

import dataclasses
import fnmatch
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.method.contract import Method, parse_options


@dataclass(frozen=True)
class Info:
    """One entry of the catalogue: a method's name, paper, equation, claim and settings."""

    name: str
    title: str
    paper: str  # authors and year, then the arXiv id
    equation: str  # ΔW, W_eff or the changed activation, in the words of the docstring
    hypothesis: str  # what the method claims about the geometry of the change, in one sentence
    family: str  # low-rank | spectral | sparse | block | rotation | scale | dense | hidden
    cls: type[Method]
    rate: float = 1e-3  # where a search for its learning rate (AdamW) starts; measured here, not the paper's
    preset: dict = field(default_factory=dict)
    paper_setting: str | None = None  # the paper's main setting where ours differs; "": as here, None: nobody said
    published: str = ""  # figures that its authors or others printed, with the source and what is unfair about them

    def build(self, **options) -> Method:
        """Build the method with these options; raises AddendaError on an unknown option or a bad value."""
        return parse_options(self.cls, {**self.preset, **options})


_catalogue: dict[str, Info] = globals().get("_catalogue", {})  # kept when this module is loaded again


def register(
    name: str,
    *,
    title: str,
    paper: str,
    equation: str,
    hypothesis: str,
    family: str,
    rate: float = 1e-3,
    published: str = "",
    paper_setting: str | None = None,
) -> Callable:
    """Decorate a class to enter it in the catalogue as the method `name`; its help then begins with what it is."""

    def enter(cls: type[Method]) -> type[Method]:
        cls.name = name
        cls.__doc__ = f"{title}: {equation} ({paper}).\n\n{inspect.cleandoc(cls.__doc__ or '')}"
        extras = {"published": published, "paper_setting": paper_setting}
        _enter(Info(name, title, paper, equation, hypothesis, family, cls, rate, **extras))
        return cls

    return enter


def variant(name: str, of: type[Method], preset: dict, **changed) -> None:
    """Enter a named variant: `of` with preset options, its info record changed where `changed` says so."""
    changed = {"published": "", "paper_setting": None} | changed
    _enter(dataclasses.replace(_catalogue[of.name], name=name, preset=preset, **changed))


def _enter(info: Info) -> None:
    if (entry := _catalogue.get(info.name)) is not None and not same_place(entry.cls, info.cls):
        raise ValueError(f"two methods are called {info.name!r}")
    _catalogue[info.name] = info


def same_place(one: Any, other: Any) -> bool:
    """Return whether two classes or functions are the same lines of one module, run again as in a notebook's cell."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


@cache
def _import_all() -> None:
    import addenda.methods  # the built-in ones register on import

    if not _catalogue:  # this module was forgotten and imported again, and they were not
        for name in [n for n in sys.modules if n.startswith(f"{addenda.methods.__name__}.")]:
            importlib.reload(sys.modules[name])
    for entry in entry_points(group="addenda.methods"):
        try:
            entry.load()
        except AddendaError as error:
            package = entry.dist.name if entry.dist is not None else entry.value
            raise AddendaError(
                f"A method of the package {package} (entry point {entry.name!r} in 'addenda.methods') cannot be taken: "
                f"{error} Mend it, or uninstall the package."
            ) from error


class Catalogue(list[Info]):
    """A list of entries in their order, each also found by its name: `catalogue()["NAME"]`."""

    def __getitem__(self, key):  # type: ignore[override]
        """Return an entry by its name or place. Raises AddendaError with the nearest names for an unknown one."""
        if not isinstance(key, str):
            return super().__getitem__(key)
        for entry in self:
            if entry.name == key:
                return entry
        names = [entry.name for entry in self]
        raise AddendaError(f"There is no method {key!r}.{nearest(key, names)} Known methods: {', '.join(names)}.")

    def __contains__(self, key: object) -> bool:
        return any(entry.name == key for entry in self) if isinstance(key, str) else super().__contains__(key)


def catalogue(match: str = "*") -> Catalogue:
    """Return all methods whose name matches a glob, sorted by family and name."""
    _import_all()
    matching = (entry for entry in _catalogue.values() if fnmatch.fnmatch(entry.name, match))
    return Catalogue(sorted(matching, key=lambda entry: (entry.family, entry.name)))


def info(name: str) -> Info:
    """Return one entry by its name; raises AddendaError with the nearest names for an unknown one."""
    _import_all()
    return _catalogue[name] if name in _catalogue else catalogue()[name]


def build(spec: str) -> Method:
    """Build a method from text: `"name"` or `"name:option=value,other=8"`, as the command line writes it."""
    name, options = parse_spec(spec)
    return info(name).build(**options)


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split "name:option=value,other=8" into the name and its options, as text. Raises AddendaError for a missing =."""
    if not isinstance(spec, str):
        raise AddendaError(f"Expected a text such as 'name' or 'name:option=8', got {str(spec)[:100]!r}.")
    name, _, assignments = spec.partition(":")
    options = {}
    for part in filter(None, assignments.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise AddendaError(f"Expected option=value in {spec!r}, got {part!r}. Write e.g. '{name}:{part}=8'.")
        if key.strip() in options:
            raise AddendaError(f"{spec!r} says {key.strip()}= twice, {options[key.strip()]!r} and {value.strip()!r}.")
        options[key.strip()] = value.strip()
    return name.strip(), options
