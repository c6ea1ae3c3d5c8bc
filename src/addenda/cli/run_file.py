"""Run files: the options of a command as YAML, read by `--config` and left by a run beside its results.

    addenda tune --config run.yaml                     goes on with the run that left it
    addenda tune --config run.yaml --out OTHER         runs it again; what stands on the command line wins

A file is one mapping: names of options without their `--`, and scalars, or lists for what is separated by commas or
given several times. It may be anybody's, so it is no program: aliases, tags and nesting are refused, and so are the
options that execute code, which are said on the command line or not at all. Values are read from the text as it stands
(a column called 007 is not the number 7), and every problem is told with its line before anything is loaded.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from addenda.cli.common import asked_of, flags_of, listed, say
from addenda.core.base import ranges
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.visible import label

NAME = "run.yaml"
MOST = 64 << 10  # bytes of a run file
MANY = 40  # problems that are told of
EXECUTE = {"trust_remote_code": "code of the model's folder", "humaneval": "what the model writes"}
LISTS = ("targets", "exclude", "methods", "add_tokens")  # separated by commas on the command line
EMPTY = ("exclude", "system")  # may be an empty text
_FIRST = "# A run of addenda. To run it again: addenda "
_context: ContextVar[typer.Context | None] = ContextVar("context", default=None)  # of the command that runs
_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}


def parameter(command: Callable) -> inspect.Parameter:
    """Return `--config`, for the signature of a command."""

    def fill(context: typer.Context, path: Path | None) -> None:
        _context.set(context)
        if path is not None:
            context.default_map = read(path, command, _name(context), _others(context))

    option = typer.Option(
        "--config", callback=fill, is_eager=True, help="Run file (YAML) of these options; what stands here wins."
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter("config", kind, default=None, annotation=Annotated[Path | None, option])


def said(command: Callable, given: Mapping[str, Any]) -> set[str]:
    """Return the options that the command line or a run file names, those too that have the default's value there."""
    context = _context.get()
    if context is None:  # called as a function
        return set(asked_of(command, given))
    return {name for name in given if getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"}


def _name(context: typer.Context) -> str:
    """Return the words that call a command: two for one of a group."""
    above = "" if context.parent is None or context.parent.parent is None else f"{context.parent.command.name} "
    return f"{above}{context.command.name}"


def _others(context: typer.Context) -> tuple[str, ...]:
    found: dict[str, Any] = getattr(context.find_root().command, "commands", {})
    groups = {n: getattr(c, "commands", None) for n, c in found.items()}
    return tuple(w for n, own in groups.items() for w in ([n] if own is None else [f"{n} {o}" for o in own]))


def read(path: Path, command: Callable, name: str, commands: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the options in a run file of a command, by the names of its parameters, in their types.

    name: of the command; commands: of all. Raises AddendaError with every problem of the file and its line.
    """
    from addenda.core.disk.access import path_of, reading, shown

    path = path_of(path, "--config")
    with reading(path):
        missing = not path.exists()
    if missing:
        raise AddendaError(f"There is no run file {shown(path)}. A run leaves one in its folder, {NAME}.")
    known, found, problems = _keys(command), {}, []
    lines: dict[str, int] = {}
    for key, value, line in _entries(path):
        at = f"line {line}: "
        same = key.removeprefix("--").replace("_", "-")
        if same in lines:
            problems.append(f"{at}{label(key)} stands in line {lines[same]} already")
            continue
        lines[same] = line
        if same == "command":
            _check_command(path, line, value, name, commands)
        elif same == "version":
            _other_version(path, value)
        elif same not in known:
            hint = nearest(same, known) or f" Its options: {', '.join(known)}."
            problems.append(f"{at}addenda {name} has no option {label(key)!r}.{hint}".rstrip("."))
        else:
            option, annotation, default = known[same]
            try:
                converted = _converted(option, same, annotation, value)
            except ValueError as error:
                problems.append(f"{at}{error}")
                continue
            if converted is None and default is not None:
                problems.append(f"{at}{same} has no value; give one, or leave the line out")
            elif option in EXECUTE and converted:
                problems.append(f"{at}{same} executes {EXECUTE[option]}, so it is given on the command line only: "
                                f"--{same}")  # fmt: skip
            elif converted is not None:
                wrong = ranges.problems({option: converted})
                problems += [f"{at}{same}{problem.removeprefix(option)}" for problem in wrong]
                found[option] = converted
    if problems:
        more = f" … and {len(problems) - MANY} more" if len(problems) > MANY else ""
        raise AddendaError(f"The run file {shown(path)} cannot be used: {'; '.join(problems[:MANY])}{more}.")
    return found


def _keys(command: Callable) -> dict[str, tuple[str, Any, Any]]:
    """Return {name in a run file: (parameter, its type, its default)}."""
    found = inspect.signature(command).parameters
    names = {n: flag.removeprefix("--").lower().replace("_", "-") for n, flag in flags_of(command).items()}
    return {names[n]: (n, get_args(p.annotation)[0], p.default) for n, p in found.items() if n != "config"}


def _check_command(path: Path, line: int, value: Any, name: str, commands: tuple[str, ...]) -> None:
    """Raise AddendaError for the run file of another command, and of none."""
    from addenda.core.disk.access import shown

    said = str(getattr(value, "value", ""))
    if said == name:
        return
    way = (
        f"Give it there: addenda {said} --config {shown(path)}." if said in commands else
        f"There is no such command.{nearest(said, commands)}"
    )  # fmt: skip
    raise AddendaError(
        f"The run file {shown(path)} is of the command {label(said)!r} (line {line}), and this is {name}. {way}"
    )


def _other_version(path: Path, value: Any) -> None:
    """Say where a run file is of another version."""
    import addenda

    said = str(getattr(value, "value", ""))
    if said != addenda.__version__:
        say(f"note: {path} was written by addenda {label(said, 40)}; this is {addenda.__version__}.")


def _converted(option: str, key: str, annotation: Any, node: Any) -> Any:
    """Return the value of one entry in the type of its option; None where it has none. Raises ValueError."""
    import yaml

    kinds = get_args(annotation) or (annotation,)
    repeated = any(get_origin(kind) is list for kind in (annotation, *kinds))  # given again and again there
    if isinstance(node, yaml.SequenceNode):
        texts = [_text(key, each) for each in node.value]
        if repeated:
            return texts
        if option not in LISTS:
            raise ValueError(f"{key} takes one value, and a list came")
        texts = [t.replace(",", ";") if option == "methods" else t for t in texts]  # of options, not of arms
        joined = ",".join(texts)
        if listed(joined) != [t.strip() for t in texts]:
            raise ValueError(f"{key} has a name with a comma in it, or an expression (re:…) that others follow; write "
                             "it alone, as text")  # fmt: skip
        return joined
    text = _text(key, node)
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if repeated:
        return [text]
    if not text.strip() and option not in EMPTY:
        raise ValueError(f"{key} has an empty value; give one, or leave the line out")
    kind = next((k for k in (bool, int, float) if k in kinds), None)
    try:
        if kind is bool:
            if node.tag != "tag:yaml.org,2002:bool":
                raise ValueError
            return yaml.SafeLoader.bool_values[text.lower()]
        return text if kind is None else kind(text)
    except ValueError:
        raise ValueError(f"{key} is {_WORDS[kind or float]}, got {label(text, 80)!r}") from None


def _text(key: str, node: Any) -> str:
    if not isinstance(node.value, str):
        raise ValueError(f"{key} takes a value, or names in a list, and a {node.id} came")
    return node.value


def _entries(path: Path) -> Iterator[tuple[str, Any, int]]:
    """Yield (key, node of the value, line) of a run file that is one flat mapping. Raises AddendaError."""
    import yaml

    from addenda.core.disk.access import reading, shown

    with reading(path), open(path, "rb") as f:
        data = f.read(MOST + 1)
    whose = f"The run file {shown(path)}"
    if len(data) > MOST:
        raise AddendaError(f"{whose} has more than {MOST >> 10} KiB, and options take a few lines. Name another file.")
    try:
        text = data.decode("utf-8-sig")
        for wrong, line in _odd(text):
            raise AddendaError(f"{whose} has {wrong} in line {line}; it is a plain list of options, such as steps: 40.")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise AddendaError(f"{whose} is not text in UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        raise AddendaError(f"{whose} is not YAML{where}: {label(why)}.") from None
    if not isinstance(root, yaml.MappingNode):
        what = "nothing" if root is None else f"a {'list' if root.id == 'sequence' else 'text'} (line 1)"
        raise AddendaError(f"{whose} holds {what}, and a mapping of options was expected, such as steps: 40.")
    for key, value in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise AddendaError(f"{whose} has a {key.id} for a name in line {line}; names are those of options.")
        yield key.value, value, line


def _odd(text: str) -> Iterator[tuple[str, int]]:
    """Yield what a plain list of options does not have, and its line: aliases, tags, nesting. Nothing is built."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            yield "an alias or its anchor (& or *)", line
        if tag := getattr(event, "tag", None):
            yield f"a tag ({label(tag, 60)})", line
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > 2:
                yield "lists or mappings in each other", line
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


# -- written by a run --------------------------------------------------------------------------------------------------


def check_place(out: Path, command: Callable) -> None:
    """Raise AddendaError where the name of the run file that a command will leave is taken by something else."""
    from addenda.core.disk.access import path_of, shown
    from addenda.core.disk.place import check_free, holds

    folder = path_of(out, "out")
    check_free(folder, {NAME: lambda file: holds(file, _FIRST, "\ncommand: ")})
    if (folder / NAME).exists() and not is_of(folder, command):
        raise AddendaError(
            f"{shown(folder)} holds the run of another command ({NAME} says which), which would be written over by "
            f"what addenda {command.__name__} leaves. Choose another --out."
        )


def is_of(folder: Path, command: Callable) -> bool:
    """Return whether a run of this command has left its run file in a folder."""
    from addenda.core.disk.place import holds

    return holds(folder / NAME, _FIRST, f"\ncommand: {command.__name__}\n")


def write(out: Path, command: Callable, given: Mapping[str, Any], chosen: Mapping[str, Any] | None = None) -> None:
    """Leave the run file of a run that is done: what it was given, what was chosen for it, and all other defaults.

    given: every option by its parameter; chosen: what stands for the default of some. A file that says the same stays.
    """
    from addenda.core.disk.access import path_of
    from addenda.core.disk.atomic import write_atomically
    from addenda.core.disk.place import is_first

    if not is_first():
        return
    file = path_of(out, "out") / NAME
    text = text_of(command, given, chosen or {}).encode()
    there = file.read_bytes() if file.is_file() else b""
    if sorted(there.splitlines()) != sorted(text.splitlines()):  # what was chosen before may be given now
        write_atomically(file, text)


def text_of(command: Callable, given: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """Return the run file of these options."""
    import addenda

    known, name = _keys(command), command.__name__
    asked, rest, notes = {}, {}, []
    for key, (option, _, default) in known.items():
        value = given.get(option)
        if option in EXECUTE:
            notes += [f"# --{key} was given: it executes {EXECUTE[option]}, and is said on the command line only\n"
                      ] if value else []  # fmt: skip
        elif value == "" and option not in EMPTY:
            continue  # as if nothing had been given
        elif value != default:
            asked[key] = _plain(value)
        elif (value := chosen.get(option, default)) is not None:
            rest[key] = _plain(value)
    head = f"{_FIRST}{name} --config {NAME} --out OTHER\n"
    parts = [head, _dumped({"command": name, "version": addenda.__version__}), "# given\n", _dumped(asked), *notes]
    return "".join([*parts, "# chosen, or the default of this version\n", _dumped(rest)])


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) else str(value)


def _dumped(entries: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=10**6) if entries else ""
