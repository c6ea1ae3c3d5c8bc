"""A call that is refused, breaks off or is interrupted leaves the model as it was: every function, its mistakes."""

import copy

import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.compose.composition import Stack
from addenda.core.base.errors import AddendaError
from addenda.core.method.catalogue import catalogue
from addenda.core.packed.nf4 import NF4Tensor
from addenda.quantizing.quantize import dequantize, quantize
from marks import differences, snapshot


class BrokenError(Exception):
    pass


def broken(*_, **__):
    raise BrokenError


def batches(good: int, then: type[BaseException] = BrokenError):
    """So many batches of ids, then an error."""
    for _ in range(good):
        yield torch.arange(12).reshape(2, 6)
    raise then


def mean(model, batch):
    return model(batch).square().mean()


def plain():
    """A model with modes, flags and gradients of its own, which a careless call would make uniform."""
    torch.manual_seed(7)
    model = toys.Tiny().train()
    model.layers[0].eval()
    model.embed.weight.requires_grad_(False)
    model(torch.arange(12).reshape(2, 6)).sum().backward()
    return model


def adapted(method="lora:rank=2", **options):
    model = plain()
    adapter = ad.attach(model, method, targets=["q_proj", "up_proj"], seed=3, **options)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    ad.attach(model, "shira:density=0.1", targets="q_proj", name="other")
    ad.switch(model, "default")
    return model


def saved(tmp_path, change=None):
    path = ad.adapters(adapted())["default"].save(tmp_path / "a.safetensors")
    return path if change is None else change(path)


def norms():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model(torch.randn(2, 2, 8, 8))
    model[1].eval()
    return model


def wild(model, at=-2):
    """A weight that is not finite, not in the first place that is looked at."""
    with torch.no_grad():
        list(model.parameters())[at].view(-1)[0] = float("nan")
    return model


IMAGES = torch.randn(2, 2, 8, 8)

