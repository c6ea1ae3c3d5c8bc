"""`addenda plan`: what would be attached where, and what it costs; nothing is changed."""

import typer

from addenda.cli.common import Dtype, Exclude, Method, Model, Targets, listed, model_or_default


def register(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    model: Model = None,
    method: Method = "lora",
    targets: Targets = "linear",
    exclude: Exclude = "",
    dtype: Dtype = "auto",
) -> None:
    """Show the sites, shapes, trained numbers and bytes of a method on a model."""
    from addenda.core.plan import plan as make
    from addenda.core.registry import build
    from addenda.train.load import load_model

    chosen = build(method)  # before the model is read, which takes longer
    loaded = load_model(model_or_default(model), dtype=dtype, device="cpu")
    typer.echo(make(loaded.model, chosen, targets=listed(targets), exclude=listed(exclude), also_train=loaded.heads))
