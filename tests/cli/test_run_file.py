"""Run files: every command reads one, what a run leaves repeats it, and a hostile one is an error with its line."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file

from addenda.cli import run_file
from addenda.cli.common import flags_of
from addenda.cli.main import commands, run
from addenda.core.base.errors import AddendaError

COMMANDS = {name: info.callback for name, info in commands().items()}


def call(*arguments, code=0):
    with pytest.raises(SystemExit) as stopped:
        run([word for a in arguments for word in (a.split() if a in COMMANDS else [str(a)])])
    assert (stopped.value.code or 0) == code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The present folder: a model, data of sums and a text."""
    from tiny_models import make_llama, make_tokenizer

    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    rows = "".join(f'{{"question": "{a}+{b}=?", "answer": "{a + b}"}}\n' for a in range(5) for b in range(5))
    (tmp_path / "sums.jsonl").write_text(rows)
    (tmp_path / "text.txt").write_text("".join(f"{a} and {b} is {a + b}.\n" for a in range(40) for b in range(9)))
    return tmp_path


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """A function: what a command says of a run file of this text, or of these bytes."""
    monkeypatch.chdir(tmp_path)

    def tell(text, command="tune"):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "mine.yaml").write_bytes(data)
        call(command, "--config", "mine.yaml", code=2)
        says = capsys.readouterr().err
        assert says.startswith("addenda: ") and "Traceback" not in says
        assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]
        return says

    return tell


