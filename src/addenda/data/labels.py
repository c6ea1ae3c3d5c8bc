"""What a column of labels means: classes or numbers to predict, their names, and which output of a head each is.

| the column holds                               | understood as                                                  |
| ---------------------------------------------- | -------------------------------------------------------------- |
| texts (spam, ham)                              | classes, in the order of the head's names, else of the alphabet |
| whole numbers from 0 (0, 1, 2)                 | classes, by place                                              |
| numbers with fractions (0.5, 1.7)              | numbers to predict                                             |
| numbers, for a kept head with one output       | numbers to predict                                             |
| 1.0, -1, 007, 3 beside "three", 10001 alone    | nothing: refused, unless `kind` says "class" or "number"       |

Names come from whoever knows the order of the outputs: the adapter's file, the model's configuration where it says more
than LABEL_0, a data set that numbers its own classes, and only then the data. A label that the head does not know is an
error, with the nearest that it does.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal

from torch import nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.state.state import find_state

LabelKind = Literal["class", "number"]
PLACES = 16  # outputs that whole numbers may ask for, however few of them occur
FREE_TEXT = 100  # different texts that are no classes where most of them occur once
LONGEST = 200  # characters of a label
WHOLE = re.compile(r"-?[1-9][0-9]*|0")
CODE = re.compile(r"[+-]?[0-9]+")  # of digits, but not as a number is written: 007, +1
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
UNNAMED = re.compile(r"LABEL_[0-9]+")
NUMERIC = {"whole", "negative", "fraction", "point", "code"}


@dataclass(frozen=True)
class Scale:
    """How labels become what a model learns. names: of its outputs, in order; None: numbers to predict.

    texts, places: which output a written label, or a whole number, is. said: the same in words.
    """

    column: str
    names: tuple[str, ...] | None
    said: str
    texts: dict[str, int]
    places: dict[int, int]

    def of(self, value: Any) -> int | float:
        """Return the class (an index into `names`) or the number. Raises ValueError for a label that is neither."""
        value = plain(value)
        if (text := written(value)) is None:
            raise ValueError(f"column {self.column!r} holds {short(value)}, a label was expected")
        if self.names is None:
            number = float(text) if NUMBER.fullmatch(text) and not isinstance(value, bool) else math.nan
            if not math.isfinite(number):
                raise ValueError(f"column {self.column!r} holds {short(value)}, a number was expected")
            return number
        if text in self.texts:
            return self.texts[text]
        if WHOLE.fullmatch(text) and int(text) in self.places:
            return self.places[int(text)]
        folded = {n.casefold(): n for n in reversed(self.names)}
        near = f" Did you mean {folded[text.casefold()]!r}?" if text.casefold() in folded else nearest(text, self.names)
        raise ValueError(f"column {self.column!r} holds {short(value)}, expected one of {_some(self.names)}.{near}")


@dataclass(frozen=True)
class _Column:
    """The values of a column. seen: its different labels; forms: of each form that occurs, the first row with it."""

    name: str
    source: str
    place: Callable[[int], str]
    rows: int
    seen: frozenset[str]
    forms: dict[str, tuple[int, Any]]
    note: str = ""
    unusable: tuple[int, Any] | None = None  # the first value that is no label

    def refuse(self, form: str, why: str) -> AddendaError:
        row, value = self.forms[form]
        return AddendaError(
            f"{self.source}, {self.place(row)}: column {self.name!r} holds {short(value)}, and {why}. Say what is "
            "meant with label_kind='class' or 'number' (--label-kind), or write it otherwise."
        )

    def classes(self, names: tuple[str, ...], places: dict[int, int] | None = None) -> Scale:
        note = f"{len(names):,} classes in column {self.name!r}: {_some(names)}{self.note}"
        return Scale(self.name, names, note, {n: i for i, n in enumerate(names)}, places or {})

    def numbers(self) -> Scale:
        return Scale(self.name, None, f"numbers to predict in column {self.name!r}", {}, {})


def scale_of(
    values: Sequence[Any],
    column: str,
    *,
    names: Sequence[str] | None = None,
    own: Sequence[str] | None = None,
    outputs: int | None = None,
    kind: LabelKind | None = None,
    source: str = "The data",
    place: Callable[[int], str] = "row {}".format,
) -> Scale:
    """Return what the values of a column are.

    names: of a head's outputs; outputs: how many there are, where a head is kept; own: names that the data gives to its
    numbers. kind: decides where the column could be either. source, place: of row i, for messages.
    Raises AddendaError for what could be understood in two ways, with the first row that shows it, and for classes that
    a head has no outputs for.
    """
    if kind not in (None, "class", "number"):
        raise AddendaError(f"label_kind must be 'class' or 'number', got {kind!r}.")
    names, own = checked(names, source), checked(own, source)
    if names is None and own is None and outputs == 1 and kind is None:
        kind = "number"  # the head has room for nothing else
    texts, forms, spaced, unusable = set(), {}, False, None
    for i, value in enumerate(map(plain, values)):
        if (text := written(value)) is not None:
            texts.add(text)
            spaced = spaced or (isinstance(value, str) and value != text)
            forms.setdefault(_form(value, text), (i, value))
        elif unusable is None:
            unusable = (i, value)
    note = " (spaces around them left out)" if spaced else ""
    column_values = _Column(column, source, place, len(values), frozenset(texts), forms, note, unusable)
    if kind == "number":
        if (names and len(names) > 1) or (outputs or 1) > 1:
            raise AddendaError(
                f"Numbers want a model with one output; this one has {len(names or ()) or outputs}"
                f"{f' ({_some(names)})' if names else ''}. Give a model without a head, or label_kind='class'."
            )
        return column_values.numbers()
    if names is None and outputs and texts and all(UNNAMED.fullmatch(text) for text in texts):
        names = tuple(f"LABEL_{i}" for i in range(outputs))
    if own is not None and names is not None and own == tuple(map(str, range(len(own)))) and not {*own} & {*names}:
        own = None  # it counts, and does not name
    if own is not None:
        names = names or _as_many(column_values, own, outputs)
        index = {n: i for i, n in enumerate(names)}
        unknown = [n for k, n in enumerate(own) if n not in index and str(k) in texts]
        if unknown:
            raise AddendaError(
                f"{source} has a class {unknown[0]!r} in column {column!r} that is none of the model's: {_some(names)}."
                f"{nearest(unknown[0], names)} Rename it, or give labels= in the order of the model's outputs."
            )
        return column_values.classes(names, {k: index[n] for k, n in enumerate(own) if n in index})
    if names is not None:
        by_place = not any(map(WHOLE.fullmatch, names)) and all(map(WHOLE.fullmatch, texts))
        return column_values.classes(names, {i: i for i in range(len(names))} if by_place else {})
    return _of_data(column_values, outputs, kind)


def _of_data(held: _Column, outputs: int | None, kind: LabelKind | None) -> Scale:
    """Return the scale that the data itself suggests, since nobody else says."""
    forms = held.forms
    if kind is None:
        if ("bool" in forms and len(forms) > 1) or ("text" in forms and NUMERIC & set(forms)):
            form = "bool" if "bool" in forms else "text"
            raise held.refuse(form, f"other rows hold what is of another kind, such as {_other(held, form)}")
        if "code" in forms:
            raise held.refuse("code", "it may be a name or a number")
        if "fraction" in forms:
            return held.numbers()
        if "point" in forms:
            raise held.refuse("point", "it may be a number to predict, or a class whose number got a point")
        if "negative" in forms:
            raise held.refuse("negative", "it may be a class, a number to predict, or stand for no label")
        if len(held.seen) > max(FREE_TEXT, held.rows // 2) and "text" in forms:
            raise held.refuse("text", f"of {held.rows:,} rows {len(held.seen):,} hold another text, as classes do not")
    if held.seen and all(WHOLE.fullmatch(text) and text[0] != "-" for text in held.seen):
        return _counted(held, outputs, kind)
    if kind is None and (pair := _alike(held.seen)):
        raise AddendaError(
            f"{held.source}: column {held.name!r} holds {pair[0]!r} and {pair[1]!r}, which are written differently and "
            "look like one class. Write them alike, or say with label_kind='class' that they are two."
        )
    numbers = all(map(NUMBER.fullmatch, held.seen))
    names = tuple(sorted(held.seen, key=(lambda text: (float(text), text)) if numbers else None))
    return held.classes(_as_many(held, names, outputs))


def _counted(held: _Column, outputs: int | None, kind: LabelKind | None) -> Scale:
    """Return the scale of whole numbers: the places of a head's outputs, or of as many as the largest number says."""
    values = sorted(map(int, held.seen))
    size = outputs or values[-1] + 1
    if outputs is not None and values[-1] >= outputs:
        raise held.refuse(
            "whole", f"the model's head has {outputs} outputs, counted from 0; the largest is {values[-1]}"
        )
    if outputs is None and size > max(2 * len(values), PLACES):
        if kind == "class":
            return held.classes(tuple(map(str, values)))
        raise held.refuse(
            "whole", f"{len(values):,} different whole numbers up to {values[-1]:,} would be {size:,} classes by place"
        )
    scale = held.classes(tuple(map(str, range(size))))
    if len(values) == size:
        return scale
    return replace(scale, said=f"{scale.said} ({size - len(values):,} of them without an example here)")


