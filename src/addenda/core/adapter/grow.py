"""New tokens: a tokenizer and the tables of its model grow together, and adapters' files hold the new rows.

    grown = ad.grow(model, tokenizer, ["<call>", "</call>"])
    ad.attach(model, {"linear": method, "model.embed_tokens": rows}, ...)        # whatever trains the new rows
    adapter.save("calls.safetensors")                                            # rows, tokens, the tokenizer's hash
    ad.load(fresh_model, "calls.safetensors", tokenizer=tokenizer)               # grows the tables of the fresh base

The base's rows keep their bits. What stands in the new rows when an adapter is attached is part of its base: it is in
the file, and what is trained is a change of it like of any other weight.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from addenda.core.adapter.start_rows import pieces_of, start_rows
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.base.visible import label
from addenda.core.file import tokenizer as tokenizers
from addenda.core.forward.acting import alone
from addenda.core.modules.borrow import in_its_mode
from addenda.core.modules.wrappers import model_in
from addenda.core.site.site import owners_of, site_at
from addenda.core.site.tables import fixed, rows_in_folder, tables_of
from addenda.core.state.state import State, find_state
from addenda.core.state.undo import undone
from addenda.core.state.vocabulary import (
    Grown,
    Vocabulary,
    axis_of,
    grown_of,
    lighten,
    put_on,
    remember,
    rows_of,
    table_at,
    take_off,
    text_config,
)


@in_its_mode
@checked()
@torch.no_grad()
def grow(
    model: nn.Module,
    tokenizer: Any = None,
    tokens: Iterable[Any] = (),
    *,
    base_rows: int | None = None,
    start: Literal["pieces", "mean"] = "pieces",
    noise: float = 0.0,
    seed: int = 0,
) -> Vocabulary:
    """Add tokens to a tokenizer and rows for them to its model, before an adapter is attached.

    tokens: texts, or a tokenizer's AddedToken. The embedding, the output head (tied or not) and its bias get a row for
    every token that has none; rows of the base keep their bits, and the configuration says the new size. A table with
    room for them, as padded ones have, is left as it is. start: what a new row is: the mean of the rows of the pieces
    that its text was before, or the mean of all rows. noise: its deviation, as a share of the root mean square of the
    table's numbers; drawn from the seed, the same on every machine.

    base_rows: of a model whose tables have grown already (resize_token_embeddings): how many rows the base has. Those
    behind them are new as they are, and so are the tokenizer's tokens with these numbers; no row is added but for
    `tokens`.

    The same call again changes nothing. `shrink` takes the rows off. Raises AddendaError, with tokenizer and model as
    they were, for a model that has adapters, is wrapped, sharded or quantised, or has no table of tokens.
    """
    if start not in ("pieces", "mean"):
        raise AddendaError(f"start must be 'pieces' or 'mean', got {start!r}.")
    wanted = by_text(tokens)
    if wanted and tokenizer is None:
        raise AddendaError("tokens= are added to a tokenizer, and none is given: grow(model, tokenizer, tokens).")
    tokenizer = None if tokenizer is None else tokenizers.inner(tokenizer)
    root = _root(model)
    tables = tables_of(root)
    grown, rows = grown_of(root), len(next(iter(tables.values())))
    first = _first(root, grown, rows, base_rows)
    numbers, fresh = _numbered(tokenizer, wanted)
    new = {t: n for t, n in numbers.items() if n >= first or t in wanted}
    needed = max([rows, *(n + 1 for n in new.values())])
    larger = {}
    if needed > rows:
        by_row = {n: t for t, n in new.items()}
        texts = [by_row.get(n) for n in range(rows, needed)]
        parts = [pieces_of(tokenizer, t, rows) if start == "pieces" else [] for t in texts]
        for path, table in tables.items():
            more = start_rows(table, rows, texts, parts, noise, Stream(seed, "new rows", path))
            larger[path] = torch.cat([table.detach(), more], axis_of(table, rows) or 0)
    with alone(root, "grow"), undone(root):
        _add(tokenizer, fresh, numbers)
        mark = (None, None) if tokenizer is None else tokenizers.mark(tokenizer)
        before = {} if grown is None else dict(grown.vocabulary.tokens)
        named = dict(sorted((before | new).items(), key=lambda item: item[1]))
        vocabulary = Vocabulary(first, needed - first, tuple(tables) if needed > first else (), named, *mark)
        if larger:
            put_on(root, vocabulary, larger, rows, False)
        elif grown is None or grown.vocabulary != vocabulary:
            remember(root, Grown(vocabulary, rows) if grown is None else replace(grown, vocabulary=vocabulary))
        lighten(root)
    return vocabulary


def by_text(tokens: Iterable[Any]) -> dict[str, Any]:
    """Return tokens by their text. Raises AddendaError for what is none."""
    given = [] if isinstance(tokens, str) else list(tokens)
    texts = [t if isinstance(t, str) else getattr(t, "content", None) for t in given]
    found = {t: token for t, token in zip(texts, given, strict=True) if isinstance(t, str) and t}
    if isinstance(tokens, str) or len(found) != len(set(texts)):
        raise AddendaError(
            f"tokens is a list of texts, none of them empty, such as ['<call>']; got {str(tokens)[:100]!r}."
        )
    return found


def _first(root: nn.Module, grown: Grown | None, rows: int, base_rows: int | None) -> int:
    """Return the first new row. Raises AddendaError where what is said of it cannot be."""
    if grown is not None:
        first = grown.vocabulary.base_rows
        if base_rows not in (None, first):
            raise AddendaError(f"This model was told of new rows behind {first:,}, not behind {base_rows:,}.")
        return first
    if base_rows is None:
        refuse_untold(root)
        return rows
    if base_rows > rows:
        raise AddendaError(f"base_rows={base_rows} of a table that has {rows:,} rows. It is how many the base has.")
    return base_rows


def _numbered(tokenizer: Any, wanted: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the number of every token, those that are still to be added with theirs, and these."""
    known = {} if tokenizer is None else tokenizer.get_vocab()
    fresh = {text: token for text, token in wanted.items() if text not in known}
    if fresh and len(known) != 1 + max(known.values(), default=-1):
        raise AddendaError("This tokenizer's numbers have gaps, so it cannot be said which ones new tokens get.")
    return known | {text: len(known) + i for i, text in enumerate(fresh)}, fresh


