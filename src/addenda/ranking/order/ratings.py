"""What people said of images: a value for a query, or that one image is above another; read and checked.

| source | what it says |
| --- | --- |
| table (CSV, JSONL, Parquet): image, query, value | a rating, a count, a year, … |
| table: better, worse, query | one is above the other for that query |
| FOLDER/GRADE/IMAGE, with query= | the folder's number is the value |
| FOLDER of images beside IMAGE.xmp, with query= | the stars of the sidecar (xmp:Rating, 1 to 5) |

What is not said is not known, and never 0; 0 is a value like others. Paths of a table count from its folder. Images are
known by the SHA-256 of their bytes: one file under two names is one image.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.visible import label
from addenda.core.disk.access import path_of, reading, sha256_of
from addenda.data.columns import table, text_of
from addenda.data.examples import Picture
from addenda.data.images import SUFFIXES
from addenda.data.rows import SUFFIXES as TABLES
from addenda.data.rows import Rows

STARS = re.compile(rb"xmp:Rating\s*(?:=\s*[\"']|>)\s*(-?\d+(?:\.\d+)?)")
MOST_XMP = 1 << 20  # bytes of a sidecar that are read
MOST = 1e100  # of a value: its square is a number too


@dataclass(frozen=True)
class Ratings:
    """Images, and what is known of them by query, all by position.

    values: {query: {position: value}}; comparisons: {query: [(better, worse)]}, as often as they were made. skipped:
    places and names of images that were left out as they are empty or cannot be read.
    """

    pictures: tuple[Picture, ...]
    values: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    comparisons: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    source: str = "memory"
    skipped: tuple[str, ...] = ()

    @property
    def queries(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.values, *self.comparisons]))

    def of(self, positions: Sequence[int]) -> "Ratings":
        """Return the images at these positions, what is known of them, and comparisons of two of them."""
        new = {old: i for i, old in enumerate(positions)}
        values = {q: {new[i]: v for i, v in rated.items() if i in new} for q, rated in self.values.items()}
        pairs = {
            q: tuple((new[a], new[b]) for a, b in of if a in new and b in new) for q, of in self.comparisons.items()
        }
        return Ratings(
            tuple(self.pictures[i] for i in positions),
            {q: rated for q, rated in values.items() if rated}, {q: p for q, p in pairs.items() if p}, self.source,
            self.skipped,
        )  # fmt: skip

    def check_learnable(self) -> None:
        """Raise AddendaError where nothing can be learned of a query: one image, all alike, two kinds at once."""
        if not self.queries:
            raise AddendaError(f"{self.source} rates no image. Give values or comparisons for a query.")
        for query, rated in self.values.items():
            if query in self.comparisons:
                raise AddendaError(
                    f"{self.source} has values and comparisons for {query!r}, and a group is learned from one of them. "
                    "Leave one out, or give them two sentences."
                )
            if len(rated) < 2:
                raise AddendaError(
                    f"{self.source} rates one image for {query!r}, and an order wants two at least. Rate more images, "
                    "or leave the query out."
                )
            if len(set(rated.values())) == 1:
                raise AddendaError(
                    f"All {len(rated)} images of {self.source} have the value {next(iter(rated.values())):g} for "
                    f"{query!r}: there is no order to learn. Rate images that differ, or leave the query out."
                )


def read_ratings(
    source: Any,
    *,
    query: str | None = None,
    image: str = "image",
    value: str = "value",
    allow_circles: bool = False,
    skip_corrupt: bool = False,
    split: str = "train",
) -> Ratings:
    """Return the ratings or comparisons of a table or a folder; see the module.

    query: the sentence, for a folder, or for a table without a column of that name. image, value: columns.
    allow_circles: comparisons that contradict each other are evidence, not mistakes (of several people). skip_corrupt:
    leave out images that are empty or cannot be read. Whether the others can be decoded is not looked at here.
    Raises AddendaError, by file and row, for missing files, values that are no finite numbers, an image with two values
    for a query, an image compared with itself, and comparisons in a circle.
    """
    if isinstance(source, str | Path):
        path = path_of(source, "the ratings")
        if path.is_dir() and (found := _folder(path, query, skip_corrupt)) is not None:
            return found
        source = path
    rows, columns = table(source, split)
    if "query" not in columns and not _said(query):
        raise AddendaError(
            f"{rows.name} has no column 'query' (it has {', '.join(map(repr, columns))}), so that nothing says by what "
            "the images are ordered. Add it, or give query= (--query) for all rows."
        )
    folder = (
        source.parent
        if isinstance(source, Path) and source.is_file()
        else source
        if isinstance(source, Path)
        else Path()
    )
    known = _Known(rows, folder, query, skip_corrupt)
    if "better" in columns and "worse" in columns:
        return known.comparisons(allow_circles)
    if lacking := [c for c in (image, value) if c not in columns]:
        raise AddendaError(
            f"{rows.name} has no column {' and none '.join(map(repr, lacking))}; it has "
            f"{', '.join(map(repr, columns))}.{nearest(lacking[0], columns)} A table of ratings has image, query and "
            "value, one of comparisons better, worse and query."
        )
    return known.values(image, value)


class _UnreadableError(ValueError):
    """An image that is there, and empty or not to be read."""


class _Known:
    """Images seen so far, by their bytes, while the rows of a table are read."""

    def __init__(self, rows: Rows, folder: Path, query: str | None, skip: bool):
        self.rows, self.folder, self.query, self.skip = rows, folder, query, skip
        self.positions: dict[str, int] = {}
        self.pictures: list[Picture] = []
        self.keys: dict[Path, str] = {}
        self.problems: list[str] = []
        self.skipped: list[str] = []

    def values(self, image: str, value: str) -> Ratings:
        """Return the values; raise AddendaError for all rows that cannot be used."""
        found: dict[str, dict[int, float]] = {}
        first: dict[tuple[str, int], int] = {}

        def take(i: int, row: Mapping) -> None:
            said = row.get(value)
            if (
                said is None
                or said == ""
                or (isinstance(said, float) and math.isnan(said) and _from_parquet(self.rows))
            ):
                return  # nothing is known
            number, at, asked = _number(said, value), self.position(row.get(image), image), self.asked(row)
            kept = found.setdefault(asked, {}).setdefault(at, number)
            where = first.setdefault((asked, at), i)
            if kept != number:
                raise ValueError(
                    f"{self.pictures[at].name} has the value {number:g} for {asked!r}, and {kept:g} in "
                    f"{self.rows.place(where)}; one image has one value"
                )

        self.each(take)
        return Ratings(tuple(self.pictures), found, {}, self.rows.name, tuple(self.skipped))

    def comparisons(self, allow_circles: bool) -> Ratings:
        """Return the comparisons; raise AddendaError for all rows that cannot be used."""
        found: dict[str, list[tuple[int, int]]] = {}
        last: dict[str, dict[tuple[int, int], int]] = {}  # row of a pair

        def take(i: int, row: Mapping) -> None:
            better, worse = (self.position(row.get(c), c) for c in ("better", "worse"))
            if better == worse:
                raise ValueError(f"{self.pictures[better].name} is compared with itself")
            asked = self.asked(row)
            found.setdefault(asked, []).append((better, worse))
            last.setdefault(asked, {})[better, worse] = i

        self.each(take)
        for asked, pairs in last.items():
            circle = None if allow_circles else _circle(list(pairs))
            if circle:
                names = [self.pictures[i].name for i in circle]
                rows = [self.rows.place(pairs[edge]) for edge in pairwise(circle)]
                raise AddendaError(
                    f"{self.rows.name}: the comparisons for {asked!r} go in a circle: {' above '.join(names)} "
                    f"({', '.join(rows)}). Remove one of them; where several people disagree, give allow_circles=True."
                )
        pairs = {q: tuple(p) for q, p in found.items()}
        return Ratings(tuple(self.pictures), {}, pairs, self.rows.name, tuple(self.skipped))

    def each(self, take: Callable[[int, Mapping], None]) -> None:
        for i, row in enumerate(self.rows):
            try:
                take(i, row)
            except ValueError as error:
                skipped = self.skip and isinstance(error, _UnreadableError)
                (self.skipped if skipped else self.problems).append(f"{self.rows.place(i)}: {error}")
        if self.problems:
            rest = f"; … and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""
            raise AddendaError(
                f"{len(self.problems)} of {len(self.rows)} rows of {self.rows.name} cannot be used: "
                f"{'; '.join(self.problems[:5])}{rest}. Mend or remove them; leave a value empty where it is not known."
            )

    def asked(self, row: Mapping) -> str:
        said = row.get("query", self.query)
        return text_of(said if said not in (None, "") else self.query, "column 'query'")

    def position(self, said: Any, column: str) -> int:
        """Return the position of an image, a new one for bytes that were not seen yet. Raises ValueError."""
        path = self.folder / text_of(said, f"column {column!r}")
        if path not in self.keys:
            try:
                there, size = path.is_file(), path.stat().st_size if path.is_file() else 0
                if not there:
                    raise ValueError(f"column {column!r}: there is no file {label(path)}")
                self.keys[path] = sha256_of(path) if size else ""
            except OSError as error:  # of its rights, of its name, of the disk
                why = os.strerror(error.errno) if error.errno else error
                raise _UnreadableError(f"{label(path)} cannot be read ({why})") from None
        if not self.keys[path]:
            raise _UnreadableError(f"{label(path)} is empty")
        key = self.keys[path]
        if key not in self.positions:
            self.positions[key] = len(self.pictures)
            self.pictures.append(Picture(key, 0, str(said), path))
        return self.positions[key]


def _folder(path: Path, query: str | None, skip: bool) -> Ratings | None:
    """Return the ratings of grade folders, or of sidecars; None for a folder of neither."""
    with reading(path):
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    grades = [p for p in inside if p.is_dir() and _is_number(p.name)]
    images = [p for p in inside if p.is_file() and p.suffix.lower() in SUFFIXES]
    if grades:
        others = [p.name for p in inside if p.is_dir() and p not in grades] + [p.name for p in images]
        if others:
            raise AddendaError(
                f"{path} holds folders of grades ({', '.join(p.name for p in grades[:5])}) and beside them "
                f"{', '.join(others[:4])}, of which no grade is known. Move them away, or into a grade."
            )
        rated = [(p, float(g.name.replace(",", "."))) for g in grades for p in _images_in(g)]
        if huge := [p.name for p in grades if abs(float(p.name.replace(",", "."))) > MOST]:
            raise AddendaError(
                f"{path} holds the grade {label(huge[0])}; at most {MOST:g} was expected. Rename the folder."
            )
    else:
        stars = {p: _stars(p) for p in images}
        rated = [(p, n) for p, n in stars.items() if n is not None]
        if not rated and (not images or any(p.suffix.lower() in TABLES for p in inside)):
            return None
        if not rated:
            raise AddendaError(
                f"{path} holds {len(images)} images, and nothing says what they are worth: put them into folders of "
                "grades (1, 2, …), give them stars in sidecars (IMAGE.xmp), or write a table of image, query and value."
            )
    if not _said(query):
        raise AddendaError(
            f"{path} holds images with {'grades' if grades else 'stars'}, and nothing says what they are for. Give "
            "query= (--query), such as 'a sharp photo'."
        )
    known = _Known(Rows([], str(path)), path, query, skip)
    values: dict[int, float] = {}
    for file, value in rated:
        name = str(file.relative_to(path))
        try:
            at = known.position(name, "image")
        except ValueError as error:
            (known.skipped if skip and isinstance(error, _UnreadableError) else known.problems).append(str(error))
            continue
        if values.setdefault(at, value) != value:
            raise AddendaError(
                f"{path}: {name} and {known.pictures[at].name} are the same image with two values, {value:g} and "
                f"{values[at]:g}. Keep one of them."
            )
    if known.problems:
        rest = f"; … and {len(known.problems) - 5} more" if len(known.problems) > 5 else ""
        raise AddendaError(
            f"{len(known.problems)} of {len(rated)} images in {path} cannot be used: {'; '.join(known.problems[:5])}"
            f"{rest}. Mend or remove them, or leave them out with skip_corrupt (--skip-corrupt)."
        )
    return Ratings(tuple(known.pictures), {str(query): values} if values else {}, {}, str(path), tuple(known.skipped))


def _images_in(folder: Path) -> list[Path]:
    with reading(folder):
        return [p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]


def _stars(image: Path) -> float | None:
    """Return the stars of an image's sidecar, IMAGE.xmp or NAME.xmp; None where there are none. Raises AddendaError."""
    for file in (image.with_name(f"{image.name}.xmp"), image.with_suffix(".xmp")):
        if file.is_file():
            with reading(file), file.open("rb") as f:
                found = STARS.search(f.read(MOST_XMP))
            stars = 0.0 if found is None else float(found[1])
            if stars == 0:  # not rated; −1 is rejected, below one star
                return None
            if not -1 <= stars <= 5:
                raise AddendaError(f"{file} gives {stars:g} stars; 1 to 5 were expected, or −1. Mend the file.")
            return stars
    return None


