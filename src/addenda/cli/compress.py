"""`addenda compress`: a smaller model out of a larger one, or an adapter file in few bits."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from addenda.cli import run_file
from addenda.cli.common import (
    Device,
    Dtype,
    Exclude,
    Model,
    Trust,
    data_or_default,
    listed,
    model_or_default,
    refuse_unread,
    say,
    tell,
)

RANKS, TEXT, ADAPTER = "Ranks", "Text", "An adapter file in few bits"


def register(app: typer.Typer) -> None:
    app.command()(compress)


def compress(
    adapter: Annotated[Path | None, typer.Argument(help="An adapter file, with --how 1bit to 8bit.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for the smaller model; a killed run goes on. For an adapter: the new file."
        ),
    ] = None,
    model: Model = None,
    how: Annotated[
        str,
        typer.Option(
            "--how",
            help="lord, svd-llm, drone, asvd, fwsvd, svd; dense multiplies factors out; 1bit to 8bit: an adapter.",
        ),
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
            help="Layers by what their error does to the loss, or by error; auto: loss for a causal LM (waterfill).",
            rich_help_panel=RANKS,
        ),
    ] = "auto",
    share: Annotated[float, typer.Option("--share", help="Energy kept (energy).", rich_help_panel=RANKS)] = 0.99,
    rise: Annotated[
        float, typer.Option("--rise", help="Perplexity's rise allowed (sensitivity).", rich_help_panel=RANKS)
    ] = 0.01,
    multiple: Annotated[int, typer.Option("--multiple", help="Ranks are multiples.", rich_help_panel=RANKS)] = 8,
    storage: Annotated[str, typer.Option("--storage", help="factors, or pivot: r² numbers fewer.")] = "factors",
    split: Annotated[str, typer.Option("--split", help="left, or sqrt: factors of like size.")] = "left",
    center: Annotated[bool, typer.Option("--center", help="Take the mean out, into the bias (lord).")] = False,
    sequential: Annotated[bool, typer.Option("--sequential", help="Solve on compressed inputs.")] = False,
    targets: Annotated[
        str | None, typer.Option("--targets", help="Roles, globs or re:… of layers, by commas. Default: linear.")
    ] = None,
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
    head_bits: Annotated[
        int | None, typer.Option("--head-bits", help="Of heads trained with it; else full.", rich_help_panel=ADAPTER)
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Judge it on this, before and after.", rich_help_panel=ADAPTER)
    ] = None,
    part: Annotated[str, typer.Option("--part", help="Which part of the data.", rich_help_panel=ADAPTER)] = "test",
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Make a model's linear layers low rank, or put an adapter into few bits, and say what that costs and brings."""
    given = dict(locals())
    few = re.fullmatch(r"(\d+) ?-?bits?", how)
    _check_read(given, few is not None or adapter is not None)
    if few or adapter is not None:
        judge = _judge(adapter, model, data, part, dtype, device, trust_remote_code)
        _few_bits(adapter, few and int(few[1]), out, head_bits, judge)
        return
    if out is None:
        from addenda.core.base.errors import AddendaError

        raise AddendaError("A smaller model wants a folder: give --out FOLDER.")
    if how == "dense":
        from addenda.compressing.dense import to_dense

        made = to_dense(model_or_default(model), out, dtype=dtype, trust_remote_code=trust_remote_code)
        run_file.write(out, compress, given)
        tell(f"written: {made}")
        return
    from addenda.compressing.run import compress as run
    from addenda.compressing.settings import CompressionSettings

    settings = CompressionSettings(
        how=how, remove=ratio, of=cast(Any, budget), allocate=cast(Any, allocate), share=share, rise=rise, floor=floor,
        weigh=cast(Any, weigh), multiple=multiple, storage=cast(Any, storage), split=cast(Any, split), center=center,
        sequential=sequential, samples=samples, length=length, seed=seed,
    )  # fmt: skip
    report = _kept(out, run)(
        model_or_default(model), out=out, calibration=calibration, settings=settings,
        targets=listed(targets) if targets else "linear", exclude=listed(exclude), dtype=dtype, device=device,
        latency=latency, by_type=by_type, humaneval=humaneval, trust_remote_code=trust_remote_code, say=say,
        leave=lambda folder, made: run_file.write(folder, compress, given, {"dtype": made.dtype.partition(" ")[0]}),
    )  # fmt: skip
    tell(report)
    tell(f"written: {out}, with README.md, compress.json and {run_file.NAME}")


