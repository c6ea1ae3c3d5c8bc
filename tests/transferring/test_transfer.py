import errno
import importlib
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.transferring import gather as gathering
from addenda.transferring import transfer as transferring
from addenda.transferring.bundle import read_bundle
from addenda.transferring.report import read_report
from addenda.transferring.transfer import transfer
from lister import DATA, SEEDS, make_lister, write_transfer
from shared import same_bits
from tiny_models import make_llama

SMALL = {"n": 10, "sample_batch": 8, "batch": 5, "steps": 6, "max_new_tokens": 6, "rate": 1e-2, "tries": 64,
         "dtype": "float32"}  # fmt: skip
SEVERAL = [{"messages": [{"role": role, "content": "1"} for role in ("user", "assistant") * 2]}]
FORMAT = r"\d\+\d=\?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_transfer(tmp_path_factory.mktemp("transfer"))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))


def moved(place, out, **options):
    given = {"method": "lora:rank=4", "format": FORMAT, **SMALL, **options}
    return transfer(place / "sums.bundle", place / "source", place / "target", out, **given)


def test_an_adapter_moves_to_a_base_of_another_vocabulary(place, tmp_path):
    told = []
    made = moved(place, tmp_path / "out", method="dora:rank=4", say=told.append, eval_data=DATA[:12])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out"]
    names = ["README.md", "adapter.safetensors", "transfer.bundle", "transfer.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert len(made.gathered.texts) == 10 == made.report.chosen
    assert not set(made.gathered.texts) & {*SEEDS} and len(made.labels) == 10
    assert any("dry run of 8 samples" in line and "Predicted" in line for line in told)
    target, tokenizer = make_lister(other=True)
    ad.load(target, tmp_path / "out" / "adapter.safetensors")
    ids = torch.tensor([tokenizer("1+1=?")["input_ids"]])
    assert same_bits(ad.adapters(target)["default"].state_dict(), made.adapter.state_dict())
    torch.testing.assert_close(target(ids).logits, made.model(ids).logits, rtol=1e-5, atol=1e-5)  # of a mapped file
    report = read_report(tmp_path / "out")
    assert str(report) == str(made.report) == str(made)
    assert report.judged is not None and set(report.judged["means"]) == {"source", "base", "transferred"}
    assert report.distance is not None and report.on == "12 real inputs" and report.examples == made.gathered.texts
    assert report.counts["samples"] >= 8 and report.cost["sampling"]["tokens"] > 0 and report.predicted["lines"] >= 8
    kept = read_bundle(tmp_path / "out" / "transfer.bundle")
    assert kept.seeds == tuple(SEEDS)
    kept.check_teacher(target, tokenizer, ad.adapters(target)["default"])


def test_a_chain_keeps_seeds_and_judge(place, tmp_path):
    moved(place, tmp_path / "one", steps=80, method="lora:rank=16", rate=2e-2)
    options = {"format": FORMAT, **SMALL, "seed": 1}
    third = make_llama(), make_lister()[1]
    third[0].load_state_dict(make_lister()[0].state_dict())
    with torch.no_grad():
        third[0].lm_head.weight.add_(1e-3)
    given = tmp_path / "one" / "transfer.bundle", place / "target", third
    with pytest.raises(AddendaError, match=r"trained on another model than this source .*judge_model="):
        transfer(*given, tmp_path / "two", **options)
    made = transfer(
        *given, tmp_path / "two", judge_model=place / "source", method="svft:pattern=banded,band=2", **options
    )
    assert made.report.source == str(place / "target") and made.report.method.startswith("svft")
    assert read_bundle(tmp_path / "two" / "transfer.bundle").judged == read_bundle(place / "sums.bundle").judged
    assert "no adapter" not in ad.status(third[0])


class KilledError(BaseException):
    """As a kill: nothing that catches errors sees it."""


def stopping(function, after):
    """A function that works so many times, and then is where the process ends, before or behind its work."""
    left = [after]

    def call(*args, **kwargs):
        if left[0] == 0:
            raise KilledError
        left[0] -= 1
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("where", "name", "after"),
    [
        (gathering, "write_state", 1),
        ("addenda.transferring.label", "keep", 1),
        (transferring, "distil", 0),
        ("addenda.train.checkpoint", "finish", 1),
        (transferring, "save", 0),
        ("addenda.train.unfinished", "rename", 0),
    ],
)
def test_killed_in_any_stage_it_goes_on_with_the_same_bits(place, tmp_path, monkeypatch, whole, where, name, after):
    owner = importlib.import_module(where) if isinstance(where, str) else where
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, stopping(getattr(owner, name), after))
        with pytest.raises(KilledError):
            moved(place, tmp_path / "out", same_order=2)
    assert not (tmp_path / "out").exists()
    told = []
    made = moved(place, tmp_path / "out", same_order=2, say=told.append)
    assert "going on with" in " ".join(told)
    assert made.gathered.texts == whole.gathered.texts and made.labels.answers == whole.labels.answers
    for file in ("adapter.safetensors", "transfer.bundle"):
        assert (tmp_path / "out" / file).read_bytes() == (whole.path / file).read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out"]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADDENDA_CACHE", str(folder / "cache"))
        return moved(place, folder / "out", same_order=2)