def _alike(names: Iterable[str]) -> tuple[str, str] | None:
    """Return two names that differ in capitals, spaces or how Unicode writes a letter only; None if there are none."""
    by_folded: dict[str, str] = {}
    for name in sorted(names):
        folded = " ".join(unicodedata.normalize("NFKC", name).split()).casefold()
        if (other := by_folded.setdefault(folded, name)) != name:
            return other, name
    return None


def _as_many(held: _Column, names: tuple[str, ...], outputs: int | None) -> tuple[str, ...]:
    """Return the names. Raises AddendaError where a head that does not name its outputs has not as many."""
    if outputs not in (None, len(names)):
        if held.unusable:
            row, value = held.unusable
            raise AddendaError(
                f"{held.source}, {held.place(row)}: column {held.name!r} holds {short(value)}, a label was expected. "
                "Mend or remove such rows."
            )
        raise AddendaError(
            f"{held.source} has {len(names)} labels in column {held.name!r} ({_some(names)}), and the model's head has "
            f"{outputs} outputs without names. Give labels= in the order of the model's outputs."
        )
    return names


def _other(held: _Column, form: str) -> str:
    return next(f"{short(value)} ({held.place(row)})" for f, (row, value) in held.forms.items() if f != form)


def checked(names: Sequence[str] | None, source: str = "labels") -> tuple[str, ...] | None:
    """Return names of classes as texts, each once. Raises AddendaError for anything else."""
    if names is None:
        return None
    if isinstance(names, str) or not names:
        raise AddendaError(f"labels must be a list of names in the order of the model's outputs, got {names!r}.")
    texts = tuple(map(str, names))
    duplicates = sorted({n for n in texts if texts.count(n) > 1}) if len(set(texts)) < len(texts) else []
    if duplicates:
        raise AddendaError(
            f"{source}: two classes are called {duplicates[0]!r}, so that a label cannot say which it is."
        )
    return texts


