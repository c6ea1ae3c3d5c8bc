"""Nothing that a file says is run: no pickle is opened, no code is made of text, by any line or any run."""

import ast
import json
import sys
from pathlib import Path

import pytest

import addenda as ad
from addenda.train.tune import tune
from tiny_models import SUMS, make_llama, make_tokenizer

SOURCE = Path(__file__).parents[1] / "src" / "addenda"
CALLS = {  # what can run what it is given, fetch it, or unpack it
    "eval", "exec", "compile", "__import__", "import_module", "reload", "spec_from_file_location", "load_module",
    "run_module", "run_path", "system", "popen", "Popen", "check_output", "check_call", "execv", "execve", "spawnl",
    "spawnv", "load_dataset", "load_state_dict_from_url", "urlopen", "snapshot_download", "hf_hub_download",
    "urlretrieve", "read_pickle", "unsafe_load", "full_load", "unpack_archive", "extractall",
}  # fmt: skip
OPENS = {
    ("torch", "load"), ("torch.jit", "load"), ("pickle", "load"), ("pickle", "loads"), ("yaml", "load"), ("np", "load"),
    ("numpy", "load"), ("joblib", "load"), ("marshal", "loads"), ("dill", "load"), ("shelve", "open"),
}  # fmt: skip
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code", "zipfile", "tarfile"}
# import_module of names that stand in the source, never of a file's or a user's
KNOWN = {
    ("comparing/workers.py", "Popen"): "a worker, where --workers asks for it: this program, of this environment",
    ("comparing/workers.py", "pickle"): "what a worker and who began it tell each other, over a pipe of their own",
    ("comparing/workers.py", "load"): "there",
    ("comparing/workers.py", "loads"): "there, of what was written a line above",
    ("__init__.py", "import_module"): "the table of public names",
    ("cli/main.py", "import_module"): "the table of commands",
    ("methods/__init__.py", "import_module"): "the files of the package",
    ("optim/__init__.py", "import_module"): "the files of the package",
    ("exporting/doors.py", "import_module"): "the table of doors",
    ("compressing/announce.py", "import_module"): "one module of ours",
    ("quantizing/bridges/__init__.py", "import_module"): "the files of the package",
    ("core/method/catalogue.py", "reload"): "modules that were imported already",
    ("compressing/sandbox.py", "Popen"): "HumanEval, where --humaneval asks for it",
    ("compressing/sandbox.py", "compile"): "there, in that process",
    ("compressing/sandbox.py", "exec"): "there, in that process",
}


def _name(function: ast.expr) -> tuple[str, str]:
    if isinstance(function, ast.Attribute):
        return ast.unparse(function.value), function.attr
    return "", function.id if isinstance(function, ast.Name) else ""


def found(tree: ast.AST) -> set[str]:
    """What in a file could run what it is given."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            of, name = _name(node.func)
            builtin = name in ("eval", "compile", "exec") and of not in ("", "builtins")  # model.eval(), re.compile()
            if (name in CALLS and not builtin) or (of, name) in OPENS:
                names.add(name)
            keywords = {k.arg: k.value for k in node.keywords}
            for key in ("shell", "allow_pickle"):
                if key in keywords and ast.unparse(keywords[key]) != "False":
                    names.add(key)
            if ast.unparse(keywords.get("weights_only", ast.Constant(None))) == "False":
                names.add("weights_only")
        imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names |= {m for m in imported if m.split(".")[0] in MODULES}
    return names


def test_no_line_runs_what_a_file_says():
    there = {
        (str(file.relative_to(SOURCE)), name)
        for file in sorted(SOURCE.rglob("*.py"))
        for name in found(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert there == set(KNOWN), (there - set(KNOWN), set(KNOWN) - there)


@pytest.mark.parametrize("line", [
    "torch.load(f)", "pickle.loads(b)", "import pickle", "from pickle import load", "eval(x)", "exec(x)", "reload(x)",
    "yaml.load(f)", "np.load(f)", "np.load(f, allow_pickle=True)", "run(x, shell=True)", "importlib.import_module(x)",
    "read(f, weights_only=False)", "os.system(x)", "datasets.load_dataset(x)", "compile(x, '', 'exec')",
])  # fmt: skip
def test_such_a_line_is_seen(line):
    assert found(ast.parse(line))
    assert not found(ast.parse("model.eval(); re.compile(x); torch.compile(m); yaml.safe_load(f); run(x, shell=False)"))


EVENTS: list[str] = []
_watching: list[bool] = []


def _watch(event: str, arguments: tuple) -> None:
    """Note opened pickles, and code made of what is no file of a package."""
    if not _watching:
        return
    if event in ("pickle.find_class", "os.system", "socket.connect", "socket.getaddrinfo"):
        EVENTS.append(f"{event} {str(arguments)[:80]}")
    elif event in ("exec", "compile"):
        code = arguments[0] if event == "exec" else arguments[1]
        name = getattr(code, "co_filename", code)
        if isinstance(name, str) and name.endswith((".bin", ".json", ".safetensors", ".jsonl", ".yaml", "code.py")):
            EVENTS.append(f"{event} {name}")


sys.addaudithook(_watch)


def test_a_whole_run_opens_no_pickle(tmp_path, monkeypatch):
    """Training, going on, loading, moving and compressing a model, with pickles and code lying about in its folder."""
    import torch

    model = tmp_path / "model"
    make_llama().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    (model / "code.py").write_text("raise SystemExit('it ran')")
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "vocab.pkl"):
        (model / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModelForCausalLM": "code.Own"}}))
    monkeypatch.setattr(torch, "load", lambda *a, **k: EVENTS.append(f"torch.load {a}"))
    options = {"batch": 4, "out": tmp_path / "run", "progress": False, "dtype": "float32", "save_every": 1}
    EVENTS.clear()
    _watching.append(True)
    try:
        tune(model, SUMS, steps=2, **options)
        made = tune(model, SUMS, steps=4, **options)  # goes on
        ad.detach(made.model)
        fresh = make_llama()
        adapter = ad.load(fresh, tmp_path / "run" / "adapter.safetensors")
        ad.export(adapter, "peft", tmp_path / "peft")
        ad.detach(fresh)
        ad.import_adapter(fresh, tmp_path / "peft")
    finally:
        _watching.clear()
    assert EVENTS == []
