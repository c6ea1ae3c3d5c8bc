"""Every name that a run is given acts, is translated, or is refused with what to write instead."""

import dataclasses
import inspect

import pytest
import transformers

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.train import trainer
from addenda.train.fit import fit
from addenda.train.theirs import PASSED, REFUSED, TRANSLATED, translated
from addenda.train.tune import FURTHER
from tiny_models import SUMS, make_llama, make_tokenizer

FIELDS = [f.name for f in dataclasses.fields(transformers.TrainingArguments)]
OWN = {"seed", "weight_decay", "report_to"}  # the same name and meaning in both

VALUES = {  # one that is not the default, and what it is called here
    "learning_rate": (0.5, {"rate": 0.5}),
    "lr_scheduler_type": (transformers.SchedulerType.COSINE, {"schedule": "cosine"}),
    "warmup_steps": (2, {"warmup": 2}),
    "warmup_ratio": (0.5, {"warmup": 0.5}),
    "optim": ("adamw_torch", {"optimizer": "adamw"}),
    "num_train_epochs": (2, {"epochs": 2}),
    "max_steps": (3, {"steps": 3}),
    "max_grad_norm": (0.25, {"clip": 0.25}),
    "torch_compile": (True, {"compile": True}),
    "gradient_checkpointing": (True, {"checkpointing": True}),
    "activation_checkpointing": (True, {"checkpointing": True}),
    "eval_steps": (2, {"eval_every": 2}),
    "save_steps": (2, {"save_every": 2}),
    "save_total_limit": (1, {"keep": 1}),
    "output_dir": ("run", {"out": "run"}),
    "weight_decay": (0.5, {"weight_decay": 0.5}),
    "seed": (7, {"seed": 7}),
    "report_to": ("tensorboard", {"report_to": "tensorboard"}),
}


class StoppedError(Exception):
    pass


@pytest.fixture
def given(monkeypatch, tmp_path):
    """given(options) -> what the Trainer is made with: settings, steps of evaluations and saves, the rest."""
    monkeypatch.chdir(tmp_path)

    def call(options: dict) -> dict:
        seen = {}

        class Spy:
            def __init__(self, adapter, train, rows, settings, **rest):
                seen.update(rest, rows=rows, settings=settings)
                raise StoppedError

        monkeypatch.setattr(trainer, "AdapterTrainer", Spy)
        with pytest.raises(StoppedError):
            ad.tune(
                make_llama(), SUMS, "dylora:rank=2,frozen=true", tokenizer=make_tokenizer(), progress=False,
                eval_data=0.2, **options,
            )  # fmt: skip
        out = seen["out"]
        seen["out"] = str(out) if not str(out).startswith("/tmp") else None
        return {k: v for k, v in seen.items() if k not in ("optimizer", "choices", "watch", "eval_data")}

    return call


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_acts_or_is_refused(name):
    own = (*inspect.signature(ad.tune).parameters, *FURTHER)
    if name in OWN or name in PASSED:
        assert translated({name: 3}, own, "tune") == {name: 3}
    elif name in TRANSLATED:
        value, ours = VALUES[name]
        assert translated({name: value}, own, "tune") == ours
    else:
        with pytest.raises(AddendaError, match=rf"{name} is transformers' and is not read here.*\w=?") as refused:
            translated({name: 3}, own, "tune")
        elsewhere = ("neftune_noise_alpha", "tf32", "skip_memory_metrics")  # of the method, of torch, of fit
        assert any(f"{ours}=" in str(refused.value) for ours in own) or name in elsewhere


def test_names_refused_are_fields_of_this_or_an_older_release():
    assert not set(REFUSED) & (set(TRANSLATED) | set(PASSED) | OWN)
    assert set(PASSED) <= set(FIELDS)
    assert set(VALUES) == set(TRANSLATED) | OWN


@pytest.mark.parametrize("name", [n for n in VALUES if n != "torch_compile"])
def test_a_translated_name_changes_the_run_as_ours_does(given, name):
    value, ours = VALUES[name]
    base = {} if name in ("num_train_epochs", "max_steps") else {"steps": 6}
    if name in ("save_steps", "save_total_limit", "report_to"):
        base["out"] = "run"
    theirs = given({**base, name: value})
    assert theirs == given({**base, **ours})
    assert theirs != given(dict(base))


