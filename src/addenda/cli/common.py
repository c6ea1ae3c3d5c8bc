"""What several commands share: options, and the embedded defaults for a model and data that were not named."""

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import ParameterInfo

from addenda.core.base.visible import visible

DATA, SPEED = "Columns and lengths", "Speed and memory"  # panels of --help
VISION = "dinov2-small"

Rename = Annotated[
    list[str] | None,
    typer.Option(
        "--rename",
        help="OLD=NEW: paths in the adapter file and in this model, where those differ; * fills *. May be given again.",
    ),
]
Model = Annotated[
    Path | None, typer.Option("--model", "-m", help="Folder of a transformers model. Default: the embedded one.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model's folder brings. It can do anything.")
]
ReportTo = Annotated[
    str,
    typer.Option("--report-to", help="Trackers told of every loss, by commas: tensorboard, wandb, trackio, mlflow."),
]
DataFile = Annotated[
    Path | None,
    typer.Option(
        "--data",
        "-d",
        help="JSONL, CSV, Parquet, a folder of datasets or of class folders. Default: the embedded task.",
    ),
]
Method = Annotated[str, typer.Option("--method", help="A method and its options, e.g. lora:rank=16 (see methods).")]
Targets = Annotated[
    str | None,
    typer.Option("--targets", help="Roles, globs or re:… of the sites, by commas. Default: what the method is for."),
]
Exclude = Annotated[str, typer.Option("--exclude", help="Targets to leave out, separated by commas.")]
Question = Annotated[str | None, typer.Option("--question", help="Column of the prompts.", rich_help_panel=DATA)]
Answer = Annotated[str | None, typer.Option("--answer", help="Column of the answers.", rich_help_panel=DATA)]
Text = Annotated[str | None, typer.Option("--text", help="Column of the texts.", rich_help_panel=DATA)]
Label = Annotated[str | None, typer.Option("--label", help="Column of the labels.", rich_help_panel=DATA)]
LabelKind = Annotated[
    str | None,
    typer.Option(
        "--label-kind", help="What labels are where they could be either: class or number.", rich_help_panel=DATA
    ),
]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="Longest example in tokens.", rich_help_panel=DATA)]
Image = Annotated[str | None, typer.Option("--image", help="Column of the images to classify.", rich_help_panel=DATA)]
Subset = Annotated[
    str | None,
    typer.Option(
        "--subset", help="Learn from a part: 8/class (8 more to choose by), vtab (800 and 200).", rich_help_panel=DATA
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", help="Side of the images in pixels. Default: the model's.", rich_help_panel=DATA),
]
SkipCorrupt = Annotated[
    bool, typer.Option("--skip-corrupt", help="Leave out images that cannot be decoded.", rich_help_panel=DATA)
]
Overflow = Annotated[
    str,
    typer.Option(
        "--overflow", help="Longer examples: error, drop, truncate or (of pairs) truncate_second.", rich_help_panel=DATA
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float32 or float16.", rich_help_panel=SPEED)]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="Keep the base in few bits: nf4, int8 or spqr. nf4 with lora is QLoRA.",
        rich_help_panel=SPEED,
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, … Default: CUDA where there is one.", rich_help_panel=SPEED)
]


def say(text: str) -> None:
    """Print one line of progress on stderr."""
    typer.echo(visible(text), err=True)


def tell(text: object) -> None:
    """Print a result on stdout."""
    typer.echo(visible(text))


def short(text: str, most: int = 40) -> str:
    """Return a text in one line, cut."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def draw(table: Any) -> None:
    """Print a table of rich's on stdout, 140 characters wide where that is no terminal."""
    from rich.console import Console

    # a command in it may be longer than the terminal is wide
    Console(width=None if sys.stdout.isatty() else 140).print(table, crop=False)


def model_or_default(model: Path | None) -> Path:
    """Return the folder named, or the embedded model's; dinov2-small is the embedded vision model's."""
    if model is not None and str(model) == VISION and not model.exists():
        from addenda.models.vision import DINOV2

        return DINOV2.model_folder(say)
    if model is not None:
        return model
    from addenda.models.embedded import model_folder

    return model_folder(say)


def data_or_default(data: Path | None) -> Any:
    """Return the path named, or the embedded task with its splits, which sort-numbers names as well."""
    from addenda.data.task import NAME, embedded_task

    return embedded_task() if data is None or (str(data) == NAME and not data.exists()) else data


def asked_of(command: Callable, given: Mapping[str, Any]) -> list[str]:
    """Return the options of a command that have another value than their default, by name."""
    found = inspect.signature(command).parameters
    return [n for n, p in found.items() if n in given and given[n] != p.default]


def refuse_unread(command: Callable, given: Mapping[str, Any], unread: Collection[str], why: str) -> None:
    """Raise AddendaError where an option has another value than its default and nothing reads it here."""
    refuse([name for name in asked_of(command, given) if name in unread], why)


def refuse(names: Collection[str], why: str) -> None:
    """Raise AddendaError for options that were given and that nothing reads here: they would be swallowed."""
    from addenda.core.base.errors import AddendaError

    if names:
        found = ", ".join(f"{name}=" for name in names)
        raise AddendaError(f"{found} {'is' if len(names) == 1 else 'are'} not read {why}")


def renaming(given: Collection[str] | None) -> dict[str, str] | None:
    """Return {path in the file: path in this model} of OLD=NEW. Raises AddendaError for other texts and doubles."""
    from addenda.core.base.errors import AddendaError

    pairs = [text.partition("=") for text in given or ()]
    if wrong := ["".join(p) for p in pairs if not (p[0] and p[2]) or "=" in p[2]]:
        raise AddendaError(f"--rename wants OLD=NEW, a path in the file and one in this model; got {wrong[0]!r}.")
    if len({old for old, _, _ in pairs}) < len(pairs):
        raise AddendaError("--rename names one path of the file twice. Give each once.")
    return {old: new for old, _, new in pairs} or None


def columns_of(**named: str | None) -> dict[str, str]:
    """Return the columns that were named."""
    return {k: v for k, v in named.items() if v is not None}


def left_out(names: tuple[str, ...]) -> str:
    """Return how many corrupt images were skipped, and the first of them."""
    return f"{len(names)} corrupt images left out: {', '.join(names[:8])}" + (", …" if len(names) > 8 else "")


def flags_of(command: Callable) -> dict[str, str]:
    """Return {name of a parameter: how it is written on the command line}; arguments in capitals."""
    found = {}
    for name, parameter in inspect.signature(command).parameters.items():
        infos = [a for a in get_args(parameter.annotation) if isinstance(a, ParameterInfo)]
        said = [d for a in infos for d in (a.default, *(a.param_decls or ()))]  # typer keeps the first as a default
        decls = [d for d in said if isinstance(d, str) and d.startswith("--")]
        argument = any(isinstance(a, typer.models.ArgumentInfo) for a in infos)
        found[name] = name.upper() if argument else (decls or [f"--{name.replace('_', '-')}"])[0].partition("/")[0]
    return found


def listed(text: str) -> list[str]:
    """Split "a, b" into ["a", "b"]; what begins with re: is one expression, commas and all."""
    if text.startswith("re:"):
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


Register = Callable[[typer.Typer], None]
