"""Rerankers of two parts: a task adapter over the adapters of the query's and of the document's language.

    made = modular(model, "task.safetensors", document="de.safetensors", tokenizer=tokenizer)
    Reranker(model, tokenizer, made.composition)

The task is trained on a frozen part of the source language and judged with the target's in its place (Pfeiffer et al.
2020, arXiv:2005.00052; Litschko et al. 2022, arXiv:2204.02292):

| where | what acts |
| --- | --- |
| "query" | the query's language, then the task |
| "document" | the document's language, then the task |
| "both" | both languages, then the task; of one language once |
| "split" | the query's tokens through its language, the document's through its own, then the task |

A task's file names, by hash, the tokenizer and the language part of its training. Another part is what such a reranker
is for, and noted; another tokenizer is an error.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from addenda.compose.split import SEPARATOR, TYPES, Split
from addenda.compose.stack import Composition, Stack
from addenda.core.adapter.attach import detach
from addenda.core.adapter.handle import Adapter
from addenda.core.adapter.load import load
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import shown
from addenda.core.file.tokenizer import inner
from addenda.core.file.trained_on import content_hash, difference, note_training, trained_on
from addenda.core.state.state import free_name, name_of, names_on, record_of
from addenda.core.state.trained_on import TrainedOn

Where = Literal["query", "document", "both", "split"]
Skip = Literal["last", "own"]
Given = str | Path | Adapter | None  # a name on the model, a file, an adapter; None: no part


@dataclass(frozen=True)
class Modular:
    """A task with language parts on a model. notes: what differs from the task's training, in words."""

    composition: Composition
    task: str
    parts: tuple[str, ...]  # the language parts that act, in order
    notes: tuple[str, ...] = ()

    def note(self, model: nn.Module, tokenizer: Any = None) -> TrainedOn:
        """Remember for the task's file that it is trained beside these parts, with this tokenizer."""
        root = record_of(model, self.task).root
        return note_training(
            Adapter(root, self.task), tokenizer=tokenizer, beside=[Adapter(root, p) for p in self.parts]
        )

    def __str__(self) -> str:
        return "\n".join([repr(self.composition), *self.notes])


def composition_for(
    task: str | None,
    *,
    query: str | None = None,
    document: str | None = None,
    where: Where = "document",
    skip: Skip = "last",
    by: str | None = None,
) -> Composition:
    """Return the composition of a task and language parts, by their names.

    skip: as in training, see `compose.stack`. by: for "split", how the query's tokens are told: "separator:ID" or
    "types", as `pairs_by` says. Raises AddendaError for a part that `where` wants and that is not given, and for an
    adapter that is named twice.
    """
    if where not in get_args(Where):
        raise AddendaError(f"where is one of {', '.join(get_args(Where))}, got {where!r}.")
    wanted = {"query": ("query",), "document": ("document",)}.get(where, ("query", "document"))
    given = {"query": query, "document": document}
    languages = [given[side] for side in wanted if given[side] is not None]
    if languages and len(languages) < len(wanted):
        lacking = next(side for side in wanted if given[side] is None)
        raise AddendaError(f"where={where!r} wants a language part of the query and of the document; give {lacking}=.")
    if not languages and any(given.values()):
        other = "document" if where == "query" else "query"
        raise AddendaError(f"where={where!r} wants {where}=, and only {other}= is given.")
    if task is not None and task in languages:
        raise AddendaError(f"{task!r} is named as the task and as a language part. An adapter acts once.")
    one = list(dict.fromkeys(languages))
    behind = [] if task is None else [task]
    if where == "split" and len(one) == 2:
        if by is None:
            raise AddendaError("where='split' wants to know the query's tokens: by=pairs_by(tokenizer).")
        return Stack(Split(*one, by=by, pooled=0), *behind, skip=skip)
    if not one and not behind:
        raise AddendaError("Neither a task nor a language part is given, so there is nothing to compose.")
    return Stack(*one, *behind, skip=skip)


