"""Every command: numbers are refused before anything is loaded, words are the command line's, names cannot act."""

import inspect
import os
import re
import signal
import typing
from functools import reduce, wraps
from importlib import import_module
from pathlib import Path

import pytest
import typer

from addenda.cli.guard import TerminatedError, exit_code, flags_of, in_flags, terminable
from addenda.cli.main import app, commands, run
from addenda.core.base import ranges
from addenda.core.base.visible import visible

COMMANDS = {name: info.callback for name, info in commands().items()}
CLICK = {
    name: reduce(lambda held, word: held.commands[word], name.split(), typer.main.get_command(app)) for name in COMMANDS
}
HOSTILE = ["[/red]", "a\x1b[2Jb", "\x1b]0;title\x07", "[bold]x[/bold]", "tab\u202efdp.exe", "\udcff", "\x9b31m"]


def call(*arguments):
    with pytest.raises(SystemExit) as stopped:
        run([word for a in arguments for word in (a.split() if a in COMMANDS else [str(a)])])
    return stopped.value.code or 0


def numeric():
    for name, command in COMMANDS.items():
        for p in inspect.signature(command).parameters.values():
            kind = typing.get_args(p.annotation)[0] if typing.get_args(p.annotation) else p.annotation
            if {int, float} & {kind, *typing.get_args(kind)}:
                yield name, p.name, flags_of(command)[p.name]


def needed(name):
    """Arguments without which a command does not parse; no such file is there, so nothing could be loaded."""
    return {
        "tune": ["--out", "run"], "compress": ["--out", "run"], "generate": ["hello"],
        "reduce": ["a.safetensors", "--to", "lora", "--out", "b.safetensors"],
        "export": ["a.safetensors", "--to", "peft", "--out", "b"], "import": ["a", "--out", "b.safetensors"],
        "combine": ["a.safetensors", "b.safetensors", "--out", "c.safetensors"], "inspect": ["a.safetensors"],
        "merge": ["--adapter", "a.safetensors", "--out", "b"],
        "choose": ["a"], "bundle": ["--adapter", "a.safetensors", "--out", "b"],
        "transfer": ["--bundle", "a", "--source", "b", "--target", "c", "--out", "d"],
        "extract": ["--base", "a", "--tuned", "b", "--out", "c.safetensors"],
        "rerank index": ["--out", "i.safetensors"], "rerank train": ["--out", "run"],
        "rerank language": ["--out", "run"], "rerank eval": ["--adapter", "a.safetensors"],
        "order train": ["--data", "r.csv", "--out", "run"], "order eval": ["--data", "r.csv", "--adapter", "a"],
        "order rank": ["photos", "red", "--adapter", "a.safetensors", "--out", "r.csv"],
        "rerank search": ["i.safetensors", "hello"], "rerank export": ["--adapter", "a.safetensors", "--out", "b"],
    }.get(name, [])  # fmt: skip


@pytest.fixture
def nothing_loads(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    loading = ("models.load", "train.tune", "comparing.subject", "compressing.run")
    places = [import_module(f"addenda.{m}") for m in loading]
    for place in [*places, import_module("addenda.models.embedded")]:  # imported before anything is put in their way
        for name in {"load_model", "config_of", "model_folder"} & set(vars(place)):
            monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("a model was looked at"))
    return tmp_path


def test_every_number_has_a_range():
    assert len(list(numeric())) > 30
    assert not [(c, p) for c, p, _ in numeric() if p not in ranges.RANGES]


@pytest.mark.parametrize(("command", "name", "flag"), list(numeric()))
def test_numbers_are_refused_before_anything_is_loaded(command, name, flag, nothing_loads, capsys):
    own = ranges.RANGES[name]
    for value in ("nan", "inf", "-inf", "-1", "0", "1e30", str(10**30), "0.5", "true", ""):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        allowed = not own.refusal(name, int(number) if own.whole and number % 1 == 0 else number)
        if allowed and not (own.whole and not re.fullmatch(r"-?\d+", value)):
            continue
        assert call(command, *needed(command), flag, value) == 2, (flag, value)
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert flag in told
        assert not list(nothing_loads.iterdir())


