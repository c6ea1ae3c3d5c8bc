"""Where the sites of a file have gone in a model that lacks their paths: a map for `load(rename=…)`, ready to paste.

A site of the same kind and shape whose weight has the bytes that the file tells of is certain; where none has, the one
of the nearest name is a guess. Weights are looked at only while an error is being written, and hashed only where the
sixteen values that the file holds agree.
"""

import difflib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import is_sharded
from addenda.core.file.fingerprint import hash_of, sample
from addenda.core.file.header import Header, SiteEntry
from addenda.core.file.rename import new_paths
from addenda.core.modules.ours import is_ours
from addenda.core.packed.tensor import parts_of
from addenda.core.site.kinds import OUTPUT
from addenda.core.site.site import Site, owners_of, point_at, site_at
from addenda.core.site.targets import all_paths
from addenda.core.state.state import State
from addenda.core.state.vocabulary import Vocabulary

_MOST = 2000  # sites that are looked for
_LOOKS = 3000  # at a name or a weight: about a second, however many paths a file makes up
_NEAREST = 8  # modules that are tried for one that a hidden method names


@dataclass(frozen=True)
class _Found:
    old: str
    new: str
    certain: bool


def advice(root: nn.Module, header: Header, missing: Iterable[str], path: str | Path) -> str:
    """Return a sentence with the map under which missing paths are found, or the empty string where none comes near."""
    entries = {s.path: s for s in header.sites}
    lost = [_as_before(entries[p], header.vocabulary) for p in missing][:_MOST]
    if not lost:
        return ""
    found = _Search(root, {s.path for s in header.sites}).of(lost)
    pairs = dict((f.old, f.new) for f in found)
    rename = _shortest(pairs, [s.path for s in header.sites], path)
    if not rename:
        return ""
    sites = sum(1 for s in lost if all(n in pairs for n in _modules(s.path)))
    certain = all(f.certain for f in found)
    listed = ", ".join(f'"{k}": "{v}"' for k, v in list(rename.items())[:40]) + (", …" if len(rename) > 40 else "")
    how = "certain: the weights are equal" if certain else _guess(found)
    return f"With rename={{{listed}}} it has {sites} of them ({how})."


def _as_before(s: SiteEntry, vocabulary: Vocabulary | None) -> SiteEntry:
    """Return an entry as it would be without the new rows of a vocabulary, of whose base no hash is known."""
    v = vocabulary
    if v is None or not {s.path, f"{s.path}.weight"} & set(v.tables) or s.shape[0] != v.all_rows:
        return s
    return replace(s, shape=(v.base_rows, *s.shape[1:]), hash=None, sample=None)


def _guess(found: list[_Found]) -> str:
    sure = sum(f.certain for f in found)
    where = f"; the weights are equal at {sure} of {len(found)}" if sure else ""
    return f"a guess, by names and shapes{where}"


