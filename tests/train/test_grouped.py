"""Runs of a group against the same runs alone: the numbers, one that diverges, one that is killed."""

import shutil
import warnings

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.state.state import state_of
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.optim.registry import known
from addenda.train import grouped
from addenda.train.fit import fit
from addenda.train.grouped import fit_grouped, packed
from addenda.train.loss import score
from addenda.train.slot import Run
from addenda.train.trainer import DivergedError
from addenda.train.tune import calibration
from shared import EVERY, METHODS, where
from tiny_models import SUMS, config, make_tokenizer

STEPS, CLOSE = 20, 1e-5
CAUSAL = encode(read(SUMS), make_tokenizer())
WORDS = [{"text": row["question"] * (1 + i % 3), "label": "ab"[int(row["answer"]) % 2]} for i, row in enumerate(SUMS)]
CLASSES = encode(read(WORDS, task="label"), make_tokenizer())


def causal():
    """A causal LM that drops in attention; what batches of several lengths do to it shows."""
    torch.manual_seed(0)
    return LlamaForCausalLM(config(attention_dropout=0.1, mlp_bias=True)).eval()


def encoder():
    """An encoder that drops in every layer, with a head of its own."""
    torch.manual_seed(0)
    from transformers import BertConfig

    return BertForSequenceClassification(config(BertConfig, num_labels=2)).eval()


def attached(model, method, seed, name, train, **options):
    return ad.attach(
        model, METHODS.get(method, method), targets=where(method) if method in METHODS else "linear", seed=seed,
        name=name, calibration=calibration(model, train, 4, seed, 4),
        loss=lambda m, b: score(m, b, train.kind).mean, **options,
    )  # fmt: skip


def alone(make, train, method, seed, also=(), eval=None, **options):
    model = make()
    adapter = attached(model, method, seed, "trial", train, also_train=also)
    return fit(model, adapter, train, attention=None, seed=seed, eval=eval, **options)


def together(make, train, runs, also=(), eval=None, out=None, progress=None):
    """runs: (method, seed, options)."""
    model = make()
    made = []
    for i, (method, seed, options) in enumerate(runs):
        adapter = attached(model, method, seed, f"slot{i}", train, also_train=also)
        folder = None if out is None else out / f"slot{i}"
        made.append(Run(adapter, {"seed": seed, **options}, progress, folder))
    return fit_grouped(model, made, train, eval=eval)


def check(found, want, close=CLOSE):
    assert [step for step, _ in found.losses] == [step for step, _ in want.losses]
    torch.testing.assert_close([x for _, x in found.losses], [x for _, x in want.losses], rtol=close, atol=0.0)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "1 trainable tensors|.* zero gradients")
        yield


OPTIONS = {"steps": STEPS, "batch": 4, "rate": 1e-2}


@pytest.mark.parametrize("name", EVERY)
def test_every_method_beside_others(name):
    """A run of the method between another of it and LoRA with dropout, batches of other lengths beside it."""
    options = OPTIONS | {"steps": 8}
    want = alone(causal, CAUSAL, name, 1, **options)
    found = together(causal, CAUSAL, [(name, 0, options), (name, 1, options),
                                      ("lora:rank=2,dropout=0.2", 5, options)])  # fmt: skip
    check(found[1], want)


@pytest.mark.parametrize(("make", "train", "also"), [(causal, CAUSAL, ()), (encoder, CLASSES, ["classifier"])])
def test_rates_seeds_and_methods(make, train, also):
    """The numbers of every run, of a causal LM and of an encoder with heads; validation and its looks too."""
    methods = ["lora:rank=4", "lora:rank=2,dropout=0.3", "shira:density=0.1"]
    runs = [(m, seed, {"rate": rate}) for m in methods for seed, rate in ((0, 1e-2), (3, 3e-3))]
    shared = {"steps": STEPS, "batch": 4, "eval_every": 10}
    found = together(make, train, [(m, s, o | shared) for m, s, o in runs], also, eval=train.first(9))
    for (method, seed, options), got in zip(runs, found, strict=True):
        want = alone(make, train, method, seed, also, eval=train.first(9), **options, **shared)
        check(got, want)
        assert [(e["step"], e["items"]) for e in got.evaluations] == [(e["step"], e["items"]) for e in want.evaluations]


def test_what_is_each_runs_own():
    """Clipping, decay, schedules, batches in parts, numbers of steps and examples: all differ, in one group."""
    runs = [
        ("lora:rank=4", 0, {"clip": 0.01, "batch": 4, "steps": 20}),
        ("lora:rank=4", 1, {"clip": 0.0, "weight_decay": 0.5, "batch": 6, "steps": 9}),
        ("lora:rank=4", 2, {"schedule": "cosine", "warmup": 4, "batch": 6, "accumulate": 2, "steps": 14}),
    ]
    for got, (method, seed, options) in zip(together(causal, CAUSAL, runs), runs, strict=True):
        check(got, alone(causal, CAUSAL, method, seed, **options))