def test_tune_again_by_its_run_file_has_equal_bits(folder, capsys):
    call("tune", "--model", "model", "--data", "sums.jsonl", "--out", "run", "--method", "lora:rank=2", "--steps", 3,
         "--batch", 5, "--eval", "0.3", "--targets", "q_proj,v_proj", "--no-group", "--rate", "1e-3")  # fmt: skip
    assert "run.yaml" in capsys.readouterr().out
    text = (folder / "run" / "run.yaml").read_text()
    for line in ("command: tune", "out: run", "model: model", "eval: '0.3'", "group: false", "rate: 0.001", "seed: 0"):
        assert f"{line}\n" in text
    assert "auto" not in {line.partition(": ")[2] for line in text.splitlines() if not line.startswith("optimizer")}
    call("tune", "--config", "run/run.yaml", "--out", "other")
    one, two = (load_file(folder / name / "adapter.safetensors") for name in ("run", "other"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    losses = [json.loads((folder / name / "run.json").read_text())["losses"] for name in ("run", "other")]
    assert losses[0] == losses[1]
    before = {p: p.read_bytes() for p in (folder / "run").iterdir() if p.is_file()}
    call("tune", "--config", "run/run.yaml")  # goes on with a run that is finished
    assert {p: p.read_bytes() for p in (folder / "run").iterdir() if p.is_file()} == before
    call("tune", "--config", "run/run.yaml", "--steps", 4, "--group", code=2)  # the command line wins
    assert "group was False, now True" in capsys.readouterr().err
    call("tune", "--config", "run/run.yaml", "--steps", 4)
    assert json.loads((folder / "run" / "run.json").read_text())["steps"] == 4
    assert "steps: 4\n" in (folder / "run" / "run.yaml").read_text()


def test_compare_again_by_its_run_file_is_the_same_comparison(folder):
    call("compare", "--model", "model", "--data", "sums.jsonl", "--methods", "lora:rank=2;alpha=4,shira", "--rates", 1,
         "--seeds", 1, "--budget", "steps=2", "--batch", 4, "--dtype", "float32", "--out", "one", "--yes")  # fmt: skip
    call("compare", "--config", "one/run.yaml", "--out", "two")
    one, two = (json.loads((folder / name / "config.json").read_text()) for name in ("one", "two"))
    of_the_clock = {"created", "command", "predicted_seconds", "measured_step_seconds"}
    for config in (one, two):
        config["model"].pop("attention_seconds")
    assert {k: v for k, v in one.items() if k not in of_the_clock} == {
        k: v for k, v in two.items() if k not in of_the_clock
    }
    call("compare", "--config", "one/run.yaml", "--seeds", 2)  # goes on, and grows
    assert json.loads((folder / "one" / "config.json").read_text())["seeds"] == [0, 1]


def test_another_command_keeps_out_of_a_folder_and_its_run_file_says_nothing_to_more(folder, capsys):
    on = ("--model", "model", "--data", "sums.jsonl")
    call("compare", *on, "--methods", "lora:rank=2", "--rates", 1, "--seeds", 1, "--budget", "steps=2", "--batch", 4,
         "--dtype", "float32", "--general", "none", "--out", "one", "--yes")  # fmt: skip
    file = folder / "one" / "run.yaml"
    before = {p: p.read_bytes() for p in (folder / "one").rglob("*") if p.is_file()}
    call("tune", *on, "--steps", 1, "--out", "one", code=2)
    assert "one holds the run of another command (run.yaml says which)" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (folder / "one").rglob("*") if p.is_file()} == before
    file.write_text(file.read_text().replace("command: compare", "command: tune"))  # as tune once wrote it there
    there = file.read_text()
    call("compare", "--more", "one", "--seeds", 2, "--yes", *on)
    assert json.loads((folder / "one" / "config.json").read_text())["seeds"] == [0, 1] and file.read_text() == there


def test_compress_again_by_its_run_file_has_equal_bits(folder):
    call("compress", "--model", "model", "--calibration", "text.txt", "--out", "one", "--how", "svd", "--ratio", "0.3",
         "--samples", 4, "--length", 32, "--multiple", 1, "--no-latency", "--no-by-type")  # fmt: skip
    text = (folder / "one" / "run.yaml").read_text()
    assert "ratio: 0.3\n" in text and "latency: false\n" in text and "by-type: false\n" in text
    call("compress", "--config", "one/run.yaml", "--out", "two")
    one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reads_one(command, told):
    first = next(iter(run_file._keys(COMMANDS[command])))
    said = told(f"# a comment\n{first[:-1]}x{first[-1]}: 1\n", command)
    assert f"line 2: addenda {command} has no option" in said
    assert f"'{first}'" in said
    assert "is of the command 'tunee' (line 1)" in told("command: tunee\n", command)
    other = "plan" if command != "plan" else "tune"
    assert f"addenda {other} --config mine.yaml" in told(f"command: {other}\n", command)


@pytest.mark.parametrize(("text", "says"), [
    ("stpes: 40", "line 1: addenda tune has no option 'stpes'. Did you mean 'steps'"),
    ("config: a.yaml", "has no option 'config'"),
    ("steps: many", "line 1: steps is a whole number, got 'many'"),
    ("steps: 1.5", "steps is a whole number, got '1.5'"),
    ("steps: true", "steps is a whole number, got 'true'"),
    ("steps: 0", "line 1: steps must be at least 1"),
    ("rate: .nan", "rate is a number, got '.nan'"),
    ("rate: nan", "rate must be a positive number"),
    ("steps: " + "9" * 60_000, "steps is a whole number, got '999"),
    ("group: maybe", "group is true or false, got 'maybe'"),
    ("group: 'true'", "group is true or false, got 'true'"),
    ("overflow: cut", "overflow must be 'error'"),
    ("batch: [1]", "batch takes one value, and a list came"),
    ("data: {a: 1}", "data takes a value, or names in a list, and a mapping came"),
    ("batch:", "batch has no value"),
    ("data: ''", "data has an empty value"),
    ("out: run\nmax-length: 8\nmax_length: 9", "line 3: max_length stands in line 2 already"),
    ("targets: ['re:a,b', c]", "write it alone"),
    ("a: 1\nb: 2", "line 1: addenda tune has no option 'a'"),
    ("trust-remote-code: true", "executes code of the model's folder, so it is given on the command line only"),
    ("- steps: 1", "holds a list"),
    ("steps 40", "holds a text"),
    ("# nothing", "holds nothing"),
    ("", "holds nothing"),
    ("a: [1\nb: 2", "is not YAML in line 2"),
    ("a: 1\n---\nb: 1", "is not YAML in line 2"),
    ("\tsteps: 1", "is not YAML in line 1"),
    ("? [a]\n: 1", "a sequence for a name in line 1"),
    ("steps: !!python/object/apply:os.system ['true']", "a tag (tag:yaml.org,2002:python/object/apply:os.system)"),
    ("steps: !!int 4", "a tag"),
    ("steps: &a 4", "an alias or its anchor (& or *) in line 1"),
    ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "an alias or its anchor"),
    ("<<: {steps: 1}", "has no option '<<'"),
    ("steps: " + "[" * 30_000, "lists or mappings in each other in line 1"),
    ("targets: [[a]]", "lists or mappings in each other in line 1"),
    ("a: 1\n" * 20_000, "more than 64 KiB"),
    (b"steps: \xff", "is not text in UTF-8"),
    (b"steps: \x00", "is not YAML"),
    ("\x1b[2J: 1", "is not YAML"),
])  # fmt: skip
def test_what_cannot_be_is_told_before_anything_is_loaded(text, says, told):
    assert says in told(text)


def test_all_problems_are_told_together(told):
    said = told("stpes: 1\nbatch: x\nrate: 1e-3\nwarmup: -1\n")
    assert "line 1" in said and "line 2" in said and "line 3" not in said and "line 4: warmup must be" in said


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / ("x" * 300)):
        call("tune", "--config", path, code=2)
        assert str(tmp_path) in capsys.readouterr().err
    call("tune", "--config", tmp_path / "none.yaml", code=2)
    assert "There is no run file" in capsys.readouterr().err


def entries(text, tmp_path, command="tune"):
    (tmp_path / "a.yaml").write_text(text)
    return run_file.read(tmp_path / "a.yaml", COMMANDS[command], command)


