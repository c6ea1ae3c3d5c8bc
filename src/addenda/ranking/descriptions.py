"""Debian's lists as packages and their descriptions: what `ranking/apt.py` has fetched, read.

A description is known by the MD5 of its English text, which translations repeat. Lists of updates come after those of
the release, and what they say of a package counts.
"""

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import amount_of, reading, shown
from addenda.ranking.apt import LISTS, language_of

MOST = 1 << 29  # bytes of a list, unpacked: ten times the largest
LONGEST = 2 << 20  # of a paragraph
_SCRIPTS = r"[\u0e00-\u0e7f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]"
_NO_SPACES = re.compile(f"(?<={_SCRIPTS}) (?={_SCRIPTS})")  # a line's end within a sentence without spaces
_WANTED = ("Package", "Source", "Section", "Description-md5")


@dataclass(frozen=True)
class Package:
    """A package: its name, that of the source it is built from, what it is for, and its description's MD5."""

    name: str
    source: str
    section: str
    md5: str


@dataclass(frozen=True)
class Description:
    """One line, and the paragraphs behind it."""

    short: str
    long: tuple[str, ...]


def packages(folder: Path) -> dict[str, Package]:
    """Return the packages by name, in its order. Raises AddendaError for lists that are damaged."""
    files = _lists(folder)
    described = {part for part, language, _ in files if language == "en"}  # not of servers without descriptions
    found: dict[str, Package] = {}
    for part, language, path in files:
        if language is None and part in described:
            for fields in _paragraphs(path, _WANTED):
                if "Package" in fields and "Description-md5" in fields:
                    source = fields.get("Source", fields["Package"]).split(" ")[0]
                    section = fields.get("Section", "").rpartition("/")[2]
                    name = fields["Package"]
                    found[name] = Package(name, source, section, fields["Description-md5"])
    return dict(sorted(found.items()))


def translations(folder: Path, language: str) -> dict[str, Description]:
    """Return the descriptions in a language by MD5. Raises AddendaError for lists that are damaged or not there."""
    files = [path for _, code, path in _lists(folder) if code == language]
    if not files:
        known = sorted({code for _, code, _ in _lists(folder) if code})
        raise AddendaError(
            f"{shown(folder)} holds no descriptions in {language!r}; it has {', '.join(known) or 'none'}. Fetch them: "
            f"ranking.apt.fetch([{language!r}])."
        )
    key, found = f"Description-{language}", {}
    for path in files:
        for fields in _paragraphs(path, ("Description-md5", key)):
            if len(fields) == 2:
                found[fields["Description-md5"]] = _description(fields[key])
    return found


def _lists(folder: Path) -> list[tuple[str, str | None, Path]]:
    """Return (release and component, language or None, file), updates behind what they update."""
    with reading(folder):
        named = [(found, path) for path in folder.iterdir() if (found := LISTS.fullmatch(path.name))]
    named.sort(key=lambda pair: ("-" in pair[0]["suite"], pair[1].name))
    return [(found["part"], language_of(path.name), path) for found, path in named]


def _paragraphs(path: Path, wanted: tuple[str, ...]) -> Iterator[Mapping[str, str]]:
    """Yield the wanted fields of each paragraph, with their further lines. Raises AddendaError."""
    field = re.compile(rf"^({'|'.join(map(re.escape, wanted))}):[ \t]*(.*(?:\n[ \t].*)*)", re.MULTILINE)
    for paragraph in _pieces(path):
        if fields := dict(field.findall(paragraph)):
            yield fields


def _pieces(path: Path) -> Iterator[str]:
    """Yield what stands between empty lines. Raises AddendaError for a list that is damaged or too large."""
    size, rest = 0, b""
    try:
        with closing(_opened(path)) as file:
            while block := file.read(1 << 20):
                size += len(block)
                *pieces, rest = (rest + block).split(b"\n\n")
                if size > MOST or len(rest) > LONGEST:
                    raise ValueError(
                        f"unpacked it is larger than {amount_of(MOST)}, or a paragraph {amount_of(LONGEST)}"
                    )
                for piece in pieces:
                    yield piece.decode("utf-8", "replace")
        yield rest.decode("utf-8", "replace")
    except (OSError, EOFError, ValueError, RuntimeError, lzma.LZMAError, zlib.error) as error:  # lz4: RuntimeError
        raise AddendaError(
            f"{shown(path)} is damaged ({str(error)[:200] or type(error).__name__}). Remove the folder "
            f"{shown(path.parent)}, and it is fetched again."
        ) from None


def _opened(path: Path) -> Any:
    match path.suffix:
        case ".lz4":
            try:
                from lz4 import frame
            except ImportError as error:
                raise AddendaError(
                    f'apt keeps its lists in lz4: {error}. Run `pip install "addenda[ranking]"`.'
                ) from None
            return frame.open(path, "rb")
        case ".gz":
            return gzip.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
    return path.open("rb")


def _description(text: str) -> Description:
    """Return a description's parts: further lines are paragraphs, with lines of one dot between."""
    short, _, rest = text.partition("\n")
    paragraphs = re.split(r"^[ \t]\.$", rest, flags=re.MULTILINE)
    joined = (_NO_SPACES.sub("", " ".join(p.split())) for p in paragraphs)
    return Description(" ".join(short.split()), tuple(p for p in joined if p))
