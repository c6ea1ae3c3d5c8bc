"""Lottery runs on a tiny BERT with a head: what is chosen, what moves, what comes back, and going on after a kill."""

import copy
import random

import pytest
import torch
from torch import nn

import addenda as ad
import tiny_models
import toys
from addenda import AddendaError
from addenda.core.forward.adapted import effective_weight
from addenda.core.forward.slots import slots_of
from addenda.core.site.site import site_at
from addenda.core.site.targets import resolve
from addenda.data.encode import Tokens
from addenda.train.fit import fit
from addenda.train.lottery import maskable
from addenda.train.pull import pull
from shared import KilledError, bits, same_bits, values

HOW = {"steps": 5, "batch": 6, "rate": 2e-2, "attention": None, "loss": "logits", "warmup": 0}


def made(kind=torch.float32):
    model = toys.make_bert().to(kind)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


def data(count=18, seed=0, words=range(5, 20)):
    rng = random.Random(seed)
    rows = [[1, *rng.choices(words, k=rng.randint(4, 7)), 2] for _ in range(count)]
    return Tokens(rows, [sum(r) % 3 for r in rows], "class", 0, [[0] * len(r) for r in rows])


def changes(model, adapter):
    """By path of every parameter: its effective value, and the base's."""
    found = {}
    for site in resolve(model, "weights"):
        slots = slots_of(site.module)
        live = slots.live.get(site.parameter, ()) if slots else ()
        found[site.path] = (effective_weight(site, live) if live else site.weight.detach(), site.weight.detach())
    return found


@pytest.mark.parametrize("k", [1, "changed + 1"])
def test_exactly_k_of_all_tensors_together(k):
    model = made()
    sizes = {p: site_at(model, p).weight.numel() for p in maskable(model, heads=["classifier"])}
    twin = copy.deepcopy(model)
    adapter = ad.attach(twin, "full", targets="weights", also_train="classifier")
    fit(twin, adapter, data(), **HOW)
    moved = {p: (t._parameters["value"] - site_at(twin, p).matrix).abs() for p, t in adapter.sites() if p in sizes}
    flat = torch.cat([moved[p].flatten() for p in sizes])
    changed = int((flat > 0).sum())
    assert changed < len(flat), "rows of unseen tokens have not moved"
    k = 1 if k == 1 else changed + 1
    result = ad.lottery(model, data(), k=k, **HOW)
    assert result.k == k == sum(t.tensors()["values"].numel() for p, t in result.adapter.sites() if p in sizes)
    order = torch.sort(flat, descending=True, stable=True).indices[:k].sort().values.tolist()
    starts, at = {}, 0
    for p, n in sizes.items():
        starts[p], at = at, at + n
    assert [starts[p] + int(i) for p, index in result.positions.items() for i in index] == order


def test_all_is_full_fine_tuning():
    model, train = made(torch.float64), data()
    twin = copy.deepcopy(model)
    whole = ad.attach(twin, "full", targets="weights", also_train="classifier")
    fit(twin, whole, train, **HOW)
    every = sum(site_at(model, p).weight.numel() for p in maskable(model, heads=["classifier"]))
    result = ad.lottery(model, train, k=every, **HOW)
    mine, theirs = changes(model, result.adapter), changes(twin, whole)
    assert mine.keys() == theirs.keys()
    moved = max(float((a - b).abs().max()) for a, b in theirs.values())
    assert moved > 1e-2
    assert max(float((mine[p][0] - theirs[p][0]).abs().max()) for p in mine) < 1e-6
    assert result.sparse[0].losses[0] == result.full[0].losses[0], "both begin with the base and its head"


def sgd(adapter, rate, weight_decay):
    return torch.optim.SGD(adapter.parameters(), lr=rate, momentum=0.9, weight_decay=weight_decay)


def adafactor(adapter, rate, weight_decay):
    return torch.optim.Adafactor(adapter.parameters(), lr=rate, weight_decay=weight_decay)


@pytest.mark.parametrize("optimizer", ["adamw", sgd, adafactor])
def test_nothing_else_moves(optimizer):
    model = made()
    before = bits(model)
    result = ad.lottery(model, data(), k=200, optimizer=optimizer, weight_decay=0.1, **HOW)
    assert same_bits(bits(model), before)
    moved = 0
    for path, (now, base) in changes(model, result.adapter).items():
        if path.startswith("classifier"):
            assert not torch.equal(now, base)
            continue
        outside = torch.ones(base.numel(), dtype=torch.bool)
        outside[result.positions.get(path, torch.empty(0)).long()] = False
        assert torch.equal(now.flatten()[outside], base.flatten()[outside]), path
        moved += int((now != base).sum())
    assert 150 < moved <= 200
    ad.detach(model)
    assert same_bits(bits(model), before)


