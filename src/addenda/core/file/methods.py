"""The methods of an adapter file, as its header stores them."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.core.file.header import Header, MethodEntry
from addenda.core.method.catalogue import info
from addenda.core.method.contract import Method, Replace


def known_options(entry: MethodEntry) -> dict[str, Any]:
    """Return a stored method's options. Raises AddendaError for an option that this version does not know.

    One that the file does not store has the default of the version that wrote it. One that is not known, and of which
    the file says that it means what a file without it means, is left out: this version does just that.
    """
    cls = info(entry.name).cls
    fields = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(entry.options) - fields - set(entry.ignorable))
    if unknown:
        raise AddendaError(
            f"The file uses options of {entry.name} that this version does not know: {', '.join(unknown)}. "
            "It was written by another version of addenda; upgrade."
        )
    return {**cls.formerly, **{k: v for k, v in entry.options.items() if k in fields}}


def described(methods: Iterable[Method]) -> tuple[MethodEntry, ...]:
    """Return the methods as a header stores them: all options, so that no later default changes what a file means."""
    return tuple(MethodEntry(m.name, m.options(defaults=True), _as_absent(m)) for m in methods)


def _as_absent(method: Method) -> tuple[str, ...]:
    """Return the options whose value is what a file that does not store them means."""
    absent = {f.name: f.default for f in dataclasses.fields(method)} | method.formerly
    return tuple(k for k, v in method.options(defaults=True).items() if v == absent[k])


def methods_of(header: Header, path: str | Path) -> tuple[list[Method], Replace]:
    """Return the methods of a file in the order of its header, and how its heads are trained."""
    try:
        return [info(m.name).cls(**known_options(m)) for m in header.methods], Replace(**header.head)
    except TypeError:
        raise AddendaError(
            f"{path}: this version of addenda does not know these options of heads: {str(header.head)[:200]}."
        ) from None
