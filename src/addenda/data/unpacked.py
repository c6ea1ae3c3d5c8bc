"""How much a small file may become in memory: a few kilobytes of Parquet, PNG or gzip can be gigabytes of one value.

What is in plain text costs what it says. Of packed files a hundred times their size is read, which leaves room for
text that repeats itself, and what fits into a little memory anyhow; more is refused with the way out, to unpack it.
"""

import json
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.disk.access import read_json

TIMES = 100  # bytes out of one byte of a file
ALWAYS = 24 << 20  # bytes that any file may become
_PIXELS = 12 << 20  # of an image of any file: 36 MiB
_ROWS = 4  # out of one byte of a file: each is an object in memory
_HASHED = 1 << 30  # bytes of a file whose repeated texts are counted


def check_unpacked(size: int, packed: int, what: str) -> None:
    """Raise ValueError where so many bytes come out of a file of packed bytes."""
    if size > TIMES * packed + ALWAYS:
        raise ValueError(
            f"{what} of {size:,} bytes would come out of {packed:,}, as of a file that was made to fill the memory. "
            "Where you trust whoever made it, unpack it yourself and give that"
        )


def check_pixels(width: int, height: int, packed: int) -> None:
    """Raise ValueError for an image whose pixels are far more than its file could hold of a picture."""
    if width * height > max(_PIXELS, TIMES * packed):
        raise ValueError(
            f"{width:,} × {height:,} pixels out of {packed:,} bytes, as of a file that was made to fill the memory; "
            "make it smaller where you trust whoever made it"
        )


def parquet_table(path: Path) -> Any:
    """Return a Parquet file as a table of Arrow's. Raises ValueError for far more than so small a file holds."""
    import pyarrow.parquet

    packed = path.stat().st_size
    with path.open("rb") as f:
        about = pyarrow.parquet.ParquetFile(f)
        said = about.metadata
        if said.num_rows > _ROWS * packed:
            raise ValueError(f"{said.num_rows:,} rows in {packed:,} bytes are rows of one value, and no examples")
        groups = [said.row_group(i) for i in range(said.num_row_groups)]
        columns = [g.column(i) for g in groups for i in range(g.num_columns)]
        check_unpacked(sum(c.total_uncompressed_size for c in columns), packed, "Columns")
        texts = [c.path for c in (about.schema.column(i) for i in range(len(about.schema))) if _is_text(c)]
    with path.open("rb") as f:
        found = pyarrow.parquet.ParquetFile(f, read_dictionary=texts if packed < _HASHED else [])
        parts = [found.read_row_group(i) for i in range(len(groups))]  # repeated texts are told apart in each
        table = pyarrow.concat_tables(parts) if parts else found.read()
    repeated = sum(_expanded(chunk) for column in table.columns for chunk in column.chunks)
    check_unpacked(repeated, packed, "Text")
    return table


def _is_text(column: Any) -> bool:
    return column.physical_type == "BYTE_ARRAY"


def _expanded(values: Any) -> int:
    """Return the bytes of all texts of an array of Arrow's, each as often as it is named."""
    import pyarrow
    import pyarrow.compute

    kind = values.type
    if pyarrow.types.is_dictionary(kind):
        if not _lengthy(kind.value_type):
            return 0
        lengths = pyarrow.compute.call_function("binary_length", [values.dictionary]).cast(pyarrow.int64())
        return pyarrow.compute.call_function("sum", [lengths.take(values.indices)]).as_py() or 0
    if pyarrow.types.is_struct(kind):
        return sum(_expanded(part) for part in values.flatten())
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return _expanded(values.flatten())
    return 0


def _lengthy(kind: Any) -> bool:
    import pyarrow.types as types

    return any(f(kind) for f in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary))


def check_saved(folder: Path) -> None:
    """Raise AddendaError where what datasets.save_to_disk wrote names files that are not in its folder."""
    splits = []
    if (file := folder / "dataset_dict.json").is_file():
        said = read_json(file)
        splits = said.get("splits") if isinstance(said, dict) else None
        if not isinstance(splits, list) or not all(_plain(s) for s in splits):
            raise AddendaError(f"{file} names splits that are no folders beside it. Write the folder again.")
    for part in [folder / s for s in splits] or [folder]:
        for name in ("state.json", "dataset_info.json"):
            if (file := part / name).is_file():
                _check_entries(file, read_json(file))


def _check_entries(file: Path, said: Any) -> None:
    if not isinstance(said, dict) or not isinstance(said.get("_data_files", []), list):
        raise AddendaError(f"{file} cannot be read as a note of datasets. Write the folder again.")
    names = [d.get("filename") if isinstance(d, dict) else None for d in said.get("_data_files", [])]
    if wrong := [n for n in names if not _plain(n)]:
        raise AddendaError(f"{file} names {label(wrong[0])!r}, which is no file beside it. Write the folder again.")
    features = json.dumps(said.get("features"))
    if wrong := [key for key in ("names_file", "num_classes") if f'"{key}"' in features]:
        raise AddendaError(
            f"{file} gives the names of classes by {wrong[0]} and not as a list, which datasets does not write. Write "
            "the folder again."
        )


def _plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")
