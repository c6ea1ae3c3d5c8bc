"""A grown vocabulary in an adapter file: what the header says of it, and the new rows beside the adapter's tensors.

    "vocabulary": {"base_rows": 49152, "rows": 2, "tables": ["model.embed_tokens.weight"],
                   "tokens": {"<call>": 49152, "</call>": 49153}, "tokenizer": "<64 hex>", "entries": 49154}

The rows of a table are the tensor ".new/TABLE", in the base's dtype: what stands behind the base's rows while no
adapter acts. Without a tokenizer the last two are missing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import is_sha256
from addenda.core.state.state import State
from addenda.core.state.vocabulary import Vocabulary, axis_of, grown_of, rows_of, table_at

_KEYS = {"base_rows", "rows", "tables", "tokens", "tokenizer", "entries"}
_TABLES = 8  # at most: an embedding, a head, a bias
_LARGEST = 2**40


def key_of(table: str) -> str:
    """Return the name of the tensor with the new rows of a table."""
    return f".new/{table}"


def rows_in(vocabulary: Vocabulary | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the new rows in a file by table."""
    return {} if vocabulary is None else {t: tensors[key_of(t)] for t in vocabulary.tables}


def to_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return what a header stores."""
    entry: dict[str, Any] = {
        "base_rows": vocabulary.base_rows,
        "rows": vocabulary.rows,
        "tables": list(vocabulary.tables),
        "tokens": dict(vocabulary.tokens),
    }
    if vocabulary.tokenizer is not None:
        entry |= {"tokenizer": vocabulary.tokenizer, "entries": vocabulary.entries}
    return entry


def of_json(raw: Any) -> Vocabulary:
    """Build what a header stores. Raises ValueError, KeyError or TypeError where that is malformed."""
    if not isinstance(raw, dict) or not raw.keys() <= _KEYS:
        raise ValueError(f"the vocabulary must have {', '.join(sorted(_KEYS))}, and nothing else")
    base_rows, rows, tables, tokens = raw["base_rows"], raw["rows"], raw["tables"], raw["tokens"]
    if not (type(base_rows) is int and type(rows) is int and 0 < base_rows < _LARGEST and 0 <= rows < _LARGEST):
        raise ValueError("base_rows and rows of the vocabulary must be whole numbers")
    if not (isinstance(tables, list) and all(isinstance(t, str) and t for t in tables) and len(tables) <= _TABLES):
        raise ValueError(f"the tables of the vocabulary must be at most {_TABLES} names")
    if len(set(tables)) < len(tables) or bool(tables) != bool(rows):
        raise ValueError("the tables of the vocabulary must be there, each once, where there are new rows")
    if not (isinstance(tokens, dict) and all(type(n) is int and 0 <= n < base_rows + rows for n in tokens.values())):
        raise ValueError("the tokens of the vocabulary must have numbers of its rows")
    if len(set(tokens.values())) < len(tokens):
        raise ValueError("two tokens of the vocabulary have one number")
    sha256, entries = raw.get("tokenizer"), raw.get("entries")
    if (sha256, entries) != (None, None) and not (
        is_sha256(sha256) and type(entries) is int and 0 < entries < _LARGEST
    ):
        raise ValueError("the tokenizer of the vocabulary must be a SHA-256 and a number of tokens")
    return Vocabulary(base_rows, rows, tuple(tables), tokens, sha256, entries)


def check_rows(vocabulary: Vocabulary, tensors: Mapping[str, Tensor], floating: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError where the new rows are not as many as the header says, or are no numbers."""
    for table, t in rows_in(vocabulary, tensors).items():
        if t.dtype not in floating or t.dim() > 2 or axis_of(t, vocabulary.rows) is None:
            raise ValueError(f"the new rows of {table} must be {vocabulary.rows:,} of numbers, got {list(t.shape)}")
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"the new rows of {table} hold values that are not finite")


def stored(root: nn.Module, state: State) -> tuple[Vocabulary, dict[str, Tensor]]:
    """Return a grown model's vocabulary, and its new rows as the base has them, by their names in a file.

    Raises AddendaError where a table was replaced or resized since.
    """
    grown = grown_of(root)
    assert grown is not None
    v, made = grown.vocabulary, {}
    for name in v.tables:
        table = table_at(root, name)
        if table is None or axis_of(table, v.all_rows) is None:
            raise AddendaError(
                f"{name} is no longer the table of {v.all_rows:,} rows that had grown when the adapter was attached. "
                "Resize tables before attach only, with addenda.grow(model, tokenizer, tokens)."
            )
        kept = next((k for p in (name, name.rpartition(".")[0]) if (k := (state.merged or {}).get(p))), None)
        if kept is not None:
            table = kept.values if kept.index is None else kept.put_back(table.detach().clone())
        made[key_of(name)] = rows_of(table, v).cpu().contiguous().clone()
    return v, made