def test_a_run_of_other_settings_does_not_go_on(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(transferring, "label", stopping(None, 0))
        with pytest.raises(KilledError):
            moved(place, tmp_path / "out")
    with pytest.raises(AddendaError, match=r"other settings .*: settings.temperature was 1.0, now 0.5"):
        moved(place, tmp_path / "out", temperature=0.5)


def test_a_full_disk_between_stages_loses_nothing(place, tmp_path, monkeypatch, whole):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for where, name in ((gathering, "write_state"), (transferring, "save")):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, full)
            with pytest.raises(AddendaError, match=r"The disk is full at .*What is done is kept.*same command goes on"):
                moved(place, tmp_path / "out", same_order=2)
    told = []
    moved(place, tmp_path / "out", same_order=2, say=told.append)
    assert "going on with" in " ".join(told)
    assert (tmp_path / "out" / "adapter.safetensors").read_bytes() == (whole.path / "adapter.safetensors").read_bytes()


def test_what_the_judge_rejects_is_taken_by_margin_and_said(place, tmp_path):
    made = moved(place, tmp_path / "out", threshold=1e5, tries=24)
    assert made.gathered.passed == 0 and made.report.filled == made.report.chosen == len(made.gathered.texts) > 0
    assert "24 samples" in made.report.stopped and "the best of those that it refused" in str(made)
    margins = made.gathered.margins
    rest = [m for i, m in enumerate(margins) if i not in made.gathered.chosen]
    assert min(margins[i] for i in made.gathered.chosen) >= max(rest, default=-1e9)


def test_it_asks_where_it_would_take_longer_than_it_may(place, tmp_path):
    asked = []
    with pytest.raises(AddendaError, match=r"more than the 0 s of within=, and nothing was begun"):
        moved(place, tmp_path / "out", within=1e-6)
    with pytest.raises(AddendaError, match="nothing was begun"):
        moved(place, tmp_path / "out", within=1e-6, ask=lambda text: asked.append(text))
    assert "Begin all the same?" in asked[0]
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / "out").exists()


def test_by_logits_within_one_vocabulary(place, tmp_path):
    student = make_lister()
    with torch.no_grad():
        student[0].model.norm.weight.mul_(1.1)
    options = {"format": FORMAT, **SMALL, "mode": "logits", "top_k": 8, "name": "moved"}
    made = transfer(place / "sums.bundle", place / "source", student, tmp_path / "out", **options)
    assert made.distilled.mode == "logits" and made.adapter.name == "moved"
    with pytest.raises(AddendaError, match="two"):
        moved(place, tmp_path / "no", mode="logits")
    plain = replace(read_bundle(place / "sums.bundle"), chat=False)
    with pytest.raises(AddendaError, match="without the chat template that both"):
        transfer(plain, place / "source", student, tmp_path / "no", **options)
    student[1].chat_template = None
    with pytest.raises(AddendaError, match=r"different chat templates.*mode='sequence'"):
        transfer(place / "sums.bundle", place / "source", student, tmp_path / "no", **options)


def test_a_loaded_source_is_afterwards_as_it_was(place, tmp_path):
    model, tokenizer = make_lister()
    transfer(place / "sums.bundle", (model, tokenizer), place / "target", tmp_path / "out", format=FORMAT, **SMALL)
    assert "no adapter" in ad.status(model) or "0 adapter" in ad.status(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": "source"}, "the same model"),
        ({"source": "target", "target": "source"}, "goes with another source"),
        ({"adapter": "other.safetensors"}, "adapter is another|goes with another source"),
        ({"adapter": "nothing"}, "no file, and no adapter on this model"),
        ({"bundle": "adapter.safetensors"}, "of another kind|no sound|bundle"),
        ({"format": "x+"}, "refuses 5 of the 5 seeds"),
        ({"max_new_tokens": 1}, "came to its end"),
        ({"steps": 3, "epochs": 1.0}, "not both"),
        ({"out": "source/inside"}, "never written to"),
        ({"out": "run"}, "is there already and is not empty"),
        ({"n": 0}, "n must be"),
        ({"start": "nothing.safetensors"}, "nothing.safetensors"),
        ({"eval_data": SEVERAL}, "not one question and its answer"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(place, tmp_path, change, said):
    if not (place / "other.safetensors").exists():
        model, _ = make_lister()
        ad.attach(model, "lora:rank=2").save(place / "other.safetensors")
    names = {"bundle": "sums.bundle", "source": "source", "target": "target", "out": "nowhere"} | change
    paths = [place / names.pop(k) for k in ("bundle", "source", "target", "out")]
    if "adapter" in names:
        names["adapter"] = str(place / names["adapter"])
    options = {"format": FORMAT, **SMALL, **names}
    before = sorted(p.name for p in place.iterdir())
    with pytest.raises(AddendaError, match=said):
        transfer(*paths, **options)
    assert sorted(p.name for p in place.iterdir()) == before


def test_examples_that_are_longer_than_a_model_reads_are_refused_before_a_stage(place, tmp_path):
    _, tokenizer = make_lister(other=True)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=96, n_embd=16, n_layer=1, n_head=2, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    data = [*DATA[:4], {"question": "1+1=?" * 30, "answer": "2"}]
    told = []
    with pytest.raises(AddendaError, match=r"1 of the 5 examples of eval_data are longer than the 96 .* target reads"):
        transfer(
            place / "sums.bundle", place / "source", (GPT2LMHeadModel(config), tokenizer), tmp_path / "out",
            eval_data=data, say=told.append, **SMALL | {"format": FORMAT},
        )  # fmt: skip
    assert told == ["reading the models"] and not any(tmp_path.glob("*out*"))
