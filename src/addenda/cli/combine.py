"""`addenda combine`: several adapter files of one model as one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from addenda.cli.common import Device, Dtype, Model, Trust, listed, model_or_default, tell

RULE, HELD = "Options of rules", "How the result is held"


def register(app: typer.Typer) -> None:
    app.command()(combine)


def combine(
    files: Annotated[list[Path], typer.Argument(help="Adapter files of one model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The adapter file to write.")],
    how: Annotated[
        str, typer.Option("--how", help="cat, linear, svd, ties, dare, della, magnitude, tsv, iso-c, core-space, …")
    ] = "cat",
    model: Model = None,
    weights: Annotated[str | None, typer.Option("--weights", help="One for each file, by commas.")] = None,
    scale: Annotated[float, typer.Option("--scale", help="Of the result.")] = 1.0,
    rule: Annotated[
        str | None, typer.Option("--rule", help="What acts in core-space or knots.", rich_help_panel=RULE)
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Share of entries that are kept.", rich_help_panel=RULE)
    ] = None,
    window: Annotated[
        float | None, typer.Option("--window", help="Of the probabilities of della.", rich_help_panel=RULE)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what dare and della drop.", rich_help_panel=RULE)] = 0,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Highest rank of the result.", rich_help_panel=HELD)
    ] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Or the share of the change to keep.", rich_help_panel=HELD)
    ] = None,
    form: Annotated[
        str, typer.Option("--form", help="auto, low-rank, sparse or dense.", rich_help_panel=HELD)
    ] = "auto",
    absent: Annotated[
        str, typer.Option("--absent", help="A site that one file lacks: error or zero.", rich_help_panel=HELD)
    ] = "error",
    heads_of: Annotated[
        str | None,
        typer.Option("--heads-of", help="Whose heads it takes: a file by its name without suffix, or FOLDER/NAME."),
    ] = None,
    base: Annotated[str, typer.Option("--base", help="exact, or compatible: another dtype.")] = "exact",
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write one adapter that several of one model come to, and say how far it is from their weighted sum."""
    given = locals()
    from addenda.combining.combine import combine as combined
    from addenda.combining.combine import prepared
    from addenda.combining.options import SPECIAL
    from addenda.combining.sources import names_of
    from addenda.core.base import ranges
    from addenda.core.base.errors import AddendaError
    from addenda.core.disk.whole import free_place, whole
    from addenda.models.load import dtype_for, load_model, wanted_by

    options: dict[str, Any] = {n: given[n] for n in _OWN}
    options["weights"] = None if weights is None else _numbers(weights)
    if problems := ranges.problems({n: given[n] for n in SPECIAL}, SPECIAL):
        raise AddendaError(f"These options cannot be: {'; '.join(f'--{p}' for p in problems)}.")
    place = free_place(out, "--out")  # all of this before the model is read, which takes longer
    prepared(files, **options)
    wanted: dict[str, Any] = wanted_by(dict(zip(names_of(files), files, strict=True)).get(heads_of or "", files[0]))
    wanted |= {"dtype": dtype_for(files, dtype), "trust_remote_code": trust_remote_code}
    loaded = load_model(model_or_default(model), device=device, **wanted)
    report = combined(files, model=loaded.model, **options)
    tell(report)
    with whole(place, folder=False) as beside:  # where nothing is, not even what came meanwhile
        report.adapter.save(beside)
    tell(f"written: {place}")


_OWN = ("how", "scale", "rule", "density", "window", "seed", "rank", "energy", "form", "absent", "heads_of", "base")


def _numbers(text: str) -> list[float]:
    from addenda.core.base.errors import AddendaError

    try:
        return [float(part) for part in listed(text)]
    except ValueError:
        raise AddendaError(f"--weights are numbers, one for each file, such as 0.5,0.5; got {text!r}.") from None