def test_masks_grow_over_iterations():
    model, seen = made(), []
    from addenda.train import lottery as module

    attached = module._Run.attached

    def noted(self, method, **how):
        if method == "sparse":
            seen.append({p: set(t.tolist()) for p, t in how["positions"].items()})
        return attached(self, method, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Run, "attached", noted)
        result = ad.lottery(model, data(), k=301, iterations=2, **HOW)
    first, second = seen
    assert [sum(map(len, m.values())) for m in seen] == [150, 301]
    assert all(first[p] <= second[p] for p in first)
    assert result.k == 301
    losses = result.full[1].losses[0][1], result.full[0].losses[0][1]
    assert losses[0] != losses[1], "the second iteration goes on where the first has ended"
    once = ad.lottery(made(), data(), k=301, **HOW)
    assert {p: set(t.tolist()) for p, t in once.positions.items()} != second


def test_a_pull_makes_changes_smaller():
    sizes = []
    for l1 in (0.0, 100.0):
        result = ad.lottery(made(), data(), k=300, l1=l1, **HOW)
        size = sum(
            float(t.tensors()["values"].detach().abs().sum())
            for _, t in result.adapter.sites()
            if "values" in t.tensors()
        )
        sizes.append(size)
    assert sizes[0] > sizes[1] > 0


def test_the_pull_is_l1_over_n_times_the_sign():
    model = made()
    one = ad.attach(model, "full", targets="bias", also_train="classifier")
    (path, tensors), *_ = one.sites()
    with torch.no_grad():
        tensors._parameters["value"].add_(torch.tensor([1.0, -1.0] * 4))
    for p in one.parameters():
        p.grad = torch.zeros_like(p)
    pull(one, 3.0)
    n = sum(t._parameters["value"].numel() for p, t in one.sites() if not p.startswith("classifier"))
    assert torch.equal(tensors._parameters["value"].grad, torch.tensor([1.0, -1.0] * 4) * (3.0 / n))
    assert not any(bool(t._parameters["value"].grad.any()) for p, t in one.sites() if p != path)


def test_norms_embeddings_heads_and_exclusions():
    model = made()
    every = maskable(model, heads=["classifier"])
    assert not [p for p in every if p.startswith("classifier")]
    assert {p for p in every if p not in maskable(model, heads=["classifier"], norms=False)} == {
        p for p in every if "LayerNorm" in p
    }
    assert {p for p in every if p not in maskable(model, heads=["classifier"], embeddings=False)} == {
        f"bert.embeddings.{n}_embeddings" for n in ("word", "position", "token_type")
    }
    result = ad.lottery(
        model, data(), k=50, norms=False, embeddings=False, exclude=["bias", "bert.pooler.dense"], **HOW
    )  # fmt: skip
    assert all(p.startswith("bert.encoder") for p in result.positions)
    assert result.adapter.methods.keys() >= {"classifier.weight", "classifier.bias"}


def test_random_positions_take_no_first_phase():
    one, two = (ad.lottery(made(), data(), k=400, positions="random", seed=s, **HOW) for s in (0, 1))
    assert one.full == two.full == (None,)
    assert one.k == two.k == 400
    assert len(one.positions) > 10
    assert any(one.positions[p].tolist() != two.positions.get(p, torch.empty(0)).tolist() for p in one.positions)


def test_phases_have_options_of_their_own():
    result = ad.lottery(made(), data(), k=100, full={"steps": 3, "batch": 4, "rate": 1e-3}, **HOW)
    assert (result.full[0].steps, result.sparse[0].steps) == (3, 5)


def language(model):
    """A sparse language part that has been trained, as a file's is."""
    words = range(20, 31)
    result = ad.lottery(
        model,
        data(seed=7, words=words),
        k=200,
        also_train=(),
        exclude=["classifier", "classifier.bias"],
        name="language",
        **HOW,
    )
    return result.adapter


def test_a_task_on_a_frozen_language():
    model = made()
    part = language(model)
    kept, before = values(part), bits(model)
    start = model(input_ids=torch.tensor([[1, 6, 2]])).logits.clone()
    task = ad.lottery(model, data(), k=200, name="task", **HOW)
    assert same_bits(values(part), kept), "the language stays"
    assert same_bits(bits(model), before)
    assert all(p.requires_grad for p in part.parameters()), "and may learn again afterwards"
    ad.switch(model, "language")
    assert torch.equal(model(input_ids=torch.tensor([[1, 6, 2]])).logits, start)
    bare = made()
    alone = ad.lottery(bare, data(), k=200, **HOW)
    assert task.sparse[0].losses[0] != alone.sparse[0].losses[0], "θ0 is base and language together"
    assert not any(p.startswith("classifier") for p in part.methods)


