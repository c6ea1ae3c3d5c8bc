import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.states import read_state
from addenda.data.batches import Collator, batches
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.quantizing.quantize import quantize
from addenda.train import attention, checkpoint, chunked
from addenda.train.callback import TrainerCallback
from addenda.train.fit import fit
from shared import KilledError, killed_at, same_bits, values
from tiny_models import SUMS, make_llama, make_tokenizer

FILES = (checkpoint.FILE, *checkpoint.RESUMES, "rng_state.safetensors")
METHOD = ad.LoRA(rank=4, dropout=0.25)


def data():
    return encode(read(SUMS), make_tokenizer())


def run(train, method=METHOD, **options):
    model = make_llama()
    adapter = ad.attach(model, method, seed=3)
    return model, adapter, fit(model, adapter, train, **{"steps": 12, "batch": 8, "rate": 1e-2, "seed": 5} | options)


def test_tensors_that_a_first_batch_does_not_reach_may_be_warned_of():
    def late(dead):
        model = make_llama()
        adapter = ad.attach(model, METHOD)
        layer, forwards = model.model.layers[-1], []
        own = layer.forward

        def dropped(x, *rest, **options):
            forwards.append(layer.training)
            return x if sum(forwards) == 1 and layer.training else own(x, *rest, **options)

        layer.forward = dropped
        return fit(model, adapter, data(), steps=3, batch=8, attention=None, loss="logits", dead=dead)

    with pytest.raises(AddendaError, match="no gradient in the first step"):
        late("raise")
    with pytest.warns(UserWarning, match="no gradient in the first step"):
        assert late("warn").steps == 3
    with pytest.raises(AddendaError, match="dead must be 'raise' or 'warn', got 'no'"):
        ad.tune("nowhere", SUMS, dead="no")


@pytest.mark.parametrize(("accumulate", "bits"), [(1, None), (2, 1)])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, accumulate, bits):
    train = data()
    options = {
        "method": dataclasses.replace(METHOD, bits=bits),
        "eval": train,
        "eval_every": 5,
        "save_every": 4,
        "accumulate": accumulate,
    }
    _, whole, result = run(train, **options)
    with pytest.raises(KilledError):
        run(train, out=tmp_path, progress=killed_at(11), **options)
    assert checkpoint.latest(tmp_path).name == "checkpoint-8"
    shutil.copytree(tmp_path / "checkpoint-8", tmp_path / ".checkpoint-12")  # a kill while writing the next
    (tmp_path / ".checkpoint-12" / "optimizer.safetensors").write_bytes(b"half")
    torch.manual_seed(99)
    _, parts, again = run(train, out=tmp_path, resume=True, **options)
    assert again.resumed_from == 8
    assert same_bits(values(whole), values(parts))
    assert whole.step_count == parts.step_count == 12
    assert again.losses == result.losses
    assert again.evaluations == result.evaluations
    assert [p.name for p in checkpoint.all_of(tmp_path)] == ["checkpoint-8", "checkpoint-12"]
    _, finished, more = run(train, out=tmp_path, resume=True, **options)  # nothing is left to do
    assert same_bits(values(whole), values(finished))
    assert more.tokens == 0


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(tmp_path):
    _, adapter, _ = run(data(), out=tmp_path, steps=2)
    folder = checkpoint.latest(tmp_path)
    names = {
        "adapter.safetensors",
        "addenda.json",
        "optimizer.safetensors",
        "scheduler.safetensors",
        "rng_state.safetensors",
    }
    assert {p.name for p in folder.iterdir()} == names | {"trainer_state.json"}
    assert same_bits(load_file(folder / "adapter.safetensors"), values(adapter))
    moments = read_state(folder / "optimizer.safetensors")["state"]
    assert sum(t.numel() for s in moments.values() for t in s.values() if t.numel() > 1) == 2 * adapter.trainable
    assert sum(p.stat().st_size for p in folder.iterdir()) < 4 * 4 * adapter.trainable + 100_000
    fresh = make_llama()
    loaded = ad.load(fresh, folder / "adapter.safetensors")  # a checkpoint's file is an adapter file
    assert same_bits(values(loaded), values(adapter))


