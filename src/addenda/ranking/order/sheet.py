"""What an order leaves behind: a table (CSV), a contact sheet (PNG), copies whose names say their rank."""

import csv
import io
import math
import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.disk.access import writing
from addenda.core.disk.atomic import write_atomically
from addenda.core.disk.place import file_for, holds
from addenda.core.disk.whole import free_place, whole
from addenda.data.prepare import plain
from addenda.ranking.order.rank import Ranked

COLUMNS = ("rank", "file", "score", "nearest trained query", "similarity")
SIDE, LINE, MOST = 144, 15, 60  # pixels of a thumbnail, and of a line of text under it; images on a sheet
FONT, FRAME = 12, "#c8c8c8"  # a white image on a white sheet has an edge
MARK = "addenda order rank"  # stands in a sheet as the software that made it
NAME = 240  # bytes of a copy's name: most disks take 255


def write_table(rows: Sequence[Ranked], path: str | Path) -> Path:
    """Write a CSV: rank, file, score, nearest trained query, its similarity; whole, over nothing that is no CSV."""
    place = table_place(path)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([row.rank, row.picture.name, f"{row.score:.6g}", row.nearest, f"{row.similarity:.3f}"])
    write_atomically(place, text.getvalue().encode("utf-8", "surrogateescape"))  # names as the disk has them
    return place


def write_sheet(rows: Sequence[Ranked], path: str | Path, *, most: int = MOST, across: int = 6) -> Path:
    """Write a contact sheet as PNG: the best first, each with its score and name; of many every k-th.

    Returns its path. Raises AddendaError where nothing can be written there, or where something else stands.
    """
    from PIL import Image, ImageDraw
    from PIL.PngImagePlugin import PngInfo

    place = sheet_place(path)
    chosen = picked(rows, most)
    down = -(-len(chosen) // across)
    wide = min(across, len(chosen))
    high = SIDE + 2 * LINE + 8
    sheet = Image.new("RGB", (wide * (SIDE + 8) + 8, down * high + 8), "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for n, row in enumerate(chosen):
        x, y = 8 + n % across * (SIDE + 8), 8 + n // across * high
        image = plain(row.picture.open()).convert("RGB")
        if (times := SIDE // max(image.size)) > 1:  # of few pixels: each a square
            image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
        image.thumbnail((SIDE, SIDE))
        left, top = x + (SIDE - image.width) // 2, y + (SIDE - image.height) // 2
        sheet.paste(image, (left, top))
        draw.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline=FRAME)
        for line, text in enumerate((f"{row.rank}.  {_number(row.score)}", Path(row.picture.name).name)):
            draw.text((x, y + SIDE + 2 + LINE * line), _fitting(font, label(text)), "black", font)
    data, said = io.BytesIO(), PngInfo()
    said.add_text("Software", MARK)
    sheet.save(data, "PNG", pnginfo=said)
    write_atomically(place, data.getvalue())
    return place


def table_place(path: str | Path) -> Path:
    """Return where a table may be written. Raises AddendaError where something else than a table of ours stands."""
    return file_for(path, _is_table, what="out")


def sheet_place(path: str | Path) -> Path:
    """Return where a sheet may be written. Raises AddendaError for another ending, and over another's file."""
    place = file_for(path, is_sheet, what="sheet")
    if place.suffix.lower() != ".png":
        raise AddendaError(
            f"The contact sheet is a PNG, and {place.name} would be called something else. End it in .png."
        )
    return place


def is_sheet(path: Path) -> bool:
    """Return whether a file is a contact sheet that was written here: it is no image to be ordered."""
    return path.suffix.lower() == ".png" and holds(path, "PNG", f"Software\0{MARK}")


def picked(rows: Sequence[Ranked], most: int) -> list[Ranked]:
    """Return at most so many rows, the first and the last among them, evenly spread over the order."""
    if len(rows) <= most or most == 1:
        return list(rows[:most])
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def copy_ranked(rows: Sequence[Ranked], folder: str | Path) -> Path:
    """Copy images into a new folder, their rank before their names; the originals stay. Whole, or nothing.

    Raises AddendaError where the folder is there already, and for images that are in no file of their own.
    """
    out = free_place(folder, "copy")
    digits = len(str(len(rows)))
    if loose := [row.picture.name for row in rows if not isinstance(row.picture.stored, Path)]:
        raise AddendaError(f"{loose[0]} is no file, so it cannot be copied. Give a folder of images.")
    with writing(out), whole(out, folder=True) as place:
        for row in rows:
            source: Any = row.picture.stored
            name = Path(row.picture.name)
            stem = os.fsencode(name.stem)[: NAME - digits - len(os.fsencode(name.suffix))]
            shutil.copyfile(source, place / f"{row.rank:0{digits}d}-{os.fsdecode(stem)}{name.suffix}")
    return out


def _number(score: float) -> str:
    """Return a score in three digits, or in all those before the point: 0.0123, 12.3, 1987."""
    size = math.floor(math.log10(abs(score))) if score else 0
    return f"{score:.{max(0, 2 - size)}f}" if -4 < size < 8 else f"{score:.3g}"


@cache
def _font() -> Any:
    """Return matplotlib's own font, which has Latin, Greek and Cyrillic letters, where Pillow's has ASCII."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), FONT)


def _fitting(font: Any, text: str) -> str:
    """Return a text that is no wider than a thumbnail, cut in its middle, with ? for what the font does not have."""
    none = bytes(font.getmask("\uffff"))
    text = "".join(c if c.isascii() or bytes(font.getmask(c)) != none else "?" for c in text)
    kept = len(text)
    shown = text
    while kept > 4 and font.getlength(shown) > SIDE:
        kept -= 1
        shown = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) + 1 :]}"
    return shown


def _is_table(path: Path) -> bool:
    with path.open("rb") as f:
        return f.readline().decode("utf-8", "replace").strip() == ",".join(COLUMNS)
