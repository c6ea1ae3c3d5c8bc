"""Where commands write: nothing of anybody else's is touched, and a failure of the disk is an error that names it."""

import json
import os
from pathlib import Path

import pytest

import addenda as ad
from addenda.cli.main import run
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import DiskError
from addenda.core.disk.place import folder_for


def call(*arguments):
    with pytest.raises(SystemExit) as stopped:
        run([str(a) for a in arguments])
    return stopped.value.code or 0


def kept(folder):
    return {
        p: (p.is_symlink(), p.read_bytes() if p.is_file() else None)
        for p in Path(folder).rglob("*")
        if ".cache" not in p.parts
    }


@pytest.fixture
def given(tmp_path, tmp_path_factory, monkeypatch):
    """A folder with a model, data and an adapter file."""
    from tiny_models import make_llama, make_tokenizer

    model = make_llama()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = "".join(f'{{"question": "{a}+{b}=?", "answer": "{a + b}"}}\n' for a in range(5) for b in range(5))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))  # not what a command writes
    ad.attach(model, "lora:rank=2").save(tmp_path / "adapter.safetensors")
    return tmp_path


def command(name, given, out):
    """One command that writes `out`."""
    on = ["--model", given / "model", "--data", given / "data", "--dtype", "float32"]
    return {
        "tune": ["tune", *on, "--out", out, "--steps", 1],
        "compare": ["compare", *on, "--out", out, "--methods", "lora:rank=2", "--rates", 1, "--seeds", 1, "--budget",
                    "steps=1", "--yes"],
        "compress": ["compress", "--model", given / "model", "--out", out],
        "few bits": ["compress", given / "adapter.safetensors", "--how", "1bit", "--out", out],
        "items": ["eval", *on, "--split", "train", "--items", out],
        "page": ["methods", "--page", out],
    }[name]  # fmt: skip


FOLDERS, FILES = ("tune", "compare", "compress"), ("few bits", "items", "page")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("place", ["model", "data", "home", "~", "/", "adapter.safetensors", "link", "x" * 300])
def test_a_folder_that_must_not_be_written_to(given, capsys, name, place):
    (given / "link").symlink_to(given / "home")
    out = place if place in ("/", "~") else given / place
    if name == "compress" and place in ("home", "~", "link"):
        pytest.skip("an empty folder is a target of compress")
    before = kept(given)
    assert call(*command(name, given, out)) == 2
    assert "Traceback" not in (told := capsys.readouterr().err) and told.startswith("addenda: ")
    assert kept(given) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_no_name_is_no_folder(name, given):
    from addenda.comparing.run import compare
    from addenda.compressing.run import compress

    with pytest.raises(AddendaError, match="names nothing"):
        {"tune": lambda: ad.tune(given / "model", given / "data", out=""),
         "compare": lambda: compare(given / "model", given / "data", out=""),
         "compress": lambda: compress(given / "model", out="")}[name]()  # fmt: skip


@pytest.mark.parametrize(
    ("name", "taken"),
    [("tune", "README.md"), ("tune", "run.json"), ("tune", "adapter.safetensors"), ("tune", "checkpoints"),
     ("tune", "run.yaml"), ("compare", "run.yaml"), ("compare", "report.html"), ("compare", "config.json"),
     ("compare", "trials/mine.json"), ("compare", "partial/x"),
     ("compress", "thesis.txt")],
)  # fmt: skip
def test_what_others_wrote_is_an_error_where_its_name_is_wanted(given, capsys, name, taken):
    file = given / "out" / taken
    file.parent.mkdir(parents=True)
    file.write_text('{"mine": 1}')
    before = kept(given)
    assert call(*command(name, given, given / "out")) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert kept(given) == before


@pytest.mark.parametrize("name", ["tune", "compare"])
def test_other_files_may_stand_there(given, name):
    out = given / "out"
    (out / "wandb").mkdir(parents=True)
    (out / "wandb" / "log").write_text("a log")
    (out / "log.txt").write_text("a log")
    assert call(*command(name, given, out)) == 0
    assert call(*command(name, given, out)) == 0
    assert (out / "wandb" / "log").read_text() == (out / "log.txt").read_text() == "a log"
    assert not list(out.rglob(".addenda-lock"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_somebody_elses_is_not_written_over(given, capsys, name):
    out = given / "precious.safetensors"
    out.write_text("precious")
    assert call(*command(name, given, out)) == 2
    assert "is there already" in capsys.readouterr().err and out.read_text() == "precious"
    out.unlink()
    assert call(*command(name, given, out)) == 0
    assert call(*command(name, given, out)) == 0  # its own it may


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
@pytest.mark.parametrize("where", ["file/in/the/way", "x" * 300, "data" + "/y" * 3000])
def test_a_path_that_cannot_be_is_an_error_that_names_it(given, capsys, name, where):
    (given / "file").write_text("")
    before = kept(given)
    assert call(*command(name, given, given / where)) == 2
    told = capsys.readouterr().err
    assert told.startswith("addenda: ") and "Traceback" not in told and told.count("\n") == 1
    assert kept(given) == before


@pytest.mark.parametrize("name", ["tune", "compare", "few bits", "items", "page"])
def test_a_full_disk_is_an_error_that_says_so_and_leaves_no_half(given, capsys, monkeypatch, name):
    before = kept(given)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert call(*command(name, given, given / "new")) == 2
    told = capsys.readouterr().err
    assert "The disk is full at" in told and "MiB free" in told and "Make room" in told
    left = {p for p in kept(given) if p not in before and p.is_file()}
    assert not left or (name == "tune" and all("checkpoints" in p.parts for p in left))


def test_paths_of_home_are_read_and_folders_are_not_files(given, monkeypatch):
    (given / "home" / "a.safetensors").write_bytes((given / "adapter.safetensors").read_bytes())
    monkeypatch.chdir(given)
    from tiny_models import make_llama

    adapter = ad.load(make_llama(), "~/a.safetensors")
    assert adapter.save("~/b.safetensors") == given / "home" / "b.safetensors"
    for wrong, says in [(given / "home", "is a folder"), ("", "names nothing"), ("~nobody-there/x", "Write the path")]:
        with pytest.raises(AddendaError, match=says):
            adapter.save(wrong)
        with pytest.raises(AddendaError, match=says):
            ad.load(make_llama(), wrong)
    with pytest.raises(DiskError, match="name is too long"):
        adapter.save(given / ("x" * 300))
    assert call("tune", "--model", given / "model", "--data", given / "data", "--out", "~/run", "--steps", 1) == 0
    assert call("inspect", "~/run/adapter.safetensors") == 0
    peft = ["--model", given / "model", "--to", "peft", "--out=~/peft"]
    assert call("export", "~/run/adapter.safetensors", *peft) == 0 and (given / "home" / "peft").is_dir()
    assert (given / "home" / "run" / "adapter.safetensors").is_file() and not (given / "~").exists()


def test_the_folder_of_another_model_is_no_place(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(AddendaError, match="folder of a model"):
        folder_for(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"schema": 1, "methods": {}}))
    assert folder_for(tmp_path) == tmp_path


def test_what_moves_a_terminal_is_shown(capsys):
    assert call("inspect", "a\x1b[31mred\x9b.safetensors") == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told and "\x9b" not in told and "\\x1b[31mred" in told
