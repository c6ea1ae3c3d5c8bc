"""`addenda eval` and `addenda generate`: a model, with or without an adapter."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from addenda.cli.common import (
    Answer,
    DataFile,
    Device,
    Dtype,
    Image,
    ImageSize,
    Label,
    LabelKind,
    MaxLength,
    Model,
    Overflow,
    Question,
    Rename,
    SkipCorrupt,
    Text,
    Trust,
    columns_of,
    data_or_default,
    left_out,
    model_or_default,
    renaming,
    say,
    tell,
)

Adapter = Annotated[Path | None, typer.Option("--adapter", "-a", help="Adapter file; without it, the base.")]
Base = Annotated[
    str, typer.Option("--base", help="exact, or compatible: the adapter was trained on these weights in another dtype.")
]
Batch = Annotated[int, typer.Option("--batch", help="Examples at once.")]


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)
    app.command()(generate)


def evaluate(
    model: Model = None,
    data: DataFile = None,
    adapter: Adapter = None,
    split: Annotated[str, typer.Option("--split", help="Which part of the data.")] = "test",
    batch: Batch = 32,
    question: Question = None,
    answer: Answer = None,
    text: Text = None,
    label: Label = None,
    label_kind: LabelKind = None,
    image: Image = None,
    image_size: ImageSize = None,
    base: Base = "exact",
    rename: Rename = None,
    skip_corrupt: SkipCorrupt = False,
    max_length: MaxLength = None,
    overflow: Overflow = "error",
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
    items: Annotated[Path | None, typer.Option("--items", help="Write one JSON line per example here.")] = None,
) -> None:
    """Judge a model on data: loss, and how many examples are right."""
    from addenda.core.disk.atomic import write_atomically
    from addenda.core.disk.place import file_for

    where = None if items is None else file_for(items, _is_items, what="--items")  # before anything is loaded
    source = data_or_default(data)
    loaded = with_adapter(model, adapter, dtype, device, image_size, trust_remote_code, base, rename=rename)
    from addenda.train.evaluate import evaluate as judge

    columns: dict[str, Any] = columns_of(question=question, answer=answer, text=text, label=label, image=image)
    columns |= columns_of(label_kind=label_kind)
    made = judge(
        loaded.model, loaded.tokenizer, source, batch=batch, split=split,
        max_length=max_length, overflow=cast(Any, overflow), skip_corrupt=skip_corrupt, **columns,
    )  # fmt: skip
    for text in made.said:
        say(f"data: {text}")
    tell(made)
    if made.skipped:
        tell(left_out(made.skipped))
    if where is not None:
        right = made.items or [None] * len(made.losses)
        rows = zip(right, made.losses, strict=True)
        write_atomically(where, "".join(json.dumps({"right": r, "loss": loss}) + "\n" for r, loss in rows).encode())
        tell(f"written: {where}")


def _is_items(file: Path) -> bool:
    """Return whether a file is what --items has written: one object with these two names a line, and nothing else."""
    try:
        with file.open(encoding="utf-8") as f:
            return all(set(json.loads(line)) == {"right", "loss"} for line in f)
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts; - reads one per line from stdin.")],
    model: Model = None,
    adapter: Adapter = None,
    base: Base = "exact",
    rename: Rename = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer in tokens.")] = 64,
    system: Annotated[
        str | None, typer.Option("--system", help="System prompt. Default: the embedded task's, for its model.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Leave the chat template out.")] = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Draw tokens, the less likely ones more the higher it is.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw of the likeliest tokens that have this much together.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of what is drawn.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write answers to prompts: the likeliest, or drawn ones."""
    if prompts == ["-"]:
        prompts = [line for line in typer.get_text_stream("stdin").read().splitlines() if line.strip()]
    loaded = with_adapter(
        model, adapter, dtype, device, trust_remote_code=trust_remote_code, base=base, writes=True, rename=rename
    )
    from addenda.train.generate import generate as write

    if system is None and model is None and not plain:
        from addenda.data.task import SYSTEM as system  # noqa: N811
    given = prompts if system is None else _under(system, prompts)
    chat = False if plain else None
    drawn: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    for answer in write(loaded.model, loaded.tokenizer, given, max_new_tokens=max_new_tokens, chat=chat, **drawn):
        tell(answer)


def _under(system: str, prompts: list[str]) -> list:
    from addenda.data.examples import Chat

    return [Chat((("system", system), ("user", p), ("assistant", ""))) for p in prompts]


def with_adapter(
    model: Path | None,
    adapter: Path | None,
    dtype: str,
    device: str | None,
    image_size: int | None = None,
    trust_remote_code: bool = False,
    base: str = "exact",
    writes: bool = False,
    rename: list[str] | None = None,
):
    """Load a model as the command line names it, with an adapter file on it. writes: it must be able to write text."""
    if base not in ("exact", "compatible"):  # before the model is read, which takes longer
        from addenda.core.base.errors import AddendaError, nearest

        hint = nearest(base, ("exact", "compatible"))
        raise AddendaError(f"base must be 'exact' or 'compatible', got {base!r}.{hint}")
    if base != "exact" and adapter is None:
        from addenda.core.base.errors import AddendaError

        raise AddendaError(f"base={base!r} is for an adapter, and none is named: give adapter=.")
    paths = renaming(rename)
    if paths and adapter is None:
        from addenda.core.base.errors import AddendaError

        raise AddendaError("rename= is for the paths of an adapter, and none is named: give adapter=.")
    from addenda.models.load import labels_beside, load_model, name_outputs, wanted_by

    wanted: dict[str, Any] = wanted_by(adapter) | ({"image_size": image_size} if image_size else {})
    wanted |= {"task": "causal"} if writes else {}
    wanted |= {"trust_remote_code": trust_remote_code}  # never what a run.json says
    loaded = load_model(model_or_default(model), dtype=dtype, device=device, **wanted)
    heads: tuple[str, ...] = ()
    if adapter is not None:
        from addenda.core.adapter.load import load
        from addenda.core.state.state import record_of
        from addenda.train.new_tokens import tokenizer_beside

        if (grown := tokenizer_beside(adapter)) is not None:
            loaded = replace(loaded, tokenizer=grown)
        attached = load(loaded.model, adapter, base=cast(Any, base), rename=paths, tokenizer=loaded.tokenizer)
        if names := labels_beside(adapter):  # older files have them in their run.json alone
            attached.labels = names
            name_outputs(loaded.model, names)
        heads = record_of(loaded.model, "default").record.also_train
    loaded.check_heads(heads)
    return loaded