CASES = {
    "attach: unknown method": (plain, lambda m, t: ad.attach(m, "lroa")),
    "attach: unknown target": (plain, lambda m, t: ad.attach(m, "lora", targets="nothing")),
    "attach: rank too high": (plain, lambda m, t: ad.attach(m, "lora:rank=99")),
    "attach: name taken": (adapted, lambda m, t: ad.attach(m, "lora")),
    "attach: bad name": (plain, lambda m, t: ad.attach(m, "lora", name="a b")),
    "attach: no data": (plain, lambda m, t: ad.attach(m, "lora-ga")),
    "attach: head_bits without heads": (plain, lambda m, t: ad.attach(m, "lora", head_bits=1)),
    "attach: data breaks off": (plain, lambda m, t: ad.attach(m, "lora-ga", targets="q_proj", calibration=batches(1),
                                                              loss=mean)),
    "attach: inputs break off": (plain, lambda m, t: ad.attach(m, "eva:rank=2", targets="q_proj",
                                                               calibration=batches(1))),
    "attach: data interrupted": (plain, lambda m, t: ad.attach(m, "shira:mask=gradient", targets="q_proj",
                                                               calibration=batches(2, KeyboardInterrupt), loss=mean)),
    "attach: loss breaks": (plain, lambda m, t: ad.attach(m, "lora-ga", calibration=[1], loss=broken)),
    "attach: progress breaks": (plain, lambda m, t: ad.attach(m, "lora", progress=broken)),
    "attach: second, progress breaks": (adapted, lambda m, t: ad.attach(m, "lora", name="b", progress=broken)),
    "load: no file": (plain, lambda m, t: ad.load(m, t / "none.safetensors")),
    "load: other base": (lambda: wild(plain(), 1), lambda m, t: ad.load(m, saved(t))),
    "load: name taken": (adapted, lambda m, t: ad.load(m, saved(t))),
    "load: base misspelt": (adapted, lambda m, t: ad.load(m, saved(t), name="b", base="compatibel")),
    "switch: unknown": (adapted, lambda m, t: ad.switch(m, "nobody")),
    "switch: twice": (adapted, lambda m, t: ad.switch(m, ["default", "default"])),
    "switch: second unknown": (adapted, lambda m, t: ad.switch(m, ["other", "nobody"])),
    "detach: unknown": (adapted, lambda m, t: ad.detach(m, "nobody")),
    "detach: keep_merged": (adapted, lambda m, t: ad.detach(m, keep_merged=True)),
    "merge: rounding": (adapted, lambda m, t: ad.merge(m, rounding="up")),
    "merge: verify breaks": (adapted, lambda m, t: ad.merge(m, verify="words")),
    "merge: allow_loss": (adapted, lambda m, t: ad.merge(m, allow_loss=float("nan"))),
    "merge: dtype and verify": (adapted, lambda m, t: ad.merge(m, dtype=torch.float64, verify=torch.ones(1, 99))),
    "unmerge: nothing": (adapted, lambda m, t: ad.unmerge(m)),
    "lean: nothing": (adapted, lambda m, t: ad.lean(m)),
    "unlean: nothing": (adapted, lambda m, t: ad.unlean(m)),
    "quantize: form": (plain, lambda m, t: quantize(m, "nf5")),
    "quantize: not finite": (lambda: wild(plain(), -4), lambda m, t: quantize(m, "nf4")),
    "quantize: target": (plain, lambda m, t: quantize(m, "nf4", targets="nothing")),
    "dequantize: nothing": (plain, lambda m, t: dequantize(m)),
    "factorise: rule": (norms, lambda m, t: ad.factorise(m, energy=2.0, copy=False)),
    "factorise: no rule": (norms, lambda m, t: ad.factorise(m, copy=False)),
    "factorise: batches break": (norms, lambda m, t: ad.factorise(m, energy=0.1, copy=False, batches=batches(0))),
    "factorise: no batch": (norms, lambda m, t: ad.factorise(m, energy=0.1, copy=False, batches=[])),
    "factorise: wild": (norms, lambda m, t: ad.factorise(m, energy=0.1, copy=False, batches=[IMAGES * float("inf")])),
    "recalibrate: none": (norms, lambda m, t: ad.recalibrate(m, [])),
    "recalibrate: breaks off": (norms, lambda m, t: ad.recalibrate(m, [IMAGES, "words"])),
    "recalibrate: interrupted": (norms, lambda m, t: ad.recalibrate(m, batches(0, KeyboardInterrupt))),
    "trained rank pruning: rule": (norms, lambda m, t: ad.TrainedRankPruning(m, energy=0.9, keep=0.5)),
    "trained rank pruning: period": (norms, lambda m, t: ad.TrainedRankPruning(m, energy=0.9, period=0)),
    "trained rank pruning: example": (norms, lambda m, t: ad.TrainedRankPruning(m, energy=0.9, example="words")),
    "trained rank pruning: not finite": (lambda: wild(norms(), -4), lambda m, t: ad.TrainedRankPruning(
        m, energy=0.9).before_forward()),
    "macs: example": (norms, lambda m, t: ad.macs(m, "words")),
    "plan: target": (plain, lambda m, t: ad.plan(m, "lora", targets="nothing")),
    "plan: optimizer breaks": (toys.make_llama, lambda m, t: ad.plan(m, "lora:rank=2", batch=1, length=4,
                                                                     optimizer=broken)),
    "perturbation_curve: judge breaks": (adapted, lambda m, t: ad.perturbation_curve(m, "default", broken)),
    "evaluate: data": (plain, lambda m, t: ad.evaluate(m, examples=[])),
    "save: folder": (adapted, lambda m, t: ad.adapters(m)["default"].save(t)),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_a_refused_call_leaves_no_mark(case, tmp_path):
    make, call = CASES[case]
    model = make()
    before = snapshot(model)
    with pytest.raises((Exception, KeyboardInterrupt)) as refused:
        call(model, tmp_path)
    assert isinstance(
        refused.value, (AddendaError, BrokenError, KeyboardInterrupt, TypeError, RuntimeError, OSError)
    ), refused.value
    assert not (found := differences(before, snapshot(model))), found[:5]


@pytest.mark.parametrize("name", [i.name for i in catalogue()])
@pytest.mark.parametrize("at", [1, 2])
def test_every_method_interrupted_while_its_tensors_are_made(name, at):
    model, done = plain(), []

    def progress(*_):
        done.append(0)
        if len(done) == at:
            raise KeyboardInterrupt

    before = snapshot(model)
    try:
        ad.attach(model, name, calibration=[torch.arange(12).reshape(2, 6)], loss=mean, progress=progress)
    except (KeyboardInterrupt, AddendaError):
        assert not (found := differences(before, snapshot(model))), found[:5]
    else:
        assert len(done) < at


@pytest.mark.parametrize("fails", range(0, 60, 7))
@pytest.mark.parametrize("what", ["attach", "load", "second"])
def test_interrupted_at_any_line_of_the_core(what, fails, tmp_path):
    """Ctrl-C comes between any two lines: every so many calls of the functions of `core` it is raised."""
    import sys

    path = saved(tmp_path)
    model = plain() if what != "second" else adapted()
    before, count = snapshot(model), 0

    def trace(frame, event, arg):
        nonlocal count
        name = frame.f_code.co_filename
        if event == "call" and "/core/" in name and frame.f_code.co_name in INSIDE:
            count += 1
            if count == fails + 1:
                raise KeyboardInterrupt
        return None

    def call():
        if what == "load":
            ad.load(model, path, name="loaded")
        else:
            ad.attach(model, "lora:rank=2", targets=["q_proj", "up_proj"], name="new")

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        sys.settrace(None)
        assert not (found := differences(before, snapshot(model))), found[:5]
    except AddendaError:
        sys.settrace(None)
        pytest.fail("the file does not fit")
    finally:
        sys.settrace(None)


INSIDE = ("adapt", "add", "apply_active", "activate", "link", "follow", "draw", "requires_grad_", "install", "train")


@pytest.mark.parametrize("name", ["default", "other", None])
def test_a_detach_interrupted_at_any_call_leaves_the_adapter_on(name):
    import sys

    model = adapted()
    before, at, stopped = snapshot(model), 0, True
    while stopped:
        at, count = at + 3, 0

        def trace(frame, event, arg, at=at):
            nonlocal count
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            if event == "call" and "/core/" in file and not file.endswith("undo.py") and function in TAKING_OFF:
                count += 1
                if count == at:
                    raise KeyboardInterrupt
            return None

        stopped = False
        sys.settrace(trace)
        try:
            ad.detach(model, name)
        except KeyboardInterrupt:
            stopped = True
        finally:
            sys.settrace(None)
        if stopped:
            assert not (found := differences(before, snapshot(model))), found[:5]
    assert at > 6  # it was interrupted several times before it came through
    assert name is None or name not in ad.adapters(model)


TAKING_OFF = (
    "remove",
    "release",
    "follow",
    "hook",
    "apply_again",
    "apply_active",
    "let_go",
    "_still_adapted",
    "slots_of",
)


def test_stand_ins_that_are_interrupted_are_taken_out_again(monkeypatch):
    from addenda.quantizing import bridges

    def model():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def one(module, dtype=torch.float32):
        return NF4Tensor.of(module.weight.detach()) if type(module) is nn.Linear else None

    put, count = bridges.put, 0

    def interrupted(*given):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        put(*given)

    monkeypatch.setattr(bridges, "read", one)
    made = model()
    before = snapshot(made)
    monkeypatch.setattr(bridges, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bridges.adopt(made)
    assert not (found := differences(before, snapshot(made))), found[:5]
    monkeypatch.setattr(bridges, "put", put)
    assert bridges.adopt(made) == ["0", "2"]
    monkeypatch.setattr(bridges, "put", interrupted)
    before, count = [id(m) for m in made], 0
    with pytest.raises(KeyboardInterrupt):
        bridges.release(made)
    assert [id(m) for m in made] == before


def test_blocks_that_break_leave_what_acted_before():
    model = adapted()
    before = snapshot(model)
    for block in (
        lambda: ad.disabled(model), lambda: ad.per_example(model, ["default", "other"]),
        lambda: ad.composed(model, Stack("default", "other")),
    ):  # fmt: skip
        with pytest.raises(BrokenError), block():
            raise BrokenError
        assert not (found := differences(before, snapshot(model))), found[:5]
    for block, says in (
        (lambda: ad.per_example(model, ["nobody"]), "nobody"), (lambda: ad.composed(model, Stack("nobody")), "nobody"),
        (lambda: ad.composed(model, "default"), "composition"),
    ):  # fmt: skip
        with pytest.raises(AddendaError, match=says), block():
            pass
        assert not (found := differences(before, snapshot(model))), found[:5]


def test_the_snapshot_sees_what_it_should():
    """Each of these marks is found: no test here passes because nothing is looked at."""
    for mark in (
        lambda m: m.layers[0].train(), lambda m: m.embed.weight.requires_grad_(True),
        lambda m: m.register_forward_hook(lambda *_: None), lambda m: setattr(m.score, "note", 1),
        lambda m: m.score.weight.data.mul_(2), lambda m: setattr(m.score.weight, "grad", None),
        lambda m: m.register_buffer("b", torch.ones(1)), lambda m: setattr(m, "score", copy.deepcopy(m.score)),
        lambda m: ad.attach(m, "lora:rank=2"),
    ):  # fmt: skip
        model = plain()
        before = snapshot(model)
        mark(model)
        assert differences(before, snapshot(model))
