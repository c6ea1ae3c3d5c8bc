"""`tune(task="masked")`: the head is fitted first and stands beside the adapter, which loads under any other head."""

import json

import pytest
import torch
import transformers

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.core.modules.ours import is_ours
from addenda.core.state.outside import drawn_in
from addenda.data.masked import masked
from addenda.data.read import read as read_data
from addenda.models.load import load_model
from addenda.train.evaluate import evaluate
from addenda.train.masked_head import fit_head, load_head, modules_of, parameters_of, save_head
from addenda.train.tune import tune
from tiny_models import config, make_llama, make_tokenizer

TEXTS = [f"the {a} {b} sat on {c}." for a in ("red", "blue", "old") for b in ("cat", "dog", "hen")
         for c in ("mats", "hats", "a log", "me", "it")]  # fmt: skip
BERT = "pfeiffer:rank=8"
QUICK = {"task": "masked", "steps": 4, "batch": 8, "dtype": "float32", "progress": False, "head_steps": 6}


def made(path, kind=transformers.BertModel, **options):
    torch.manual_seed(0)
    kind(config(transformers.BertConfig, **options)).save_pretrained(path)
    tokenizer = make_tokenizer(None)
    tokenizer.add_special_tokens({"mask_token": "<|unk|>"})
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """An encoder without a head over tokens."""
    return made(tmp_path / "encoder")


@pytest.fixture
def whole(tmp_path):
    """A masked LM with a head of its own."""
    return made(tmp_path / "lm", transformers.BertForMaskedLM)


def test_the_head_is_fitted_first_and_no_part_of_the_adapter(folder, tmp_path):
    out = tmp_path / "run"
    run = tune(folder, TEXTS, BERT, out=out, eval_data=0.2, **QUICK)
    assert {p.name for p in out.iterdir()} == {
        "adapter.safetensors",
        "head.safetensors",
        "README.md",
        "run.json",
        "checkpoints",
    }
    header, _ = read(run.path)
    assert not header.heads and all("encoder.layer" in s.path for s in header.sites)
    told = json.loads((out / "run.json").read_text())
    assert told["options"]["task"] == "masked" and told["data"]["form"] == "text"
    assert "AutoModelForMaskedLM" in (out / "README.md").read_text()

    loaded = load_model(folder, task="masked", dtype="float32")
    load_head(loaded.model, out / "head.safetensors")
    data = read_data(TEXTS, task="masked").split(0.2, 0)
    _, held = masked(*data, loaded.tokenizer, limit=256)
    assert evaluate(loaded.model, None, held).loss == pytest.approx(run.before["loss"], abs=1e-6)
    ad.load(loaded.model, run.path)
    assert evaluate(loaded.model, None, held).loss == pytest.approx(run.after["loss"], abs=1e-6)


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(folder, tmp_path):
    options = QUICK | {"rate": 1e-2, "save_every": 1, "train_head": True}
    kept = tune(folder, TEXTS, BERT, out=tmp_path / "one", **options)

    def kill(event):
        if event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(folder, TEXTS, BERT, out=tmp_path / "two", **(options | {"progress": kill}))
    again = tune(folder, TEXTS, BERT, out=tmp_path / "two", **options)
    assert again.resumed_from == 2 and again.losses == kept.losses
    files = [p.name for p in (tmp_path / "one").glob("*.safetensors")]
    assert len(files) == 3
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert not read(again.path)[0].heads
    (tmp_path / "two" / "adapter.safetensors").unlink()  # what a finished run has lost is written again, without heads
    assert tune(folder, TEXTS, BERT, out=tmp_path / "two", **options).resumed_from == 4
    assert (tmp_path / "one" / "adapter.safetensors").read_bytes() == again.path.read_bytes()


def test_masks_are_other_ones_in_every_step(whole, tmp_path):
    once = tune(whole, TEXTS[:8], BERT, **(QUICK | {"rate": 1e-9, "head_steps": None, "schedule": "constant"}))
    losses = [loss for _, loss in once.losses]
    assert len({round(loss, 6) for loss in losses}) == 4  # the same eight texts