def test_a_resumed_run_keeps_what_was_measured(tmp_path, monkeypatch):
    train, found = data(), attention.Attention("eager", {"sdpa": 2.0, "eager": 1.0})
    monkeypatch.setattr(attention, "FEW", 12)
    monkeypatch.setattr(attention, "measure", lambda *_: found)
    monkeypatch.setattr(chunked, "MANY", 0)
    _, whole, result = run(train)
    assert result.choices["attention"] == {"name": "eager", "seconds": {"sdpa": 2.0, "eager": 1.0}}
    assert result.choices["loss"]["name"] == "chunked"
    with pytest.raises(KilledError):
        run(train, out=tmp_path, save_every=4, progress=killed_at(6))
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(chunked, "choose", lambda *_: pytest.fail("chosen again"))
    model, parts, again = run(train, out=tmp_path, save_every=4, resume=True)
    assert (again.resumed_from, again.choices) == (4, result.choices)
    assert model.config._attn_implementation == "sdpa"  # its own, afterwards
    assert same_bits(values(whole), values(parts))


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "eager"},
        {"loss": "chunked"},
        {"group": False, "steps": [list(range(8))] * 6},
        {"checkpointing": True},
        {"lean": True},
    ],
)
def test_how_it_is_computed_changes_rounding_only(options):
    train = data()
    common = {"attention": "sdpa", "loss": "logits", "steps": options.get("steps", 6)}
    plain = run(train, **common)
    made = run(train, **common | options)
    assert [x for _, x in made[2].losses] == pytest.approx([x for _, x in plain[2].losses], abs=1e-5)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in made[0].modules())


def test_the_options_reach_the_model():
    for options, calls, name in [({}, 3, "sdpa"), ({"checkpointing": True, "attention": "eager"}, 6, "eager")]:
        model, ran = make_llama(), []
        adapter = ad.attach(model, METHOD)
        model.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, ran=ran, model=model: ran.append(model.config._attn_implementation)
        )
        fit(model, adapter, data(), steps=3, batch=8, **options)
        assert ran == [name] * calls  # twice a step where activations are computed again


def test_base_and_flags_are_as_before(tmp_path):
    reference = make_llama()
    model, adapter, result = run(data(), steps=5)
    assert not list(tmp_path.iterdir())
    assert model.config.use_cache == reference.config.use_cache
    assert not model.training
    assert not hasattr(model, "_is_accelerate_prepared")
    assert all(p.grad is None for p in model.parameters())
    assert result.steps == adapter.step_count == 5
    assert result.tokens > 0
    assert result.step_seconds > 0
    ad.detach(model)
    assert same_bits(model.state_dict(), reference.state_dict())


def test_parts_of_a_batch_give_the_same_run():
    train = data()
    plain = run(train, ad.LoRA(rank=4), steps=4)[2]
    parts = run(train, ad.LoRA(rank=4), steps=4, accumulate=4)[2]
    assert [x for _, x in plain.losses] == pytest.approx([x for _, x in parts.losses], rel=1e-4)


def test_given_rows_are_the_order():
    train = data()
    rows = batches(train.lengths, 8, 4, seed=5)
    by_seed, by_rows = run(train, steps=4)[2], run(train, steps=rows)[2]
    assert by_seed.losses == by_rows.losses
    with pytest.raises(AddendaError, match=r"positions from 0 to 63.*steps \[1\]"):
        run(train, steps=[[0], [64]])


def test_early_stop_gives_the_best_values_back(tmp_path):
    train = data()
    _, adapter, result = run(
        train, steps=40, rate=0.2, schedule="constant", eval=train, eval_every=2, early_stop=2, out=tmp_path
    )
    losses = [e["loss"] for e in result.evaluations]
    assert len(losses) < 20
    assert result.best_step == 2 * (losses.index(min(losses)) + 1)
    assert same_bits(read_state(checkpoint.latest(tmp_path) / checkpoint.BEST), values(adapter))


@pytest.mark.parametrize("save_every", [1, 7])
def test_a_run_that_stopped_early_is_finished(tmp_path, save_every):
    """Called again, and killed as its last checkpoint is written, it ends with the values that it had."""
    train = data()
    options = {"steps": 40, "rate": 0.2, "schedule": "constant", "eval": train, "eval_every": 2, "early_stop": 1}
    options |= {"save_every": save_every, "resume": True}
    _, adapter, first = run(train, out=tmp_path / "a", **options)
    assert first.steps < 40 and checkpoint.step_of(checkpoint.latest(tmp_path / "a")) == first.steps
    for _ in range(2):
        _, again, second = run(train, out=tmp_path / "a", **options)
        assert same_bits(values(again), values(adapter)) and second.tokens == 0
        assert (second.steps, second.best_step, second.losses) == (first.steps, first.best_step, first.losses)
    with pytest.raises(KilledError):
        run(train, out=tmp_path / "b", progress=killed_at(first.steps), **options)
    _, resumed, third = run(train, out=tmp_path / "b", **options)
    assert same_bits(values(resumed), values(adapter)) and third.steps == first.steps


