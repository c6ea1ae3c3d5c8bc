"""`addenda rerank`: from nothing to a search, and what is refused before a model is read."""

import shutil

import pytest
from safetensors.torch import load_file
from transformers import BertModel

from addenda.cli.main import run
from addenda.ranking import beir, trec
from ranking.toy import toy, toy_config, toy_tokenizer


def call(*arguments, code=0):
    with pytest.raises(SystemExit) as stopped:
        run(["rerank", *map(str, arguments)])
    assert (stopped.value.code or 0) == code


def training(folder):
    return ["train", "--data", folder / "a", "--model", folder / "encoder", "--method", "lora:rank=4", "--steps", 4,
            "--batch", 2, "--negatives", 3, "--rate", "1e-2", "--dev", "dev", "--judge", 3,
            "--out", folder / "run"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder, collections of two languages, and a reranker that was trained on one of them."""
    import torch

    folder = tmp_path_factory.mktemp("rerank")
    torch.manual_seed(0)
    BertModel(toy_config()).save_pretrained(folder / "encoder")
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[UNK]"})
    tokenizer.save_pretrained(folder / "encoder")
    for language in "ab":
        beir.write(toy(language), folder / language)
    (folder / "a.txt").write_text("\n".join(d.text for d in toy("a").documents.values()))
    call(*training(folder))
    return folder


@pytest.fixture
def parts(place):
    return ["--model", place / "encoder", "--adapter", place / "run" / "adapter.safetensors"]


def test_training_leaves_an_adapter_and_goes_on(place, capsys):
    assert (place / "run" / "adapter.safetensors").is_file()
    before = (place / "run" / "adapter.safetensors").read_bytes()
    call(*training(place))
    assert (place / "run" / "adapter.safetensors").read_bytes() == before
    assert "RR@10 " in capsys.readouterr().out


@pytest.mark.parametrize("positions", ["largest", "random"])
def test_a_lottery_trains_as_many_numbers_as_asked_for(place, tmp_path, positions):
    call("train", "--data", place / "a", "--model", place / "encoder", "--lottery", 30, "--positions", positions,
         "--steps", 2, "--batch", 2, "--negatives", 3, "--out", tmp_path / "run")  # fmt: skip
    held = load_file(tmp_path / "run" / "adapter.safetensors")
    assert sum(t.numel() for name, t in held.items() if name.endswith("/values")) == 30


def test_eval_shows_both_systems_and_writes_the_run(place, parts, tmp_path, capsys):
    call("eval", "--data", place / "a", *parts, "--first", "bm25", "--depth", 5, "--run-out", tmp_path / "a.trec")
    told = capsys.readouterr().out
    assert "first stage" in told and "reranked" in told and "AP" in told
    assert "Recall of the first stage at 5: " in told and "ms a query" in told
    made = trec.read_run(tmp_path / "a.trec", toy("a"))
    assert set(made) == set(toy("a").split("test"))
    call("eval", "--data", place / "a", *parts, "--run-out", tmp_path / "a.trec", code=2)
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["bm25", "encoder"])
def test_an_index_is_searched_with_and_without_a_reranker(place, parts, tmp_path, capsys, first):
    index = tmp_path / "index.safetensors"
    call("index", "--data", place / "a", "--first", first if first == "bm25" else place / first, "--out", index)
    query = toy("a").queries["q3"]
    call("search", index, query, "--top", 3)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 6  # "written", then two lines for each document
    call("search", index, query, *parts, "--top", 3, "--depth", 4)
    assert len(capsys.readouterr().out.splitlines()) == 6
    call("search", index, " ", code=2)
    assert "The query is empty" in capsys.readouterr().err


def test_a_language_part_acts_beside_the_task(place, tmp_path, capsys):
    learned = ["--model", place / "encoder", "--method", "lora:rank=2", "--steps", 2, "--batch", 4, "--rate", "1e-2"]
    for seed, name in enumerate(("en", "de")):
        call(
            "language", "--data", place / "a.txt", *learned, "--head-steps", 4, "--seed", seed, "--out", tmp_path / name
        )
    assert "loss on held-out texts: " in capsys.readouterr().out
    en, de = (tmp_path / name / "adapter.safetensors" for name in ("en", "de"))
    call("train", "--data", place / "a", *learned, "--negatives", 3, "--part", en, "--out", tmp_path / "task")
    acting = ["--model", place / "encoder", "--adapter", tmp_path / "task" / "adapter.safetensors", "--first", "bm25"]
    call("eval", "--data", place / "b", *acting, "--depth", 5, "--document-part", de)
    told = capsys.readouterr()
    assert "reranked" in told.out and "was trained beside" in told.err  # another part than in training
    call("search", tmp_path / "none.safetensors", "a1", "--document-part", de, code=2)


def test_export_opens_as_a_cross_encoder(place, parts, tmp_path, capsys):
    call("export", *parts, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert capsys.readouterr().out.strip()
    call("export", *parts, "--out", tmp_path / "out", code=2)
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora:rank=2", "pfeiffer:rank=4"])
def test_what_was_exported_searches_as_the_parts_do(place, tmp_path, capsys, method):
    call("train", "--data", place / "a", "--model", place / "encoder", "--method", method, "--steps", 2, "--batch", 2,
         "--negatives", 3, "--rate", "1e-2", "--dtype", "float32", "--out", tmp_path / "run")  # fmt: skip
    acting = ["--model", place / "encoder", "--adapter", tmp_path / "run" / "adapter.safetensors"]
    call("index", "--data", place / "a", "--first", "bm25", "--out", tmp_path / "i.safetensors")
    call("export", *acting, "--out", tmp_path / "out")
    assert ("cannot be merged" in capsys.readouterr().out) == method.startswith("pfeiffer")
    told = []
    for way in (acting, ["--reranker", tmp_path / "out"], ["--reranker", tmp_path / "out", "--max-length", 30]):
        call("search", tmp_path / "i.safetensors", toy("a").queries["q3"], *way, "--top", 3)
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2] and len(told[0].splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--data", "none", "--adapter", "none.safetensors"], "none.safetensors"),
        (["eval", "--data", "none"], "What puts documents in order?"),
        (["eval", "--reranker", "r", "--adapter", "a.safetensors"], "holds its own adapters"),
        (["train", "--data", "none", "--out", "run"], "There is no folder"),
        (["train", "--data", "debian:", "--out", "run"], "Which language"),
        (["train", "--loss", "distill", "--out", "run"], "wants --teacher"),
        (["train", "--method", "lara", "--out", "run"], "lora"),
        (["train", "--lottery", "5", "--method", "lora", "--out", "run"], "--lottery trains numbers"),
        (["train", "--positions", "random", "--out", "run"], "goes with --lottery"),
        (["train", "--lottery", "5", "--positions", "best", "--out", "run"], "'largest' or 'random'"),
        (["train", "--lottery", "0", "--out", "run"], "--lottery must be at least 1"),
        (["train", "--judge", "3", "--out", "run"], "give --dev"),
        (["language", "--data", "none.txt", "--out", "run"], "none.txt"),
        (["index", "--data", "none", "--out", "i.safetensors"], "There is no folder"),
        (["index", "--data", ".", "--limit", "60", "--out", "i.safetensors"], "--limit is for Debian"),
        (["search", "none.safetensors", "hello"], "none.safetensors"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_read(arguments, words, tmp_path, monkeypatch, capsys):
    from addenda.models.wheels import Wheel

    monkeypatch.setattr(Wheel, "model_folder", lambda *_, **__: pytest.fail("a model was looked at"))
    monkeypatch.chdir(tmp_path)
    call(*arguments, code=2)
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told
    assert not list(tmp_path.iterdir())


def test_files_that_are_damaged_or_of_another_collection_are_named_by_line(place, tmp_path, capsys):
    """Before a model is read: `--model` is none that there is."""
    learn = ["train", "--model", tmp_path / "no-model", "--out", tmp_path / "run", "--first", "bm25"]
    data = shutil.copytree(place / "a", tmp_path / "a")
    (tmp_path / "other.trec").write_text("q0 Q0 d0 1 2.5 x\nz9 Q0 d0 2 1.5 x\n")
    call(*learn, "--data", data, "--loss", "distill", "--teacher", tmp_path / "other.trec", code=2)
    assert "other.trec has 1 line that cannot be used: line 2: query 'z9' not in a" in capsys.readouterr().err
    with (data / "corpus.jsonl").open("a") as f:
        f.write('{"_id": "d1", "text": "twice"}\n{"_id": "x", "text": " "}\n')
    for ask in (learn, ["index", "--first", "bm25", "--out", tmp_path / "i.safetensors"]):
        call(*ask, "--data", data, code=2)
        told = capsys.readouterr().err
        assert "corpus.jsonl has 2 lines" in told and "line 49: the _id 'd1' stands in line 2 already" in told
        assert "line 50: document 'x' is empty" in told
    assert not (tmp_path / "run").exists() and not (tmp_path / "i.safetensors").exists()


def test_a_language_of_few_texts_is_told_and_one_of_none_refused(place, tmp_path, capsys):
    learn = ["language", "--model", place / "encoder", "--method", "lora:rank=2", "--steps", 1, "--batch", 2]
    (tmp_path / "few.txt").write_text("".join(f"b{i} b{i + 1}\n" for i in range(49)))
    call(*learn, "--data", tmp_path / "few.txt", "--head-steps", 1, "--out", tmp_path / "few")
    assert "fewer than 50" in capsys.readouterr().err
    (tmp_path / "none.txt").write_text(" \n\n")
    call(*learn, "--data", tmp_path / "none.txt", "--out", tmp_path / "none", code=2)
    assert "none.txt holds no text" in capsys.readouterr().err and not (tmp_path / "none").exists()
