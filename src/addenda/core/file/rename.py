"""Paths of a file put in the place of others: an adapter that was trained when the modules had other names.

    rename={"model.layers.*.attn.q": "model.layers.*.self_attn.q_proj"}    each * fills one * of the new path
    rename={"model": "model.language_model"}                               everything below
    rename={"layers.3.fc": "layers.3.up_proj"}                             one path

Keys are paths in the file, or the beginning of one up to a dot, or patterns of either; of several that match, a whole
path counts before the longest. They apply to the modules that a site names, one by one: in "layers.0.mlp@layers.0.norm"
to both.
What the file says and holds is then what it would be, had it been trained under the new names; but each site keeps the
path that its random tensors were drawn by as `SiteEntry.origin`, so that they come back.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.file.header import Header, SiteEntry
from addenda.core.file.vocabulary import key_of

_PLAIN = ("output", "input", "again")  # what a hidden method reads where it names no module
_LONGEST = 1000  # characters of a module's path: no pattern is tried on what only a hostile file holds


def renamed(
    header: Header, tensors: Mapping[str, Tensor], rename: Mapping[str, str] | None, path: str | Path
) -> tuple[Header, dict[str, Tensor]]:
    """Return a file's header and tensors under other paths.

    Raises AddendaError for an entry that matches nothing, for two paths that become one, and for a map that is none.
    """
    if not rename:
        check_map(rename)
        return header, dict(tensors)
    v = header.vocabulary
    tables = () if v is None else v.tables
    new = new_paths(dict.fromkeys([*(s.path for s in header.sites), *tables]), rename, path)
    sites = tuple(_moved(s, new[s.path]) for s in header.sites)
    kept = {key: t for key, t in tensors.items() if key.startswith(".")}  # what all sites train together
    rows = {key_of(new[t]): kept.pop(key_of(t)) for t in tables}
    kept |= rows
    for s in header.sites:
        for name in (*s.trainable, *s.frozen, *s.checks, *(f"{k}.moments" for k in s.packed)):
            if (key := f"{s.path}/{name}") in tensors:
                kept[f"{new[s.path]}/{name}"] = tensors[key]
    vocabulary = v and replace(v, tables=tuple(new[t] for t in tables))
    return replace(header, sites=sites, vocabulary=vocabulary), kept


def _moved(site: SiteEntry, path: str) -> SiteEntry:
    origin = site.origin or site.path
    return replace(site, path=path, origin=None if origin == path else origin)


def new_paths(paths: Iterable[str], rename: Mapping[str, str], file: str | Path) -> dict[str, str]:
    """Return the new path of each. Raises AddendaError as `renamed` does."""
    check_map(rename)
    rules = [(key, _pattern(key), value) for key, value in rename.items()]
    used: set[str] = set()
    old = list(paths)
    new = {}
    for path in old:
        if path in rename:
            used.add(path)
        new[path] = rename.get(path) or "".join(_part(part, rules, used) for part in _parts(path))
    problems = []
    for key in (k for k in rename if k not in used):
        problems.append(f"{key!r}: {'a longer entry comes before it' if _reached(key, old) else 'no path matches'}")
    came: dict[str, str] = {}
    for path, target in new.items():
        if target in came:
            problems.append(f"{came[target]} and {path} both become {target}")
        came[target] = path
    if problems:
        raise AddendaError(
            f"rename= does not fit the paths of {file}, and nothing was loaded: {'; '.join(problems[:8])}. Its paths "
            f"are {', '.join(old[:4])}{' …' if len(old) > 4 else ''}.{nearest(next(iter(rename)), old, 1)}"
        )
    return new


def check_map(rename: object) -> None:
    """Raise AddendaError where this is no map of paths whose entries have as many * on both sides."""
    if rename is None:
        return
    if not isinstance(rename, Mapping):
        raise AddendaError(f"rename= is a dict {{path in the file: path in this model}}, got {type(rename).__name__}.")
    wrong = [k for k, v in rename.items() if not (isinstance(k, str) and isinstance(v, str) and k and v)]
    if wrong:
        raise AddendaError(f"rename= maps paths to paths, both text that is not empty; see {str(wrong[0])[:200]!r}.")
    uneven = [f"{k!r}: {v!r}" for k, v in rename.items() if k.count("*") != v.count("*")]
    if uneven:
        raise AddendaError(f"rename=: each * of a path fills one * of the new one; see {', '.join(uneven[:4])}.")


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(r"(.+?)".join(re.escape(part) for part in key.split("*")) + r"(?P<below>\..+)?", re.DOTALL)


def _parts(path: str) -> list[str]:
    """Split a site's path into modules and what stands between them: "a@b~c" into a, @, b, ~, c."""
    return re.split(r"([@~])", path)


def _reached(key: str, paths: Iterable[str]) -> bool:
    pattern = _pattern(key)
    return any(pattern.fullmatch(part) for path in paths for part in _parts(path))


def _part(part: str, rules: list[tuple[str, re.Pattern[str], str]], used: set[str]) -> str:
    """Return a module's path, or what stands between two, as the longest entry that matches has it."""
    if part in ("@", "~", *_PLAIN) or len(part) > _LONGEST:
        return part
    matches = [(len(key), key, found, value) for key, p, value in rules if (found := p.fullmatch(part))]
    if not matches:
        return part
    _, key, found, value = max(matches, key=lambda m: m[0])
    used.add(key)
    filled = iter(found.groups()[:-1])
    return "".join(next(filled) if c == "*" else c for c in value) + (found["below"] or "")