def test_schedules_follow_the_step(tmp_path):
    from addenda.train.settings import Settings

    linear = Settings(10, warmup=0.2).multiplier()
    assert [linear(i) for i in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8])
    assert all(
        0 < Settings(7, schedule=s, warmup=3).multiplier()(i) <= 1 for s in ("linear", "cosine") for i in range(7)
    )
    assert Settings(1).multiplier()(0) == 1


def adamw_too(adapter, rate, weight_decay):
    return torch.optim.AdamW(adapter.parameters(), rate, weight_decay=weight_decay)


def test_another_run_or_adapter_is_not_resumed(tmp_path):
    train = data()
    run(train, out=tmp_path, steps=2)
    for options, says in [
        ({"rate": 1e-3}, "rate was 0.01, now 0.001"),
        ({"seed": 6}, "seed was 5, now 6"),
        ({"attention": "eager"}, "attention was 'sdpa', now 'eager'"),
        ({"loss": "chunked"}, "loss was 'logits', now 'chunked'"),
        ({"checkpointing": True}, "checkpointing was False, now True"),
        ({"optimizer": adamw_too}, "optimizer was 'adamw', now 'adamw_too'"),
    ]:
        with pytest.raises(AddendaError, match=says):
            run(train, out=tmp_path, resume=True, **{"steps": 2} | options)
    with pytest.raises(AddendaError, match="another adapter: the method is"):
        run(train, ad.LoRA(rank=2), out=tmp_path, resume=True, steps=2)
    run(train, ad.LoRA(rank=2), out=tmp_path, steps=2)  # without resume it starts over


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"rate": -1.0, "batch": 0}, "batch must be at least 1.*rate must be a positive"),
        ({"schedule": "step"}, "schedule must be"),
        ({"accumulate": 9}, "accumulate must be from 1 to batch=8"),
        ({"resume": True}, "give out="),
        ({"early_stop": 1}, "give eval="),
        ({"loss": "whole"}, "loss must be"),
        ({"attention": "flush"}, "attention='flush' cannot be"),
        ({"rate": 1e30}, "rate must be a positive number, at most 1,000,000"),
    ],
)
def test_bad_settings(options, says):
    with pytest.raises(AddendaError, match=says):
        run(data(), **options)


def test_adapters_that_cannot_train():
    train, model = data(), make_llama()
    adapter = ad.attach(model, METHOD).requires_grad_(False)
    with pytest.raises(AddendaError, match="No tensor of adapter 'default' may train"):
        fit(model, adapter, train, steps=1)
    adapter.requires_grad_(True)
    ad.switch(model, None)
    with pytest.raises(AddendaError, match="does not act now"):
        fit(model, adapter, train, steps=1)
    with pytest.raises(AddendaError, match="attached to another model"):
        fit(make_llama(), adapter, train, steps=1)


