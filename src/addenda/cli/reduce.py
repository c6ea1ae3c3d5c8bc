"""`addenda reduce`: what adapter files change, as one adapter in fewer numbers."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from addenda.cli.common import Device, Dtype, Model, Trust, refuse_unread, say, tell
from addenda.cli.evaluate import with_adapter

WEIGHING = "Weighed by what layers are given"


def register(app: typer.Typer) -> None:
    app.command()(reduce)


def reduce(
    files: Annotated[list[Path], typer.Argument(help="Adapter files of one model; of several, the sum.")],
    to: Annotated[
        str, typer.Option("--to", help="lora; sparse: the largest entries; bits: codes; patch: changed entries.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new adapter file; nothing may be there yet.")],
    model: Model = None,
    rank: Annotated[int | None, typer.Option("--rank", help="lora: of this rank at most.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="lora: the lowest rank that keeps this share of each change.")
    ] = None,
    density: Annotated[float | None, typer.Option("--density", help="sparse: share of each matrix's entries.")] = None,
    count: Annotated[int | None, typer.Option("--count", help="sparse: entries of each matrix.")] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="bits: 1 to 8 an entry. Default: 1.")] = None,
    weigh: Annotated[
        Path | None,
        typer.Option(
            "--weigh",
            help="Text file, folder or rows (python: its library): keep what outputs show on it (lora, sparse).",
            rich_help_panel=WEIGHING,
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Windows of text.", rich_help_panel=WEIGHING)] = 32,
    length: Annotated[int, typer.Option("--length", help="Tokens of a window.", rich_help_panel=WEIGHING)] = 256,
    base: Annotated[
        str, typer.Option("--base", help="exact; compatible takes the same weights in another dtype.")
    ] = "exact",
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Make one smaller adapter of what others change together, and say what that loses, by site and in outputs."""
    from addenda.core.adapter.handle import Adapter, adapters
    from addenda.core.adapter.load import load
    from addenda.core.disk.whole import free_place, whole
    from addenda.exporting.reduce import check_form
    from addenda.exporting.reduce import reduce as run
    from addenda.models.load import dtype_for

    given: dict[str, Any] = {"rank": rank, "energy": energy, "density": density, "count": count, "bits": bits}
    check_form(to, given | {"weigh": None if weigh is None else [weigh]})  # before the model is read
    if weigh is None:
        refuse_unread(reduce, locals(), ("samples", "length"), "without texts to weigh by: give weigh=.")
    place = free_place(out, "--out")
    _refuse_hidden(files)
    dtype = dtype_for(files, dtype)
    loaded = with_adapter(model, files[0], dtype, device, trust_remote_code=trust_remote_code, base=base)
    chosen: list[Adapter] = [adapters(loaded.model)["default"]]
    for i, file in enumerate(files[1:], 2):
        chosen.append(load(loaded.model, file, name=f"file-{i}", base=cast(Any, base), activate=False))
    batches, probe = _texts(loaded.tokenizer, weigh, samples, length)
    report = run(chosen, cast(Any, to), **given, weigh=batches, probe=probe)
    tell(report)
    with whole(place, folder=False) as beside:  # where nothing is, not even what came meanwhile
        report.adapter.save(beside)
    tell(f"written: {place}")


def _refuse_hidden(files: list[Path]) -> None:
    """Raise AddendaError for a file twice, and for methods that no weight can hold, which their files tell already."""
    from addenda.core.base.errors import AddendaError
    from addenda.core.file.header import read
    from addenda.core.file.methods import methods_of
    from addenda.core.method.hidden import HiddenMethod

    if len({file.resolve() for file in files}) < len(files):
        raise AddendaError("A file is named twice, and its change would count twice. Name each once.")
    for file in files:
        header, _ = read(file)
        hidden = [m.name for m in methods_of(header, file)[0] if isinstance(m, HiddenMethod)]
        if hidden:
            raise AddendaError(
                f"{file} holds {', '.join(hidden)}, which changes activations: no change of a weight is the same, so "
                "that it cannot be reduced."
            )


def _texts(tokenizer: Any, source: Path | None, samples: int, length: int) -> tuple[list | None, dict | None]:
    """Return batches to weigh by, and one of other text to compare outputs on; None where there are no texts."""
    if source is None:
        return None, None
    from addenda.compressing.texts import windows
    from addenda.core.base.errors import AddendaError

    if not hasattr(tokenizer, "pad_token_id"):
        raise AddendaError("The model reads no text, so that weigh= has nothing to give it. Leave it out.")
    seen, other = windows(tokenizer, source, samples, length, judge=4)
    say(f"weighed by {len(seen.rows)} windows ({seen.tokens:,} tokens) of {seen.source}")
    return seen.batches(8), other.batches(4)[0]
