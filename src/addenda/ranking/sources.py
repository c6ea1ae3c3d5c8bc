"""A collection by what a user calls it: a BEIR folder, or "debian:de" for Debian's descriptions in a language.

collection_of("debian:de", limit=600)       # English queries, German documents
collection_of("debian:en")                  # English both: what a task is learned on
texts_of("debian:de")                       # plain German text; or a file with a text a line, a table's column
"""

from collections.abc import Sequence
from pathlib import Path

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.data.examples import Text
from addenda.data.plain import read_texts
from addenda.ranking import beir, debian
from addenda.ranking.collection import SPLITS, Collection

DEBIAN = "debian:"
FEWEST = 50  # texts of a language, below which a word of warning is due


def collection_of(
    source: str | Path, *, limit: int | None = None, splits: Sequence[str] | None = None, judged: bool = True
) -> Collection:
    """Return the collection that a source names. limit: documents, of Debian's only. splits: those to read.

    Raises AddendaError as `beir.read` and `debian.collection` do, and for a limit of a folder.
    """
    language = _language(source)
    if language is None:
        if limit is not None:
            raise AddendaError(f"limit= is for Debian's descriptions; {source} is a folder, which is read whole.")
        return beir.read(source, splits=splits, judged=judged)
    return debian.collection(language, limit=limit, splits=SPLITS if splits is None else tuple(splits))


def texts_of(source: str | Path) -> list[str]:
    """Return plain texts of a language: of Debian's packages, of a BEIR folder's documents, or as `tune` reads them.

    Raises AddendaError for none, and as `data.plain.read_texts` does.
    """
    language = _language(source)
    if language is not None:
        return debian.texts(language)
    path = path_of(source, "data")
    if (path / "corpus.jsonl").is_file():
        return [d.whole for d in beir.read(path, judged=False).documents.values()]
    return [text.text.strip() for text in read_texts(path, "train", None).examples if isinstance(text, Text)]


def _language(source: str | Path) -> str | None:
    """Return the language of Debian's descriptions that a source names; None for a path."""
    if not str(source).startswith(DEBIAN) or Path(source).exists():
        return None
    language = str(source).removeprefix(DEBIAN)
    if not language:
        raise AddendaError(f"Which language of Debian's descriptions? Give debian:{debian.LANGUAGES[0]}, for example.")
    return language