def plain_trainer(train, out, steps, resume=None, **options):
    model = make_llama()
    adapter = ad.attach(model, METHOD, seed=3)
    args = transformers.TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, save_steps=3, seed=1,
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, args, Collator(train.pad, train.kind), train, callbacks=[TrainerCallback(adapter), *options.values()]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return adapter


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:transformers")
def test_the_callback_saves_and_restores_in_a_plain_trainer(tmp_path):
    train = data()
    whole = plain_trainer(train, tmp_path / "a", 6)
    assert whole.step_count == 6
    folder = tmp_path / "a" / "checkpoint-3"
    assert json.loads((folder / "addenda.json").read_text())["step"] == 3
    assert load_file(folder / "adapter.safetensors").keys() == whole.state_dict().keys()
    resumed = plain_trainer(train, tmp_path / "a", 6, resume=str(folder))
    assert resumed.step_count == 6
    assert same_bits(values(whole), values(resumed))
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(AddendaError, match=r"no file .*adapter"):
        plain_trainer(train, tmp_path / "a", 6, resume=str(folder))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"base": 1}, "base.weights was .*…, now"),
        ({"base": "half"}, "base.dtypes.float32 was .*base.dtypes.bfloat16 was None"),
        ({"base": "nf4"}, r"base.packed was \[\], now \['NF4Tensor'\]"),
        ({"base": "rope"}, "base.config was"),
        ({"eval": 8}, "eval was .*…, now"),
        ({"eval": None}, "eval was .*…, now None"),
        ({"train": 32}, "data was"),
        ({"batch": 4}, "batch was 8, now 4"),
        ({"torch_empty_cache_steps": 2}, "arguments.torch_empty_cache_steps was None, now 2"),
        ({"targets": "q_proj"}, "adapter.sites.count was 14, now 2"),
        ({"steps": 4}, "steps was 6, now 4"),
        ({"accumulate": 2, "rate": 0.5}, "rate was 0.01, now 0.5; accumulate was 1, now 2"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "-".join(value),
)
def test_a_checkpoint_is_of_one_run(tmp_path, other, says):
    train, model = data(), make_llama()
    common = {"steps": 6, "batch": 8, "rate": 1e-2, "seed": 5, "out": tmp_path, "eval": train.first(4)}
    fit(model, ad.attach(model, METHOD, seed=3), train, **common)
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    base = other.pop("base", None)
    model = make_llama(int(base == 1))
    if base == "half":
        model.bfloat16()
    if base == "nf4":
        quantize(model, "nf4")
    if base == "rope":
        model.config.rms_norm_eps = 0.1
    adapter = ad.attach(model, METHOD, seed=3, targets=other.pop("targets", "linear"))
    train = train.first(other.pop("train", len(train)))
    if "eval" in other:
        other["eval"] = other["eval"] and train.first(other["eval"])
    with pytest.raises(AddendaError, match=f"checkpoint-6 belongs to another run: .*{says}"):
        fit(model, adapter, train, resume=True, **(common | other))
    assert kept == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_run_can_be_lengthened_and_says_so(tmp_path):
    train = data()
    first = run(train, out=tmp_path, steps=6)[2]
    made = run(train, out=tmp_path, steps=10, resume=True)[2]
    assert (made.resumed_from, made.steps, first.looks) == (6, 10, [])
    assert made.losses[:6] == first.losses and [s for s, _ in made.losses] == list(range(1, 11))
    assert made.looks[0]["changed"] == {"steps": [6, 10]} and made.looks[0]["seen"] == "6 steps"
    again = run(train, out=tmp_path, steps=10, resume=True)[2]
    assert again.looks == made.looks and again.losses == made.losses


