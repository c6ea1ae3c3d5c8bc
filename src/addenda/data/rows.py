"""Rows out of a source: JSON Lines, JSON, CSV, Parquet, a folder of `datasets`, a data set or rows in memory.

Nothing is guessed: a row of a CSV file with another number of fields than the header has, a column or a key that is
there twice, and a file that is cut are refused, with the line.
"""

import csv
import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError, nearest
from addenda.data.unpacked import check_saved, parquet_table

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_FIELDS = threading.Lock()  # csv's limit is one for the process


class Rows(list):
    """Rows, and where each stands. known: names of classes by column, where the format carries them; name: the source.

    lines: the line of each in its file, where it has lines.
    """

    def __init__(self, rows: Iterable, name: str, known: dict[str, list[str]] | None = None, lines=()):
        super().__init__(rows)
        self.name, self.known, self.lines = name, known or {}, tuple(lines)

    def place(self, i: int) -> str:
        """Return where row i is, for messages."""
        return f"line {self.lines[i]}" if self.lines else f"row {i}"


def rows_of(source: Any, split: str = "train") -> Rows:
    """Return the rows of any source; of one with splits those of `split`.

    Raises AddendaError for a source that is missing, damaged or of no known form.
    """
    if isinstance(source, str | Path):
        try:
            return _at(Path(source).expanduser(), split)
        except (OSError, RuntimeError) as error:  # a name that is too long, a folder that may not be read, ~nobody
            raise AddendaError(f"{source} cannot be read: {error}.") from None
    if isinstance(source, Mapping):
        return _mapping(source, split)
    if hasattr(source, "features") and hasattr(source, "column_names"):  # of datasets, in memory or as a stream
        class_names = {c: list(f.names) for c, f in (source.features or {}).items() if hasattr(f, "names")}
        return Rows(source.to_list() if hasattr(source, "to_list") else source, "the data set", class_names)
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a frame of pandas, or of polars
        columns = list(map(str, source.columns))
        _once(columns, "the frame", "column")
        rows = source.to_dicts() if hasattr(source, "to_dicts") else source.to_dict("records")
        return Rows(({str(k): None if _missing(v) else v for k, v in row.items()} for row in rows), "the frame")
    if isinstance(source, bytes | bytearray) or not isinstance(source, Iterable):
        hint = " Call it, and give what it returns." if callable(source) else ""
        raise AddendaError(
            "Expected a path, a datasets.Dataset, a list of dicts, a dict of columns or a frame as data, got "
            f"{type(source).__name__}.{hint}"
        )
    return Rows(source, "the data given")


def _at(path: Path, split: str) -> Rows:
    if not path.exists():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise AddendaError(f"There is no data at {path}.{nearest(path.name, names)} Nothing is downloaded.")
    return _folder(path, split) if path.is_dir() else _file(path)


def _mapping(source: Mapping, split: str) -> Rows:
    """Return the rows of a dict of splits, or of columns."""
    parts = {k: v for k, v in source.items() if hasattr(v, "column_names") or _holds_rows(v)}
    if source and len(parts) == len(source):
        if split not in source:
            raise AddendaError(f"The data has no split {split!r}; it has {', '.join(map(str, source))}.")
        rows = rows_of(source[split])
        return Rows(rows, f"the data given[{split}]", rows.known, rows.lines)
    if unnamed := [k for k in source if not isinstance(k, str)]:
        raise AddendaError(f"A dict as data is taken by columns, whose names are texts; got the key {unnamed[0]!r}.")
    columns = {str(k): list(v) for k, v in source.items() if isinstance(v, Sequence) and not isinstance(v, str | bytes)}
    columns |= {str(k): v.tolist() for k, v in source.items() if hasattr(v, "tolist") and getattr(v, "ndim", 0) == 1}
    other_keys = [str(k) for k in source if str(k) not in columns]
    if other_keys or len({len(v) for v in columns.values()}) > 1:
        sizes = ", ".join(f"{k!r} {len(v)}" for k, v in columns.items())
        raise AddendaError(
            "A dict as data is taken by columns, each a list with one entry for every row, or by splits; "
            + (
                f"{other_keys[0]!r} holds {type(source[other_keys[0]]).__name__}"
                if other_keys
                else f"the columns' lengths are {sizes}"
            )
            + ". One row alone is given as a list: [row]."
        )
    return Rows((dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)), "the data given")


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value[:8])


