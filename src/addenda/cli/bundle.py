"""`addenda bundle`: what moves with an adapter, so that another base can learn it without the data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from addenda.cli.common import (
    Answer,
    DataFile,
    Device,
    Dtype,
    Model,
    Question,
    Trust,
    columns_of,
    data_or_default,
    model_or_default,
    say,
    tell,
)

FIT = "The discriminator"


def register(app: typer.Typer) -> None:
    app.command()(bundle)


def bundle(
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="The adapter file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle to write.")],
    model: Model = None,
    data: DataFile = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the task. Default: the data's.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Inputs of the task to keep, word for word.")] = 5,
    split: Annotated[str, typer.Option("--split", help="Which part of the data.")] = "train",
    count: Annotated[
        int | None,
        typer.Option(
            "--count",
            help="Inputs that the discriminator learns from, and that a transfer makes. Default: all, 1,000 at most.",
        ),
    ] = None,
    question: Question = None,
    answer: Answer = None,
    method: Annotated[
        str, typer.Option("--method", help="Its method (see methods).", rich_help_panel=FIT)
    ] = "lora:rank=8",
    steps: Annotated[int, typer.Option("--steps", help="Of its training, at most.", rich_help_panel=FIT)] = 200,
    batch: Annotated[int, typer.Option("--batch", help="Texts a step.", rich_help_panel=FIT)] = 16,
    rate: Annotated[float, typer.Option("--rate", help="Highest learning rate.", rich_help_panel=FIT)] = 1e-3,
    held_share: Annotated[
        float, typer.Option("--held-share", help="Of the texts, held out to judge it by.", rich_help_panel=FIT)
    ] = 0.2,
    early_stop: Annotated[
        int, typer.Option("--early-stop", help="Looks without gain before it stops.", rich_help_panel=FIT)
    ] = 3,
    answers: Annotated[
        str, typer.Option("--answers", help="Its two words, one token each.", rich_help_panel=FIT)
    ] = "yes,no",
    temperature: Annotated[
        float, typer.Option("--temperature", help="Temperature at which the base makes negatives.", rich_help_panel=FIT)
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw, the sampling and the training.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Keep a few seeds and a discriminator of the task, while its data is there: `addenda transfer` reads them."""
    from addenda.cli.common import listed
    from addenda.core.disk.place import file_for
    from addenda.data.read import read
    from addenda.models.load import dtype_for, load_model, wanted_by
    from addenda.transferring.bundle import is_bundle
    from addenda.transferring.make_bundle import make_bundle

    file_for(out, is_bundle, what="--out")  # all of this before the model is read, which takes longer
    columns: dict[str, Any] = columns_of(question=question, answer=answer)
    examples = read(data_or_default(data), split=split, **columns)
    wanted: dict[str, Any] = wanted_by(adapter) | {"task": "causal", "trust_remote_code": trust_remote_code}
    wanted["dtype"] = dtype_for([adapter], dtype)
    loaded = load_model(model_or_default(model), device=device, **wanted)
    made = make_bundle(
        loaded.model, loaded.tokenizer, adapter, examples, out, seeds=seeds, name=name, count=count, method=method,
        steps=steps, batch=batch, rate=rate, held_share=held_share, early_stop=early_stop, answers=listed(answers),
        temperature=temperature, seed=seed, say=say, progress=_told,
    )  # fmt: skip
    tell(made)


def _told(event: Any) -> None:
    if event.evaluation is not None:
        found = event.evaluation
        say(f"step {event.step} of {event.steps}: held out {found['accuracy']:.1%} right, loss {found['loss']:.3f}")
