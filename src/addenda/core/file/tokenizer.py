"""What a tokenizer is, for files: a hash of what decides a token's number, and the pieces of a new token.

Any tokenizer of transformers will do, written in Rust or in Python, and a `tokenizers.Tokenizer`. No code of theirs is
imported here.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.file.identity import digest
from addenda.core.state.vocabulary import Vocabulary

_GAPS = 1 << 20  # numbers without a token, below the largest one
_HOW = ("lstrip", "rstrip", "normalized", "single_word")  # how an added token is found in a text


class Mark(NamedTuple):
    """What a file keeps of a tokenizer."""

    sha256: str
    entries: int


def inner(tokenizer: Any) -> Any:
    """Return the tokenizer of a processor, or what was given. Raises AddendaError where it is none."""
    found = getattr(tokenizer, "tokenizer", None) or tokenizer
    if not callable(getattr(found, "get_vocab", None)):
        raise AddendaError(
            f"Expected a tokenizer, such as AutoTokenizer.from_pretrained gives, got {type(found).__name__}."
        )
    return found


def mark(tokenizer: Any) -> Mark:
    """Return the SHA-256 of a tokenizer's tokens with their numbers, its merges, and how added tokens are found.

    It is the same after saving and loading, and for a tokenizer's fast and slow form where these hold the same.
    Raises AddendaError where a token's number is far above how many there are.
    """
    tokenizer = inner(tokenizer)
    tokens = tokenizer.get_vocab()
    largest = max(tokens.values(), default=0)
    if largest > len(tokens) + _GAPS:  # the library lists each number in between as it writes itself down
        raise AddendaError(
            f"This {type(tokenizer).__name__} has {len(tokens):,} tokens, and one of them the number {largest:,}. Its "
            "file is damaged: get it again."
        )
    held = {
        "tokens": sorted(([n, t] for t, n in tokens.items())),
        "merges": _merges(tokenizer),
        "added": [
            [n, getattr(t, "content", str(t)), *(bool(getattr(t, how, False)) for how in _HOW)]
            for n, t in sorted(_added(tokenizer).items())
        ],
    }
    text = json.dumps(held, ensure_ascii=True, separators=(",", ":"))
    return Mark(hashlib.sha256(text.encode()).hexdigest(), len(tokens))


def template_of(tokenizer: Any) -> str | None:
    """Return the SHA-256 of a tokenizer's chat template, or None."""
    template = getattr(inner(tokenizer), "chat_template", None)
    if not template:
        return None
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else digest(template)


def difference(tokenizer: Any, vocabulary: Vocabulary) -> str | None:
    """Return how a tokenizer differs from the one that a vocabulary was made with, or None."""
    tokenizer = inner(tokenizer)
    tokens, found = tokenizer.get_vocab(), mark(tokenizer)
    first = next(((t, n) for t, n in vocabulary.tokens.items() if tokens.get(t) != n), None)
    if vocabulary.tokenizer in (None, found.sha256) and first is None:
        return None
    there = "some" if vocabulary.entries is None else f"{vocabulary.entries:,}"
    sizes = f"it has {found.entries:,} tokens, and that of training {there}"
    if first is None:
        return (
            f"{sizes}; the new tokens are the same, and among the others, the merges or how added tokens are found in "
            "a text something differs"
        )
    text, number = first
    has = "there is none here" if text not in tokens else f"here it is {tokens[text]}"
    return f"{sizes}; the first that differs is {label(repr(text))}, which is number {number} there, and {has}"


def pieces(tokenizer: Any, text: str) -> list[int]:
    """Return the numbers of the tokens that a text is without added ones: what stood for a new token before."""
    backend = _backend(tokenizer)
    if backend is None:
        split = getattr(tokenizer, "_tokenize", None)
        return [n for t in (split(text) if split else ()) if (n := tokenizer.get_vocab().get(t)) is not None]
    normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
    words = [w for w, _ in backend.pre_tokenizer.pre_tokenize_str(normal)] if backend.pre_tokenizer else [normal]
    return [piece.id for word in words for piece in backend.model.tokenize(word)]


def _backend(tokenizer: Any) -> Any:
    """Return the `tokenizers.Tokenizer` inside, or None for one that is written in Python."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        return backend
    return tokenizer if hasattr(tokenizer, "pre_tokenizer") and hasattr(tokenizer, "model") else None


def _added(tokenizer: Any) -> Mapping[int, Any]:
    if hasattr(tokenizer, "added_tokens_decoder"):
        return tokenizer.added_tokens_decoder
    return tokenizer.get_added_tokens_decoder() if hasattr(tokenizer, "get_added_tokens_decoder") else {}


def _merges(tokenizer: Any) -> list[str]:
    """Return the pairs that are merged, in order, as text; empty for a tokenizer that merges none."""
    if (backend := _backend(tokenizer)) is not None:
        merges = json.loads(backend.to_str()).get("model", {}).get("merges") or []
    else:
        ranks = getattr(tokenizer, "bpe_ranks", None) or {}
        merges = sorted(ranks, key=ranks.__getitem__)
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
