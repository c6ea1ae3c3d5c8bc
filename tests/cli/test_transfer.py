"""`addenda transfer`: a folder with an adapter of another base, and what is refused before a model is read."""

import shutil

import pytest

from lister import write_transfer
from shared import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_transfer(tmp_path_factory.mktemp("transfer"))


def given(folder, **paths):
    names = {"bundle": "sums.bundle", "source": "source", "target": "target"} | paths
    return [part for name, path in names.items() for part in (f"--{name}", folder / path)]


def test_a_transfer_is_run_asked_about_and_run_again_by_its_run_file(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    small = ["--count", 4, "--steps", 2, "--batch", 2, "--max-new-tokens", 5, "--tries", 8, "--sample-batch", 4,
             "--format", r"\d\+\d=\?", "--dtype", "float32", "--rate", "0.01"]  # fmt: skip
    call("transfer", *given(folder), *small, "--out", tmp_path / "out", "--within", "0.000001", code=2)
    said = capsys.readouterr().err
    assert "dry run of 8 samples" in said and "Nobody is there to answer" in said and "--within" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()
    call("transfer", *given(folder), *small, "--out", tmp_path / "out", "--within", "0.000001", "--yes")
    said = capsys.readouterr()
    assert "accepted by stage: format" in said.out and "step 2/2" in said.err and "written:" in said.out
    assert (tmp_path / "out" / "run.yaml").is_file()
    first = (tmp_path / "out" / "adapter.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    config = tmp_path / "run.yaml"
    call("transfer", *given(folder), *small, "--out", tmp_path / "out")
    shutil.move(tmp_path / "out" / "run.yaml", config)
    call("transfer", "--config", config, "--out", tmp_path / "again")
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == first


def test_what_cannot_be_is_said_before_a_model_is_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("addenda.transferring.sides.load_model", lambda *_, **__: pytest.fail("a model was read"))
    for arguments, said in (
        ([*given(folder, target="source")], "are the same model"),
        ([*given(folder, bundle="adapter.safetensors")], "a bundle of seeds and a discriminator was expected"),
        ([*given(folder, bundle="none")], "There is no file"),
        ([*given(folder, target="none")], "none"),
        ([*given(folder), "--yes"], "--yes answers what --within asks"),
        ([*given(folder), "--method", "lroa"], "Did you mean"),
        ([*given(folder), "--count", 0], "--count must be at least 1"),
        ([*given(folder), "--steps", 3, "--epochs", 2], "--steps or --epochs|steps or epochs"),
    ):
        call("transfer", *arguments, "--out", tmp_path / "out", code=2)
        found = capsys.readouterr().err
        assert any(part in found for part in said.split("|")), found
    assert not list(tmp_path.iterdir())