_ALWAYS = ("out", "model", "how", "dtype", "trust_remote_code")
_JUDGING = ("adapter", "head_bits", "model", "data", "part", "device")
_RANKS = {"share": "energy", "rise": "sensitivity", "floor": "waterfill", "weigh": "waterfill"}  # and who reads them
_BY_THEMSELVES = {"energy": "share", "sensitivity": "rise"}  # allocations that no share to remove decides


def _check_read(given: dict[str, Any], of_adapter: bool) -> None:
    """Raise AddendaError for options that nothing reads in this mode: an adapter's file, dense, or a smaller model."""
    how, allocate = given["how"], given["allocate"]
    if of_adapter:
        refuse_unread(compress, given, given.keys() - {*_ALWAYS, *_JUDGING}, "for an adapter file in few bits.")
        if given["model"] is None and given["data"] is None:
            reading = ("part", "device", "dtype", "trust_remote_code")
            refuse_unread(compress, given, reading, "without a judge: give --model and --data.")
        return
    refuse_unread(compress, given, ("head_bits", "data", "part"), "without an adapter file to put into few bits.")
    if how == "dense":
        refuse_unread(compress, given, given.keys() - {*_ALWAYS}, "with --how dense, which multiplies factors out.")
        return
    for name, reader in _RANKS.items():
        if allocate != reader:
            refuse_unread(compress, given, (name,), f"with --allocate {allocate}; it is for --allocate {reader}.")
    if allocate in _BY_THEMSELVES:
        own = f"with --allocate {allocate}, where --{_BY_THEMSELVES[allocate]} decides how much is removed."
        refuse_unread(compress, given, ("ratio", "budget"), own)


def _kept(out: Path, run: Callable) -> Callable:
    """Return `run`, made to say what is kept where it is interrupted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        from addenda.train.unfinished import beside

        try:
            return run(*args, **kwargs)
        except KeyboardInterrupt as error:
            folder = beside(out.expanduser().resolve())
            there = folder.is_dir() and any(folder.glob("piece-*"))
            error.add_note(
                f"Kept: the layers solved so far, in {folder}. The same command goes on there." if there else
                "Nothing is kept yet: no layer was solved."
            )  # fmt: skip
            raise

    return call


def _few_bits(adapter: Path | None, bits: int | None, out: Path | None, head_bits: int | None, judge) -> None:
    from addenda.compressing.adapter import compress_adapter
    from addenda.core.base.errors import AddendaError

    if adapter is None or bits is None:
        raise AddendaError(
            "An adapter in few bits wants a file and how many: addenda compress --how 1bit adapter.safetensors"
        )
    report = compress_adapter(adapter, bits, out, head_bits=head_bits, judge=judge)
    tell(report)
    tell(f"written: {report.path}")


def _judge(
    adapter: Path | None,
    model: Path | None,
    data: Path | None,
    part: str,
    dtype: str,
    device: str | None,
    trust_remote_code: bool,
) -> Callable[[Path], Any] | None:
    """Return what `addenda eval` says of an adapter file; None where neither a model nor data is named."""
    if model is None and data is None:
        return None
    from addenda.cli.evaluate import with_adapter
    from addenda.core.adapter.handle import adapters
    from addenda.models.load import labels_beside, wanted_by
    from addenda.train.evaluate import evaluate

    def judge(file: Path) -> Any:  # classes and image size are those of the run that made the adapter
        side = wanted_by(adapter).get("image_size")
        loaded = with_adapter(model, file, dtype, device, side, trust_remote_code)
        if names := labels_beside(adapter):
            adapters(loaded.model)["default"].labels = names
        return evaluate(loaded.model, loaded.tokenizer, data_or_default(data), split=part)

    return judge
