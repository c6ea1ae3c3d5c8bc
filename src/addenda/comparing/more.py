"""Going on with a record by its folder alone: `compare(more="runs/compare", seeds=8)`.

What a comparison was asked for is kept in its configuration, apart from where the model and the data are: a record may
be handed on, and such paths are of one machine. Code that a model's folder brings runs only where this call says so.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from addenda.comparing.budget import Budget
from addenda.comparing.commands import options_in
from addenda.comparing.embedded import task_of
from addenda.comparing.grow import open_record
from addenda.comparing.record import Record
from addenda.comparing.until import NO_MORE
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, shown
from addenda.core.file.identity import plain

# Of a call, what a record does not keep: where things are, how much of it, and what the caller sees of it.
HERE = ("model", "data", "general", "subject", "trust_remote_code", "report_to", "ray", "workers", "watch", "command")
HOW_MUCH = ("seeds", "until", "max_minutes")
_APART = (*HERE, *HOW_MUCH, "more", "out", "title")

P = ParamSpec("P")
R = TypeVar("R")


def kept(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record keeps of the arguments of `compare`, as JSON. of: where its model and data came from."""
    options = {k: v for k, v in given.items() if k not in _APART}
    if isinstance(budget := options["budget"], Budget):
        options["budget"] = f"{budget.kind}={budget.value:.15g}"
    if given["general"] in (None, "auto"):  # else a path
        options["general"] = given["general"]
    if given["subject"] is not None:
        return plain({**options, "of": "a subject"})
    if task_of(given["model"], given["data"]) is None:
        return plain({**options, "of": "files"})
    named = {k: given[k] for k in ("model", "data") if given[k] is not None}  # names, not places
    return plain({**options, **named, "of": "embedded"})


def said_in(command: str) -> dict[str, str]:
    """Return "model" and "data" as a command `addenda compare` of a record names them; {} of any other."""
    said = options_in(command) or {}
    return {k: said[f"--{k}"] for k in ("model", "data") if said.get(f"--{k}")}


def with_more(compare: Callable[P, R]) -> Callable[P, R]:
    """Decorate `compare`: with `more`, the options that a record keeps stand for those that are not given."""
    parameters = inspect.signature(compare).parameters

    @functools.wraps(compare)
    def call(*args: P.args, **given: P.kwargs) -> R:
        if given.get("more") is None:
            return compare(*args, **given)
        named = dict(zip(parameters, args, strict=False)) | given
        default = {k: p.default for k, p in parameters.items()}
        own = (*HERE, *HOW_MUCH)  # whose default is as if they were not given; all else is the record's
        asked = {k: v for k, v in named.items() if k not in own or (v is not default[k] and v != default[k])}
        return compare(**_taken_up(asked.pop("more"), asked))  # pyright: ignore[reportCallIssue]

    return call


def _taken_up(more: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that goes on with the record `more`. Raises AddendaError where it cannot."""
    folder = path_of(more, "more")
    record = open_record(folder) or Record.read(folder)  # which says that there is none
    options = dict(record.config.options or {})
    if not options:
        raise AddendaError(
            f"{shown(folder)} does not keep what it was asked for, so more= cannot go on with it. Repeat its first "
            f"call with out={shown(folder)} and more seeds."
        )
    if refused := [k for k in asked if k not in (*HERE, *HOW_MUCH)]:
        raise AddendaError(
            f"With more= everything is as the record {shown(folder)} has it, so {', '.join(f'{k}=' for k in refused)} "
            f"cannot be given. For other arms, another budget or another place, repeat its first call."
        )
    of, about = options.pop("of", None), record.config
    if of == "a subject" and "subject" not in asked:
        raise AddendaError(f"{shown(folder)} was made from Python, with subject=. Give it here too.")
    if of == "files" and not {"model", "data"} <= set(asked):
        raise AddendaError(
            f"{shown(folder)} is about the model {about.model.name} and the data {about.data.name}; where they are is "
            "not kept in a record. Give both: model= and data=."
        )
    return options | asked | _how_much(record, asked) | {"out": folder}


def _how_much(record: Record, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return seeds, or until when: what was asked for now, else as it was."""
    until = record.config.until
    if "seeds" in asked or (until is None and "until" in asked):
        return {}
    if until is None or (until.stopped == NO_MORE and not {"until", "max_minutes"} & set(asked)):
        return {"seeds": len(record.config.seeds)}
    return {"until": "decided", "max_minutes": asked.get("max_minutes", until.max_minutes)}
