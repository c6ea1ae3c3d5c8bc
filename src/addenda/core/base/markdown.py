"""Text that others have written, as Markdown shows it and no more: names between backticks, reports in a fence."""

import re

from addenda.core.base.visible import visible


def code(text: object) -> str:
    """Return a name as code on one line, between more backticks than it has in a row."""
    line = visible(text).replace("\n", " ").replace("\t", " ")
    fence = "`" * (1 + _longest(line))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{line}{space}{fence}"


def fenced(text: object, language: str = "") -> list[str]:
    """Return the lines of a block of code, between fences longer than any in it."""
    lines = visible(text)
    fence = "`" * max(3, 1 + _longest(lines))
    return [fence + language, lines, fence]


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
