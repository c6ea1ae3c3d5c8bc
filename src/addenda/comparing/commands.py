"""Commands that follow from a record: `addenda tune` with an arm of it, `addenda compare` with more seeds.

What a record does not know (where the model and the data are, of a comparison that was called from Python) or tune has
not (the embedded encoders and their docstrings) stands as MODEL and DATA. Nothing that executes code is taken over from
a record, and nothing that is not what it should be.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from addenda.comparing.arm import TRAINING, Arm, parse_arm
from addenda.comparing.embedded import DOCSTRINGS
from addenda.comparing.record import Record
from addenda.core.base import ranges
from addenda.core.base.errors import AddendaError
from addenda.core.method.catalogue import build
from addenda.data.task import NAME as TASK
from addenda.models.embedded import NAME as MODEL
from addenda.models.encoders import ENCODERS

# Options of `addenda compare` that `addenda tune` has too: where the model and the data are, and how they are read.
SHARED = {
    "-m": "--model", "-d": "--data", **{name: name for name in (
        "--model", "--data", "--question", "--answer", "--text", "--label", "--label-kind", "--image", "--subset",
        "--image-size", "--max-length", "--dtype", "--quantize",
    )},
}  # fmt: skip
ELSEWHERE = ("--config", "--more")  # options that say that the others stand in a file


def tune_command(record: Record, arm: str) -> str | None:
    """Return the `addenda tune` command that trains an arm as the comparison did, or None where tune cannot.

    The rate is the one of the arm's final runs. tune cannot train an arm whose method is not in the catalogue.
    """
    about, runs = record.config.methods.get(arm), record.trials_of(arm, "final")
    if about is None or not runs:
        return None
    steps, batch, rate = runs[-1].steps or about.steps, record.config.budget.batch, runs[-1].rate
    try:
        made = parse_arm(arm)
        own = {"optimizer", *TRAINING}  # these the label says, and the parser has judged
        spec = _spec(made, {k: v for k, v in (about.options or {}).items() if k not in own})
    except AddendaError:
        return None
    method, targets = build(spec), about.targets
    targets = targets if targets is None or isinstance(targets, str) else ",".join(targets)
    numbers = {"rate": rate, "steps": steps, "batch": batch} | made.training
    if ranges.problems({k: v for k, v in numbers.items() if v is not None}):
        return None
    said: dict[str, Any] = {"--out": f"runs/{made.name}", **_subject(record), "--method": spec}
    if targets is not None and targets not in (method.targets, ",".join(method.targets)):
        said["--targets"] = targets
    said |= {f"--{k.replace('_', '-')}": v for k, v in numbers.items() if v is not None}
    said |= {"--optimizer": made.optimizer} if made.optimizer != "auto" else {}
    return _line("tune", said)


def more_command(record: Record, seeds: int) -> str | None:
    """Return the command that goes on with a record until every arm has so many seeds; None where it cannot grow."""
    config, where = record.config, str(record.path)
    of = (config.options or {}).get("of")
    if config.identity is None or of not in ("files", "embedded"):
        return None
    named = _plain(where) and not record.path.is_absolute()
    said: dict[str, Any] = {"--more": where if named else "RECORD", "--seeds": seeds}
    unknown = of == "files" and not {"--model", "--data"} <= set(_given(config.command) or {})
    return _line("compare", said | ({"--model": "MODEL", "--data": "DATA"} if unknown else {}))


def _spec(arm: Arm, options: Mapping[str, Any]) -> str:
    """Return the text form of an arm's method with these options. Raises AddendaError where there is none."""

    def text(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) or value is None else str(value)

    own = arm.label.partition("@")[0]
    if arm.method.options() == options and _plain(own):
        return own
    spec = arm.name + ":" * bool(options) + ",".join(f"{k}={text(v)}" for k, v in options.items())
    if not _plain(spec) or build(spec).options() != options:
        raise AddendaError(f"{arm.name} has no text form with the options {options!r}.")
    return spec


def _subject(record: Record) -> dict[str, Any]:
    """Return options that say which model and data, as far as the record knows them and tune takes them."""
    said, model = _given(record.config.command) or {}, record.config.model
    if (model.name, record.config.data.name) == (MODEL, TASK):  # what tune has without these options
        said = {k: v for k, v in said.items() if k not in ("--model", "--data")}
    else:
        folder, data = said.pop("--model", None), said.pop("--data", None)
        named = {"--model": None if folder in ENCODERS else folder, "--data": None if data == DOCSTRINGS else data}
        said = {name: value or name.strip("-").upper() for name, value in named.items()} | said
    if model.quantize is not None and _plain(model.quantize):
        said["--quantize"] = model.quantize
    return said


def options_in(command: str) -> dict[str, Any] | None:
    """Return what a command `addenda compare` says of model and data, by option, or None of any other."""
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    own = next((i for i, word in enumerate(words[1:], 1) if not word.startswith("-")), 0)  # behind options of all
    if words[:1] != ["addenda"] or words[own] != "compare":
        return None
    said: dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--skip-corrupt", *ELSEWHERE):
            said[name] = True
        elif name in SHARED:
            said[SHARED[name]] = value if equals else following
    return said


def _given(command: str) -> dict[str, Any] | None:
    """Return the options that may stand in another command; None where all is not said, as of a run file's."""
    said = options_in(command)
    if said is None or any(name in said for name in ELSEWHERE):
        return None
    return {name: value for name, value in said.items() if value is True or _plain(value)}


def _plain(value: Any) -> bool:
    """Return whether a value may stand in a command: one line of text that is no option itself."""
    return isinstance(value, str) and value.strip() != "" and value.isprintable() and not value.startswith("-")


def _line(command: str, said: Mapping[str, Any]) -> str:
    words = [w for name, value in said.items() for w in ([name] if value is True else [name, str(value)])]
    return shlex.join(["addenda", command, *words])