def test_base_bits_are_equal_after_200_changes_in_any_order(tmp_path):
    model, ids = made().eval(), torch.tensor([[1, 6, 9, 2], [1, 22, 25, 2]])
    language(model)
    ad.lottery(model, data(), k=200, name="task", **HOW)
    ad.switch(model, None)
    ad.lottery(
        model, data(seed=3), k=150, also_train=(), exclude=["classifier", "classifier.bias"], name="other", **HOW
    )
    ad.switch(model, None)
    before, plain = bits(model), model(input_ids=ids).logits
    wanted, merged = {}, False
    ways = [
        (),
        ("language",),
        ("other",),
        ("task",),
        ("language", "task"),
        ("other", "task"),
        ("language", "other", "task"),
    ]
    for way in ways:
        ad.switch(model, way)
        wanted[way] = model(input_ids=ids).logits
    assert len({w.detach().numpy().tobytes() for w in wanted.values()}) == len(ways)
    rng = random.Random(0)
    way = ways[-1]
    for _ in range(200):
        if merged:
            assert (model(input_ids=ids).logits - wanted[way]).abs().max() < 1e-5
            ad.unmerge(model)
            merged = False
        elif way and rng.random() < 0.4:
            ad.merge(model, verify={"input_ids": ids})
            merged = True
            continue
        else:
            way = rng.choice(ways)
            ad.switch(model, way)
        assert same_bits(bits(model), before)
        assert torch.equal(model(input_ids=ids).logits, wanted[way])
    if merged:
        ad.unmerge(model)
    ad.detach(model)
    assert same_bits(bits(model), before)
    assert torch.equal(model(input_ids=ids).logits, plain)


def test_the_result_is_an_ordinary_adapter(tmp_path):
    model, ids = made().eval(), torch.tensor([[1, 6, 9, 2]])
    result = ad.lottery(model, data(), k=200, out=tmp_path / "run", **HOW)
    y = model(input_ids=ids).logits
    assert result.path == tmp_path / "run" / "adapter.safetensors"
    other = made().eval()
    ad.load(other, result.path)
    assert torch.equal(other(input_ids=ids).logits, y)
    with ad.composed(other, ad.Stack("default")):
        assert torch.equal(other(input_ids=ids).logits, y)
    ad.merge(other, verify={"input_ids": ids})
    assert (other(input_ids=ids).logits - y).abs().max() < 1e-5
    third = made()
    with torch.no_grad():
        third.bert.pooler.dense.weight[0, 0] += 1
    with pytest.raises(AddendaError, match="other base weights"):
        ad.load(third, result.path)


@pytest.mark.parametrize(("phase", "iterations"), [("sparse", 1), ("full", 2)])
def test_a_killed_run_goes_on_with_the_same_bits(phase, iterations, tmp_path):
    options = HOW | {"steps": 6, "save_every": 2, "k": 151, "iterations": iterations}
    whole = ad.lottery(made(), data(), **options)
    seen = 0

    def watch(event):
        nonlocal seen
        seen += event.evaluation is None
        if seen == (2 * iterations - 2) * 6 + (5 if phase == "full" else 11):
            raise KilledError

    model = made()
    before = bits(model)
    with pytest.raises(KilledError):
        ad.lottery(model, data(), out=tmp_path, progress=watch, **options)
    assert not any(slots_of(m) for m in model.modules())
    assert same_bits(bits(model), before)
    assert (tmp_path / f"positions-{iterations}.safetensors").exists() == (phase == "sparse")
    again = ad.lottery(model, data(), out=tmp_path, **options)
    last = again.full[-1] if phase == "full" else again.sparse[-1]
    assert last.resumed_from == 4
    assert (again.full[-1] is None) == (phase == "sparse")
    assert same_bits(values(again.adapter), values(whole.adapter))
    third = ad.lottery(made(), data(), out=tmp_path, **options)
    assert same_bits(values(third.adapter), values(whole.adapter)), "a finished run says the same again"


