"""`addenda extract`: what a tuned checkpoint has changed of its base, as an adapter file."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from addenda.cli.common import say, tell

FORM = "Size of the form"


def register(app: typer.Typer) -> None:
    app.command()(extract)


def extract(
    base: Annotated[Path, typer.Option("--base", help="Folder of the model that was tuned.")],
    tuned: Annotated[Path, typer.Option("--tuned", help="Folder of what it has become.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new adapter file; nothing may be there yet.")],
    to: Annotated[
        str, typer.Option("--to", help="lora; sparse; bits, a few an entry; or patch, which loses nothing.")
    ] = "lora",
    rank: Annotated[int | None, typer.Option("--rank", help="Of lora.", rich_help_panel=FORM)] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Of lora: the share of each change to keep.", rich_help_panel=FORM)
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Of sparse: the share of entries.", rich_help_panel=FORM)
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", help="Of sparse: entries of each matrix.", rich_help_panel=FORM)
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="Of bits: 1 to 8.", rich_help_panel=FORM)] = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Load both and compare outputs. Without: no model in memory at all."),
    ] = True,
) -> None:
    """Write what a tuned checkpoint has changed of its base as an adapter file of the base."""
    from addenda.core.disk.whole import free_place
    from addenda.exporting.extract import extract as write

    def progress(done: int, path: str) -> None:
        if done % 50 == 0:
            say(f"{done} weights that differ are done, the last {path}")

    free_place(out, "--out")
    tell(
        write(
            base, tuned, out, to=cast(Any, to), rank=rank, energy=energy, density=density, count=count, bits=bits,
            check=check, progress=progress,
        )
    )  # fmt: skip
    tell(f"written: {out}")
