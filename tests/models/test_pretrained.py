"""Folders of models: no code of theirs runs unasked, whatever command reads them."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.models.load import load_model
from addenda.models.pretrained import pretrained
from addenda.train.tune import tune
from tiny_models import SUMS, make_llama, make_tokenizer

ROOT = Path(__file__).parents[2]
CODE = """
from pathlib import Path

Path({marker!r}).write_text(__name__)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Settings(LlamaConfig):
    model_type = "own"

class Model(LlamaForCausalLM):
    config_class = Settings

class Reader(PreTrainedTokenizerFast):
    pass
"""
OWN = {"AutoConfig": "code.Settings", "AutoModelForCausalLM": "code.Model"}
FOLDERS = {  # what config.json and tokenizer_config.json say
    "configuration": ({"model_type": "own", "auto_map": {"AutoConfig": "code.Settings"}}, {}),
    "model": ({"model_type": "own", "auto_map": OWN}, {}),
    "tokenizer": ({}, {"tokenizer_class": "Reader", "auto_map": {"AutoTokenizer": ["code.Reader", "code.Reader"]}}),
    "kernel": ({"attn_implementation": "somebody/kernel"}, {}),
}  # fmt: skip
COMMANDS = {
    "plan": "plan --model {m}",
    "tune": "tune --model {m} --data {d} --steps 1 --out {o}",
    "eval": "eval --model {m} --data {d} --split train",
    "generate": "generate hello --model {m}",
    "compare": "compare --model {m} --data {d} --methods lora --yes --out {o}",
    "compress": "compress --model {m} --out {o}",
    "dense": "compress --how dense --model {m} --out {o}",
    "few-bits": "compress {a} --how 1bit --model {m} --data {d} --out {o}",
}


def edited(file: Path, **entries) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder for each kind of foreign code, data, and an adapter of the model that they were made of."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, SUMS)))
    model = make_llama()
    adapter = ad.attach(model, "lora:rank=2")
    adapter.save(root / "adapter.safetensors")
    ad.detach(model)
    for name, (config, tokenizer) in FOLDERS.items():
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
        (root / name / "code.py").write_text(CODE.format(marker=str(root / "MARKER")))
        edited(root / name / "config.json", **config)
        edited(root / name / "tokenizer_config.json", **tokenizer)
    return root


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """transformers' copies of foreign code, and those that Python has imported, are this test's own."""
    import transformers.dynamic_module_utils as theirs

    monkeypatch.setattr(theirs, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]  # none else: a library that comes to be imported here cannot be imported twice


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_folders_code(written, tmp_path, capfd, monkeypatch, command, kind):
    """The answer that transformers would ask for is there to be read, and nobody reads it."""
    from addenda.cli.main import run

    read, write = os.pipe()
    os.write(write, b"y\n" * 20)
    os.close(write)
    places = {"m": written / kind, "d": written / "data.jsonl", "o": tmp_path / "out"}
    words = [word.format(**places, a=written / "adapter.safetensors") for word in COMMANDS[command].split()]
    with os.fdopen(read) as answers:
        monkeypatch.setattr(sys, "stdin", answers)
        with pytest.raises(SystemExit) as left:
            run(words)
    said = capfd.readouterr().err
    assert left.value.code == 2, said
    if (command, kind) != ("dense", "tokenizer"):  # it has no low-rank layers, so its tokenizer is not read
        assert "--trust-remote-code" in said
        assert str(written / kind) in said
    assert not (written / "MARKER").exists()
    assert not (tmp_path / "out" / "adapter.safetensors").exists()


def test_a_terminal_is_not_asked_either(written, tmp_path):
    """The same in a process of its own, whose stdin says yes."""
    command = [sys.executable, "-m", "addenda", "plan", "--model", str(written / "model")]
    made = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, timeout=120)
    assert made.returncode == 2
    assert "--trust-remote-code" in made.stderr
    assert "Traceback" not in made.stderr
    assert not (written / "MARKER").exists()


@pytest.mark.usefixtures("modules")
def test_whoever_trusts_a_folder_says_so_and_it_is_recorded(written, tmp_path):
    with pytest.raises(AddendaError, match=r"code\.py, named in config\.json"):
        tune(written / "model", SUMS, steps=1, batch=4, out=tmp_path / "run", progress=False)
    made = tune(
        written / "model", SUMS, steps=1, batch=4, out=tmp_path / "run", progress=False, dtype="float32",
        trust_remote_code=True,
    )  # fmt: skip
    try:
        assert type(made.model).__module__.startswith("transformers_modules.")
        assert json.loads((tmp_path / "run/run.json").read_text())["options"]["trust_remote_code"] is True
        assert "trust_remote_code=True" in (tmp_path / "run/README.md").read_text()
    finally:
        (written / "MARKER").unlink()


def test_an_architecture_of_transformers_needs_no_code(written, tmp_path):
    """Many folders name code beside an architecture that transformers has itself: its own class is taken."""
    make_llama().save_pretrained(tmp_path / "both")
    make_tokenizer().save_pretrained(tmp_path / "both")
    (tmp_path / "both/code.py").write_text(CODE.format(marker=str(tmp_path / "MARKER")))
    edited(tmp_path / "both/config.json", auto_map=OWN)
    loaded = load_model(tmp_path / "both", dtype="float32")
    assert type(loaded.model).__module__.startswith("transformers.models.llama")
    assert not loaded.trust_remote_code
    assert not (tmp_path / "MARKER").exists()


def test_a_preparation_of_images_runs_no_code(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**size, image_size=8, patch_size=4)).save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(CODE.format(marker=str(tmp_path / "MARKER")))
    said = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "code.Reader"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(AddendaError, match=r"preprocessor_config\.json.* --trust-remote-code"):
        load_model(tmp_path, dtype="float32")
    assert not (tmp_path / "MARKER").exists()


def test_from_pretrained_is_called_in_one_place():
    """Everywhere else a call might leave `trust_remote_code` open, and transformers would ask."""
    files = [f for part in ("src", "recipes", "bench") for f in (ROOT / part).rglob("*.py")]
    assert len(files) > 100
    calls = {
        str(file.relative_to(ROOT)): node.lineno
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config", "load_dataset")
    }
    own = {f"bench/{name}.py" for name in ("peft_parity", "served", "on_disk")}  # of what they have just written
    assert list(calls.keys() - own) == ["src/addenda/models/pretrained.py"], calls
    assert pretrained.__module__ == "addenda.models.pretrained"
