"""`addenda setup-demo`: the embedded model, fetched and converted once."""

import typer

from addenda.cli.common import say


def register(app: typer.Typer) -> None:
    app.command("setup-demo")(setup_demo)


def setup_demo() -> None:
    """Fetch and convert the embedded model (93 MB, once), so that the other commands need no --model."""
    from addenda.train.embedded import setup_demo as setup

    typer.echo(setup(say))
