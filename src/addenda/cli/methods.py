"""`addenda methods`: the catalogue, one method in full, or all of it as a page."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from addenda.cli.common import tell


def register(app: typer.Typer) -> None:
    app.command()(methods)


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full; a glob lists those that match.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the catalogue to this Markdown file instead.")] = None,
    doors: Annotated[
        Path | None, typer.Option("--doors", help="Write there how each method leaves: PEFT, vLLM, GGUF, kohya.")
    ] = None,
) -> None:
    """List the methods and what each one claims."""
    from addenda.core.method.catalogue import catalogue, info

    if page is not None:
        _write(page, "--page", "# The catalogue\n", catalogue_page)
    if doors is not None:
        from addenda.exporting.table import page as doors_page

        _write(doors, "--doors", "# Doors\n", doors_page)
    if page is not None or doors is not None:
        return
    if name and not set("*?[") & set(name):
        tell(_full(info(name)))
        return
    found = catalogue(name or "*")
    if not found:
        info(str(name))  # raises with the known names
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from addenda.core.ask.capabilities import probe
    from addenda.optim import known

    table = Table("method", "family", "equation", "claims that", "can (tried just now)", box=None, pad_edge=False)
    for i in found:
        can = str(probe(i.build()))
        table.add_row(*map(Text, (i.name, i.family, i.equation, i.hypothesis, can)))  # brackets are no markup
    console = Console()
    console.print(table)
    console.print(f"\n{len(found)} methods. `addenda methods NAME` shows one in full, with its options.", markup=False)
    console.print(f"Optimizers for `addenda tune --optimizer`: {', '.join(known())}.", markup=False)


def _write(file: Path, option: str, title: str, text: Callable[[], str]) -> None:
    """Write a page that this command makes, over an older one of its own at most."""
    from addenda.core.disk.atomic import write_atomically
    from addenda.core.disk.place import file_for, holds

    path = file_for(file, lambda there: holds(there, title, f"`addenda methods {option}"), what=option)
    write_atomically(path, text().encode())


def _full(entry) -> str:
    import dataclasses
    import inspect

    from addenda.core.ask.capabilities import probe
    from addenda.core.method.contract import Method

    made = entry.build()
    lines = [
        f"{entry.name}: {entry.title} ({entry.family})",
        f"  paper       {entry.paper}",
        f"  equation    {entry.equation}",
        f"  hypothesis  {entry.hypothesis}",
        f"  can         {probe(made)}",
        f"  rate        {entry.rate:g} (where a search for AdamW's learning rate starts)",
        f"  paper has   {entry.paper_setting or 'the setting that is the default here'}",
        "  options",
    ]
    common = {f.name for f in dataclasses.fields(Method)}
    own = [f for f in dataclasses.fields(entry.cls) if f.name not in common]
    for f in own:
        shown = f.type.__name__ if isinstance(f.type, type) else str(f.type).replace("typing.", "")
        lines.append(f"    {f.name} = {getattr(made, f.name)!r}    {shown}")
    if not own:
        lines.append("    none")
    lines += ["  as all do", "    bits = None    1 to 8: trained matrices in so many bits; ste = 'paper' or 'plain'"]
    about_options = (inspect.getdoc(entry.cls) or "").partition("\n\n")[2]  # behind the title, which stands above
    module = inspect.getdoc(inspect.getmodule(entry.cls)) or ""
    return "\n".join([*lines, "", about_options, "", module]).rstrip()


def catalogue_page() -> str:
    """Return the catalogue as Markdown: docs/catalogue.md, which a test compares with this."""
    from addenda.core.ask.capabilities import probe
    from addenda.core.method.catalogue import catalogue
    from addenda.optim import known

    found = catalogue()
    lines = [
        "# The catalogue",
        "",
        f"{len(found)} methods and {len(known())} optimizers. This page is written by `addenda methods --page "
        "docs/catalogue.md` from what the methods say of themselves; what each can do is tried while it is written. "
        "Where a paper's main setting differs from the defaults, it is said. Figures printed in papers stand under "
        "*published* with their source. They were measured on other models, data "
        "and budgets than their neighbours here: `addenda compare` measures on yours.",
        "",
        "Shapes: W is m × n = out × in. *Trained* is the count at one layer of 1024 × 1024 with the default "
        "options; for hidden methods, which change what modules return, at one place of width 1024. Every method whose "
        "sites train matrices of their own takes `bits=1` to `bits=8` besides: these matrices in so many bits "
        "([few-bit adapters](compress.md#few-bit-adapters)).",
    ]
    for family in dict.fromkeys(i.family for i in found):
        lines += ["", f"## {family.capitalize()}"]
        for i in (i for i in found if i.family == family):
            lines += ["", *_entry(i, str(probe(i.build())))]
    lines += ["", "## Optimizers", "", "| name | what it is | options | paper |", "| --- | --- | --- | --- |"]
    for name, o in known().items():
        options = ", ".join(f"{k}={v!r}" for k, v in o.options.items())
        lines.append(f"| `{name}` | {o.about} | {options} | {o.paper} |")
    return "\n".join(lines) + "\n"


def _trained(made, shape: tuple[int, ...]) -> str:
    pooled = made.pooled([shape])
    more = f", and {pooled:,} that all sites train together" if pooled else ""
    return f"{made.trainable(*shape):,}{more}"


def _entry(i, can: str) -> list[str]:
    import dataclasses

    from addenda.core.method.contract import Method
    from addenda.core.method.hidden import HiddenMethod

    made = i.build()
    shape = (1024,) if isinstance(made, HiddenMethod) else (1024, 1024)
    misfit = made.check(*shape)
    trained = _trained(made, shape) if misfit is None else f"not with these options ({misfit})"
    common = {f.name for f in dataclasses.fields(Method)}
    own = {k: v for k, v in made.options(defaults=True).items() if k not in common}
    options = ", ".join(f"`{k}={v!r}`" for k, v in own.items()) or "none"
    lines = [
        f"### {i.name}",
        "",
        f"{i.title} ({i.paper})",
        "",
        f"    {i.equation}",
        "",
        f"- Claims: {i.hypothesis}",
        f"- Trained: {trained}",
        f"- Can: {can}",
        f"- Options: {options}" + ("" if made.trained_by == "adamw" else f"; trained by `{made.trained_by}`"),
    ]
    lines += [f"- The paper's setting: {i.paper_setting}"] if i.paper_setting else []
    return [*lines, *([f"- Published: {i.published}"] if i.published else [])]
