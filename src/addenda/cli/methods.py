"""`addenda methods`: the catalogue, or one method in full."""

import typer


def register(app: typer.Typer) -> None:
    app.command()(methods)


def methods(
    name: str = typer.Argument(None, help="One method, in full; a glob lists those that match."),
) -> None:
    """List the methods and what each one claims."""
    from addenda.core.registry import catalogue, info

    if name and not set("*?[") & set(name):
        typer.echo(_full(info(name)))
        return
    found = catalogue(name or "*")
    if not found:
        info(name)  # raises with the known names
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from addenda.core.capabilities import probe

    table = Table("method", "family", "ΔW", "claims that", "can (tried just now)", box=None, pad_edge=False)
    for i in found:
        can = str(probe(i.build()))
        table.add_row(*map(Text, (i.name, i.family, i.equation, i.hypothesis, can)))  # brackets are no markup
    console = Console()
    console.print(table)
    console.print(f"\n{len(found)} methods. `addenda methods NAME` shows one in full, with its options.", markup=False)


def _full(entry) -> str:
    import dataclasses
    import inspect

    from addenda.core.capabilities import probe

    made = entry.build()
    lines = [
        f"{entry.name}: {entry.title} ({entry.family})",
        f"  paper       {entry.paper}",
        f"  equation    {entry.equation}",
        f"  hypothesis  {entry.hypothesis}",
        f"  can         {probe(made)}",
        f"  rate        {entry.rate:g} (where a search for AdamW's learning rate starts)",
        "  options",
    ]
    for f in dataclasses.fields(entry.cls):
        shown = f.type.__name__ if isinstance(f.type, type) else str(f.type).replace("typing.", "")
        lines.append(f"    {f.name} = {getattr(made, f.name)!r}    {shown}")
    if not dataclasses.fields(entry.cls):
        lines.append("    none")
    module = inspect.getdoc(inspect.getmodule(entry.cls)) or ""
    return "\n".join([*lines, "", inspect.getdoc(entry.cls) or "", "", module]).rstrip()
