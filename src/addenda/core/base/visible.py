"""Text that others have written (names, paths, data, headers of files), made safe to print on a terminal.

A name may hold ESC and so move the cursor or set the title, a right-to-left mark that turns a path around, or a lone
surrogate that cannot be printed at all. All that a command prints goes through `visible`.
"""

import unicodedata

_KEPT = "\n\t\u200c\u200d"  # joiners: letters of Persian and Hindi, and emoji, are written with them
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def label(text: object, most: int = 160) -> str:
    """Return a name out of a file as part of one line: line breaks are spelt out, a long name is cut in its middle."""
    text = str(text)
    if len(text) > most:
        text = f"{text[: most * 2 // 3]}…{text[-most // 4 :]}"
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def visible(text: object) -> str:
    """The text with what controls a terminal or cannot be seen spelt out, ESC as \\x1b; line breaks stay."""
    return "".join(
        c if c in _KEPT or unicodedata.category(c) not in _HIDDEN else c.encode("unicode_escape").decode()
        for c in str(text)
    )
