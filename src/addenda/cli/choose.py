"""`addenda choose`: which arm of a finished comparison to take, and the command that trains it."""

from pathlib import Path
from typing import Annotated

import typer

from addenda.cli.common import tell


def register(app: typer.Typer) -> None:
    app.command()(choose)


def choose(
    record: Annotated[Path, typer.Argument(help="A record directory, as compare leaves it.")],
    cost: Annotated[
        str, typer.Option("--cost", help="What counts: memory (at the peak), size (of the file) or time (to train).")
    ] = "memory",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Which method to take: the cheapest not worse than the best by the margin, with its tune command."""
    import json

    from addenda.comparing.choose import COSTS
    from addenda.comparing.choose import choose as run
    from addenda.core.base.errors import AddendaError

    if cost not in COSTS:
        raise AddendaError(f"cost= is one of {', '.join(COSTS)}, got {cost!r}.")
    choice = run(record, cost)  # type: ignore[arg-type]
    if as_json:
        tell(json.dumps(choice.as_json(), indent=1))
        return
    tell("Nothing is recommended." if choice.title is None else f"{choice.title}: {choice.cost} {choice.price}")
    tell(choice.why)
    if choice.command is not None:
        tell(choice.command)
