"""`addenda tune`: adapt a model to data, resumable."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from addenda.cli import run_file
from addenda.cli.common import (
    SPEED,
    Answer,
    DataFile,
    Device,
    Dtype,
    Exclude,
    Image,
    ImageSize,
    Label,
    LabelKind,
    MaxLength,
    Model,
    Overflow,
    Quantize,
    Question,
    ReportTo,
    SkipCorrupt,
    Subset,
    Targets,
    Text,
    Trust,
    columns_of,
    data_or_default,
    left_out,
    listed,
    model_or_default,
    say,
    tell,
)
from addenda.core.base.errors import AddendaError
from addenda.train.settings import DOCS, Settings
from addenda.train.tracking import trackers_of


def _training(flag: str, what: str = "", more: str = "", panel: str = "Training"):
    """Return an option of training. Where it is a field of `Settings`, its help is the field's sentence, and `more`."""
    name = flag.partition("/")[0].removeprefix("--").replace("-", "_")
    return typer.Option(flag, help=what or DOCS[name] + more, rich_help_panel=panel)


def _speed(flag: str):
    return _training(flag, panel=SPEED)


def _masked(flag: str, what: str):
    return _training(flag, what, panel="Masked language modelling")


def register(app: typer.Typer) -> None:
    app.command()(tune)