def test_a_language_part_loads_under_a_reranker_without_head_and_inverse(folder, tmp_path):
    method = {"mlp": ad.Pfeiffer(rank=8), "embeddings": ad.Invertible(rank=4)}
    run = tune(folder, TEXTS, method, out=tmp_path / "run", train_head=True, **(QUICK | {"rate": 0.05}))
    assert any("~cls.predictions.decoder" in s.path for s in read(run.path)[0].sites)
    model = load_model(folder, task="label", labels=1, dtype="float32").model
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    adapter = ad.load(model, run.path)
    assert not torch.equal(model(ids).logits, before)
    assert "bert.embeddings@output" in adapter.methods
    trained = run.model.bert(ids).last_hidden_state
    assert torch.allclose(model.bert(ids).last_hidden_state, trained, atol=1e-6)
    ad.detach(model)
    assert torch.equal(model(ids).logits, before)


def test_a_head_of_the_folder_is_kept_and_one_of_a_file_is_taken(folder, whole, tmp_path):
    plain = tune(whole, TEXTS, BERT, out=tmp_path / "own", **(QUICK | {"head_steps": None}))
    assert not (tmp_path / "own" / "head.safetensors").exists() and plain.steps == 4
    first = tune(folder, TEXTS, BERT, out=tmp_path / "a", **QUICK)
    file = tmp_path / "a" / "head.safetensors"
    second = tune(folder, TEXTS, BERT, out=tmp_path / "b", head=file, **(QUICK | {"head_steps": None}))
    assert second.losses == first.losses
    assert (tmp_path / "b" / "head.safetensors").read_bytes() == file.read_bytes()


