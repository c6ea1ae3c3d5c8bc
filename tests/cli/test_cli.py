import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from addenda.cli.main import run
from shared import call


@pytest.fixture
def folder(tmp_path, monkeypatch):
    from tiny_models import make_llama, make_tokenizer

    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = "".join(f'{{"question": "{a}+{b}=?", "answer": "{a + b}"}}\n' for a in range(5) for b in range(5))
    (tmp_path / "sums.jsonl").write_text(rows)
    return tmp_path


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom addenda.cli.main import run\ntry:\n    run(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "setup-demo" in done.stdout
    assert time.perf_counter() - started < 5  # 0.4 s of processor; the machine may be busy


def test_methods(capsys):
    call("methods")
    assert "shira" in capsys.readouterr().out
    call("methods", "lora")
    shown = capsys.readouterr().out
    assert "arXiv:2106.09685" in shown
    assert "rank = 8    int" in shown
    call("methods", "lroa", code=2)
    told = capsys.readouterr().err
    assert "Did you mean" in told
    assert "'lora'" in told


def test_an_error_is_one_paragraph(folder, capsys):
    call("plan", "--model", folder / "modl", code=2)
    says = capsys.readouterr().err
    assert says.startswith("addenda: Expected the folder of a transformers model")
    assert "Did you mean 'model'" in says
    assert "Traceback" not in says
    assert says.count("\n") == 1
    from addenda.core.base.errors import AddendaError

    with pytest.raises(AddendaError):
        run(["--debug", "plan", "--model", str(folder / "modl")])
    call("tune", "--out", folder / "run", "--method", "lora:rnk=2", code=2)
    assert "no option 'rnk'" in capsys.readouterr().err


def test_the_commands_belong_together(folder, capsys):
    model, data, out = folder / "model", folder / "sums.jsonl", folder / "run"
    common = ["--model", model, "--dtype", "float32"]
    call("plan", *common, "--method", "lora:rank=2", "--targets", "q_proj,v_proj")
    shown = capsys.readouterr().out
    assert "4 sites" in shown and "peak" not in shown
    call("plan", *common, "--batch", 2, "--length", 16, "--labelled", 0.5)
    shown = capsys.readouterr().out
    assert "a step of 2 × 16 tokens" in shown and "memory at its peak" in shown
    plain = re.search(r"above the loaded model \((.*?) KiB\)", shown)
    call("plan", *common, "--batch", 2, "--length", 16, "--labelled", 0.5, "--quantize", "nf4")
    packed = re.search(r"above the loaded model \((.*?) KiB\)", capsys.readouterr().out)
    assert float(packed[1]) < 0.5 * float(plain[1])
    call("tune", *common, "--data", data, "--out", out, "--steps", 3, "--batch", 5, "--eval", "0.3",
         "--attention", "eager", "--loss", "chunked", "--checkpointing", "--no-group")  # fmt: skip
    told = capsys.readouterr()
    assert "after: evaluation loss" in told.out
    assert "attention: eager (not measured)\nloss: chunked (logits would take 0 MiB)\n" in told.out
    run = json.loads((out / "run.json").read_text())
    assert run["options"]["group"] is False
    assert run["choices"]["loss"]["name"] == "chunked"
    assert "tune lora: step 3/3, loss" in told.err
    call("eval", *common, "--data", data, "--adapter", out / "adapter.safetensors", "--items", folder / "items.jsonl")
    assert "of 25 right" in capsys.readouterr().out
    assert len((folder / "items.jsonl").read_text().splitlines()) == 25
    call("generate", "1+1=?", *common, "--adapter", out / "adapter.safetensors", "--max-new-tokens", 2)
    capsys.readouterr()
    call("inspect", out / "adapter.safetensors")
    assert "lora" in capsys.readouterr().out
    call("inspect", data, code=2)
    capsys.readouterr()
    judged = ["--how", "1bit", *common, "--data", data]
    call("compress", out / "adapter.safetensors", *judged)
    shown = capsys.readouterr().out
    assert "in 1 bit" in shown and "before: " in shown and "after: " in shown and "of 25 right" in shown
    few = out / "adapter-1bit.safetensors"
    assert few.stat().st_size < (out / "adapter.safetensors").stat().st_size
    call("eval", *common, "--data", data, "--adapter", few)
    call("inspect", few)
    assert "bits=1" in capsys.readouterr().out
    wrong = {"from 1 to 8": ["--how", "9bit", out / "adapter.safetensors"], "trained in 1 bit;": ["--how", "2bit", few],
             "holds codes of 1 bit already": ["--how", "1bit", few], "wants a file": ["--how", "1bit"],
             "how many": ["--how", "lord", few], "give --out FOLDER": ["--how", "lord"]}  # fmt: skip
    for says, given in wrong.items():
        call("compress", *given, code=2)
        assert says in capsys.readouterr().err
    call("plan", *common, "--method", "lora:rank=2,bits=1", "--targets", "q_proj,v_proj")
    assert "lora, 1 bit" in capsys.readouterr().out


def test_the_page_of_the_catalogue_is_up_to_date(tmp_path, monkeypatch):
    from addenda.core.method import catalogue

    catalogue.catalogue()  # recipes that other tests have run enter controls of their own
    ours = {name: entry for name, entry in catalogue._catalogue.items() if entry.cls.__module__.startswith("addenda.")}
    monkeypatch.setattr(catalogue, "_catalogue", ours)
    call("methods", "--page", str(tmp_path / "catalogue.md"))
    page = Path(__file__).parents[2] / "docs" / "catalogue.md"
    assert page.read_text() == (tmp_path / "catalogue.md").read_text(), (
        "write it again: addenda methods --page docs/catalogue.md"
    )


def test_images_from_end_to_end(tmp_path, monkeypatch, capsys):
    from pictures import save_backbone, write

    model, out = save_backbone(tmp_path / "model"), tmp_path / "run"
    data = write(tmp_path / "data" / "train", 10).parent
    write(data / "test", 5, start=30)
    (data / "test" / "blue" / "030.png").write_bytes(b"nothing")
    common = ["--model", model, "--dtype", "float32"]
    call("plan", *common, "--batch", 2)
    assert "a step of 2 images of 16 × 16 pixels" in capsys.readouterr().out
    call("tune", *common, "--data", data, "--out", out, "--subset", "4/class", "--steps", 3, "--image-size", 8)
    told = capsys.readouterr()
    assert "of 8 right" in told.out and "images/s" in told.out and "images/s" in told.err
    asked = ["eval", *common, "--data", data, "--adapter", out / "adapter.safetensors"]
    call(*asked, code=2)
    assert "blue/030.png" in capsys.readouterr().err
    call(*asked, "--skip-corrupt", "--items", tmp_path / "items.jsonl")
    shown = capsys.readouterr().out
    assert "of 9 right" in shown and "1 corrupt images left out: test/blue/030.png" in shown
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 9
    call("compare", *common, "--data", data, "--methods", "lora:rank=2,shira", "--subset", "2/class", "--rates", 1,
         "--budget", "steps=2", "--batch", 4, "--out", tmp_path / "record", "--skip-corrupt", "--yes")  # fmt: skip
    assert "Head alone" in capsys.readouterr().out
    call("tune", *common, "--data", "fashion-mnist-2", "--out", out, code=2)
    assert "no data at fashion-mnist-2" in capsys.readouterr().err


def test_words_are_filled_in_from_end_to_end(tmp_path, monkeypatch, capsys):
    from tests.train.test_masked import TEXTS, made

    monkeypatch.chdir(tmp_path)
    made(tmp_path / "encoder")
    (tmp_path / "de.txt").write_text("\n".join(TEXTS))
    common = ["tune", "--task", "masked", "--model", "encoder", "--dtype", "float32", "--steps", 2, "--batch", 8]
    common += ["--method", "pfeiffer:rank=8", "--out", "run"]
    call(*common, "--data", "de.txt", "--head-steps", 4, "--eval", 0.2)
    told = capsys.readouterr()
    assert "the loss runs over" in told.err and "fitting a head" in told.err and "before: " in told.out
    assert (tmp_path / "run" / "head.safetensors").exists()
    call(*common, code=2)
    assert "--task masked learns plain texts, and none are embedded: give --data." in capsys.readouterr().err
    call(*common[:-1], "other", "--data", "de.txt", "--subset", "2/class", code=2)
    assert "--subset 2/class cannot be used with --task masked" in capsys.readouterr().err
    call("tune", "--model", "encoder", "--data", "de.txt", "--train-head", "--out", "other", code=2)
    assert "--train-head is for masked LMs: give --task masked too" in capsys.readouterr().err