@pytest.mark.parametrize("wrong", [
    ["compare", "--budget", "steps=nan"], ["compare", "--budget", "steps=0"], ["compare", "--budget", "seconds=inf"],
    ["compare", "--budget", "steps=1e30"], ["compare", "--budget", "steps=0.5"], ["compare", "--budget", "steps=-1"],
    ["compare", "--methods", "mosa@consistency=nan"], ["compare", "--methods", "mosa@consistency=-1"],
    ["compare", "--methods", "mosa@consistency=1@consistency=2"], ["compare", "--methods", "lora:rank=1;rank=2"],
    ["compare", "--methods", "lora@lora-pro:trust=nan"], ["compare", "--subset", "2/class"], ["compare", "--text", "t"],
    ["tune", "--out", "run", "--method", "lora:rank=0"], ["tune", "--out", "run", "--method", "lora:alpha=nan"],
    ["tune", "--out", "run", "--method", "lora:r=8"], ["plan", "--method", "lora:rank=1e30"],
    ["compress", "--out", "run", "--how", "0bit", "x"], ["compress", "--out", "run", "--allocate", "some"],
])  # fmt: skip
def test_numbers_inside_of_texts_too(wrong, nothing_loads, capsys):
    assert call(*wrong) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not list(nothing_loads.iterdir())


@pytest.mark.parametrize("options", [
    ["--device", "cudaa"], ["--dtype", "int3"], ["--quantize", "nf5"], ["--schedule", "sine"], ["--loss", "chunkd"],
    ["--overflow", "trunc"], ["--optimizer", "adam"], ["--eval", "nan"], ["--eval", "1.5"], ["--early-stop", "2"],
    ["--eval-every", "2"], ["--subset", "x"], ["--steps", "1", "--epochs", "1"], ["--accumulate", "17"],
    ["--consistency-add", "1"], ["--device", "cuda:99"],
])  # fmt: skip
def test_what_tune_can_say_before_it_looks_at_a_model(options, nothing_loads, capsys):
    assert call("tune", "--out", "run", "--model", "m", "--data", "d.jsonl", *options) == 2
    assert "addenda: " in capsys.readouterr().err
    assert not list(nothing_loads.iterdir())


@pytest.mark.parametrize(("wrong", "told"), [
    (["compress", "--out", "run", "--share", "0.5"], "--share is not read with --allocate waterfill"),
    (["compress", "--out", "run", "--rise", "0.5", "--allocate", "energy"], "--rise is not read"),
    (["compress", "--out", "run", "--floor", "0.2", "--allocate", "uniform"], "--floor is not read"),
    (["compress", "--out", "run", "--weigh", "loss", "--allocate", "uniform"], "--weigh is not read"),
    (["compress", "--out", "run", "--ratio", "0.3", "--allocate", "energy"], "--ratio is not read"),
    (["compress", "--out", "run", "--of", "flops", "--allocate", "sensitivity"], "--of is not read"),
    (["compress", "--out", "run", "--head-bits", "2"], "--head-bits is not read"),
    (["compress", "--out", "run", "--data", "x", "--part", "train"], "--data, --part are not read"),
    (["compress", "--out", "run", "--how", "dense", "--ratio", "0.3"], "--ratio is not read with --how dense"),
    (["compress", "--out", "run", "--how", "dense", "--device", "cpu"], "--device is not read"),
    (["compress", "--how", "1bit", "a.safetensors", "--ratio", "0.3"], "--ratio is not read for an adapter"),
    (["compress", "--how", "1bit", "a.safetensors", "--center"], "--center is not read for an adapter"),
    (["compress", "--how", "1bit", "a.safetensors", "--part", "train"], "--part is not read without a judge"),
    (["plan", "--labelled", "0.5"], "--labelled is not read without --batch"),
    (["plan", "--optimizer", "lora-pro"], "--optimizer is not read without --batch"),
    (["plan", "--length", "8"], "--length is not read without --batch"),
    (["compare", "--rates", "1", "--search-steps", "3"], "--search-steps is not read with --rates 1"),
    (["eval", "--base", "compatible"], "--base compatible is for an adapter"),
    (["generate", "hello", "--base", "compatible"], "--base compatible is for an adapter"),
    (["tune", "--out", "run", "--overflow", "cut"], "--overflow must be"),
    (["eval", "--overflow", "cut"], "--overflow must be"),
    (["eval", "--label-kind", "word"], "--label-kind must be"),
    (["compare", "--label-kind", "word"], "--label-kind must be"),
])  # fmt: skip
def test_what_nothing_would_read_is_refused(wrong, told, nothing_loads, capsys):
    assert call(*wrong) == 2
    assert told in capsys.readouterr().err
    assert not list(nothing_loads.iterdir())


def unset():
    """Every option of every command that takes a text or a path."""
    for name in COMMANDS:
        for p in CLICK[name].params:
            if (
                any(o.startswith("-") for o in p.opts)
                and not p.is_flag
                and {*p.opts}.isdisjoint({"--exclude", "--system"})
            ):
                yield from ((name, option) for option in p.opts)


