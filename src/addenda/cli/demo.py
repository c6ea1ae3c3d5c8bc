"""`addenda setup-demo`: the embedded models, fetched and converted once."""

from typing import Annotated

import typer

from addenda.cli.common import say, tell


def register(app: typer.Typer) -> None:
    app.command("setup-demo")(setup_demo)


def setup_demo(
    vision: Annotated[bool, typer.Option("--vision", help="The vision model instead: DINOv2-small (90 MB).")] = False,
) -> None:
    """Fetch and convert the embedded model (93 MB, once), so that the other commands need no --model."""
    if vision:
        from addenda.models.vision import DINOV2

        tell(DINOV2.setup(say))
        return
    from addenda.models.embedded import setup_demo as setup

    tell(setup(say))