class _Search:
    """Looks in a model for sites that have gone, each found one saying where to look for the next.

    taken: the paths of all sites of the file; what stands at one of them is no other that has gone.
    """

    def __init__(self, root: nn.Module, taken: set[str]):
        self.root, self.state, self.owners = root, State(), owners_of(root)
        self.known = {path for path, _ in root.named_modules()}
        self.modules = [path for path in self.known if path and not is_ours(path)]
        self.sites: dict[tuple, list[Site]] = {}
        self.learned: dict[str, str] = {}  # patterns of what was found
        self.looks = _LOOKS  # that are left; then only places are looked at that what was found leads to
        for path in dict.fromkeys(all_paths(root)):
            try:
                site = site_at(root, path, self.owners)
            except AddendaError:
                continue
            alike = self.sites.setdefault((site.kind.name, tuple(site.stored)), [])
            if site.path not in taken and all(other.path != site.path for other in alike[-1:]):
                alike.append(site)

    def of(self, lost: list[SiteEntry]) -> list[_Found]:
        found: dict[str, _Found] = {}
        used: set[str] = set()
        for s in lost:
            if s.kind == OUTPUT.name:
                for one in self._point(s, used):
                    used.add(one.new)
                    found.setdefault(one.old, one)
            elif one := self._weight(s, used):
                used.add(one.new)
                found[one.old] = one
        return list(found.values())

    def _weight(self, s: SiteEntry, used: set[str]) -> _Found | None:
        """Return the site that has the weight of an entry, or the nearest by name of its kind and shape."""
        by_path = {c.path: c for c in self.sites.get((s.kind, s.shape), ()) if c.path not in used}
        ordered = self._by_name(s.path, list(by_path), len(by_path))
        for name in ordered[: max(self.looks, 1)]:
            self.looks -= 1
            if self._equal(s, by_path[name]):
                return self._learn(s.path, name, True)
        alike = [n for n in ordered if _numbers(n) == _numbers(s.path)]
        return self._learn(s.path, alike[0], False) if alike else None

    def _equal(self, s: SiteEntry, site: Site) -> bool:
        """Return whether a weight has the bytes of training, and not just one number everywhere, as others may have."""
        if s.hash is None or s.sample is None or any(p.is_meta or is_sharded(p) for p in parts_of(site.weight)):
            return False
        there = sample(self.state, replace(site, origin=s.origin or s.path))
        return len(set(there)) > 1 and tuple(there) == tuple(s.sample) and hash_of(site.weight) == s.hash

    def _point(self, s: SiteEntry, used: set[str]) -> list[_Found]:
        """Return where the modules have gone that a hidden method's site names.

        That is where the weight nearest to it is equal, else where it is as wide. Several modules may have the same
        weight nearest to them: certain is the one whose own it is.
        """
        gone = list(dict.fromkeys(n for n in _modules(s.path) if n not in self.known))
        options = [self._options(n, used) for n in gone]
        fallback: dict[str, str] = {}
        for choice in itertools.islice(itertools.product(*options), max(self.looks, 1)):
            self.looks -= 1
            new = dict(zip(gone, choice, strict=True))
            try:
                point = point_at(self.root, "".join(new.get(part, part) for part in re.split(r"([@~])", s.path)))
            except AddendaError:
                continue
            if len(set(choice)) < len(choice) or tuple(point.stored) != s.shape:
                continue
            fallback = fallback or new
            if self._equal(s, point):
                target, own = s.path.partition("@")[0], point.owner is point.module
                return [self._learn(old, found, old == target and own) for old, found in new.items()]
        return [self._learn(old, found, False) for old, found in fallback.items()]

    def _options(self, name: str, used: set[str]) -> list[str]:
        if self.looks <= 0:
            expected = self._expected(name)
            return [expected] if expected is not None and expected in self.known and expected not in used else []
        free = [m for m in self.modules if m not in used and _numbers(m) == _numbers(name)]
        return self._by_name(name, free, _NEAREST)

    def _learn(self, old: str, new: str, certain: bool) -> _Found:
        """Note how a path has changed, and what is around it, for those that come after; return it as found."""
        if _numbers(old) == _numbers(new):
            self.learned[_starred(old)] = _starred(new)
            self.learned.setdefault(_starred(_around(old)), _starred(_around(new)))
        return _Found(old, new, certain)

    def _by_name(self, path: str, known: list[str], most: int) -> list[str]:
        """Return paths, the likeliest first: as one of the same pattern was found, then by how alike they are."""
        numbers, around, leaf = _numbers(path), self._expected(_around(path)), path.rpartition(".")[2]
        if (expected := self._expected(path)) in known:
            return [expected, *(p for p in known if p != expected)][:most]
        if self.looks <= 0:
            return []
        self.looks -= len(known)
        matcher = difflib.SequenceMatcher(b=path, autojunk=False)

        def rank(other: str) -> tuple[Any, ...]:
            matcher.set_seq1(other)
            elsewhere = around is not None and _around(other) != around
            return _numbers(other) != numbers, elsewhere, other.rpartition(".")[2] != leaf, -matcher.ratio(), other

        return sorted(known, key=rank)[:most]

    def _expected(self, path: str) -> str | None:
        """Return where a path has gone if it has gone as others of its pattern, or None where none was found."""
        if (pattern := self.learned.get(_starred(path))) is None:
            return None
        filled = iter(_numbers(path))
        return re.sub(r"\*", lambda _: next(filled), pattern)


def _modules(path: str) -> list[str]:
    """Return the modules that a site's path names; of a weight's, the path itself."""
    return [part for part in re.split(r"[@~]", path) if part not in ("output", "input", "again")]


def _around(path: str) -> str:
    return path.rpartition(".")[0]


def _numbers(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdigit()]


def _starred(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _shortest(pairs: dict[str, str], paths: list[str], file: str | Path) -> dict[str, str]:
    """Return the shortest map that does what the pairs say, and nothing else, to the paths of the file."""
    pairs = {old: new for old, new in pairs.items() if old != new}
    if not pairs:
        return {}
    patterns: dict[str, str] = {}
    for old, new in pairs.items():
        alike = _numbers(old) == _numbers(new) and "*" not in old + new
        key, value = (_starred(old), _starred(new)) if alike else (old, new)
        if patterns.setdefault(key, value) != value:
            patterns[old] = new
    wanted = _applied(pairs, paths, file)
    for candidate in (_beginning(pairs), patterns):
        if candidate and len(candidate) <= len(pairs) and _applied(candidate, paths, file) == wanted:
            return candidate
    return pairs


def _applied(rename: dict[str, str], paths: list[str], file: str | Path) -> dict[str, str] | None:
    try:
        return new_paths(paths, rename, file)
    except AddendaError:
        return None


def _beginning(pairs: dict[str, str]) -> dict[str, str]:
    """Return the one entry that changes the beginnings of all these paths alike, or nothing."""
    changes = set()
    for old, new in pairs.items():
        a, b = old.split("."), new.split(".")
        same = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), min(len(a), len(b)))
        changes.add((".".join(a[: len(a) - same]), ".".join(b[: len(b) - same])))
    if len(changes) != 1:
        return {}
    old, new = changes.pop()
    if old and new:
        return {old: new}
    return {f"{old}.*".lstrip("."): f"{new}.*".lstrip(".")}
