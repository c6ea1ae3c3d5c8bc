"""`addenda inspect`: what an adapter holds, whoever wrote it; no model needed."""

from pathlib import Path
from typing import Annotated

import typer

from addenda.cli.common import tell


def register(app: typer.Typer) -> None:
    app.command()(inspect)


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter: a file of addenda, GGUF, kohya, or a folder of PEFT.")],
) -> None:
    """Show the methods, sites and size of an adapter file, whoever wrote it."""
    from addenda.exporting.inspect import inspect as describe

    tell(describe(file))
