"""Collections in many languages of Debian's package descriptions: a short one is the query, a long one its document.

    query      the English short description (or the language's own)
    document   the other language's long description
    answer     the description of the same package; of each source package, and of each first paragraph, one is taken

Names of the package and its source, and the words in them, are blotted out of both, whole words in any case: they
stand in both, and finding them is no reading. Words that query and document share otherwise stay. Without them lexical
match would speak *against* relevance, and BM25 find the answer last every time.

Everything is decided by hashes of the source package's name: which split it is in, the same in every language, so that
what was learned in one is not judged in another, and which documents a smaller pool holds. So a collection is the same
on every machine that has the same lists, and `Collection.digest()` tells whether it is.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from addenda.core.base.errors import AddendaError
from addenda.ranking.apt import fetch
from addenda.ranking.collection import SPLITS, Collection, Document
from addenda.ranking.descriptions import Description, Package, packages, translations
from addenda.ranking.near import near

LANGUAGES = ("de", "fr", "it", "ja", "da", "fi")  # of the record; fi is the smallest usable
TEST, DEV = 40, 10  # of 100 source packages; the rest is for training
WORDS, CHARACTERS = 3, 40  # of a query, and of a document, at least: less is no description
FEWEST = 50  # documents of a collection
_EMPTY = re.compile(r"transitional|dummy package|meta-?package|virtual package", re.IGNORECASE)
_PARTS = re.compile(r"[^\W\d_]{3,}")
_LETTER = re.compile(r"[^\W\d_]")


def collection(
    language: str,
    *,
    query_language: str = "en",
    limit: int | None = None,
    splits: tuple[str, ...] = SPLITS,
    folder: Path | None = None,
) -> Collection:
    """Return the documents of a language, queries in English or in the same language, and judgements by split.

    limit: documents, the first by hash; queries are theirs. splits: whose documents and queries are taken. folder: of
    lists; None: fetched where they lack (`apt.fetch`).
    Raises AddendaError where they cannot be fetched, and for a language with fewer than `FEWEST` usable documents.
    """
    if query_language not in ("en", language):
        raise AddendaError(f"query_language is 'en' or the documents' own ({language!r}), got {query_language!r}.")
    if unknown := [s for s in splits if s not in SPLITS]:
        raise AddendaError(f"Splits are {', '.join(SPLITS)}, got {unknown[0]!r}.")
    if limit is not None and limit < FEWEST:
        raise AddendaError(f"limit is how many documents are kept, {FEWEST} or more, got {limit}.")
    folder = folder or fetch([language])
    name = f"debian-{query_language}-{language}"
    found = [item for item in usable(folder, language, query_language) if split_of(item[0].source) in splits]
    found = sorted(found, key=lambda item: _hash("pool", item[0].source))[:limit]
    if len(found) < FEWEST:
        raise AddendaError(
            f"{name} has {len(found)} usable documents, and {FEWEST} are the fewest to order. Choose a language with "
            f"more, such as {', '.join(LANGUAGES)}."
        )
    queries = {package.name: query for package, query, _ in found}
    documents = {package.name: Document(text) for package, _, text in found}
    qrels: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS if split in splits}
    for package, _, _ in found:
        qrels[split_of(package.source)][package.name] = {package.name: 1}
    return Collection(
        name,
        queries,
        documents,
        {split: of for split, of in qrels.items() if of},
        language=language,
        query_language=query_language,
        near=near({name: document.text for name, document in documents.items()}),
        sections={package.name: package.section for package, _, _ in found if package.section},
    )


def texts(language: str, *, splits: tuple[str, ...] = ("train",), folder: Path | None = None) -> list[str]:
    """Return the descriptions of a language as plain text, each once, for masked language modelling.

    Those of source packages of other splits are left out: their documents are what is judged.
    Raises AddendaError as `collection` does, but for how many there are.
    """
    folder = folder or fetch([language])
    described = translations(folder, language)
    known = sorted(packages(folder).values(), key=lambda p: p.name)
    apart = {p.md5 for p in known if split_of(p.source) not in splits}  # one text may be several packages'
    found = [described[p.md5] for p in known if p.md5 in described and p.md5 not in apart]
    return list(dict.fromkeys("\n\n".join((d.short, *d.long)) for d in found if d.long))


def split_of(source: str) -> str:
    """Return the split of a source package: its place among 100 by hash."""
    place = _hash("split", source) % 100
    return "test" if place < TEST else "dev" if place < TEST + DEV else "train"


def blotted(text: str, *names: str) -> str:
    """Return a text without these names and their parts of three letters or more: whole words, in any case.

    Of libfoo-bar1 those are libfoo, foo and bar, as texts call what is in it.
    """
    parts = {part for name in names for part in _PARTS.findall(name)}
    parts |= {part[3:] for part in parts if part.startswith("lib") and len(part) > 5}
    for name in sorted({*names, *parts}, key=lambda n: (-len(n), n)):
        if name.lower() in text.lower():  # an expression is made for few only
            text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", " ", text, flags=re.IGNORECASE)
    return re.sub(r" +([,;:!?)])", r"\1", " ".join(text.split()))


def usable(folder: Path, language: str, query_language: str) -> Iterator[tuple[Package, str, str]]:
    """Yield (package, query, document): one of each source, first paragraph and query."""
    english, described = translations(folder, "en"), translations(folder, language)
    asked = english if query_language == "en" else described
    seen: set[tuple[str, str]] = set()
    for package in sorted(packages(folder).values(), key=lambda p: (p.name != p.source, p.name)):
        here = described.get(package.md5)
        if here is None or package.md5 not in english or _EMPTY.search(english[package.md5].short):
            continue
        names = (package.name, package.source)
        query, document = blotted(asked[package.md5].short, *names), blotted(_long(here), *names)
        keys = {("source", package.source), ("paragraph", here.long[0] if here.long else ""), ("query", query.lower())}
        if keys & seen or not _says_enough(query, document, query_language):
            continue
        seen |= keys
        yield package, query, document


def _long(description: Description) -> str:
    return " ".join(description.long)


def _says_enough(query: str, document: str, language: str) -> bool:
    words = len(query.split()) >= WORDS or (language in ("ja", "zh_CN", "zh_TW", "km") and len(query) >= 2 * WORDS)
    return words and len(document) >= CHARACTERS and _LETTER.search(document) is not None


def _hash(what: str, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{what}:{name}".encode()).digest()[:8], "big")
