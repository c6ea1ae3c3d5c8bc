"""A vocabulary that has grown: tables of a model with rows behind those of the base, put on and taken off.

A table is a tensor with an entry for every token: the embedding, the output head where it is not tied to it, a head's
bias. Rows are put on by a new parameter in the place of the old one, at all modules that hold it, so that ties stay.
The old parameter is kept, without memory of its own, and comes back with the bits that the base's rows have then.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.sharded import whole

_KEY = "_addenda_vocabulary"
_SIZES = ("num_embeddings", "out_features")  # what embeddings and linear layers say of their rows


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is new in a vocabulary: where it begins, in which tables, for which tokens of which tokenizer."""

    base_rows: int  # of the base's tables
    rows: int  # behind them
    tables: tuple[str, ...]  # the names of the tensors with new rows
    tokens: Mapping[str, int]  # the new tokens and their numbers, rising
    tokenizer: str | None = None  # the SHA-256 of the tokenizer with them, see `core.file.tokenizer`
    entries: int | None = None  # how many tokens that one has

    @property
    def all_rows(self) -> int:
        """How many rows the tables have with the new ones."""
        return self.base_rows + self.rows

    @property
    def new_rows(self) -> str:
        """The rows of the new tokens as text, stretches joined by "+", as in "5+7+100-120"; all new ones without them.

        Empty where nothing is new.
        """
        stretches: list[list[int]] = []
        for n in sorted(self.tokens.values()) or range(self.base_rows, self.all_rows):
            if stretches and stretches[-1][1] == n - 1:
                stretches[-1][1] = n
            else:
                stretches.append([n, n])
        return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in stretches)

    def __str__(self) -> str:
        behind = f"{self.rows:,} rows behind the base's {self.base_rows:,} in {', '.join(self.tables)}"
        return f"{len(self.tokens):,} new tokens, {behind if self.rows else 'and no new row'}"


@dataclass(frozen=True)
class Grown:
    """What a model remembers of its new rows."""

    vocabulary: Vocabulary
    before: int  # how many rows the tables had when it was first told of new ones
    former: dict[str, Tensor] = field(default_factory=dict)  # by table, the tensor that stood there then
    loaded: bool = False  # whether they came with an adapter's file, and go with the last adapter that has them


def grown_of(root: nn.Module) -> Grown | None:
    """Return what the model remembers of its new rows, or None where it was told of none."""
    return root.__dict__.get(_KEY)


def remember(root: nn.Module, grown: Grown) -> None:
    """Let the model remember that it has new rows, which are there already."""
    root.__dict__[_KEY] = grown


def table_at(root: nn.Module, path: str) -> Tensor | None:
    """Return the parameter or buffer of this name, or None."""
    owner, _, leaf = path.rpartition(".")
    try:
        module = root.get_submodule(owner)
    except AttributeError:
        return None
    return module._parameters.get(leaf, module._buffers.get(leaf))


def axis_of(table: Tensor, rows: int) -> int | None:
    """Return the dimension that counts the tokens: the first of this size. None where there is none."""
    return next((i for i, n in enumerate(table.shape) if n == rows), None)


def rows_of(table: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return the new rows of a table that has them, detached. Of a sharded one every process must call it."""
    axis = axis_of(table, vocabulary.all_rows)
    assert axis is not None
    return whole(table).narrow(axis, vocabulary.base_rows, vocabulary.rows)


def put_on(root: nn.Module, vocabulary: Vocabulary, tables: Mapping[str, Tensor], before: int, loaded: bool) -> None:
    """Put tables in the place of those of these names, and remember what they are.

    before: how many rows those have. Call it inside of `core.state.undo.undone`, which takes care of errors, and
    `lighten` when nothing can fail any more.
    """
    grown = grown_of(root) or Grown(vocabulary, before, {}, loaded)
    former = dict(grown.former)
    for path, table in tables.items():
        old = table_at(root, path)
        assert old is not None
        former.setdefault(path, old)
        _exchange(root, old, nn.Parameter(table, old.requires_grad) if isinstance(old, nn.Parameter) else table)
    remember(root, replace(grown, vocabulary=vocabulary, former=former))
    _count(root, before, vocabulary.all_rows)


def lighten(root: nn.Module) -> None:
    """Let the tensors that stood there before share the memory of those that stand there now, where they can."""
    if (grown := grown_of(root)) is None or grown.before != grown.vocabulary.base_rows:
        return
    for path, old in grown.former.items():
        now = table_at(root, path)
        if now is not None and axis_of(old, grown.before) == 0 and not (old.is_inference() or now.is_inference()):
            old.data = now.data.narrow(0, 0, grown.before)


@torch.no_grad()
def take_off(root: nn.Module) -> None:
    """Put the tensors back that stood there before, with the bits that the base's rows have now."""
    if (grown := grown_of(root)) is None:
        return
    base, all_rows = grown.vocabulary.base_rows, grown.vocabulary.all_rows
    for path, old in grown.former.items():
        now = table_at(root, path)
        if now is None or (axis := axis_of(now, all_rows)) is None:  # replaced since
            continue
        own, more = now.detach().narrow(axis, 0, base), old.detach().narrow(axis, base, grown.before - base)
        values = torch.cat([own, more.to(own)], axis)
        put = nn.Parameter(values, now.requires_grad) if isinstance(now, nn.Parameter) else values
        if (old.dtype, old.device, old.is_inference()) == (put.dtype, put.device, put.is_inference()):
            old.data, old.grad = values, None
            put = old.requires_grad_(now.requires_grad) if isinstance(now, nn.Parameter) else old
        _exchange(root, now, put)
    _count(root, all_rows, grown.before)
    del root.__dict__[_KEY]


def keep_rows(root: nn.Module) -> None:
    """Let new rows that came with a file stay where the adapters go."""
    if (grown := grown_of(root)) is not None:
        remember(root, replace(grown, loaded=False))


def _exchange(root: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put a tensor in the place of another at all modules that hold it, and let them say how many rows there are."""
    for module in root.modules():
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for name in [n for n, tensor in held.items() if tensor is old]:
                held[name] = new
                for size in _SIZES if name == "weight" else ():
                    if vars(module).get(size) == old.shape[0]:
                        setattr(module, size, new.shape[0])


def _count(root: nn.Module, before: int, now: int) -> None:
    """Let modules and configurations that say how large the vocabulary is say it anew."""
    for thing in counting(root):
        if thing.vocab_size == before:
            thing.vocab_size = now


def text_config(config: Any) -> Any:
    """Return the part of a configuration that is of text, or all of it where it has no such part, or several."""
    ask = getattr(config, "get_text_config", None)
    try:
        return ask() if callable(ask) else config
    except ValueError:  # transformers', where there are several
        return config


def counting(root: nn.Module) -> Iterator[Any]:
    """Yield the modules and the configurations, each once, that say how large the vocabulary is."""
    seen: set[int] = set()
    for module in root.modules():
        config = vars(module).get("config")
        said = [module] if "vocab_size" in vars(module) else []
        said += [c for c in (config, text_config(config)) if hasattr(c, "vocab_size")]
        for thing in said:
            if id(thing) not in seen:
                seen.add(id(thing))
                yield thing
