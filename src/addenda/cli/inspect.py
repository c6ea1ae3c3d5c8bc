"""`addenda inspect`: what an adapter holds, whoever wrote it; no model needed."""

from pathlib import Path
from typing import Annotated

import typer

from addenda.cli.common import refuse_unread, tell

ENGINE = "Whether an engine would serve it"


def register(app: typer.Typer) -> None:
    app.command()(inspect)


def inspect(
    file: Annotated[Path, typer.Argument(help="A file of addenda, GGUF or kohya, a folder of PEFT, or a bundle.")],
    engine: Annotated[
        str | None,
        typer.Option("--for", help="vllm: check a folder by its rules, without it.", rich_help_panel=ENGINE),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Folder of the base, for names.", rich_help_panel=ENGINE)
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option("--max-lora-rank", help="What it is started with.", rich_help_panel=ENGINE)
    ] = None,
) -> None:
    """Show the methods, sites and size of an adapter file, whoever wrote it."""
    from addenda.core.base.errors import AddendaError
    from addenda.exporting.formats import format_of
    from addenda.exporting.inspect import inspect as describe
    from addenda.transferring.bundle import is_bundle, read_bundle

    if engine is None:
        refuse_unread(inspect, locals(), ("model", "max_lora_rank"), "without --for.")
    elif engine != "vllm":
        raise AddendaError(f"Only vllm has rules that are checked here, got --for {engine!r}.")
    elif (kind := format_of(file)) != "peft":
        raise AddendaError(f"vllm reads folders of PEFT, and {file} is an adapter of {kind}. Export it: --to vllm.")
    tell(read_bundle(file) if is_bundle(file) else describe(file))
    if engine is None:
        return
    from addenda.exporting.vllm import check

    problems = check(file, max_lora_rank=max_lora_rank, config=model)
    if problems:
        told = "; ".join(p.rstrip(".") for p in problems[:12])
        raise AddendaError(f"vLLM would not serve this as it is meant: {told}.")
    unknown = "" if model else ";\n  whether the base has these modules, --model says"
    tell(f"vllm: nothing keeps it from being served{unknown}")