def named(config: Any) -> tuple[str, ...] | None:
    """Return the names of a classifier's outputs in its configuration, where they say more than LABEL_0.

    Raises AddendaError for a name that two outputs have.
    """
    by_place = getattr(config, "id2label", None) or {}
    names = [str(by_place[i]) for i in sorted(by_place)]
    if len(names) < 2 or all(map(UNNAMED.fullmatch, names)):
        return None
    return checked(names, "The model's id2label")


def head_of(model: nn.Module) -> tuple[tuple[str, ...] | None, int | None]:
    """Return (the names of a classifier's outputs, how many it has), None for what nobody says.

    The names are those of the adapter that acts, else of the configuration. Raises AddendaError where adapters that act
    together name the outputs differently.
    """
    config, host = getattr(model, "config", None), find_state(model)
    by_adapter = [] if host is None else [host.state.records[n].labels for n in host.state.active]
    names = list(dict.fromkeys(labels for labels in by_adapter if labels))
    if len(names) > 1:
        raise AddendaError(
            f"The adapters that act name the outputs differently: {_some(names[0])}, and {_some(names[1])}. Judge with "
            "one of them (switch), or give labels=."
        )
    outputs = getattr(config, "num_labels", None)
    return (names[0] if names else named(config)), outputs if isinstance(outputs, int) else None


def of_head(given: Sequence[str] | None, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the names that a caller gave, else the head's. Raises AddendaError where the order differs."""
    labels = checked(given)
    if labels and names and labels != names and set(labels) == set(names):
        raise AddendaError(
            f"The labels are in another order than the model's outputs, which are {_some(names)}; got {_some(labels)}. "
            "Leave labels out, or give them in that order."
        )
    return labels or names


def written(value: Any) -> str | None:
    """Return a label as it would be written; None for what is none: nothing, NaN, a list, a text of 5,000 digits."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**LONGEST:
        return None
    text = str(value).strip() if isinstance(value, str | int) else ""
    return text if 0 < len(text) <= LONGEST and writable(text) else None


def plain(value: Any) -> Any:
    """Return a number of numpy, torch or decimal as Python's own."""
    if isinstance(value, Decimal):
        return float(value)
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value


def writable(text: str) -> bool:
    """Return whether a text can be encoded: half of a surrogate pair, which JSON can hold, cannot."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _form(value: Any, text: str) -> str:
    if isinstance(value, bool):
        return "bool"
    if WHOLE.fullmatch(text):
        return "point" if isinstance(value, float) else "negative" if text[0] == "-" else "whole"
    if CODE.fullmatch(text):
        return "code"
    if not NUMBER.fullmatch(text):
        return "text"
    return "point" if float(text).is_integer() else "fraction"


def short(value: Any) -> str:
    """Return a value cut to a length that a message can hold."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of 5,000 digits; a list in a list in a list
        return f"{type(value).__name__} that is too long to show"
    return text if len(text) <= 80 else f"{text[:60]} … ({len(text):,} characters)"


def _some(names: Sequence[str], n: int = 8) -> str:
    return ", ".join(repr(x[:40]) for x in names[:n]) + (f" … and {len(names) - n:,} more" if len(names) > n else "")
