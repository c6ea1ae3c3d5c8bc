"""One exception for everything a user can mend.

A message is one paragraph: what was expected, what came, where, and what to do next. Problems of one call are
collected and raised together. The command line prints the message without a traceback and exits with code 2.
"""

import difflib
from collections.abc import Iterable

MOST = 1 << 16  # characters of a message: names in it may be a file's own


class AddendaError(Exception):
    """Bad input, or a state in which the call makes no sense. Nothing was changed on the model or on disk.

    Its message can be printed, whatever is in it: half a character of a name is spelt out, and a message of more than
    `MOST` characters is cut in its middle.
    """

    def __init__(self, *args: object):
        super().__init__(*(_printable(a) if isinstance(a, str) else a for a in args))


def _printable(text: str) -> str:
    cut = text if len(text) <= MOST else f"{text[: MOST * 3 // 4]}…{text[-MOST // 8 :]}"
    return cut.encode("utf-8", "backslashreplace").decode("utf-8")


def nearest(word: object, known: Iterable[str], n: int = 3) -> str:
    """Return `" Did you mean 'rank'?"` for an unknown word, or the empty string when nothing comes close."""
    matches = difflib.get_close_matches(str(word), list(known), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(f) for f in matches)}?" if matches else ""
