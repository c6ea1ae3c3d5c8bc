"""`addenda compress`: a smaller model out of a larger one."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from addenda.cli.common import Device, Dtype, Exclude, Model, Targets, listed, model_or_default, say

RANKS, TEXT = "Ranks", "Text"


def register(app: typer.Typer) -> None:
    app.command()(compress)


def compress(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the smaller model; a killed run goes on.")],
    model: Model = None,
    how: Annotated[
        str, typer.Option("--how", help="lord, svd-llm, drone, asvd, fwsvd, svd; dense multiplies factors out again.")
    ] = "lord",
    ratio: Annotated[
        float, typer.Option("--ratio", help="Share of the compressed layers' parameters to remove; 0.2 keeps 80 %.")
    ] = 0.2,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            "-d",
            help="Text file, folder or rows. Default: python, its standard library.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Windows of text.", rich_help_panel=TEXT)] = 64,
    length: Annotated[int, typer.Option("--length", help="Tokens of a window.", rich_help_panel=TEXT)] = 512,
    allocate: Annotated[
        str, typer.Option("--allocate", help="waterfill, uniform, energy, sensitivity or asvd.", rich_help_panel=RANKS)
    ] = "waterfill",
    budget: Annotated[str, typer.Option("--of", help="parameters or flops.", rich_help_panel=RANKS)] = "parameters",
    floor: Annotated[
        float, typer.Option("--floor", help="Lowest share of the uniform rank (waterfill).", rich_help_panel=RANKS)
    ] = 0.5,
    weigh: Annotated[
        str,
        typer.Option(
            "--weigh",
            help="Layers by their error alone, or by its part in the loss (waterfill).",
            rich_help_panel=RANKS,
        ),
    ] = "error",
    share: Annotated[float, typer.Option("--share", help="Energy kept (energy).", rich_help_panel=RANKS)] = 0.99,
    rise: Annotated[
        float, typer.Option("--rise", help="Perplexity's rise allowed (sensitivity).", rich_help_panel=RANKS)
    ] = 0.01,
    multiple: Annotated[int, typer.Option("--multiple", help="Ranks are multiples.", rich_help_panel=RANKS)] = 8,
    storage: Annotated[str, typer.Option("--storage", help="factors, or pivot: r² numbers fewer.")] = "factors",
    split: Annotated[str, typer.Option("--split", help="left, or sqrt: factors of like size.")] = "left",
    center: Annotated[bool, typer.Option("--center", help="Take the mean out, into the bias (lord).")] = False,
    sequential: Annotated[bool, typer.Option("--sequential", help="Solve on compressed inputs.")] = False,
    targets: Targets = None,
    exclude: Exclude = "",
    latency: Annotated[bool, typer.Option(help="Measure tokens a second; both forms are in memory then.")] = True,
    by_type: Annotated[bool, typer.Option(help="Judge each type of layer compressed alone, too.")] = True,
    humaneval: Annotated[
        int,
        typer.Option(
            "--pass-at-1",
            help="Problems of HumanEval to try, before and after. EXECUTES what the model writes. 0: none.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice of text.", rich_help_panel=TEXT)] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Make a model's linear layers low rank, and say what that costs and brings."""
    if how == "dense":
        from addenda.compress.dense import to_dense

        typer.echo(f"written: {to_dense(model_or_default(model), out, dtype=dtype)}")
        return
    from addenda.compress.run import compress as run
    from addenda.compress.settings import Settings

    settings = Settings(
        how=how, remove=ratio, of=cast(Any, budget), allocate=cast(Any, allocate), share=share, rise=rise, floor=floor,
        weigh=cast(Any, weigh), multiple=multiple, storage=cast(Any, storage), split=cast(Any, split), center=center,
        sequential=sequential, samples=samples, length=length, seed=seed,
    )  # fmt: skip
    report = run(
        model_or_default(model), out=out, calibration=calibration, settings=settings,
        targets=listed(targets) if targets else "linear", exclude=listed(exclude), dtype=dtype, device=device,
        latency=latency, by_type=by_type, humaneval=humaneval, say=say,
    )  # fmt: skip
    typer.echo(report)
    typer.echo(f"written: {out}, with README.md and compress.json")