def tune(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the adapter, card, record and checkpoints.")],
    model: Model = None,
    data: DataFile = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="A method and its options, e.g. lora:rank=16 (see methods). Default: lora."),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--start", help="An adapter file to begin with; method and sites are then its own.")
    ] = None,
    targets: Targets = None,
    exclude: Exclude = "",
    head_bits: Annotated[
        int | None, typer.Option("--head-bits", help="A trained head in 1 to 8 bits; a method's own: bits=1 in it.")
    ] = None,
    add_tokens: Annotated[
        str | None,
        typer.Option("--add-tokens", help="New tokens by commas, trained too; the tokenizer is saved in --out."),
    ] = None,
    steps: Annotated[int | None, _training("--steps")] = None,
    epochs: Annotated[float | None, _training("--epochs", "Passes over the data (1 without --steps).")] = None,
    batch: Annotated[int, _training("--batch")] = Settings.batch,
    accumulate: Annotated[int, _speed("--accumulate")] = Settings.accumulate,
    rate: Annotated[float | None, _training("--rate", more=" Default: the catalogue's for the method.")] = None,
    schedule: Annotated[str, _training("--schedule")] = Settings.schedule,
    warmup: Annotated[float, _training("--warmup")] = Settings.warmup,
    weight_decay: Annotated[float, _training("--weight-decay")] = Settings.weight_decay,
    consistency: Annotated[float, _training("--consistency")] = Settings.consistency,
    consistency_add: Annotated[float, _training("--consistency-add")] = Settings.consistency_add,
    seed: Annotated[int, _training("--seed")] = Settings.seed,
    task: Annotated[
        str | None, _masked("--task", "masked: an encoder fills in words of plain texts (.txt: one a line; a column).")
    ] = None,
    head: Annotated[Path | None, _masked("--head", "A head.safetensors to begin with, instead of fitting one.")] = None,
    head_steps: Annotated[
        int | None, _masked("--head-steps", "Steps of fitting a head first. Default: 300 where the model has none.")
    ] = None,
    train_head: Annotated[bool, _masked("--train-head", "The head learns along; it is never in the adapter.")] = False,
    vocabulary: Annotated[
        str, _masked("--vocabulary", "Tokens that the loss runs over: texts, those that occur; or all.")
    ] = "texts",
    eval_data: Annotated[str | None, _training("--eval", "Data to judge by, or a share of --data such as 0.1.")] = None,
    eval_every: Annotated[int | None, _training("--eval-every", "Steps between evaluations.")] = None,
    early_stop: Annotated[int | None, _training("--early-stop")] = Settings.early_stop,
    question: Question = None,
    answer: Answer = None,
    text: Text = None,
    label: Label = None,
    label_kind: LabelKind = None,
    image: Image = None,
    subset: Subset = None,
    image_size: ImageSize = None,
    skip_corrupt: SkipCorrupt = False,
    max_length: MaxLength = None,
    overflow: Overflow = "error",
    dtype: Dtype = "auto",
    device: Device = None,
    quantize: Quantize = None,
    trust_remote_code: Trust = False,
    report_to: ReportTo = "none",
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run in --out.")] = True,
    attention: Annotated[str, _speed("--attention")] = "auto",
    loss: Annotated[str, _speed("--loss")] = Settings.loss,
    group: Annotated[bool, _speed("--group/--no-group")] = Settings.group,
    compile: Annotated[bool, _speed("--compile")] = Settings.compile,
    checkpointing: Annotated[bool, _speed("--checkpointing")] = Settings.checkpointing,
    lean: Annotated[bool, _speed("--lean")] = Settings.lean,
    optimizer: Annotated[str, _speed("--optimizer")] = Settings.optimizer,
    dead: Annotated[
        str, _training("--dead", "raise, or warn: of tensors that the first step does not reach (dropped layers).")
    ] = "raise",
) -> None:
    """Train an adapter; killed at any moment, the same command goes on."""
    given = dict(locals())
    from addenda.core.method.catalogue import build

    # a mistake here should not cost the seconds that transformers takes
    chosen = None if method is None else build(method)
    trackers_of(report_to)
    run_file.check_place(out, tune)
    from addenda.core.disk.place import is_first
    from addenda.train.progress import judged, told
    from addenda.train.tune import tune as run

    made = run(
        _model(model, task), _data(data, task), chosen,
        task=cast(Any, task), head=head, head_steps=head_steps, train_head=train_head, vocabulary=cast(Any, vocabulary),
        start=start, targets=listed(targets) if targets else None, exclude=listed(exclude), head_bits=head_bits,
        add_tokens=listed(add_tokens or ""),
        out=out, epochs=epochs, eval_data=_share(eval_data), eval_every=eval_every, resume=resume, dead=dead,
        max_length=max_length, overflow=cast(Any, overflow), dtype=dtype, device=device, quantize=quantize,
        columns=columns_of(question=question, answer=answer, text=text, label=label, image=image),
        subset=subset, image_size=image_size, skip_corrupt=skip_corrupt, label_kind=cast(Any, label_kind),
        trust_remote_code=trust_remote_code, report_to=report_to,
        **{name: given[name] for name in DOCS if name in given},
    )  # fmt: skip
    if not is_first():  # of several processes one writes and tells
        return
    run_file.write(out, tune, given, _chosen(out))
    if made.skipped:
        tell(left_out(made.skipped))
    if made.resumed_from:
        say(f"went on from step {made.resumed_from}")
    for when, result in (("before", made.before), ("after", made.after)):
        if result:
            tell(f"{when}: {judged(result)}")
    if not made.losses or not made.seconds:
        tell(f"the run was finished before: {made.steps} steps; nothing was trained. written: {made.path}")
        return
    memory = "" if made.peak_memory is None else f", {made.peak_memory / 2**20:,.0f} MiB above the model"
    tell(f"attached in {made.adapter.seconds:.1f} s, {made.adapter.trainable:,} trained numbers")
    tell(f"{made.step_seconds:.3f} s a step, {made.tokens_per_second:,.0f} {made.unit}/s{memory}")
    for line in told(made.choices):
        tell(line)
    tell(f"written: {made.path}, with README.md, run.json and {run_file.NAME}")


def _model(model: Path | None, task: str | None) -> Any:
    """Return the model's folder; of masked LMs also by the name of an embedded encoder, e5 where none is named."""
    if task != "masked" or (model is not None and model.exists()):
        return model_or_default(model)
    from addenda.models.encoders import encoder_folder

    return encoder_folder("e5" if model is None else model, say)


def _data(data: Path | None, task: str | None) -> Any:
    if data is None and task == "masked":
        raise AddendaError("task='masked' learns plain texts, and none are embedded: give --data.")
    return data_or_default(data)


def _chosen(out: Path) -> dict[str, Any]:
    """Return the values that a run chose for options left to their default, out of its run.json."""
    from addenda.core.disk.access import path_of
    from addenda.models.machine import DTYPES
    from addenda.train.card import read_run

    run = read_run(path_of(out, "out")) or {"options": {}}
    names = {k: choice.get("name") for k, choice in run.get("choices", {}).items() if k in ("attention", "loss")}
    found = names | {k: run["options"].get(k) for k in ("rate", "dtype")}
    return {k: v for k, v in found.items() if v is not None and (k != "dtype" or v in DTYPES)}


def _share(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