def _add(tokenizer: Any, fresh: Mapping[str, Any], numbers: Mapping[str, int]) -> None:
    """Add tokens to a tokenizer. Raises AddendaError where it gives them other numbers."""
    added = tokenizer.add_tokens(list(fresh.values())) if fresh else 0
    known = tokenizer.get_vocab() if fresh else {}
    if added != len(fresh) or any(known.get(t) != numbers[t] for t in fresh):
        raise AddendaError(
            f"The tokenizer has taken {added} of {len(fresh)} tokens, or under other numbers than the next ones. Load "
            "it anew, and add tokens one by one to see which it does not take."
        )


@checked()
@in_its_mode
def shrink(model: nn.Module) -> None:
    """Take off the rows that `grow` has put on: the base's tables, with the bits that their rows have now.

    The tokenizer keeps its tokens. Raises AddendaError where adapters are attached, or nothing has grown.
    """
    root = _root(model)
    if grown_of(root) is None:
        raise AddendaError(f"This {type(root).__name__} has no new rows that grow has put on.")
    with alone(root, "shrink"), undone(root):
        take_off(root)


def refuse_untold(root: nn.Module) -> None:
    """Raise AddendaError where tables have more rows than the model's folder says, and nobody told of them."""
    if grown_of(root) is not None:
        return
    config = getattr(root, "config", None)
    now = getattr(text_config(config), "vocab_size", None)
    then = rows_in_folder(config)
    if type(now) is int and then is not None and now > then:
        raise AddendaError(
            f"This {type(root).__name__} has {now:,} tokens, and the model that it was loaded from {then:,}: no file "
            f"would hold the rows of the {now - then} new ones. Say that they are new, before attach: "
            f"addenda.grow(model, tokenizer, base_rows={then}). Or leave the resizing to it, which starts "
            "new rows alike on every machine: grow(model, tokenizer, tokens)."
        )


@contextmanager
def grown_as(
    root: nn.Module, state: State, vocabulary: Vocabulary | None, rows: Mapping[str, Tensor], path: str | Path
) -> Iterator[None]:
    """Grow a model as a file says, for a `with` block that attaches its adapter: an error in it takes the rows off.

    rows: by table, those of the file. Raises AddendaError, with nothing changed, where the tables are not the base's,
    have other new rows, or cannot grow.
    """
    if vocabulary is None:
        yield
        return
    with undone(root):
        _grow_as(root, state, vocabulary, rows, path)
        yield
    lighten(root)


