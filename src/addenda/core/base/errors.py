"""One exception for everything a user can mend.

A message is one paragraph: what was expected, what came, where, and what to do next. Problems of one call are
collected and raised together. The command line prints the message without a traceback and exits with code 2.
"""

import difflib
from collections.abc import Iterable


class AddendaError(Exception):
    """Bad input, or a state in which the call makes no sense. Nothing was changed on the model or on disk."""


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """Return `" Did you mean 'rank'?"` for an unknown word, or the empty string when nothing comes close."""
    matches = difflib.get_close_matches(word, list(known), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(f) for f in matches)}?" if matches else ""