def pairs_by(tokenizer: Any) -> str:
    """Return how a Split tells the query's tokens in a pair: by the separator behind it, else by types.

    Raises AddendaError for a tokenizer with neither.
    """
    found = inner(tokenizer)
    separator = getattr(found, "sep_token_id", None)
    separator = separator if separator is not None else getattr(found, "eos_token_id", None)
    if isinstance(separator, int):
        return f"{SEPARATOR}{separator}"
    if "token_type_ids" in (getattr(found, "model_input_names", None) or ()):
        return TYPES
    raise AddendaError(
        f"This {type(found).__name__} has no separator token and no token types, so where the query ends in a pair is "
        "not known. Compose query, document or both."
    )


def modular(
    model: nn.Module,
    task: Given,
    *,
    query: Given = None,
    document: Given = None,
    where: Where = "document",
    tokenizer: Any = None,
    skip: Skip = "last",
    base: Literal["exact", "compatible"] = "exact",
) -> Modular:
    """Attach what is needed of a task and language parts, and return their composition; nothing acts yet.

    task, query, document: names of adapters on the model, files, or adapters; a file is loaded once, under the name of
    the file. tokenizer: must be that of training, where files name one; "split" needs it. skip: as in training. base:
    of files, as in `load`; "compatible" admits the same weights in another dtype.

    Raises AddendaError, with nothing attached that was not there, as `load` and `composition_for` do, and for another
    tokenizer than that of training.
    """
    by = None
    if where == "split" and query is not None and document is not None:
        if tokenizer is None:
            raise AddendaError("where='split' wants tokenizer=, which says what stands between query and document.")
        by = pairs_by(tokenizer)
    came: dict[str, str] = {}
    with ExitStack() as undo:
        names = [_name(model, given, tokenizer, came, undo, base) for given in (task, query, document)]
        composition = composition_for(names[0], query=names[1], document=names[2], where=where, skip=skip, by=by)
        root = record_of(model, composition.names()[0]).root
        acting = {n: Adapter(root, n) for n in composition.names()}
        if tokenizer is not None:
            _check_tokenizers(acting.values(), tokenizer)
        parts = tuple(n for n in acting if n != names[0])
        notes = () if names[0] is None else _notes(acting[names[0]], [acting[n] for n in parts])
        undo.pop_all()
    return Modular(composition, names[0] or "", parts, notes)


def _name(
    model: nn.Module, given: Given, tokenizer: Any, came: dict[str, str], undo: ExitStack, base: Any = "exact"
) -> str | None:
    """Return an adapter's name on the model; a file is loaded. came: names by file; undo: how to take them off."""
    if given is None:
        return None
    there = names_on(model)
    if isinstance(given, Adapter):
        if given.name not in there:
            raise AddendaError(f"The adapter {given.name!r} is not on this model. Load its file here.")
        return given.name
    if isinstance(given, str) and given in there:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        known = f" On the model: {', '.join(map(repr, there))}." if there else ""
        raise AddendaError(f"{shown(path)} is no file, and no adapter on this model is called so.{known}")
    key = str(path.resolve())
    if key not in came:
        name = free_name(model, name_of(path, "part"))
        load(model, path, name=name, activate=False, tokenizer=tokenizer, base=base)
        undo.callback(detach, model, name)
        came[key] = name
    return came[key]


def _check_tokenizers(adapters: Any, tokenizer: Any) -> None:
    """Raise AddendaError where an adapter was trained with another tokenizer."""
    for adapter in adapters:
        noted = trained_on(adapter)
        told = None if noted is None else difference(noted, tokenizer)
        if told is not None:
            raise AddendaError(
                f"{adapter.name!r} was trained with another tokenizer: {told}. Its tokens would have other numbers. "
                "Use the tokenizer that was saved with it."
            )


def _notes(task: Adapter, parts: Sequence[Adapter]) -> tuple[str, ...]:
    """Return in words which parts act that did not at the task's training, where its file names those that did."""
    noted = trained_on(task)
    if noted is None:
        return ()
    known = {b.sha256: b.name for b in noted.beside}
    now = {p.name: content_hash(p) for p in parts}
    if set(now.values()) == known.keys():
        return ()
    then = ", ".join(f"{n} ({sha[:12]}…)" for sha, n in known.items()) or "no other part"
    here = ", ".join(f"{n} ({sha[:12]}…)" for n, sha in now.items()) or "no other part"
    return (f"{task.name} was trained beside {then}, and acts beside {here}",)