@torch.no_grad()
def _grow_as(
    root: nn.Module, state: State, vocabulary: Vocabulary, rows: Mapping[str, Tensor], path: str | Path
) -> None:
    if grown_of(root) is not None:
        if problem := other_rows(root, vocabulary, rows):
            raise AddendaError(
                f"{path} has {vocabulary}, and this model has grown otherwise: {problem}. Detach what has grown it, or "
                "call shrink(model), and load again. Nothing was loaded."
            )
        return
    if not vocabulary.rows:
        remember(root, Grown(vocabulary, vocabulary.base_rows, {}, True))
        return
    problems, before, made = [], set(), {}
    for name in vocabulary.tables:
        found = _table_for(root, name, vocabulary, rows[name])
        if isinstance(found, str):
            problems.append(found)
        else:
            made[name] = found
            before.add(found[0].shape[found[1]])
    if len(before) > 1:
        problems.append("some of its tables have grown, and some have not")
    if not problems:
        problems += _held(root, state, [table for table, _ in made.values()])
    if problems:
        raise AddendaError(
            f"{path} has {vocabulary}, which this {type(root).__name__} cannot take, and nothing was loaded: "
            f"{'; '.join(problems[:8])}."
        )
    tables = {
        name: torch.cat([table.detach().narrow(axis, 0, vocabulary.base_rows), rows[name].to(table)], axis)
        for name, (table, axis) in made.items()
    }
    with alone(root, "attach and load"):
        put_on(root, vocabulary, tables, before.pop(), True)


def _table_for(root: nn.Module, name: str, vocabulary: Vocabulary, rows: Tensor) -> tuple[Tensor, int] | str:
    """Return the model's table of this name and the dimension of its rows, or why a file's new rows do not fit it."""
    table = table_at(root, name)
    if table is None:
        return f"the model has no {name[:200]}"
    if reason := fixed(table):
        return f"{name}: {reason}"
    axes = [axis_of(table, count) for count in (vocabulary.base_rows, vocabulary.all_rows)]
    axis = next((axis for axis in axes if axis is not None), None)
    if axis is None:
        return (
            f"{name}: the file wants {vocabulary.base_rows:,} rows, or these and its new ones, the model has "
            f"{list(table.shape)}"
        )
    shape = [*table.shape[:axis], vocabulary.rows, *table.shape[axis + 1 :]]
    if list(rows.shape) != shape:
        return f"{name}: the file's new rows are {list(rows.shape)}, and {shape} would fit"
    return table, axis


def other_rows(root: nn.Module, v: Vocabulary | None, rows: Mapping[str, Tensor]) -> str | None:
    """Return how new rows on a model differ from those of a file, None standing for a file without, or None."""
    here = None if (grown := grown_of(root)) is None else grown.vocabulary
    if here is None or v is None:
        return None if here is v else f"{'nothing has grown' if here is None else here} here"
    if (here.base_rows, here.rows) != (v.base_rows, v.rows):
        return f"{here}"
    if here.tables != v.tables:
        return f"its tables are {', '.join(here.tables)}"
    if here.tokens and v.tokens and here.tokens != v.tokens:
        text, n = next((t, n) for t, n in v.tokens.items() if here.tokens.get(t) != n)
        return f"{label(repr(text))} is number {n} there, and {here.tokens.get(text, 'no new token')} here"
    if None not in (here.tokenizer, v.tokenizer) and here.tokenizer != v.tokenizer:
        return "with another tokenizer"
    for name in v.tables:
        table = table_at(root, name)
        if table is None or axis_of(table, v.all_rows) is None:
            return f"{name} is no longer there, or of another size"
        own = rows_of(table, v)
        if own.shape != rows[name].shape or not torch.equal(own, rows[name].to(own)):
            return f"the new rows of {name} are others"
    return None


def _held(root: nn.Module, state: State, tables: list[Tensor]) -> list[str]:
    """Return which adapters stand on these tables, each as a problem."""
    ids, owners = {id(t) for t in tables}, owners_of(root)
    on = {n for n, r in state.records.items() for p in r.methods if id(site_at(root, p, owners).weight) in ids}
    return [f"the adapter {name!r} is on a table that would grow; detach it first" for name in sorted(on)]


def _root(model: nn.Module) -> nn.Module:
    """Return the model itself. Raises AddendaError where rows cannot be put on or taken off."""
    root = model_in(model)
    if root is not model or hasattr(model, "set_modules_to_forward_prefetch"):
        raise AddendaError(f"The model is wrapped in {type(model).__name__}. Grow first, attach, then wrap or shard.")
    if (host := find_state(root)) is not None:
        names = ", ".join(map(repr, host.state.records))
        raise AddendaError(
            f"Adapters are attached to this {type(root).__name__} ({names}), and tables change their size before "
            "attach only. Detach them first."
        )
    return root
