"""New tokens of a run: added to the tokenizer and the model, trained, and the tokenizer kept beside the adapter."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from addenda.core.adapter.grow import grow
from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, writing
from addenda.core.disk.whole import whole
from addenda.core.file.header import read
from addenda.core.file.tokenizer import difference, inner
from addenda.core.method.catalogue import build
from addenda.core.modules.wrappers import unwrap
from addenda.core.site.site import owners_of
from addenda.core.site.tables import tables_of
from addenda.core.state.vocabulary import Vocabulary
from addenda.models.pretrained import pretrained

FOLDER = "tokenizer"  # beside an adapter file: the tokenizer with its new tokens


def with_new_tokens(model: nn.Module, tokenizer: Any, tokens: Iterable[Any], method: Any, targets: Any) -> dict:
    """Add tokens to a tokenizer and its model; return {target: method} that trains their rows besides the method.

    Rows are trained by "trainable-tokens", in the embedding and in a head that is not tied to it; `also_train` of a
    whole table takes its place. Raises AddendaError as `grow` does.
    """
    grown = grow(model, tokenizer, tokens)
    if not grown.new_rows:
        raise AddendaError("add_tokens= names no token.")
    root = unwrap(model)
    owners, rows = owners_of(root), build(f"trainable-tokens:tokens={grown.new_rows}")
    tables = [p for p, t in tables_of(root).items() if isinstance(t, nn.Parameter) and t.dim() == 2]
    alone = {p: len(owners[id(root.get_parameter(p))]) == 1 for p in tables}  # else the tensor itself, for all owners
    if isinstance(method, Mapping):
        groups = dict(method)
    else:
        key = targets if targets is None or isinstance(targets, str) or callable(targets) else tuple(targets)
        groups = {key: method}
    return groups | {p.removesuffix(".weight") if alone[p] else p: rows for p in tables}


@contextmanager
def tokens_left_alone(tokenizer: Any) -> Iterator[None]:
    """Put a tokenizer back as it was where a `with` block ends with an error: no call of its own takes a token out."""
    own = None if tokenizer is None else inner(tokenizer)
    before = None if own is None else copy.deepcopy(vars(own))
    try:
        yield
    except BaseException:
        if own is not None and before is not None:
            vars(own).clear()
            vars(own).update(before)
        raise


def keep_tokenizer(folder: Path, adapter: Adapter, tokenizer: Any) -> None:
    """Save a tokenizer with new tokens into a run's folder, where it is not there yet.

    Raises AddendaError where another one is there.
    """
    vocabulary, place = adapter.vocabulary, folder / FOLDER
    if vocabulary is None or not callable(getattr(tokenizer, "save_pretrained", None)):
        return
    if place.exists():
        check_kept(place, vocabulary)
        return
    with whole(place, folder=True) as beside, writing(place):
        tokenizer.save_pretrained(beside)


def check_kept(place: Path, vocabulary: Vocabulary) -> None:
    """Raise AddendaError where a folder holds another tokenizer than that of a vocabulary, or none."""
    try:
        told = difference(_read(place), vocabulary)
    except AddendaError:
        raise
    except Exception:  # of whatever class: transformers reads what others wrote
        told = "it cannot be read"
    if told:
        raise AddendaError(
            f"{place} is not the tokenizer with the new tokens of this run: {told}. Move it, or choose another folder "
            "(--out)."
        )


def tokenizer_beside(adapter: str | Path) -> Any:
    """Return the tokenizer that a run has kept beside its adapter file, or None where its vocabulary has not grown."""
    place = path_of(adapter).with_name(FOLDER)
    if not place.is_dir() or read(adapter)[0].vocabulary is None:  # in this order: most adapters have no such folder
        return None
    return _read(place)


def _read(place: Path) -> Any:
    return pretrained("AutoTokenizer", place)
