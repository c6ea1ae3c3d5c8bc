"""What every command does around its own work: numbers are checked before it starts, its words are the command line's.

    --batch must be at least 1, at most 10,000,000, got 0        not: batch must be …
    load it with --base compatible                               not: base='compatible'

Ctrl-C says what the command has kept and ends with 130; so does SIGTERM, as schedulers send it, with 143.
"""

import functools
import inspect
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from addenda.cli import run_file
from addenda.cli.common import flags_of, say
from addenda.core.base import ranges


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: what Ctrl-C is to a terminal, sent by a scheduler or by `kill`."""


def exit_code(error: KeyboardInterrupt) -> int:
    """Return what shells expect of a process that a signal has ended."""
    return 128 + (signal.SIGTERM if isinstance(error, TerminatedError) else signal.SIGINT)


@contextmanager
def terminable() -> Iterator[None]:
    """Raise TerminatedError at SIGTERM, in a `with` block. A second one ends the process at once.

    Where SIGTERM is ignored, or handled by whoever called, it stays so.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    here = os.getpid()

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != here:  # a forked worker, which has nothing to say
            os.kill(os.getpid(), number)
            return
        raise TerminatedError

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def guarded(command: Callable) -> Callable:
    """Return the command under the checks that all of them have, with `--config`, which acts before the call."""
    flags, signature = flags_of(command), inspect.signature(command)

    @functools.wraps(command)
    def call(*, config: Any = None, **given: Any) -> None:
        from addenda.core.base.errors import AddendaError

        try:
            if problems := ranges.problems(given):
                named = [f"{flags.get(name, name)}{rest}" for name, rest in map(_parted, problems)]
                raise AddendaError(f"These options cannot be: {'; '.join(named)}.")
            given = {name: _expanded(value, flags.get(name, name)) for name, value in given.items()}
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: say(f"note: {message}")
                command(**given)
        except AddendaError as error:
            told = re.sub(r"^\w+ cannot be called so: ", "These options cannot be: ", str(error))  # a name of Python's
            error.args = (in_flags(told, flags),)
            raise
        except KeyboardInterrupt as error:
            told = in_flags(" ".join(getattr(error, "__notes__", ())), flags)
            how = "stopped by SIGTERM" if isinstance(error, TerminatedError) else "interrupted"
            say(f"\naddenda: {how}. {told.replace('The same call', 'The same command')}")
            raise typer.Exit(exit_code(error)) from None

    vars(call)["__signature__"] = signature.replace(
        parameters=[*signature.parameters.values(), run_file.parameter(command)]
    )
    return call


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """Return a message in the spelling of a command: `name=`, `name='value'`, `name=True`, bare `two_words`.

    `name={"a": "b"}` is one option for each pair.

    The options of methods and the calls of Python in it (lora:rank=8, f(x=1)) stay as they are.
    """
    names = _ALIASES | dict(flags)
    own = sorted((n for n in names if names[n] in flags.values()), key=len, reverse=True)
    if not own:
        return text
    known, long = "|".join(map(re.escape, own)), "|".join(re.escape(n) for n in own if "_" in n)

    def option(found: re.Match) -> str:
        flag, value = names[found["name"]], found["value"]
        if value and value[0] == "{":
            pairs = re.findall(r'"([^"]*)": "([^"]*)"(, …)?', value)
            return " ".join(f"{flag} '{old}={new}'{more}" for old, new, more in pairs) or flag
        if value in (None, "None", "True"):
            return flag
        if value == "False":
            return f"--no-{flag.removeprefix('--')}"
        if value[0] == "[":
            value = value.strip("[]").replace(", ", ",")
        word = value.replace("'", "")
        return f"{flag} {word if word and ' ' not in word else value}"

    value = r"\{[^{}]*\}|'[^']*'|\['[^\]]*'\]|[\w.]*\w"
    made = re.sub(rf"(?<![\w.:;,@'\-])(?<!\w\()(?<!\.\.\., )(?P<name>{known})=(?P<value>{value})?", option, text)
    if long:  # a name of two words is no word of the sentence
        made = re.sub(
            rf"(?<![\w.:;,@'\"/\-=])(?<!\w\()({long})(?![\w='\"/(]|\.\w)", lambda found: names[found[0]], made
        )
    theirs = "|".join(n for n in ONLY_IN_PYTHON if n not in flags)
    given = r"'[^']*'|\[[^\]]*\]|\{[^{}]*\}|[\w.]*\w"
    made = re.sub(rf"(?<![\w.:;,@'\-(])(?<!\w, )({theirs})=({given})?", r"\g<0> (in Python)", made)
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", made)


# Options of the functions behind the commands that no command has: a message that names one says where it is.
ONLY_IN_PYTHON = (
    "activate", "allow_loss", "allow_partial", "also_train", "arguments", "around", "basis", "begun_with", "chat",
    "clip", "columns", "examples", "freeze", "heads", "judge", "keep", "labels", "latent", "memory_floor", "messages",
    "outputs", "pair", "partial", "positions", "prefix", "probe", "progress", "rename", "save_every", "source",
    "subject", "task", "title", "tokenizer", "tracking", "train", "trainable", "validation", "watch", "without_base",
)  # fmt: skip
_ALIASES = {"eval": "--eval", "remove": "--ratio", "of": "--of", "humaneval": "--pass-at-1", "how": "--how"}


def _expanded(value: Any, flag: str) -> Any:
    """Return a path, or a list of them, with `~` expanded: a shell leaves --out=~/run and '~/run' as they are."""
    from addenda.core.disk.access import path_of

    if isinstance(value, list):
        return [_expanded(each, flag) for each in value]
    return path_of(value, flag) if isinstance(value, Path) else value


def _parted(problem: str) -> tuple[str, str]:
    name = problem.partition(" ")[0]
    return name, problem[len(name) :]
