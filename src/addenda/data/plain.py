"""Plain texts, of which a masked LM learns a language: lines of a text file, a column of rows, or a list of texts.

read_texts("de.txt", "train", None)            one text a line; blank lines are left out
read_texts("de.jsonl", "train", None)          the column text (or content, sentence, passage, description)
read_texts(["Ein Satz.", "Noch einer."], …)
"""

from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.data.columns import collect, first_of, present, text_of
from addenda.data.examples import Data, Text
from addenda.data.rows import Rows, named_rows, rows_of

COLUMNS = ("text", "content", "sentence", "passage", "description")


def read_texts(source: Any, split: str, column: str | None) -> Data:
    """Return the texts of a source. split: the part of a source that has several. column: where it is no usual one.

    Raises AddendaError for a source that is missing, not in UTF-8 or without a text, and for rows without one, by line.
    """
    rows = named_rows(_rows(source, split))
    if not rows:
        raise AddendaError(f"{rows.name} holds no text; at least one is needed.")
    columns = list(dict.fromkeys(str(c) for row in rows for c in row))
    name = present(columns, rows.name, text=column or first_of(columns, COLUMNS))["text"]
    texts = collect(rows, lambda row: Text(text_of(row.get(name), f"column {name!r}")))
    return Data(texts, "text", source=rows.name)


def _rows(source: Any, split: str) -> Rows:
    if isinstance(source, str | Path):
        path = path_of(source, "data")
        inside = path / f"{split}.txt"
        file = inside if path.is_dir() and inside.is_file() else path
        if file.suffix.lower() == ".txt" and file.is_file():
            return _lines(file)
    if isinstance(source, list | tuple) and source and all(isinstance(text, str) for text in source):
        return Rows(({"text": text} for text in source), "the texts given")
    return rows_of(source, split)


def _lines(file: Path) -> Rows:
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")  # other separators, U+2028 and such, are in texts
    except (OSError, UnicodeDecodeError) as error:
        raise AddendaError(f"{file} cannot be read as text in UTF-8: {error}.") from None
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    return Rows(({"text": line} for _, line in numbered), str(file), lines=[number for number, _ in numbered])