@pytest.mark.parametrize(("command", "option"), list(unset()))
def test_an_empty_value_is_no_path(command, option, nothing_loads, capsys):
    for arguments in ([option, ""], *([[f"{option}="]] if option.startswith("--") else [])):
        assert call(command, *arguments) == 2
        assert f"{option} has an empty value" in capsys.readouterr().err
    assert not list(nothing_loads.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_in_the_home_folder_is_read_as_a_shell_would(command, tmp_path, monkeypatch):
    """--out=~/x, '~/x' and a value of a run file come as they stand."""
    from addenda.cli.guard import guarded
    from addenda.core.base.errors import AddendaError

    monkeypatch.setenv("HOME", str(tmp_path))
    own, got = inspect.unwrap(COMMANDS[command]), {}

    @wraps(own)
    def stand_in(**given):
        got.update(given)

    kinds = {n: typing.get_args(p.annotation)[0] for n, p in inspect.signature(own).parameters.items()}
    asked = {n: Path("~/x") for n, kind in kinds.items() if Path in (kind, *typing.get_args(kind))}
    asked |= {n: [asked[n]] for n, kind in kinds.items() if typing.get_origin(kind) is list and n in asked}
    guarded(stand_in)(**asked)
    assert got == {n: [tmp_path / "x"] if isinstance(v, list) else tmp_path / "x" for n, v in asked.items()}
    for name in asked:
        with pytest.raises(AddendaError, match=rf"{flags_of(own)[name]} is '~nobody-there/x'.*Write the path out"):
            guarded(stand_in)(**{name: Path("~nobody-there/x")})


def test_warnings_are_notes(monkeypatch, capsys):
    import warnings

    from addenda.cli.guard import guarded

    def warned() -> None:
        warnings.warn("the model has \x1b few positions", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        guarded(warned)()
    assert capsys.readouterr().err == "note: the model has \\x1b few positions\n"


def test_options_that_no_command_has_are_said_to_be_of_python():
    from addenda.cli.guard import ONLY_IN_PYTHON
    from addenda.comparing.run import compare
    from addenda.core.adapter.attach import attach
    from addenda.core.adapter.load import load
    from addenda.core.base.arguments import names_of
    from addenda.core.file.save import save
    from addenda.data.encode import encode
    from addenda.data.read import read
    from addenda.models.load import load_model
    from addenda.train.evaluate import evaluate
    from addenda.train.fit import fit
    from addenda.train.generate import generate
    from addenda.train.tune import tune

    theirs = {n for f in (tune, fit, read, evaluate, generate, attach, load, save, compare, load_model, encode)
              for n in names_of(f)}  # fmt: skip
    of_commands = {n for c in COMMANDS.values() for n in flags_of(c)} | {"name", "loss", "eval", "command", "options"}
    assert theirs - of_commands <= set(ONLY_IN_PYTHON)
    flags = flags_of(COMMANDS["eval"])
    assert in_flags("give also_train= the heads, or labels=.", flags) == (
        "give also_train= (in Python) the heads, or labels= (in Python)."
    )
    assert in_flags("lora:rank=8; attach(m, also_train=[])", flags) == "lora:rank=8; attach(m, also_train=[])"


@pytest.mark.parametrize("command", [*COMMANDS, None])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_has_two_names(command, flag, capsys):
    assert call(*([command] if command else []), flag) == 0
    assert "Usage" in capsys.readouterr().out


def test_the_version(capsys):
    import addenda

    assert call("--version") == 0
    assert capsys.readouterr().out == f"addenda {addenda.__version__}\n"


def test_messages_are_in_the_spelling_of_the_command():
    flags = flags_of(COMMANDS["tune"])
    for told, says in {
        "Give steps or epochs, not both; got steps=2 and epochs=1.5.": "Give steps or epochs, not both; got --steps 2 "
        "and --epochs 1.5.",
        "early_stop= wants data: give eval_data=.": "--early-stop wants data: give --eval.",
        "Start again with resume=False or elsewhere.": "Start again with --no-resume or elsewhere.",
        "or dtype='float32'.": "or --dtype float32.",
        "Write e.g. 'lora:rank=8'; give attach(..., seed=3)": "Write e.g. 'lora:rank=8'; give attach(..., seed=3)",
        "(--image-size), exclude=, or {target: method}": "(--image-size), --exclude, or {target: method}",
        "exclude=['linear'] takes what targets=['a', 'b'] name": "--exclude linear takes what --targets a,b name",
        "Raise max_length; f(max_length), 'max_length'": "Raise --max-length; f(max_length), 'max_length'",
        "resume=False (--no-resume) or out= (--out)": "--no-resume or --out",
        "data='a b.csv' or data='' and labels='c d'": "--data 'a b.csv' or --data '' and labels='c d' (in Python)",
        "targets=['a', 'b c'] take": "--targets 'a','b c' take",
    }.items():  # fmt: skip
        assert in_flags(told, flags) == says
    told = 'With rename={"a.*.q": "b.*.q", "c": "d"} it has 4 (a guess). See name={"x": 3}.'
    assert in_flags(told, flags_of(COMMANDS["export"])) == (
        "With --rename 'a.*.q=b.*.q' --rename 'c=d' it has 4 (a guess). See name={\"x\": 3}."
    )
    assert in_flags(told, flags).startswith('With rename={"a.*.q": "b.*.q", "c": "d"} (in Python) it has 4')
    for name in ("eval", "generate"):
        made = in_flags("load it with base='compatible'.", flags_of(COMMANDS[name]))
        assert made == "load it with --base compatible."
        assert "--base" in {o for p in CLICK[name].params for o in p.opts}


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_that_messages_name_exist(command):
    there = {o for p in CLICK[command].params for o in [*p.opts, *p.secondary_opts]}
    assert {f for f in flags_of(COMMANDS[command]).values() if f.startswith("--")} <= there


@pytest.mark.parametrize("text", HOSTILE)
def test_what_others_wrote_cannot_act_on_a_terminal(text):
    seen = visible(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", seen)
    seen.encode()
    assert visible("Zoë – 数字 🧑\u200d🔬 a\tb\nc") == "Zoë – 数字 🧑\u200d🔬 a\tb\nc"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "command", ["inspect", "plan", "tune", "eval", "generate", "compare", "report", "compress", "methods"]
)
def test_hostile_names_in_every_command(command, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = text.replace("\x00", "")
    given = {
        "inspect": [name], "plan": ["--model", name], "tune": ["--out", "run", "--model", name, "--data", name],
        "eval": ["--model", name, "--data", name], "generate": ["hello", "--model", name, "--adapter", name],
        "compare": ["--model", name, "--data", name], "report": [name], "compress": ["--out", "run", "--model", name],
        "methods": [name],
    }[command]  # fmt: skip
    assert call(command, *given) == 2
    made = capsys.readouterr()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", made.out + made.err)
    assert "addenda: " in made.err


@pytest.mark.parametrize("text", HOSTILE)
def test_titles_in_tables_are_no_markup(text):
    from rich.console import Console

    from addenda.comparing.live import Board
    from addenda.train.progress import shown

    class Terminal:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return True

    board = Board(Console(width=200, force_terminal=False))
    board.trial(text, "final", 0, 0.1)
    with board.console.capture() as seen:
        board.console.print(board.table())
    assert visible(text) in seen.get().replace("\n", "")
    screen = Terminal()
    with shown(text, screen):
        pass
    assert visible(text) in screen.text


def test_the_commands_print_through_one_function():
    import addenda.cli

    for file in Path(inspect.getfile(addenda.cli)).parent.glob("*.py"):
        if file.name != "common.py":
            assert "typer.echo(" not in file.read_text(encoding="utf-8"), f"{file.name}: use tell or say"


@pytest.mark.parametrize(("command", "place"), [
    ("tune", "addenda.train.tune.tune"), ("compare", "addenda.comparing.run.compare"),
    ("compress", "addenda.compressing.run.compress"),
])  # fmt: skip
def test_ctrl_c_says_what_is_kept(command, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def interrupted(*_, **__):
        error = KeyboardInterrupt()
        if command == "tune":
            error.add_note("Kept: step 4 of the run.")
        raise error

    monkeypatch.setattr(place, interrupted)
    assert call(command, *needed(command), *(["--model", "m"] if command != "compare" else [])) == 130
    told = capsys.readouterr().err
    assert "interrupted. " in told
    assert "Kept: step 4" in told if command == "tune" else "Nothing is kept yet" in told


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_is_raised_in_a_command_and_left_to_whoever_handles_it():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(TerminatedError) as ended, terminable():
            signal.raise_signal(signal.SIGTERM)
        assert exit_code(ended.value) == 143 and exit_code(KeyboardInterrupt()) == 130
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        heard = []
        signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
        with terminable():
            signal.raise_signal(signal.SIGTERM)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_name_of_a_function_of_python_is_not_told(capsys, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert call("compress", "--how", "9bit", tmp_path / "a.safetensors") == 2
    said = capsys.readouterr().err
    assert "These options cannot be: bits must be from 1 to 8, got 9." in said and "compress_adapter" not in said
