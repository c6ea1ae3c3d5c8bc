"""`addenda transfer`: an adapter's task on another base, without its data."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from addenda.cli import run_file
from addenda.cli.common import Device, Dtype, Exclude, Targets, Trust, listed, say, tell

INPUTS, STUDENT = "Synthetic inputs", "The new adapter"


def register(app: typer.Typer) -> None:
    app.command()(transfer)


def transfer(
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="What `addenda bundle` wrote.")],
    source: Annotated[Path, typer.Option("--source", help="Folder of the model that the adapter is on.")],
    target: Annotated[Path, typer.Option("--target", help="Folder of the model that it moves to.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the new adapter; a killed run goes on.")],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", "-a", help="Default: the bundle's own file, beside it.")
    ] = None,
    judge_model: Annotated[
        Path | None,
        typer.Option("--judge-model", help="Folder of the discriminator's model, where that is not --source."),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Method of the new adapter (see methods). Default: lora.")
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="sequence, or logits where both have one vocabulary.", rich_help_panel=STUDENT)
    ] = "sequence",
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", help="With logits: likeliest tokens kept. Default: all.", rich_help_panel=STUDENT),
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--start", help="An adapter file to begin with.", rich_help_panel=STUDENT)
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.", rich_help_panel=STUDENT)] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Instead of steps. Default: 10.", rich_help_panel=STUDENT)
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Examples a step.", rich_help_panel=STUDENT)] = 8,
    rate: Annotated[
        float | None,
        typer.Option("--rate", help="Highest learning rate. Default: the method's usual one.", rich_help_panel=STUDENT),
    ] = None,
    targets: Targets = None,
    exclude: Exclude = "",
    count: Annotated[
        int | None,
        typer.Option("--count", help="Inputs to learn from. Default: the bundle's.", rich_help_panel=INPUTS),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="Lower: more lines of the format, less variety.", rich_help_panel=INPUTS),
    ] = 1.0,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Draw from the likeliest tokens of this share.", rich_help_panel=INPUTS),
    ] = None,
    lines: Annotated[
        int, typer.Option("--lines", help="Lines that are taken of a sample.", rich_help_panel=INPUTS)
    ] = 1,
    same_order: Annotated[
        int, typer.Option("--same-order", help="Samples that see the seeds in one order.", rich_help_panel=INPUTS)
    ] = 1,
    format: Annotated[
        str | None,
        typer.Option(
            "--format", help="Regular expression of an input. Default: as the seeds are.", rich_help_panel=INPUTS
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option("--threshold", help="Margin of yes over no above which one passes.", rich_help_panel=INPUTS)
    ] = 0.0,
    tries: Annotated[
        int | None,
        typer.Option("--tries", help="Samples at most. Default: 20 for each input.", rich_help_panel=INPUTS),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Tokens read and written at most.", rich_help_panel=INPUTS)
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", help="Minutes of sampling at most.", rich_help_panel=INPUTS)
    ] = None,
    sample_batch: Annotated[
        int, typer.Option("--sample-batch", help="Samples, and answers, at once.", rich_help_panel=INPUTS)
    ] = 32,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Longest answer of the old adapter, in tokens.")
    ] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn, and of the training.")] = 0,
    eval_data: Annotated[
        Path | None, typer.Option("--eval", help="Real examples to judge by, if there are any.")
    ] = None,
    within: Annotated[
        float | None, typer.Option("--within", help="Seconds; above them the dry run asks first.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Begin without asking.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Move an adapter to another base without its data: made inputs, the old adapter's answers, a new adapter."""
    given = dict(locals())
    from addenda.cli.compare import asking
    from addenda.core.base.errors import AddendaError
    from addenda.core.method.catalogue import build
    from addenda.transferring.transfer import transfer as run

    if yes and within is None:
        raise AddendaError("yes= answers what within= asks. Give both, or neither.")
    if method is not None:
        build(method)
    more: dict[str, Any] = {} if rate is None else {"rate": rate}
    with _kept(out), _shown() as progress:
        made = run(
            bundle, source, target, out, adapter=adapter, judge_model=judge_model, method=method, mode=cast(Any, mode),
            top_k=top_k, start=start, targets=listed(targets) if targets else None, exclude=listed(exclude), n=count,
            temperature=temperature, top_p=top_p, lines=lines, same_order=same_order, format=format,
            threshold=threshold, tries=tries, max_tokens=max_tokens, max_minutes=max_minutes, steps=steps,
            epochs=epochs, batch=batch, sample_batch=sample_batch, max_new_tokens=max_new_tokens, seed=seed,
            eval_data=eval_data, within=within, ask=asking(yes), dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, say=say, progress=progress,
            leave=lambda folder: run_file.write(folder, transfer, given), **more,
        )  # fmt: skip
    tell(made)
    tell(f"written: {out}, with {', '.join(sorted(p.name for p in made.path.iterdir()))}")


@contextmanager
def _shown() -> Iterator[Any]:
    """Yield a progress function whose bar comes with the first step: before it, something may be asked."""
    from addenda.train.progress import shown

    with ExitStack() as stack:
        tell: list[Any] = []

        def told(event: Any) -> None:
            if not tell:
                tell.append(stack.enter_context(shown("transfer")))
            tell[0](event)

        yield told


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Say what is kept, where the `with` block is interrupted."""
    try:
        yield
    except KeyboardInterrupt as error:
        from addenda.train.unfinished import beside

        folder = beside(out.expanduser().resolve())
        error.add_note(
            f"Kept: what is done so far, in {folder}. The same command goes on there." if folder.is_dir() else
            "Nothing is kept yet."
        )  # fmt: skip
        raise
