"""The entry point `addenda`: one typer application, one file for each command or group of commands."""

import os
import sys
from contextlib import suppress
from importlib import import_module
from itertools import pairwise

import typer
from typer.models import CommandInfo

from addenda.cli.common import say, tell
from addenda.cli.guard import exit_code, guarded, terminable

# Threads wait for each other asleep, not spinning: a step is several times faster where another process uses one of two
# cores, and little slower where none does. libgomp reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = (
    "methods",
    "plan",
    "tune",
    "compare",
    "choose",
    "evaluate",
    "demo",
    "inspect",
    "compress",
    "export",
    "merge",
    "reduce",
    "combine",
    "extract",
    "rerank",
    "order",
    "bundle",
    "transfer",
)

HELP = {"help_option_names": ["-h", "--help"]}

MOST = 6000  # characters of an error message; a list of problems fits

app = typer.Typer(
    name="addenda",
    help="Small changes to large models: fit, compare, move, combine and ship adapters of a frozen model.",
    no_args_is_help=True,
    context_settings=HELP,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        import addenda

        tell(f"addenda {addenda.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Say which version.", callback=_version, is_eager=True),
) -> None:
    """Options of all commands."""


for command in COMMANDS:
    import_module(f"addenda.cli.{command}").register(app)


def commands() -> dict[str, CommandInfo]:
    """Return every command by the words that call it, those of a group too ("rerank train")."""
    found = {}
    groups = [("", app), *((f"{g.typer_instance.info.name} ", g.typer_instance) for g in app.registered_groups)]
    for before, held in groups:
        for info in held.registered_commands:
            name = info.name or getattr(info.callback, "__name__", "").replace("_", "-")
            found[f"{before}{name}"] = info
    return found


for registered in commands().values():
    registered.callback, registered.context_settings = guarded(registered.callback), HELP  # type: ignore[arg-type]


def _empty(arguments: list[str]) -> str | None:
    """Return the option that was given an empty text, as an unset variable of a shell leaves it, or None."""
    pairs = [(name, value) for name, value in pairwise(arguments) if name.startswith("-")]
    pairs += [(a.partition("=")[0], a.partition("=")[2]) for a in arguments if a.startswith("--") and "=" in a]
    return next((name for name, value in pairs if not value.strip() and name not in ("--exclude", "--system")), None)


def run(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 something that the user can mend, 130 interrupted, 143 ended by SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if (empty := _empty(arguments)) is not None:  # a path would be taken for the present folder
        say(f"addenda: {empty} has an empty value. Give one, or leave {empty} out.")
        sys.exit(2)
    try:
        with terminable():
            app(arguments)
    except KeyboardInterrupt as error:
        print("addenda: interrupted.", file=sys.stderr)  # before a command began
        sys.exit(exit_code(error))
    except Exception as error:
        from addenda.core.base.errors import AddendaError
        from addenda.core.disk.access import printable, reading

        if "--debug" in arguments or not isinstance(error, (AddendaError, OSError)):
            raise
        if not isinstance(error, AddendaError):  # of a path that no command has looked at itself, or of what is printed
            told = f"The system could not read or write ({error.strerror or error}). Look at where the output goes."
            try:
                with reading(error.filename or ""):
                    raise error if error.filename else AddendaError(told)
            except AddendaError as made:
                error = made
        text = printable(str(error))
        if len(text) > MOST:  # a name in it is of 100,000 characters
            text = f"{text[: MOST * 2 // 3]}…{text[-MOST // 3 :]}"
        with suppress(OSError):  # where that is full as well
            say(f"addenda: {text}")
        sys.exit(2)
