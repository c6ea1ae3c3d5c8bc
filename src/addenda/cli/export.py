"""`addenda export` and `addenda import`: an adapter file for another program, or of one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from addenda.cli.common import Device, Dtype, Model, Rename, Trust, model_or_default, refuse_unread, say, tell
from addenda.cli.evaluate import with_adapter

_OPTIONS = {"uniform": "uniform", "max_lora_rank": "max_lora_rank", "stored": "dtype"}  # of the command and of doors
AS_LORA = "Methods that have no form of their own there"


def register(app: typer.Typer) -> None:
    app.command()(export)
    app.command("import")(import_)


def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter file of addenda.")],
    to: Annotated[str, typer.Option("--to", help="peft, vllm or merged: a folder; gguf or kohya: a file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder or file; nothing may be there yet.")],
    model: Model = None,
    rename: Rename = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Write them as LoRA of this rank.", rich_help_panel=AS_LORA)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Or of ranks that keep this share of the change.", rich_help_panel=AS_LORA),
    ] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="One rank for all sites, padded with zeros (vllm).")
    ] = False,
    max_lora_rank: Annotated[
        int | None, typer.Option("--max-lora-rank", help="What the engine is started with (vllm).")
    ] = None,
    stored: Annotated[
        str | None, typer.Option("--stored", help="How numbers are stored: f32, f16 (gguf); float32, … (kohya).")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="In which the model is read to prove it; merged: and written.")
    ] = "float32",
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write an adapter for PEFT, vLLM, llama.cpp or kohya, read it back, and show that it acts as here."""
    from addenda.core.adapter.handle import adapters
    from addenda.core.disk.whole import free_place
    from addenda.core.file.header import read
    from addenda.exporting.doors import door_called
    from addenda.exporting.export import export as write

    door = door_called(to)  # before the model is read, which takes longer
    free_place(out, "--out")
    header, _ = read(adapter)
    same = all(s.dtype == dtype for s in header.sites)
    unread = [name for name, option in _OPTIONS.items() if option not in door.options]
    refuse_unread(export, locals(), unread, f"with --to {to}.")
    asked: dict[str, Any] = {"uniform": uniform or None, "max_lora_rank": max_lora_rank, "stored": stored}
    given = {_OPTIONS[name]: value for name, value in asked.items() if value is not None}
    base = "exact" if same else "compatible"  # the same weights in another dtype
    folder = model.resolve() if model is not None and door.model else model  # whose tokenizer is copied
    loaded = with_adapter(folder, adapter, dtype, device, trust_remote_code=trust_remote_code, base=base, rename=rename)
    tell(write(adapters(loaded.model)["default"], door.name, out, rank=rank, energy=energy, **given))
    tell(f"written: {out}")


def import_(
    file: Annotated[Path, typer.Argument(help="A folder of PEFT, a GGUF adapter, or a file of kohya or LyCORIS.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The adapter file to write.")],
    model: Model = None,
    labels: Annotated[
        int | None, typer.Option("--labels", help="Outputs of a new classifier. Default: of the head in the adapter.")
    ] = None,
    part: Annotated[
        str | None, typer.Option("--part", help="Of a file of kohya for several models: this one's, e.g. lora_te1.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Read an adapter that another program has trained, and write it as an adapter file of addenda."""
    from addenda.core.base.errors import AddendaError
    from addenda.core.disk.whole import free_place, whole
    from addenda.exporting.formats import format_of
    from addenda.exporting.import_adapter import import_adapter, outputs_in
    from addenda.models.load import load_model

    place = free_place(out, "--out")
    say(f"{file} is an adapter of {format_of(file)}")
    outputs = outputs_in(file)
    if None not in (labels, outputs) and labels != outputs:
        raise AddendaError(f"The head in {file} has {outputs} outputs, and labels={labels} were asked for.")
    wanted: dict[str, Any] = {"labels": labels or outputs, "dtype": dtype, "device": device}
    loaded = load_model(model_or_default(model), **wanted, trust_remote_code=trust_remote_code)
    adapter = import_adapter(loaded.model, file, part=part)
    tell(adapter)
    with whole(place, folder=False) as beside:  # where nothing is, not even what came meanwhile
        adapter.save(beside)
    tell(f"written: {place}")
