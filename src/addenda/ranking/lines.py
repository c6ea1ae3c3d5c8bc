"""Lines of a file that anybody may have written: numbered, of bounded length, and their faults told together."""

from collections.abc import Iterator
from pathlib import Path

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import DiskError, path_of, reading, shown

LONGEST = 16 << 20  # bytes of a line: a document of 16 MiB is no document
TOLD = 5  # faults of a file that a message names


class Faults:
    """What is wrong with the lines of a file: the first few are kept, all are counted."""

    def __init__(self, path: Path):
        self.path, self.count, self._told = path, 0, list[str]()

    def add(self, line: int, fault: str) -> None:
        self.count += 1
        if len(self._told) < TOLD:
            self._told.append(f"line {line}: {fault}")

    def check(self, advice: str) -> None:
        """Raise AddendaError where there is a fault. advice: what to do about all of them."""
        if self.count:
            more = f"; … and {self.count - TOLD:,} more" if self.count > TOLD else ""
            lines = "line" if self.count == 1 else "lines"
            raise AddendaError(
                f"{shown(self.path)} has {self.count:,} {lines} that cannot be used: {'; '.join(self._told)}{more}. "
                f"{advice}"
            )


def numbered(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text) of each line that is not blank, without its end.

    Raises AddendaError for a file that is missing, a line that is longer than `LONGEST`, and one that is not UTF-8.
    """
    path = path_of(path)
    with reading(path):
        if path.exists() and not path.is_file():
            raise DiskError(f"{shown(path)} is a folder, a device or a pipe, and lines are read from a file.")
        file = path.open("rb")
    with file, reading(path):
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            if line.isspace():
                continue
            if len(line) > LONGEST:
                raise AddendaError(
                    f"{shown(path)}, line {number} is longer than {LONGEST >> 20} MiB. A line is one document, query "
                    "or judgement: cut the document in passages, or look whether the line ends are lost."
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise AddendaError(
                    f"{shown(path)}, line {number} is not UTF-8 ({error.reason} at byte {error.start}). Write the file "
                    "again in UTF-8."
                ) from None
            if text.strip():
                yield number, text


def quoted(text: str) -> str:
    """Return a text of a file for a message, cut."""
    return repr(text if len(text) <= 60 else f"{text[:40]}…{text[-10:]}")
