"""`addenda plan`: what would be attached where, and what it costs; nothing is changed."""

from typing import Annotated, Any

import typer

from addenda.cli.common import (
    Dtype,
    Exclude,
    Method,
    Model,
    Quantize,
    Targets,
    Trust,
    listed,
    model_or_default,
    refuse_unread,
    tell,
)


def register(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    model: Model = None,
    method: Method = "lora",
    targets: Targets = None,
    exclude: Exclude = "",
    head_bits: Annotated[int | None, typer.Option("--head-bits", help="A trained head in 1 to 8 bits.")] = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    trust_remote_code: Trust = False,
    batch: Annotated[
        int | None, typer.Option("--batch", help="With --length: predict memory and FLOPs of a step.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", help="Tokens of an example; side of an image. Default for images: the model's."),
    ] = None,
    labelled: Annotated[float, typer.Option("--labelled", help="Share of the tokens that have a label.")] = 1.0,
    door: Annotated[
        str | None,
        typer.Option("--for", help="Say too how it would leave: peft, vllm, gguf, kohya or merged (docs/doors.md)."),
    ] = None,
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="Whose state a step keeps. Default: the method's own (see methods).")
    ] = "auto",
) -> None:
    """Show the sites, shapes, trained numbers and bytes of a method on a model, and what a step of training takes."""
    if batch is None:
        refuse_unread(
            plan, locals(), ("length", "labelled", "optimizer"), "without --batch, which asks what a step takes."
        )
    from addenda.core.ask.plan import plan as make
    from addenda.core.method.catalogue import build
    from addenda.exporting.doors import door_called, passage
    from addenda.models.load import load_model
    from addenda.optim import build as build_optimizer

    chosen = build(method)  # before the model is read, which takes longer
    if door is not None:
        door_called(door)
    reading: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "trust_remote_code": trust_remote_code}
    loaded = load_model(model_or_default(model), device="cpu", **reading)
    size = getattr(loaded.tokenizer, "size", None)
    made = make(
        loaded.model,
        chosen,
        targets=listed(targets) if targets else None,
        exclude=listed(exclude),
        also_train=loaded.heads,
        head_bits=head_bits,
        batch=batch,
        length=size[0] if batch and length is None and size else length,
        labelled=labelled,
        optimizer=lambda adapter: build_optimizer(adapter, optimizer, steps=100),
    )
    tell(made)
    if door is not None:
        tell(
            passage(
                loaded.model, chosen, door, targets=listed(targets) if targets else None, exclude=listed(exclude),
                also_train=loaded.heads, head_bits=head_bits,
            )
        )  # fmt: skip