def test_a_folder_of_another_run_is_refused(tmp_path):
    options = HOW | {"steps": 2, "k": 100}
    ad.lottery(made(), data(), out=tmp_path, **options)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    others = [
        ({"k": 99}, "k was 100, now 99"), ({"l1": 0.5}, r"phases\.full\.l1 was 0\.0, now 0\.5"),
        ({"also_train": ()}, "heads was"), ({"norms": False}, "sites"),
    ]  # fmt: skip
    for other, told in others:
        with pytest.raises(AddendaError, match=told):
            ad.lottery(made(), data(), out=tmp_path, **options | other)
    with pytest.raises(AddendaError, match="data was"):
        ad.lottery(made(), data(seed=9), out=tmp_path, **options)
    model = made()
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] += 1
    with pytest.raises(AddendaError, match=r"base\.weights was"):
        ad.lottery(model, data(), out=tmp_path, **options)
    model = made()
    ad.attach(model, "sparse:count=2", targets="bert.pooler.dense", name="language")
    with pytest.raises(AddendaError, match="beside"):
        ad.lottery(model, data(), out=tmp_path, **options)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    fresh = ad.lottery(made(), data(), out=tmp_path, resume=False, **options | {"k": 99})
    assert fresh.k == 99


def test_what_another_run_has_left_is_not_deleted(tmp_path):
    """An adapter, positions and checkpoints are a lottery's only beside its lottery.json."""
    ad.lottery(made(), data(), out=tmp_path, **HOW | {"steps": 2, "k": 100})
    (tmp_path / "lottery.json").unlink()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for resume in (True, False):
        with pytest.raises(AddendaError, match=r"holds adapter\.safetensors, positions-1\.safetensors"):
            ad.lottery(made(), data(), out=tmp_path, resume=resume, **HOW | {"steps": 2, "k": 100})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_checkpoints_of_a_first_phase_go_when_a_kill_has_kept_them(tmp_path, monkeypatch):
    options = HOW | {"steps": 2, "k": 100}
    with monkeypatch.context() as patch:
        patch.setattr("addenda.train.checkpoint.drop", lambda folder: None)
        first = ad.lottery(made(), data(), out=tmp_path, **options)
    assert (tmp_path / "full-1").exists()
    again = ad.lottery(made(), data(), out=tmp_path, **options)
    assert not (tmp_path / "full-1").exists() and same_bits(values(again.adapter), values(first.adapter))


def test_texts_are_read_as_tune_reads_them():
    rows = [{"text": f"{i} buy", "label": "spam"} for i in range(6)]
    rows += [{"text": f"dear {i}", "label": "ham"} for i in range(6)]
    model = tiny_models.make_bert()
    model.config.id2label = {0: "spam", 1: "ham"}
    result = ad.lottery(
        model, rows, k=50, tokenizer=tiny_models.make_tokenizer(), eval_data=0.25, steps=2, batch=4, rate=1e-2
    )
    assert result.k == 50
    assert result.adapter.labels == ("spam", "ham")
    assert "classifier.weight" in result.adapter.methods
    assert result.sparse[0].evaluations[-1]["step"] == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"k": 10**9}, "k=1,000,000,000 is above the"),
        ({"k": 2, "iterations": 3}, "Each of 3 iterations"),
        ({"k": 5, "l1": -1}, "l1 must be"),
        ({"k": 5, "positions": "best"}, "positions must be"),
        ({"k": 5, "full": {"stepz": 3}}, "full= has no option 'stepz'"),
        ({"k": 5, "full": {"rate": -1}}, "rate must be"),
        ({"k": 5, "exclude": ["nothing"]}, "matches nothing"),
        ({"k": 5, "exclude": ["weights"]}, "Nothing is left"),
        ({"k": 5, "name": "taken"}, "taken"),
        ({"k": 5, "eval_data": "file"}, "eval_data= is encoded too"),
    ],
)
def test_what_cannot_be(options, told):
    model = made()
    ad.attach(model, "lora:rank=2", targets="bert.pooler.dense", name="taken")
    before = bits(model)
    with pytest.raises(AddendaError, match=told):
        ad.lottery(model, data(), **HOW | options)
    assert list(ad.adapters(model)) == ["taken"]
    assert same_bits(bits(model), before)


REFUSED = {
    "no steps": (dict(steps=None), "steps= counts the steps of a phase, or is a list of rows.*got None"),
    "a head that is not there": (dict(also_train="scores"), "has none called 'scores'"),
    "no list of heads": (dict(also_train=None), "also_train must be a text or a list, got None"),
    "no dict of options": (dict(full=["rate"]), "full must be a dict or None, got a list"),
    "no number": (dict(k=None), "k must be a whole number, got None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_lottery_cannot_be_called_with_is_said(case):
    options, said = REFUSED[case]
    model = tiny_models.make_llama()
    with pytest.raises(AddendaError, match=said):
        ad.lottery(
            model, tiny_models.SUMS[:4], **({"k": 3, "steps": 1, "tokenizer": tiny_models.make_tokenizer()} | options)
        )
    assert all(slots_of(m) is None for m in model.modules())
