"""`addenda merge`: a model's folder with the change of adapter files in its weights, without the model in memory."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from addenda.cli.common import Model, Rename, model_or_default, renaming, say, tell


def register(app: typer.Typer) -> None:
    app.command()(merge)


def merge(
    adapter: Annotated[
        list[Path], typer.Option("--adapter", "-a", help="Adapter file; given again, the changes add up.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder; nothing may be there yet.")],
    model: Model = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16. Default: as the model's folder.")
    ] = None,
    rounding: Annotated[
        str, typer.Option("--rounding", help="nearest; or stochastic, which keeps small changes on average.")
    ] = "nearest",
    base: Annotated[
        str,
        typer.Option("--base", help="exact, or compatible: the adapter was trained on these weights in another dtype."),
    ] = "exact",
    rename: Rename = None,
    allow_loss: Annotated[
        float | None, typer.Option("--allow-loss", help="Share of the change that rounding may take, e.g. 0.5.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Load both and compare outputs. Without: no model in memory at all."),
    ] = True,
) -> None:
    """Write a model's folder with an adapter in its weights, for programs that know no adapters."""
    from addenda.core.disk.whole import free_place
    from addenda.exporting.merged import merge_on_disk

    paths = renaming(rename)
    free_place(out, "--out")  # before the embedded model is made
    tell(
        merge_on_disk(
            model_or_default(model), adapter, out, dtype=dtype, rounding=cast(Any, rounding), base=cast(Any, base),
            rename=paths, allow_loss=allow_loss, check=check, progress=_progress,
        )
    )  # fmt: skip


def _progress(done: int, total: int, what: str) -> None:
    if done == total:
        say(f"{total} weights {'compared with those of training' if what == 'base' else 'written'}")