def _number(said: Any, column: str) -> float:
    """Return a finite number that can be squared. Raises ValueError."""
    try:
        number = float(said) if not isinstance(said, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= MOST:
        wanted = f"at most {MOST:g}" if math.isfinite(number) else "a finite number"
        raise ValueError(f"column {column!r} holds {label(said)!r}, {wanted} was expected")
    return number


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d+([.,]\d+)?", text) is not None


def _from_parquet(rows: Rows) -> bool:
    return not rows.lines  # there a missing value may come as nan; a file of text says "nan" in words


def _said(query: str | None) -> bool:
    return query is not None and bool(query.strip())


def _circle(edges: Sequence[tuple[int, int]]) -> list[int] | None:
    """Return images that are each above the next, the last the first again; None where there is no such circle."""
    below: dict[int, list[int]] = {}
    for better, worse in edges:
        below.setdefault(better, []).append(worse)
    done: set[int] = set()
    for start in below:
        path, places = [start], {start: 0}
        branches = [iter(below.get(start, ()))]
        while branches:
            following = next(branches[-1], None)
            if following is None:
                branches.pop()
                done.add(path[-1])
                places.pop(path.pop())
            elif following in places:
                return [*path[places[following] :], following]
            elif following not in done:
                places[following] = len(path)
                path.append(following)
                branches.append(iter(below.get(following, ())))
    return None