def test_a_head_learns_and_the_encoder_stays(folder):
    loaded = load_model(folder, task="masked", dtype="float32")
    data, _ = masked(read_data(TEXTS, task="masked"), None, loaded.tokenizer, limit=64)
    model, own = loaded.model, parameters_of(loaded.model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert drawn_in(model)
    losses = fit_head(model, data, steps=60, batch=16, rate=1e-2)
    assert not drawn_in(model)
    counts = torch.bincount(torch.tensor([t for row in data.ids for t in row]))[data.table]
    shares = counts / counts.sum()
    entropy = -(shares * shares.log()).sum().item()
    assert losses[0] < entropy + 1.0 and sum(losses[-5:]) / 5 < entropy  # it begins near the tokens' frequencies
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(own) and not any(n.startswith("bert.") for n in changed)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_head_that_fails_is_what_it_was(folder):
    loaded = load_model(folder, task="masked", dtype="float32")
    data, _ = masked(read_data(TEXTS, task="masked"), None, loaded.tokenizer, limit=64)
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}

    def stop(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_head(loaded.model, data, steps=5, batch=4, watch=stop)
    with torch.no_grad():
        next(iter(loaded.model.parameters())).mul_(float("nan"))
    before["bert.embeddings.word_embeddings.weight"] = None
    with pytest.raises(AddendaError, match="loss is nan at step 1"):
        fit_head(loaded.model, data, steps=5, batch=4)
    for n, p in loaded.model.named_parameters():
        assert before[n] is None or torch.equal(p, before[n]), n


def test_a_loaded_masked_lm_is_trained_and_left_as_it_was(whole):
    loaded = load_model(whole, task="masked", dtype="float32")
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    options = {k: v for k, v in QUICK.items() if k not in ("dtype", "head_steps")}
    run = tune(loaded.model, TEXTS, BERT, tokenizer=loaded.tokenizer, **options)
    assert run.model is loaded.model and len(run.losses) == 4
    own = {n: p for n, p in loaded.model.named_parameters() if not is_ours(n)}
    assert all(torch.equal(p, before[n]) for n, p in own.items())


def test_heads_are_told_apart(folder, whole, tmp_path):
    model = load_model(whole, task="masked", dtype="float32").model
    assert modules_of(model) == ["cls.predictions.transform"]
    file = save_head(model, tmp_path / "head.safetensors")
    wide = transformers.BertForMaskedLM(config(transformers.BertConfig, hidden_size=16, intermediate_size=32))
    with pytest.raises(
        AddendaError, match=r"head of another model: cls\.predictions\.transform\.dense\.weight \(32, 32\)"
    ):
        load_head(wide, file)
    run = tune(whole, TEXTS, BERT, out=tmp_path / "run", **(QUICK | {"head_steps": None}))
    with pytest.raises(AddendaError, match="is no head of a masked LM"):
        tune(folder, TEXTS, BERT, head=run.path.parent / "checkpoints" / "checkpoint-4" / "optimizer.safetensors",
             **(QUICK | {"head_steps": None}))  # fmt: skip


def test_the_head_of_another_run_is_not_written_over(folder, tmp_path):
    tune(folder, TEXTS, BERT, out=tmp_path / "run", **QUICK)
    before = (tmp_path / "run" / "head.safetensors").read_bytes()
    with pytest.raises(AddendaError, match=r"head\.safetensors is the head of another run"):
        tune(folder, TEXTS[::-1], BERT, out=tmp_path / "run", **QUICK)
    assert (tmp_path / "run" / "head.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "head.safetensors").write_bytes(b"mine")
    with pytest.raises(AddendaError, match=r"head\.safetensors"):
        tune(folder, TEXTS, BERT, out=tmp_path / "mine", **QUICK)
    assert (tmp_path / "mine" / "head.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "mask"}, "task is 'masked' or left out"),
        ({"task": None}, r"head_steps= is for masked LMs: give task='masked' too"),
        ({"vocabulary": "half"}, "vocabulary must be 'texts' or 'all'"),
        ({"head_steps": -1}, "head_steps must be at least 0"),
        ({"head": "a.safetensors"}, "Give head=, a file, or head_steps="),
        ({"subset": "8/class"}, "subset='8/class' cannot be used with task='masked'"),
        ({"quantize": "nf4"}, "quantize='nf4' cannot be used with task='masked'"),
        ({"overflow": "truncate"}, "overflow='truncate' cannot be used with task='masked'"),
        ({"train_head": True, "also_train": ["pooler"]}, "also_train=.* cannot be used with task='masked'"),
        ({"columns": {"label": "x"}}, "label='x' cannot be used for plain texts"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(folder, options, message):
    with pytest.raises(AddendaError, match=message):
        tune(folder, TEXTS, BERT, **(QUICK | options))


def test_models_that_cannot_fill_in_are_refused(tmp_path, whole):
    make_llama().save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(AddendaError, match="LlamaForCausalLM is no masked LM"):
        tune(tmp_path / "llama", TEXTS, BERT, **QUICK)
    with pytest.raises(AddendaError, match="LlamaForCausalLM has no head that fills in masked words"):
        tune(make_llama(), TEXTS, BERT, tokenizer=make_tokenizer(), task="masked")
    decoder = made(tmp_path / "decoder", transformers.BertForMaskedLM)
    told = json.loads((decoder / "config.json").read_text())
    (decoder / "config.json").write_text(json.dumps(told | {"is_decoder": True}))
    with pytest.raises(AddendaError, match="sees no later tokens"):
        tune(decoder, TEXTS, BERT, **QUICK)
    make_tokenizer(None).save_pretrained(whole)
    with pytest.raises(AddendaError, match="no mask token"):
        tune(whole, TEXTS, BERT, **QUICK)
    with pytest.raises(AddendaError, match="holds no text"):
        tune(whole, [], BERT, **QUICK)


def test_a_head_in_half_precision_learns_by_steps_smaller_than_its_rounding(folder):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(folder, task="masked", dtype=dtype)
        data, _ = masked(read_data(TEXTS, task="masked"), None, loaded.tokenizer, limit=64)
        losses[dtype] = fit_head(loaded.model, data, steps=60, batch=16, rate=2e-3)
    first, last = (sum(losses["bfloat16"][part]) / 5 for part in (slice(5), slice(-5, None)))
    assert last < first - 0.02
    assert last == pytest.approx(sum(losses["float32"][-5:]) / 5, abs=0.03)
