"""The adapters that are to be combined: named, of one base, at the same sites, and what each changes there."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from addenda.combining.spaces import Low
from addenda.core.adapter.handle import Adapter, refuse_part
from addenda.core.adapter.load import load
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.file.header import Header, read
from addenda.core.file.methods import methods_of
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.hidden import HiddenMethod
from addenda.core.modules.wrappers import unwrap
from addenda.core.site.site import Site, owners_of, site_at
from addenda.core.site.targets import grouped
from addenda.core.state.state import find_state, record_of
from addenda.exporting.deltas import delta, thin_factors

Given = Adapter | str | Path
Change = Low | Tensor  # of one matrix (m × n), or of a vector


@dataclass(frozen=True)
class Source:
    """One adapter that takes part: its name, and the file that it is in where it was not on the model."""

    name: str
    adapter: Adapter | None
    file: Path | None = None


@dataclass(frozen=True)
class Place:
    """One site with the tensors of each source there, None where a source has nothing."""

    site: Site
    tensors: tuple[SiteTensors | None, ...]

    @property
    def copies(self) -> int:
        """The number of matrices that are stacked here."""
        return self.site.copies if self.site.matrix.dim() > 2 else 1

    @torch.no_grad()
    def changes(self) -> list[list[Change | None]]:
        """Return, for each matrix of the site, what each source adds to it: factors where it has such, else ΔW."""
        found = [None if t is None else _changes(self.site, t) for t in self.tensors]
        return [[None if f is None else f[e] for f in found] for e in range(self.copies)]


def _changes(site: Site, tensors: SiteTensors) -> list[Change]:
    thin = thin_factors(site, tensors)
    if thin is not None:
        B, A = (t.cpu() if t.dim() > 2 else t.cpu()[None] for t in thin)
        return [_without_zeros(Low(b, a)) for b, a in zip(B, A, strict=True)]
    dense = delta(site, tensors).cpu()
    return list(dense) if dense.dim() > 2 else [dense]


def _without_zeros(change: Low) -> Low:
    """Return the same product without columns that are zero, as those of ranks that do not act; one column at least."""
    live = (change.B != 0).any(0) & (change.A != 0).any(1)
    live[0] |= not bool(live.any())
    return Low(change.B[:, live], change.A[live])


def model_of(given: Sequence[Given], model: nn.Module | None) -> nn.Module:
    """Return the one model that all are for. Raises AddendaError where there is none, or there are two."""
    held = [g.model for g in given if isinstance(g, Adapter)] if isinstance(given, Iterable) else []
    models = {id(unwrap(m)): m for m in [*held, model] if m is not None}
    if len(models) > 1:
        raise AddendaError("These adapters are on different models. Load the files of all of them into one.")
    if not models:
        raise AddendaError(
            "Files are combined on a model, whose weights they change. Give model=, or attached adapters."
        )
    return next(iter(models.values()))


def named(given: Sequence[Given], model: nn.Module | None) -> list[Source]:
    """Return the adapters by name: handles, names of attached ones, or files. The model is not touched.

    Raises AddendaError for nothing, for a name that is neither, and where one adapter is named twice.
    """
    if isinstance(given, (str, Path, Adapter)) or not isinstance(given, Sized) or not len(given):
        raise AddendaError(f"Give a list of adapters, names or files to combine; got {str(given)[:100]!r}.")
    host = None if model is None else find_state(model)
    attached = {} if host is None else {name: Adapter(host.root, name) for name in host.state.records}
    sources = []
    for g in given:
        if isinstance(g, Adapter):
            record_of(g.model, g.name)
            sources.append(Source(g.name, g))
        elif isinstance(g, str) and g in attached:
            sources.append(Source(g, attached[g]))
        elif isinstance(g, (str, Path)) and (Path(g).suffix or Path(g).exists()):
            sources.append(Source("", None, Path(g).expanduser()))
        elif isinstance(g, str):
            raise AddendaError(
                f"{g!r} is no attached adapter and no file.{nearest(g, attached)} Attached: "
                f"{', '.join(map(repr, attached)) or 'none'}."
            )
        else:
            raise AddendaError(f"An adapter, a name or a file is wanted, got {type(g).__name__}.")
    called = iter(names_of([s.file for s in sources if s.file is not None]))
    sources = [s if s.file is None else replace(s, name=next(called)) for s in sources]
    for s in sources:
        if s.adapter is not None:
            refuse_part(s.adapter, "what it is combined into would be one too")
    names = [s.name for s in sources]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise AddendaError(
            f"{', '.join(map(repr, twice))} is there twice. Name each adapter once, with its weight; a file is called "
            "by its name without suffix."
        )
    return sources


def names_of(files: Sequence[Path]) -> list[str]:
    """Return a name for each file: its own without suffix, after as many folders as tell files of one name apart."""
    places = [f.expanduser().absolute() for f in files]
    whole = [(*place.parent.parts, place.stem) for place in places]

    def name(at: int) -> str:
        alike = [p for i, p in enumerate(whole) if i != at and p[-1] == whole[at][-1]]
        found = (whole[at][-n:] for n in range(1, len(whole[at])))
        return "/".join(next((end for end in found if all(p[-len(end) :] != end for p in alike)), whole[at][-1:]))

    return [name(at) for at in range(len(whole))]


def same_base(sources: Sequence[Source], base: str) -> dict[Path, Header]:
    """Read the headers of files. Raises AddendaError where two were trained on other weights at one site.

    base="compatible" leaves that to the load of each, which compares values within rounding.
    """
    headers = {s.file: read(s.file)[0] for s in sources if s.file is not None}
    if base != "exact":
        return headers
    for (one, first), (other, second) in itertools.combinations(headers.items(), 2):
        marks = {s.path: (s.hash, s.shape) for s in first.sites if s.hash is not None}
        differ = [s.path for s in second.sites if s.hash and marks.get(s.path, (s.hash, s.shape)) != (s.hash, s.shape)]
        if differ:
            raise AddendaError(
                f"{one} and {other} were trained on other base weights: {len(differ)} sites differ, e.g. {differ[0]}. "
                "A change means nothing on another base; nothing was combined."
            )
    return headers


def loaded(sources: Sequence[Source], model: nn.Module, base: Literal["exact", "compatible"]) -> list[Source]:
    """Return the sources with files on the model too, idle, under names of their own that begin with "combined-"."""
    taken = set() if (host := find_state(model)) is None else set(host.state.records)
    free = (f"combined-{i}" for i in itertools.count() if f"combined-{i}" not in taken)
    return [
        s if s.file is None else Source(s.name, load(model, s.file, name=next(free), base=base, activate=False), s.file)
        for s in sources
    ]


def refuse_hidden(methods: Mapping[str, Mapping[str, object]]) -> None:
    """Raise AddendaError where one of the adapters changes activations. methods: class by path, by adapter."""
    for name, of in methods.items():
        hidden = {p: c for p, c in of.items() if isinstance(c, type) and issubclass(c, HiddenMethod)}
        if hidden:
            kinds = ", ".join(dict.fromkeys(str(getattr(c, "name", c.__name__)) for c in hidden.values()))
            raise AddendaError(
                f"{name!r} has {kinds} at {len(hidden)} places, e.g. {next(iter(hidden))}: it changes activations, and "
                "there is no ΔW to combine. Let both act at once instead: addenda.composed(model, Average('a', 'b')), "
                "or Stack."
            )


def check_files(
    sources: Sequence[Source], absent: Literal["error", "zero"], heads_of: str | None, base: str
) -> list[Header]:
    """Return the headers of the files, read and held against each other; no model is needed.

    Raises AddendaError for other bases, methods of activations, other sites and heads where all are files.
    """
    headers = same_base(sources, base)
    files = [(s.name, s.file, headers[s.file]) for s in sources if s.file is not None]
    for name, file, header in files:
        methods, _ = methods_of(header, file)
        refuse_hidden({name: {e.path: type(methods[e.method]) for e in header.sites if not e.is_head}})
    if len(files) == len(sources):
        check_sites({name: [e.path for e in h.sites if not e.is_head] for name, _, h in files}, absent)
        check_heads({name: [e.path for e in h.heads] for name, _, h in files}, heads_of)
    return list(headers.values())


def check_sites(paths: Mapping[str, Sequence[str]], absent: Literal["error", "zero"]) -> list[str]:
    """Return every site, in order. Raises AddendaError where an adapter has not all of them, unless absent="zero"."""
    union = list(dict.fromkeys(p for of in paths.values() for p in of))
    lacking = {name: [p for p in union if p not in set(of)] for name, of in paths.items()}
    if absent == "error" and any(lacking.values()):
        told = "; ".join(f"{name!r} has nothing at {_shown(of)}" for name, of in lacking.items() if of)
        raise AddendaError(
            f"These adapters are not at the same sites: {told}. A combination of some sites and not of others is "
            "seldom meant. With absent='zero' what an adapter does not change counts as a change of 0."
        )
    return union


def check_heads(heads: Mapping[str, Sequence[str]], heads_of: str | None) -> None:
    """Raise AddendaError where adapters have heads and nobody says whose the result takes, or says one without."""
    having = [name for name, paths in heads.items() if paths]
    if heads_of is not None and heads_of not in having:
        told = f"Heads are in {', '.join(map(repr, having))}." if having else "None of these adapters has a head."
        raise AddendaError(f"heads_of={heads_of!r} has no heads. {told}")
    if having and heads_of is None:
        raise AddendaError(
            f"{', '.join(map(repr, having))} trained heads as whole copies ({heads[having[0]][0]}), and two heads are "
            f"no one head. Say whose the result takes: heads_of={having[0]!r}. The others still act with their own."
        )


def places(sources: Sequence[Source], absent: Literal["error", "zero"]) -> tuple[list[Place], dict[str, list[str]]]:
    """Return every site with what each source has there, and by source its heads, which are no sites of these.

    Raises AddendaError where sources have other sites, naming them, unless absent="zero"; for one weight under two
    names, and for activations.
    """
    refuse_hidden({s.name: {p: type(m) for p, m in _adapter(s).methods.items()} for s in sources})
    root = _adapter(sources[0]).model
    heads = {s.name: list(record_of(root, _adapter(s).name).record.also_train) for s in sources}
    held = [{p: t for p, t in _adapter(s).sites() if p not in heads[s.name]} for s in sources]
    union = check_sites({s.name: list(h) for s, h in zip(sources, held, strict=True)}, absent)
    owners, found, seen = owners_of(root), [], {}
    for path in union:
        site = site_at(root, path, owners)
        if site.changed in seen:
            raise AddendaError(f"{seen[site.changed]} and {path} are one weight. Train these adapters at one of them.")
        seen[site.changed] = path
        found.append(Place(site, tuple(h.get(path) for h in held)))
    if not found:
        raise AddendaError("These adapters change no weight but the heads that they train as whole copies.")
    return found, heads


def _adapter(source: Source) -> Adapter:
    assert source.adapter is not None
    return source.adapter


def _shown(paths: Sequence[str], most: int = 4) -> str:
    groups = [f"{g} ({len(p)})" if len(p) > 1 else g for g, p in grouped(paths).items()]
    return ", ".join(groups[:most]) + (" …" if len(groups) > most else "")


def attached(sources: Sequence[Source]) -> Iterator[str]:
    """Yield the names under which files were put on the model for a while."""
    return (_adapter(s).name for s in sources if s.file is not None and s.adapter is not None)
