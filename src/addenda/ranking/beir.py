"""BEIR folders, read and written: corpus.jsonl, queries.jsonl and qrels/{train,dev,test}.tsv.

    corpus.jsonl      {"_id": "d1", "title": "…", "text": "…"} a line; the title may be missing
    queries.jsonl     {"_id": "q1", "text": "…"}
    qrels/test.tsv    a header, then query, document and grade, with tabs between; above 0 is an answer
    collection.json   written by addenda only: languages, near duplicates, sections, which the format has no place for

Whatever a file holds is refused by file and line before a collection is made of it (Thakur et al. 2021,
arXiv 2104.08663, for the format).
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.disk.access import parse_json, path_of, read_json, reading, shown
from addenda.core.disk.atomic import readable
from addenda.core.disk.whole import free_place, whole
from addenda.ranking.collection import SPLITS, Collection, Document, Qrels
from addenda.ranking.lines import Faults, numbered, quoted

HEADER = ("query-id", "corpus-id", "score")
FORMAT = "addenda collection 1"  # of collection.json
GRADES = 1 << 20  # none is larger
_GRADE = re.compile(r"[+-]?\d{1,8}(\.0+)?")


def read(folder: str | Path, *, splits: Iterable[str] | None = None, judged: bool = True) -> Collection:
    """Return the collection in a BEIR folder. splits: those to read; None: all that are there.

    judged: whether one with judgements is wanted; without, qrels/ need not be there.
    Raises AddendaError, by file and line, for anything missing, damaged, empty, there twice, or judged and not there.
    """
    folder = path_of(folder, "folder")
    with reading(folder):
        if not folder.is_dir():
            near = nearest(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
            raise AddendaError(
                f"There is no folder {shown(folder)}.{near} A BEIR folder holds corpus.jsonl, queries.jsonl and "
                "qrels/test.tsv."
            )
        files = {p.stem: p for p in sorted((folder / "qrels").glob("*.tsv"))} if (folder / "qrels").is_dir() else {}
    wanted = [s for s in (*SPLITS, *files) if s in files] if splits is None else list(splits)
    wanted = list(dict.fromkeys(wanted))
    missing = [f"qrels/{s}.tsv" for s in wanted if s not in files] + ["qrels/test.tsv"] * (judged and not wanted)
    missing += [name for name in ("corpus.jsonl", "queries.jsonl") if not (folder / name).is_file()]
    if missing:
        there = ", ".join(f"qrels/{s}.tsv" for s in files) or "none"
        raise AddendaError(
            f"{shown(folder)} lacks {' and '.join(missing)} (judgements there: {there}). A BEIR folder holds "
            "corpus.jsonl, queries.jsonl and qrels/test.tsv."
        )
    documents = _objects(folder / "corpus.jsonl", _document)
    queries = _objects(folder / "queries.jsonl", _query)
    qrels = {s: read_qrels(files[s], queries, documents) for s in wanted}
    collection = Collection(folder.absolute().name, queries, documents, qrels, **_more(folder / "collection.json"))
    collection.check()
    return collection


def write(collection: Collection, folder: str | Path) -> Path:
    """Write a BEIR folder, whole or not at all, where nothing is yet; return its path. Raises AddendaError."""
    collection.check()
    out = free_place(folder, "folder")
    faults = [i for i in (*collection.queries, *collection.documents) if not _is_id(i)]
    faults += [s for s in collection.qrels if not re.fullmatch(r"\w[\w.-]{0,99}", s)]
    if faults:
        raise AddendaError(
            f"{collection.name} cannot be written in BEIR's format: ids and splits are words without tabs, line ends "
            f"and spaces around, and {quoted(faults[0])} is none. Give it another id."
        )
    check_grades(*collection.qrels.values())
    with whole(out, folder=True) as place:
        rows = ({"_id": i, "title": d.title, "text": d.text} for i, d in collection.documents.items())
        _lines(place / "corpus.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows))
        rows = ({"_id": i, "text": text} for i, text in collection.queries.items())
        _lines(place / "queries.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows))
        (place / "qrels").mkdir()
        for split, qrels in collection.qrels.items():
            rows = (f"{q}\t{d}\t{grade}" for q, graded in qrels.items() for d, grade in graded.items())
            _lines(place / "qrels" / f"{split}.tsv", ("\t".join(HEADER), *rows))
        more = {"format": FORMAT, "name": collection.name, "language": collection.language,
                "query_language": collection.query_language, "near": {d: sorted(n) for d, n in collection.near.items()},
                "sections": dict(collection.sections)}  # fmt: skip
        (place / "collection.json").write_text(readable(more) + "\n", encoding="utf-8")
    return out


def read_qrels(path: Path, queries: Iterable[str], documents: Iterable[str]) -> Qrels:
    """Return the judgements of one file of tab-separated columns under a header. Raises AddendaError, by line."""
    queries, documents, faults = set(queries), set(documents), Faults(path)
    qrels: dict[str, dict[str, int]] = {}
    first, headed = {}, False
    for number, line in numbered(path):
        columns = line.split("\t")
        if not headed:
            headed = True
            if tuple(c.strip() for c in columns) != HEADER:
                raise AddendaError(
                    f"{shown(path)}, line {number}: expected the header {' '.join(HEADER)}, with tabs between, got "
                    f"{quoted(line)}. Write it as the first line; judgements of TREC's format are read by "
                    "ranking.trec.read_qrels."
                )
            continue
        if len(columns) != 3:
            faults.add(number, f"{len(columns)} columns, 3 with tabs between were expected")
            continue
        query, document, grade = (c.strip() for c in columns)
        first.setdefault(query, number)
        add_judgement(qrels, query, document, grade, number, faults)
        if query not in queries:
            faults.add(number, f"query {quoted(query)} is not in queries.jsonl")
        if document not in documents:
            faults.add(number, f"document {quoted(document)} is not in corpus.jsonl")
    check_answers(qrels, first, faults)
    faults.check("Mend or remove these lines.")
    if not qrels:
        raise AddendaError(f"{shown(path)} holds no judgement. Remove the file, or write query, document and grade.")
    return qrels


def check_grades(*splits: Qrels) -> None:
    """Raise AddendaError for a grade that could be written and not be read."""
    for query, graded in ((q, of) for qrels in splits for q, of in qrels.items()):
        for document, grade in graded.items():
            if not float(grade).is_integer() or abs(grade) > GRADES:
                raise AddendaError(
                    f"Document {quoted(document)} is graded {grade!r} for query {quoted(query)}, and a grade is a "
                    f"whole number from −{GRADES} to {GRADES}. Give it another grade."
                )


def add_judgement(
    qrels: dict[str, dict[str, int]], query: str, document: str, grade: str, number: int, faults: Faults
) -> None:
    """Add one judgement read from a line; a grade that is no whole number, and a second one, are faults."""
    value = int(float(grade)) if _GRADE.fullmatch(grade) else None
    if value is None or abs(value) > GRADES:
        faults.add(number, f"the grade {quoted(grade)} is not a whole number from −{GRADES} to {GRADES}")
        value = 1
    graded = qrels.setdefault(query, {})
    if document in graded:
        faults.add(number, f"document {quoted(document)} is judged twice for query {quoted(query)}")
    graded[document] = value


def check_answers(qrels: Qrels, first: Mapping[str, int], faults: Faults) -> None:
    """Add a fault for each query that no document answers. first: the line at which each query comes first."""
    for query, graded in qrels.items():
        if not any(grade > 0 for grade in graded.values()):
            faults.add(first[query], f"query {quoted(query)} has no answer: no document is graded above 0")


def _objects(path: Path, make: Callable[[dict], Any]) -> dict[str, Any]:
    """Return {_id: make(object)} of a file with one JSON object a line, at least one."""
    found: dict[str, Any] = {}
    places: dict[str, int] = {}
    faults = Faults(path)
    for number, line in numbered(path):
        try:
            row = parse_json(line)
            key, value = _id(row), make(row)
        except RecursionError:
            faults.add(number, "it is nested too deeply")
        except ValueError as error:
            faults.add(number, str(error))
        else:
            if key in found:
                faults.add(number, f"the _id {quoted(key)} stands in line {places[key]} already")
            found[key], places[key] = value, number
    faults.check("Mend or remove these lines, and what is judged of them in qrels/.")
    if not found:
        raise AddendaError(f"{shown(path)} is empty. Write one JSON object a line, each with an _id and a text.")
    return found


def _id(row: Any) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"an object with _id and text was expected, got {type(row).__name__}")
    key = row.get("_id")
    if not isinstance(key, str) or not _is_id(key):
        raise ValueError(f"_id is {quoted(str(key))}; a text in quotes, without tabs and spaces around, was expected")
    return key


def _is_id(key: str) -> bool:
    return bool(key) and not re.search(r"[\t\r\n]", key) and key == key.strip()


def _text(row: dict, name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name} is {quoted(str(value))}, a text was expected")
    return value


def _document(row: dict) -> Document:
    document = Document(_text(row, "text"), _text(row, "title"))
    if not document.whole:
        raise ValueError(f"document {quoted(row['_id'])} is empty")
    return document


def _query(row: dict) -> str:
    if not _text(row, "text").strip():
        raise ValueError(f"query {quoted(row['_id'])} is empty")
    return row["text"]


def _more(path: Path) -> dict[str, Any]:
    """Return what collection.json says, nothing where it is not there or another program's."""
    if not path.is_file():
        return {}
    found = read_json(path, foreign=True)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return {}
    languages = {k: found.get(k) for k in ("language", "query_language")}
    near, sections = found.get("near", {}), found.get("sections", {})
    sound = all(v is None or isinstance(v, str) for v in languages.values()) and isinstance(near, dict)
    sound = sound and all(isinstance(n, list) and all(isinstance(d, str) for d in n) for n in near.values())
    if not sound or not isinstance(sections, dict) or not all(isinstance(s, str) for s in sections.values()):
        raise AddendaError(f"{shown(path)} is not as addenda writes it. Remove it, or write the folder again.")
    return {**languages, "near": {d: frozenset(n) for d, n in near.items()}, "sections": sections}


def _lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