def _missing(value: Any) -> bool:
    return (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in ("NAType", "NaTType")


def _once(names: Sequence[str], where: str, what: str) -> None:
    """Raise AddendaError for a name that is there twice: one of the two would be lost."""
    duplicates = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if duplicates:
        raise AddendaError(f"{where} has the {what} {duplicates[0]!r} twice, and only one can be read. Rename one.")


def _file(path: Path) -> Rows:
    if not path.is_file() and path.suffix.lower() in SUFFIXES:  # a pipe would be waited for, and is read once only
        raise AddendaError(f"{path} is a folder, a device or a pipe, and rows are read from a file. Name a file.")
    kind = path.suffix.lower()
    try:
        if kind == ".csv":
            return _csv(path)
        if kind == ".parquet":
            table = parquet_table(path)
            _once(table.column_names, str(path), "column")
            return Rows(table.to_pylist(), str(path))
        if kind in (".jsonl", ".json"):
            return _json(path, path.read_text(encoding="utf-8-sig"))
    except AddendaError:
        raise
    except RecursionError:
        raise AddendaError(f"{path} cannot be read as {kind[1:].upper()}: it is nested too deeply.") from None
    except UnicodeDecodeError:
        raise AddendaError(_not_utf8(path)) from None
    except Exception as error:  # pyarrow has errors of its own for what is damaged
        message = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise AddendaError(
            f"{path} cannot be read as {kind[1:].upper()}: {message}. Mend the file, or get it again."
        ) from None
    packed = " Unpack it first." if kind in PACKED else ""
    raise AddendaError(
        f"{path} has the ending {path.suffix!r}; expected one of {', '.join(SUFFIXES)}, or a folder.{packed}"
    )


def _not_utf8(path: Path) -> str:
    """Return what is said of a file that is not UTF-8: in which line, and what to do."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return f"{path} is in UTF-16, and rows are read in UTF-8. Save the file again in UTF-8."
    begin = 0
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:  # that of a stream tells the place in its buffer
        begin = error.start
    line = data.count(b"\n", 0, begin) + 1
    return f"{path}, line {line} is not UTF-8 (byte {data[begin : begin + 1].hex()}). Save the file again in UTF-8."


def _csv(path: Path) -> Rows:
    """Return rows with as many fields as the header has; blank lines are left out."""
    with _FIELDS, path.open(newline="", encoding="utf-8-sig") as f:
        limit = csv.field_size_limit(max(path.stat().st_size, 1 << 17))
        try:
            read = csv.reader(f, strict=True)
            header: list[str] = []
            rows, lines, notes = [], [], []
            start = 1
            for fields in read:
                line, start = start, read.line_num + 1
                if not fields:
                    continue
                if not header:
                    header = fields
                    _once(header, f"{path}, line {line}", "column")
                    continue
                if len(fields) != len(header):
                    notes.append(f"line {line} has {len(fields)}")
                rows.append(dict(zip(header, fields, strict=False)))
                lines.append(line)
        except csv.Error as error:
            raise ValueError(f"line {read.line_num}: {error}") from None
        finally:
            csv.field_size_limit(limit)
    if notes:
        raise AddendaError(
            f"{path} has {len(header)} columns ({', '.join(map(repr, header[:8]))}), but {'; '.join(notes[:5])}"
            f"{f'; … and {len(notes) - 5} more' if len(notes) > 5 else ''}. A comma inside a field wants quotes around "
            'the field: "like, this".'
        )
    return Rows(rows, str(path), lines=lines)


def _json(path: Path, content: str) -> Rows:
    if path.suffix.lower() == ".json" and content.lstrip().startswith("["):
        return Rows(_parsed(content, str(path), "Mend the file"), str(path))
    rows, lines = [], []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            rows.append(_parsed(line, f"{path}, line {number}"))
            lines.append(number)
    return Rows(rows, str(path), lines=lines)


def _parsed(text: str, where: str, way: str = "One object stands on each line: mend this one, or remove it") -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict:
        _once([k for k, _ in pairs], where, "key")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise AddendaError(f"{where} is not JSON: {error.msg}, at {at}. {way}.") from None
    except ValueError as error:
        raise AddendaError(f"{where} is not JSON: {error}.") from None
    except RecursionError:
        raise AddendaError(f"{where} is not JSON that can be read: it is nested too deeply.") from None


def _folder(path: Path, split: str) -> Rows:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _saved(path, split)
    files = [p for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES and p.stem == split]
    if len(files) > 1:
        raise AddendaError(f"{path} holds {' and '.join(p.name for p in files)}; name the one that is meant.")
    if not files:
        raise AddendaError(
            f"The folder {path} holds no {split}.jsonl, .json, .csv or .parquet and was not written by "
            f"datasets.save_to_disk. It holds: {', '.join(sorted(p.name for p in path.iterdir())[:12]) or 'nothing'}."
        )
    return _file(files[0])


def _saved(path: Path, split: str) -> Rows:
    """Read what datasets.save_to_disk wrote."""
    from datasets import DatasetDict, load_from_disk

    check_saved(path)
    try:
        dataset = load_from_disk(str(path))
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise AddendaError(
                    f"{path} has no split {split!r}; it has {', '.join(map(str, dataset))}. Choose one with split=."
                )
            dataset = dataset[split]
        rows = rows_of(dataset)
    except AddendaError:
        raise
    except Exception as error:  # whatever datasets and pyarrow say of a file that is cut
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AddendaError(
            f"{path} was written by datasets.save_to_disk and cannot be read: {type(error).__name__}: {message[:300]} "
            "Write it again."
        ) from None
    return Rows(rows, f"{path}[{split}]", rows.known)


def splits_of(source: Any) -> list[str]:
    """Return the parts of a folder or of a dict of splits, by name; nothing for any other source."""
    if isinstance(source, Mapping):
        parts = [str(k) for k, v in source.items() if hasattr(v, "column_names") or _holds_rows(v)]
        return parts if len(parts) == len(source) else []
    if not isinstance(source, str | Path) or not Path(source).expanduser().is_dir():
        return []
    path = Path(source).expanduser()
    note = path / "dataset_dict.json"
    if note.is_file():
        try:
            return [str(s) for s in json.loads(note.read_text(encoding="utf-8"))["splits"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise AddendaError(
                f"{note} does not say which splits there are: {error}. Write the folder again."
            ) from None
    return [p.stem for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES]


def named_rows(rows: Rows) -> Rows:
    """Return the rows as dicts. Raises AddendaError for one without names for its values."""
    return Rows(
        (as_dict(row, rows.place(i), rows.name) for i, row in enumerate(rows)), rows.name, rows.known, rows.lines
    )


def as_dict(row: Any, place: str, name: str) -> dict:
    """Return a row as a dict of columns. Raises AddendaError, naming its place, for what has no columns."""
    if isinstance(row, Mapping):
        return dict(row)
    if hasattr(row, "question") and hasattr(row, "answer"):
        return {"question": row.question, "answer": row.answer}
    raise AddendaError(f"{name}, {place}: expected an object with named columns, got {type(row).__name__}.")