def damaged(whole: bytes, rng: random.Random):
    """A file's bytes gone, emptied, halved, and with one bit flipped, at three places."""
    yield from (None, b"", whole[: len(whole) // 2])
    for _ in range(3):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        yield bytes(flipped)


@pytest.mark.parametrize("often", [0.03, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(often, tmp_path):
    """Every file of the newest one, damaged in every way: the run ends with the bits of the uninterrupted one.

    often: for what share of these the whole run is made.
    """
    train, rng = data(), random.Random(0)
    options = {"steps": 6, "save_every": 2, "eval": train.first(4), "eval_every": 2, "early_stop": 9}
    _, adapter, made = run(train, out=tmp_path / "whole", **options)
    whole, out = values(adapter), tmp_path / "run"
    with pytest.raises(KilledError):
        run(train, out=tmp_path / "killed", progress=killed_at(5), **options)
    files = sorted(p.name for p in (tmp_path / "killed" / "checkpoint-4").iterdir())
    assert set(files) == {*FILES, checkpoint.NOTE, checkpoint.BEST}
    for name in files:
        for held in damaged((tmp_path / "killed" / "checkpoint-4" / name).read_bytes(), rng):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(tmp_path / "killed", out)
            file = out / "checkpoint-4" / name
            file.unlink() if held is None else file.write_bytes(held)
            says = f"lacks {name}" if held is None else f"has {name} damaged or changed"
            assert checkpoint.newest(out) == (out / "checkpoint-2", [f"checkpoint-4 {says}"])
            if rng.random() > often and not (name == checkpoint.NOTE and held == b""):
                continue
            with pytest.warns(UserWarning, match=f"checkpoint-4 {says}.*goes on from checkpoint-2"):
                _, adapter, again = run(train, out=out, resume=True, **options)
            assert again.resumed_from == 2 and same_bits(values(adapter), whole) and again.losses == made.losses
            assert again.damaged == (f"checkpoint-4 {says}",) and again.best_step == made.best_step
            assert [p.name for p in checkpoint.all_of(out)] == ["checkpoint-4", "checkpoint-6"]
            assert checkpoint.newest(out) == (out / "checkpoint-6", [])


def test_a_damaged_checkpoint_stays_until_its_step(tmp_path):
    train = data()
    run(train, out=tmp_path, steps=8, save_every=2, keep=3)
    for step in (6, 8):
        (tmp_path / f"checkpoint-{step}" / checkpoint.FILE).write_bytes(b"x")
    warned = pytest.warns(UserWarning, match="checkpoint-8 has adapter.*; checkpoint-6 has adapter")
    with warned, pytest.raises(KilledError):
        run(train, out=tmp_path, steps=8, save_every=1, keep=1, resume=True, progress=killed_at(6))
    assert [p.name for p in checkpoint.all_of(tmp_path)] == ["checkpoint-5", "checkpoint-6", "checkpoint-8"]
    assert (tmp_path / "checkpoint-8" / checkpoint.FILE).read_bytes() == b"x"
    with pytest.warns(UserWarning, match="checkpoint-8 has adapter.*goes on from checkpoint-5"):
        assert run(train, out=tmp_path, steps=8, save_every=1, keep=1, resume=True)[2].resumed_from == 5


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file whose reading the system refuses")
def test_a_checkpoint_that_the_disk_does_not_give_is_passed_over_and_says_why(tmp_path):
    run(data(), out=tmp_path, steps=4, save_every=2)
    file = tmp_path / "checkpoint-4" / "optimizer.safetensors"
    file.unlink()
    file.symlink_to("/proc/self/mem")
    start, (wrong,) = checkpoint.newest(tmp_path)
    assert start == tmp_path / "checkpoint-2"
    assert (
        "checkpoint-4 cannot be read" in wrong and "optimizer.safetensors cannot be read (Input/output error" in wrong
    )


def test_where_no_checkpoint_is_whole_it_is_said_how_to_begin_again(tmp_path):
    train = data()
    whole = values(run(train, out=tmp_path, steps=2)[1])
    kept = checkpoint.latest(tmp_path)
    (kept / checkpoint.NOTE).unlink()
    (kept / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(checkpoint.NoneWholeError, match=r"whole: checkpoint-2 lacks addenda\.json.*resume=False"):
        run(train, out=tmp_path, steps=2, resume=True)
    (kept / "optimizer.pt").write_bytes(b"pickle")
    with pytest.raises(checkpoint.NoneWholeError, match="older version of addenda, which wrote pickles"):
        run(train, out=tmp_path, steps=2, resume=True)
    assert same_bits(values(run(train, out=tmp_path, steps=2)[1]), whole)
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()


@pytest.mark.parametrize("step", [0, 2])
def test_a_damaged_note_of_the_run_is_written_again(step, tmp_path):
    train, rng, options = data(), random.Random(1), {"steps": 2, "save_every": 1}
    whole = values(run(train, out=tmp_path / "whole", **options)[1])
    if step:
        run(train, out=tmp_path, **options)
    else:
        (tmp_path / checkpoint.NOTE).write_bytes((tmp_path / "whole" / checkpoint.NOTE).read_bytes())
    note = tmp_path / checkpoint.NOTE
    for held in [*damaged(note.read_bytes(), rng)][:4]:
        note.unlink() if held is None else note.write_bytes(held)
        _, adapter, made = run(train, out=tmp_path, resume=True, **options)
        assert same_bits(values(adapter), whole) and made.resumed_from == step
        assert checkpoint.begun(tmp_path)
        if not step:
            shutil.rmtree(tmp_path / "checkpoint-1"), shutil.rmtree(tmp_path / "checkpoint-2")


def test_the_choices_are_written_before_the_first_step_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "FEW", 12)
    monkeypatch.setattr(attention, "measure", lambda *_: attention.Attention("eager", {"sdpa": 2.0, "eager": 1.0}))
    train = data()

    def killed(event):
        note = json.loads((tmp_path / "addenda.json").read_text())
        assert note["choices"]["attention"]["name"] == note["identity"]["attention"] == "eager"
        raise KilledError

    with pytest.raises(KilledError):
        run(train, out=tmp_path, progress=killed)
    assert not checkpoint.all_of(tmp_path)
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured again"))
    assert run(train, out=tmp_path, resume=True)[2].choices["attention"]["name"] == "eager"


def test_what_others_wrote_is_neither_read_nor_deleted(tmp_path):
    train = data()
    for name in ("checkpoint-500", "checkpoint-3", ".checkpoint-9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_model.bin").write_text("precious")
    (tmp_path / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for resume in (False, True, False):
        assert run(train, out=tmp_path, steps=2, resume=resume)[2].steps == 2
    with pytest.raises(AddendaError, match="checkpoint-3, which this run would write"):
        run(train, out=tmp_path, steps=3)
    assert before.items() <= {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}.items()


def test_one_run_at_a_time_in_a_folder(tmp_path):
    train = data()

    def another(event):
        with pytest.raises(AddendaError, match="Another run is under way"):
            run(train, out=tmp_path, steps=2)

    run(train, out=tmp_path, steps=2, progress=another)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["addenda.json", "checkpoint-2"]