def test_values_are_read_as_they_stand(tmp_path):
    text = (
        "rate: 1e-3\nlabel: 007\nquestion: yes\nanswer: 12:30\nmodel: ~/x\nsteps: 1_000\ntargets: [q_proj, v_proj]\n"
        "exclude: ['re:a{1,2}']\nlean: on\nhead_bits: ~\neval: 0.10\n"
    )
    assert entries(text, tmp_path) == {
        "rate": 1e-3, "label": "007", "question": "yes", "answer": "12:30", "model": "~/x", "steps": 1000,
        "targets": "q_proj,v_proj", "exclude": "re:a{1,2}", "lean": True, "eval_data": "0.10",
    }  # fmt: skip
    assert entries("methods: ['lora:rank=2,alpha=4', shira]", tmp_path, "compare") == {
        "methods": "lora:rank=2;alpha=4,shira"
    }


REPEATED = [
    (command, option, key)
    for command, function in COMMANDS.items()
    for key, (option, annotation, _) in run_file._keys(function).items()
    if "list[" in str(annotation)
]


@pytest.mark.parametrize(("command", "option", "key"), REPEATED)
def test_what_is_given_several_times_is_a_list_or_one_value(command, option, key, tmp_path):
    assert entries(f"{key}: [a=1, 'b, c', 007]", tmp_path, command) == {option: ["a=1", "b, c", "007"]}
    assert entries(f"{key}: a, b", tmp_path, command) == {option: ["a, b"]}


def test_every_command_that_takes_several_of_something_was_tried():
    assert {(c, o) for c, o, _ in REPEATED} >= {
        ("merge", "adapter"), ("combine", "files"), ("reduce", "files"), ("generate", "prompts"),
        *((c, "rename") for c in ("eval", "export", "generate", "merge")),
    }  # fmt: skip


@pytest.mark.parametrize(("command", "key"), [("merge", "adapter"), ("combine", "files"), ("reduce", "files")])
@pytest.mark.parametrize("value", ["[there.safetensors]", "there.safetensors"])
def test_files_of_a_run_file_are_read(command, key, value, folder, capsys):
    to = "to: lora\n" if command == "reduce" else ""
    (folder / "mine.yaml").write_text(f"model: model\nout: made\n{to}{key}: {value}\n")
    call(command, "--config", "mine.yaml", code=2)
    assert "there.safetensors" in (said := capsys.readouterr().err) and "run file" not in said


@pytest.mark.parametrize("text", ["a: b", "# c", "'", '"', "a\nb", "yes", "007", "~", "null", "é 数字 \U0001f9d1",
                                  "\udcff", " x ", "- a", "[a", "x" * 400, "*a", "&a", "!b", "%", "a\x1b"])  # fmt: skip
def test_what_is_written_is_what_is_read(text, tmp_path):
    command = COMMANDS["tune"]
    given = {n: p.default for n, p in inspect.signature(command).parameters.items()} | {"out": text, "label": text}
    given |= {"rate": 1e-05, "weight_decay": 0.1 + 0.2, "steps": 10**9, "lean": True, "group": False}
    made = entries(run_file.text_of(command, given, {"dtype": "float32"}), tmp_path)
    chosen = {"dtype": "float32"}
    assert made == {
        k: v for k, v in (given | chosen).items() if v is not None and k not in ("config", "trust_remote_code")
    }


def test_an_empty_text_is_as_if_nothing_was_given(tmp_path):
    command = COMMANDS["tune"]
    given = {n: p.default for n, p in inspect.signature(command).parameters.items()} | {"targets": "", "out": "run"}
    assert "targets" not in entries(run_file.text_of(command, given, {}), tmp_path)


def test_what_executes_code_is_noted_and_not_repeated():
    command = COMMANDS["compress"]
    given = {n: p.default for n, p in inspect.signature(command).parameters.items()} | {"trust_remote_code": True}
    text = run_file.text_of(command, given, {})
    assert "# --trust-remote-code was given" in text and "\ntrust-remote-code" not in text
    assert "pass-at-1" not in text


def test_the_names_of_the_options_that_are_special_exist():
    names = {n for c in COMMANDS.values() for n in flags_of(c)}
    assert {*run_file.EXECUTE, *run_file.LISTS, *run_file.EMPTY} <= names
    assert not {"command", "version", "help"} & {k for c in COMMANDS.values() for k in run_file._keys(c)}


def test_a_run_file_of_somebody_elses_is_not_written_over(tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 1\n")
    with pytest.raises(AddendaError, match=r"holds run\.yaml"):
        run_file.check_place(tmp_path, COMMANDS["tune"])
    run_file.write(tmp_path / "new", COMMANDS["tune"], {"out": tmp_path})
    run_file.check_place(tmp_path / "new", COMMANDS["tune"])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.yaml"]
