"""Rows out of a source: JSON Lines, JSON, CSV, Parquet, a folder of `datasets`, a data set or a list in memory."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from addenda.core.errors import AddendaError, nearest

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def rows_of(source: Any, split: str = "train") -> tuple[list, dict[str, list[str]], str]:
    """(rows, names of classes by column where the format carries them, a name for messages) of any source."""
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.exists():
            around = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise AddendaError(f"There is no data at {path}.{nearest(path.name, around)} Nothing is downloaded.")
        if path.is_dir():
            return _folder(path, split)
        return _file(path), {}, str(path)
    if hasattr(source, "features") and hasattr(source, "column_names"):  # a datasets.Dataset
        known = {c: list(f.names) for c, f in source.features.items() if hasattr(f, "names")}
        return source.to_list(), known, "the data set"
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise AddendaError(
            f"Expected a path, a datasets.Dataset or a list of dicts as data, got {type(source).__name__}."
        )
    return list(source), {}, "the data given"


def _file(path: Path) -> list:
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as f:
                return list(csv.DictReader(f))
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json" and content.lstrip().startswith("["):
            return json.loads(content)
        if path.suffix in (".jsonl", ".json"):
            return [_json(line, n, path) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    except (ValueError, OSError, csv.Error) as error:
        raise AddendaError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}.") from None
    raise AddendaError(f"{path} has the ending {path.suffix!r}; expected one of {', '.join(SUFFIXES)}, or a folder.")


def _json(line: str, number: int, path: Path):
    try:
        return json.loads(line)
    except ValueError as error:
        raise AddendaError(f"{path}, line {number} is not JSON: {error}.") from None


def _folder(path: Path, split: str) -> tuple[list, dict[str, list[str]], str]:
    files = {p.stem: p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES}
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        from datasets import DatasetDict, load_from_disk

        found = load_from_disk(str(path))
        if isinstance(found, DatasetDict):
            if split not in found:
                raise AddendaError(
                    f"{path} has no split {split!r}; it has {', '.join(map(str, found))}. Choose one with split=."
                )
            found = found[split]
        rows, known, _ = rows_of(found)
        return rows, known, f"{path}[{split}]"
    if split not in files:
        raise AddendaError(
            f"The folder {path} holds no {split}.jsonl, .json, .csv or .parquet and was not written by "
            f"datasets.save_to_disk. It holds: {', '.join(sorted(p.name for p in path.iterdir())[:12]) or 'nothing'}."
        )
    return _file(files[split]), {}, str(files[split])


def splits_of(source: Any) -> list[str]:
    """The parts of a folder, by name; nothing for any other source."""
    if not isinstance(source, str | Path) or not Path(source).is_dir():
        return []
    path = Path(source)
    if (path / "dataset_dict.json").is_file():
        return json.loads((path / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
    return [p.stem for p in sorted(path.iterdir()) if p.suffix in SUFFIXES]


def as_dict(row: Any, index: int, name: str) -> dict:
    if isinstance(row, Mapping):
        return dict(row)
    if hasattr(row, "question") and hasattr(row, "answer"):
        return {"question": row.question, "answer": row.answer}
    raise AddendaError(f"{name}, row {index}: expected an object with named columns, got {type(row).__name__}.")
