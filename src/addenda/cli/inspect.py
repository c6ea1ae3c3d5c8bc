"""`addenda inspect`: what an adapter file holds; no model needed."""

from pathlib import Path
from typing import Annotated

import typer

from addenda.cli.common import tell


def register(app: typer.Typer) -> None:
    app.command()(inspect)


def inspect(file: Annotated[Path, typer.Argument(help="An adapter file.")]) -> None:
    """Show the methods, sites and size of an adapter file."""
    from addenda.core.file.inspect import inspect as describe

    tell(describe(file))