def test_compiling_is_asked_for_by_either_name(given):
    assert translated({"torch_compile": True}, FURTHER, "tune") == {"compile": True}


def test_what_a_launcher_reads_reaches_the_trainer(monkeypatch):
    made = {}
    own = trainer.AdapterTrainer.train

    def train(self, *args, **kwargs):
        made["args"] = self.args
        return own(self, *args, **kwargs)

    monkeypatch.setattr(trainer.AdapterTrainer, "train", train)
    asked = {"ddp_timeout": 77, "ddp_bucket_cap_mb": 5, "ddp_find_unused_parameters": False, "ddp_static_graph": True,
             "ddp_broadcast_buffers": False, "torch_empty_cache_steps": 2}  # fmt: skip
    ad.tune(make_llama(), SUMS, tokenizer=make_tokenizer(), progress=False, steps=1, **asked)
    assert {k: getattr(made["args"], k) for k in asked} == asked


def test_what_the_trainer_refuses_is_told():
    with pytest.raises(AddendaError, match="does not take parallelism_config=3"):
        ad.tune(make_llama(), SUMS, tokenizer=make_tokenizer(), progress=False, steps=1, parallelism_config=3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rate": 0.1, "learning_rate": 0.1}, "learning_rate= and rate= say the same thing; give rate= only"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "say the same thing; give warmup= only"),
        ({"steps": 2, "epochs": 1}, "steps or epochs, not both"),
        ({"steps": 2, "num_train_epochs": 1}, "steps or epochs, not both"),
        ({"epochs": 2, "max_steps": 1}, "steps or epochs, not both"),
        ({"steps": 2, "max_steps": 3}, "max_steps= and steps= say the same thing"),
        ({"checkpointing": False, "gradient_checkpointing": True}, "give checkpointing= only"),
        ({"lr_scheduler_type": "polynomial"}, "takes 'linear', 'cosine', 'constant'"),
        ({"optim": "sgd"}, "optimizer= takes .*'lora-pro'"),
        ({"max_steps": -1}, "steps must be at least 1"),
        ({"num_train_epochs": 0}, "epochs must be a positive number"),
        ({"lerning_rate": 1}, "no option 'lerning_rate'. Did you mean 'learning_rate' or 'rate'"),
        ({"eval": SUMS}, "Did you mean 'eval_data'"),
        ({"memory_floor": 3}, "no option 'memory_floor'"),
        ({"learning_rate": "fast"}, "rate must be a number, got 'fast'"),
        ({"eval_every": 1}, "eval_every=.*give eval_data="),
        ({"early_stop": 1}, "give eval_data="),
        ({"save_every": 1}, "save_every=.*give out="),
        ({"keep": 1}, "keep=.*give out="),
        ({"dtype": "bfloat16"}, r"model.to\(torch.bfloat16\)"),
        ({"device": "meta"}, "device= is for folders"),
        ({"quantize": "nf4"}, "quantize is for folders"),
        ({"image_size": 8}, "image_size is for folders"),
        ({"columns": {"qestion": "q"}}, "no option 'qestion'. Did you mean 'question'"),
        ({"method": {"q_proj": "lora"}, "targets": "v_proj"}, "targets="),
    ],
)  # fmt: skip
def test_contradictions_and_what_would_be_swallowed(options, says):
    base = {} if {"steps", "epochs", "max_steps", "num_train_epochs"} & set(options) else {"steps": 1}
    with pytest.raises(AddendaError, match=says):
        ad.tune(**{"model": make_llama(), "data": SUMS, "tokenizer": make_tokenizer(), "progress": False,
                   **base, **options})  # fmt: skip


def test_fit_takes_the_same_names_and_has_no_epochs():
    model = make_llama()
    adapter = ad.attach(model, "lora")
    from addenda.data.encode import encode
    from addenda.data.read import read

    train = encode(read(SUMS), make_tokenizer())
    with pytest.raises(AddendaError, match=r"num_train_epochs is epochs= in addenda\.tune, and fit has no epochs="):
        fit(model, adapter, train, num_train_epochs=1)
    with pytest.raises(AddendaError, match=r"fit has no option 'stps'\. Did you mean 'steps'"):
        fit(model, adapter, train, steps=1, stps=2)
    assert fit(model, adapter, train, max_steps=1, learning_rate=0.5).losses
