"""`addenda setup-demo`: the embedded models, fetched and converted once."""

from typing import Annotated

import typer

from addenda.cli.common import say, tell
from addenda.core.base.errors import AddendaError


def register(app: typer.Typer) -> None:
    app.command("setup-demo")(setup_demo)


def setup_demo(
    vision: Annotated[bool, typer.Option("--vision", help="The vision model instead: DINOv2-small (90 MB).")] = False,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="An encoder of texts instead: splade-tiny (17 MB), minilm (84 MB).")
    ] = None,
) -> None:
    """Fetch and convert the embedded model (93 MB, once), so that the other commands need no --model."""
    if encoder is not None:
        if vision:
            raise AddendaError("--vision and --encoder name one model each; run the command once for each.")
        from addenda.models.encoders import encoder_named

        tell(encoder_named(encoder).setup(say))
        return
    if vision:
        from addenda.models.vision import DINOV2

        tell(DINOV2.setup(say))
        return
    from addenda.models.embedded import setup_demo as setup

    tell(setup(say))