@pytest.mark.parametrize("optimizer", [n for n in known() if "8bit" not in n])
def test_every_optimizer(optimizer):
    method = {
        "rowwise-adamw": "dylora:rank=4,frozen=true",
        "partwise-adamw": "mosa",
        "pooled-adamw": "vb-lora",
        "adalora": "adalora",
    }
    chosen = method.get(optimizer, "lora:rank=4")
    options = OPTIONS | {"optimizer": optimizer, "steps": 8}
    found = together(causal, CAUSAL, [(chosen, 0, options), ("lora:rank=4", 2, OPTIONS), (chosen, 1, options)])
    check(found[2], alone(causal, CAUSAL, chosen, 1, **options))


def test_the_chunked_loss():
    runs = [("lora:rank=4", seed, OPTIONS | {"loss": "chunked"}) for seed in (0, 1)]
    found = together(causal, CAUSAL, runs)
    assert found[0].choices["loss"]["name"] == "chunked"
    check(found[1], alone(causal, CAUSAL, "lora:rank=4", 1, **OPTIONS, loss="chunked"))


def test_one_that_diverges_leaves_the_others_as_they_are():
    calm = [("lora:rank=4", 0, OPTIONS), ("lora:rank=4", 1, OPTIONS)]
    wild = ("lora:rank=4", 2, OPTIONS | {"rate": 1e6, "clip": 0.0, "warmup": 0})
    first, error, last = together(causal, CAUSAL, [calm[0], wild, calm[1]])
    assert isinstance(error, DivergedError) and "1e+06" in str(error)
    check(first, alone(causal, CAUSAL, "lora:rank=4", 0, **OPTIONS))
    check(last, alone(causal, CAUSAL, "lora:rank=4", 1, **OPTIONS))


class KilledError(Exception):
    pass


def test_a_killed_group_goes_on_and_a_run_of_it_alone(tmp_path):
    """Both from the checkpoints of the group, which are those of `fit`."""
    runs = [("lora:rank=4,dropout=0.2", s, OPTIONS | {"save_every": 5}) for s in (0, 1)]
    whole = together(causal, CAUSAL, runs)

    def kill(event):
        if event.step == 12:
            raise KilledError

    with pytest.raises(KilledError):
        together(causal, CAUSAL, runs, out=tmp_path, progress=kill)
    assert (tmp_path / "slot0" / "checkpoint-10").is_dir()
    shutil.copytree(tmp_path, tmp_path / "copy", dirs_exist_ok=False, ignore=shutil.ignore_patterns("copy"))
    found = together(causal, CAUSAL, runs, out=tmp_path)
    assert [r.resumed_from for r in found] == [10, 10]
    for got, want in zip(found, whole, strict=True):
        assert got.losses == want.losses  # to the bit
    model = causal()
    adapter = attached(model, runs[0][0], 0, "slot0", CAUSAL)
    place = tmp_path / "copy" / "slot0"
    one = fit(model, adapter, CAUSAL, attention=None, seed=0, out=place, resume=True, **runs[0][2])
    assert one.resumed_from == 10
    check(one, whole[0])


def test_what_no_group_has_is_refused():
    with pytest.raises(AddendaError, match="early_stop: a run with that is trained alone"):
        together(causal, CAUSAL, [("lora:rank=4", 0, OPTIONS | {"early_stop": 2})])
    with pytest.raises(AddendaError, match="no run"):
        fit_grouped(causal(), [], CAUSAL)


def test_the_model_is_as_before():
    model = causal()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    runs = [Run(attached(model, "lora:rank=4", s, f"s{s}", CAUSAL), OPTIONS | {"seed": s, "steps": 3}) for s in (0, 1)]
    ad.switch(model, "s0")
    fit_grouped(model, runs, CAUSAL)
    assert state_of(model).state.active == ("s0",)
    ad.detach(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()) and not model.training


def test_batches_of_like_length_share_a_forward():
    assert packed([30, 10, 30, 10], [4, 4, 4, 4], forward=0) == [[0, 2], [1, 3]]
    assert packed([30, 10, 30, 10], [4, 4, 4, 4], forward=161) == [[0, 1, 2, 3]]  # 8 rows of 20 more: 160 tokens
    assert packed([7], [4]) == [[0]]
    assert grouped.FORWARD == 256
