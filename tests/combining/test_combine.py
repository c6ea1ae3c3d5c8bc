"""`combine` on models: against dense sums, over kinds of layer and methods, files, heads, and bad input."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import addenda as ad
import toys
from addenda.combining.combine import combine
from addenda.core.forward.slots import slots_of
from addenda.core.modules.borrow import training_mode
from addenda.exporting.deltas import changed_sites, delta
from shared import NAMES, attach, bits, same_bits, stir

LORA = "lora:rank=2,alpha=4"
EXACT = ("linear", "task-arithmetic", "cat", "svd")


def changes(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Every ΔW of an adapter by path, dense, in float64."""
    with training_mode(model, False):
        return {s.path: delta(s, t) for s, t in changed_sites(ad.adapters(model)[name])}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative distance of a site."""
    assert a.keys() == b.keys()
    return max(float((a[p] - b[p]).norm() / b[p].norm()) for p in b)


def put(model: nn.Module, method: str = LORA, names: str = "ab", targets="linear", size: float = 0.3) -> nn.Module:
    for n in names:
        stir(ad.attach(model, method, targets=targets, name=n, seed=ord(n)), size, ord(n))
    return model


@pytest.mark.parametrize("how", EXACT)
def test_alone_halves_and_both(how):
    model = put(toys.Tiny())
    twin = ad.attach(model, LORA, targets="linear", name="twin")
    twin.load_state_dict(ad.adapters(model)["a"].state_dict())
    a, b = changes(model, "a"), changes(model, "b")
    lossless = {"rank": 4} if how == "svd" else {}
    alone = combine(["a"], model=model, how=how, weights=[1.0], name="alone", **lossless)
    assert apart(changes(model, "alone"), a) < 1e-6 and alone.error < 1e-6
    halves = combine(["a", "twin"], model=model, how=how, weights=[0.5, 0.5], name="halves", **lossless)
    assert apart(changes(model, "halves"), a) < 1e-6 and halves.error < 1e-6
    combine([ad.adapters(model)["a"], "b"], how=how, weights={"a": 1.0, "b": -0.5}, name="sum", **lossless)
    assert apart(changes(model, "sum"), {p: a[p] - 0.5 * b[p] for p in a}) < 1e-6
    ranks = {m.rank for m in ad.adapters(model)["halves"].methods.values()}
    assert ranks == ({4} if how == "cat" else {2}), "but for cat, what is there twice is held once"


def test_the_result_is_idle_acts_as_both_together_and_is_a_file_like_any(tmp_path):
    model = put(toys.Tiny())
    ids = torch.arange(12).reshape(2, 6)
    ad.switch(model, "a")
    before = model(ids)
    report = combine(["a", "b"], model=model)
    assert torch.equal(model(ids), before) and not any(p.requires_grad for p in report.adapter.parameters())
    ad.switch(model, ["a", "b"])
    both = model(ids)
    ad.switch(model, "combined")
    torch.testing.assert_close(model(ids), both)
    assert not torch.allclose(both, before, atol=1e-3)
    file = report.adapter.save(tmp_path / "c.safetensors")
    ad.detach(model)
    ad.load(model, file)
    torch.testing.assert_close(model(ids), both)


def test_linear_is_the_mean_of_changes_and_not_of_factors():
    model = put(toys.Tiny())
    combine(["a", "b"], model=model, how="linear")
    a, b = changes(model, "a"), changes(model, "b")
    assert apart(changes(model, "combined"), {p: (a[p] + b[p]) / 2 for p in a}) < 1e-6


def test_svd_is_the_nearest_of_the_rank_and_reports_the_tail():
    model = put(toys.Tiny())
    report = combine(["a", "b"], model=model, how="svd", rank=3)
    a, b, found = changes(model, "a"), changes(model, "b"), changes(model, "combined")
    for site in report.sites:
        S = torch.linalg.svdvals(a[site.path] + b[site.path])
        tail = float(S[3:].norm() / S.norm())
        assert site.error == pytest.approx(tail, rel=1e-4) and site.form == "rank 3"
        assert float((found[site.path] - a[site.path] - b[site.path]).norm() / S.norm()) == pytest.approx(
            tail, rel=1e-4
        )
    assert combine(["a", "b"], model=model, how="svd", energy=0.999, name="most").error < 0.032
    assert {s.form for s in combine(["a", "b"], model=model, how="svd", name="as-before").sites} == {"rank 2"}


@pytest.mark.parametrize("how", ["tsv", "iso-c"])
def test_a_rule_that_turns_is_in_core_space_what_it_is_on_the_weights(how):
    model = put(toys.Tiny())
    combine(["a", "b"], model=model, how=how, name="low")
    combine(["a", "b"], model=model, how="core-space", rule=how, name="core")
    combine(["a", "b"], model=model, how="knots", rule="task-arithmetic", name="knots")
    a, b = changes(model, "a"), changes(model, "b")
    from addenda.combining.rules import RULES, Settings
    from addenda.core.base.random import Stream

    dense = {p: RULES[how]([a[p], b[p]], [1.0, 1.0], Settings(), Stream(0)) for p in a}
    assert apart(changes(model, "low"), dense) < 1e-6 and apart(changes(model, "core"), dense) < 1e-6
    assert apart(changes(model, "knots"), {p: a[p] + b[p] for p in a}) < 1e-6


@pytest.mark.parametrize("how", ["ties", "magnitude", "dare", "della"])
def test_a_rule_on_entries_is_held_exactly_as_copies_or_entries_and_cut_else(how):
    model = put(toys.Tiny())
    found = {}
    for form in ("dense", "sparse", "low-rank"):
        report = combine(["a", "b"], model=model, how=how, density=0.5, form=form, name=form)
        found[form] = changes(model, form)
        lost = max(s.lost for s in report.sites)
        assert lost > 1e-3 if form == "low-rank" else lost < 1e-5
    assert apart(found["dense"], found["sparse"]) < 1e-5
    U, S, Vt = torch.linalg.svd(found["sparse"][path := "layers.0.up_proj"])
    best = U[:, :4] * S[:4] @ Vt[:4]
    torch.testing.assert_close(found["low-rank"][path], best, rtol=1e-4, atol=1e-6)
    other = combine(["a", "b"], model=model, how="core-space", rule=how, density=0.5, name="core")
    assert apart(changes(model, "core"), found["sparse"]) > 0.05, "in Core Space it is another rule"
    assert max(s.lost for s in other.sites) < 1e-6


def test_dare_draws_by_seed_and_site():
    model = put(toys.Tiny())
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        combine(["a", "b"], model=model, how="dare", seed=seed, form="sparse", name=name)
    x, y, z = (changes(model, n) for n in "xyz")
    assert all(torch.equal(x[p], y[p]) for p in x) and apart(x, z) > 0.1
    one, two = (x[p] != 0 for p in ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"))
    assert not torch.equal(one, two)


QUICK = ("dora", "vera", "oft", "loha", "shira", "ia3", "pissa", "full", "dylora")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_methods_of_every_family_come_to_their_weighted_sum(name):
    model = toys.Tiny()
    ids = torch.arange(12).reshape(2, 6)
    for n in "ab":
        stir(attach(model, name, ids, targets=["up_proj", "down_proj"], name=n, seed=ord(n)), 0.2, ord(n))
    a, b = changes(model, "a"), changes(model, "b")
    want = {p: 0.75 * a[p] + 0.25 * b[p] for p in a}
    report = combine(["a", "b"], model=model, how="linear", weights=[0.75, 0.25], rank=8, name="thin")
    assert apart(changes(model, "thin"), want) < 1e-5 and report.error < 1e-5
    whole = combine(["a", "b"], model=model, how="linear", weights=[0.75, 0.25], form="dense", name="whole")
    assert apart(changes(model, "whole"), want) < 1e-5 and {s.form for s in whole.sites} == {"copy"}


def test_sparse_union_is_exact_and_small():
    model = put(toys.Tiny(), "shira:density=0.1,mask=random")
    report = combine(["a", "b"], model=model, how="sparse-union", weights=[1.0, 2.0])
    a, b, found = changes(model, "a"), changes(model, "b"), changes(model, "combined")
    for site in report.sites:
        union = (a[site.path] != 0) | (b[site.path] != 0)
        assert site.numbers == int(union.sum()) and not bool(found[site.path][~union].any())
    assert apart(found, {p: a[p] + 2 * b[p] for p in a}) < 1e-6


def test_convolutions_embeddings_stacks_and_transposed_weights():
    experts = ["*experts.gate_up_proj", "*experts.down_proj"]
    models = (toys.TinyConv(), "conv"), (toys.Tiny(), "embed"), (toys.make_gpt2(), "linear")
    for model, targets in (*models, (toys.make_mixtral(), experts)):
        put(model, "lora:rank=2,alpha=4", targets=targets)
        a, b = changes(model, "a"), changes(model, "b")
        for how in ("cat", "tsv", "ties"):
            combine(["a", "b"], model=model, how=how, name=how)
        assert apart(changes(model, "cat"), {p: a[p] + b[p] for p in a}) < 1e-6
        assert all(bool(d.isfinite().all()) and bool(d.any()) for d in changes(model, "tsv").values())
        combine(["a", "b"], model=model, how="ties", form="sparse", name="sparse")
        assert apart(changes(model, "ties"), changes(model, "sparse")) < 1


def test_vectors_are_summed_by_every_rule_and_held_as_copies():
    model = toys.Tiny()
    for n in "ab":
        stir(ad.attach(model, "ln-tuning", targets=["*norm.weight"], name=n), 0.3, ord(n))
    a, b = changes(model, "a"), changes(model, "b")
    report = combine(["a", "b"], model=model, how="tsv")
    assert apart(changes(model, "combined"), {p: a[p] + b[p] for p in a}) < 1e-5
    assert {s.form for s in report.sites} == {"copy"}


def files(tmp_path: Path, **options) -> tuple[nn.Module, list[Path]]:
    model = put(toys.Tiny(), **options)
    saved = [ad.adapters(model)[n].save(tmp_path / f"{n}.safetensors") for n in "ab"]
    ad.detach(model)
    return model, saved


def test_files_are_on_the_model_for_the_time_of_the_call_only(tmp_path):
    model, saved = files(tmp_path)
    base = bits(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    report = combine(saved, model=model, how="linear", weights={"a": 2.0, "b": 1.0})
    assert list(ad.adapters(model)) == ["combined"] and report.weights == {"a": 2.0, "b": 1.0}
    found = changes(model, "combined")
    ad.detach(model)
    assert same_bits(bits(model), base) and {n: p.requires_grad for n, p in model.named_parameters()} == flags
    ad.load(model, saved[0], name="a")
    ad.load(model, saved[1], name="b")
    a, b = changes(model, "a"), changes(model, "b")
    assert apart(found, {p: 2 * a[p] + b[p] for p in a}) < 1e-6


def test_files_of_one_base_in_two_dtypes(tmp_path):
    model, saved = files(tmp_path)
    half = toys.Tiny().bfloat16()
    half.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})
    put(half, names="c")
    saved.append(ad.adapters(half)["c"].save(tmp_path / "c.safetensors"))
    with pytest.raises(ad.AddendaError, match="other base weights"):
        combine(saved, model=model)
    combine(saved, model=model, base="compatible")
    assert {m.rank for m in ad.adapters(model)["combined"].methods.values()} == {6}


def test_sites_that_differ_are_named_or_count_as_zero():
    model = toys.Tiny()
    put(model, names="a", targets=["*q_proj", "*v_proj"])
    put(model, names="b", targets=["*q_proj", "*up_proj"])
    with pytest.raises(ad.AddendaError, match=r"'a' has nothing at layers\.\*\.up_proj.*'b' has nothing at .*v_proj"):
        combine(["a", "b"], model=model)
    combine(["a", "b"], model=model, absent="zero", weights=[1.0, 3.0])
    a, b, found = changes(model, "a"), changes(model, "b"), changes(model, "combined")
    want = {p: a.get(p, 0) + 3 * b.get(p, 0) for p in found}
    assert apart(found, want) < 1e-6 and len(found) == 6
    combine(["a", "b"], model=model, absent="zero", how="tsv", name="tsv")


def test_heads_are_one_adapters_or_an_error(tmp_path):
    model = toys.Tiny()
    for n in "ab":
        stir(ad.attach(model, LORA, targets="linear", also_train=["score"], name=n), 0.3, ord(n))
    with pytest.raises(ad.AddendaError, match="heads_of='a'"):
        combine(["a", "b"], model=model)
    with pytest.raises(ad.AddendaError, match="heads_of='c' has no heads"):
        combine(["a", "b"], model=model, heads_of="c")
    combine(["a", "b"], model=model, heads_of="b")
    ids = torch.arange(6)[None]
    ad.switch(model, "b")
    head = model.score.weight if slots_of(model.score) is None else None
    ad.switch(model, "combined")
    made = dict(ad.adapters(model)["combined"].sites())
    theirs = dict(ad.adapters(model)["b"].sites())
    heads = [p for p in made if p.startswith("score")]
    assert head is None and heads and all(torch.equal(made[p].value, theirs[p].value) for p in heads)
    assert model(ids).isfinite().all()


BAD = {
    "weights of another count": ({"weights": [1.0]}, "2 adapters want 2 weights"),
    "weights that are none": ({"weights": [float("nan"), 1.0]}, "finite"),
    "weights of nothing": ({"weights": [0.0, 0.0]}, "not 0"),
    "a scale of nothing": ({"scale": 0.0}, "scale=0"),
    "weights by other names": ({"weights": {"a": 1, "c": 1}}, "other adapters"),
    "density of zero": ({"how": "ties", "density": 0.0}, "density must be"),
    "density above one": ({"how": "ties", "density": 1.5}, "density must be"),
    "a density that is not read": ({"density": 0.5}, "does not read density="),
    "a rank that is not read": ({"rank": 2}, "does not read rank="),
    "a seed that is not read": ({"seed": 2}, "does not read seed="),
    "rank and energy": ({"how": "svd", "rank": 2, "energy": 0.5}, "not both"),
    "an unknown how": ({"how": "tie"}, "Did you mean 'ties'|ties"),
    "an unknown rule": ({"how": "knots", "rule": "tiess"}, "no rule 'tiess'"),
    "a rule without a space": ({"how": "ties", "rule": "ties"}, "common subspace"),
    "a wide window": ({"how": "della", "density": 0.5, "window": 1.0}, "window=1"),
    "a taken name": ({"name": "a"}, "attached already"),
    "no sparse method": ({"how": "sparse-union"}, "single entries"),
    "an unknown form": ({"form": "thin"}, "form='thin'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_and_the_model_is_as_it_was(case):
    options, message = BAD[case]
    model = put(toys.Tiny())
    before = ad.status(model)
    with pytest.raises(ad.AddendaError, match=message):
        combine(["a", "b"], model=model, **options)
    assert ad.status(model) == before


def test_bad_adapters_are_refused(tmp_path, monkeypatch):
    model, saved = files(tmp_path)
    with pytest.raises(ad.AddendaError, match="Give model="):
        combine(saved)
    with pytest.raises(ad.AddendaError, match="twice"):
        combine([saved[0], saved[0]], model=model)
    with pytest.raises(ad.AddendaError, match="no attached adapter and no file"):
        combine(["x"], model=model)
    with pytest.raises(ad.AddendaError, match="no file"):
        combine([tmp_path / "x.safetensors"], model=model)
    with pytest.raises(ad.AddendaError, match="list of adapters"):
        combine([], model=model)
    torch.manual_seed(9)
    other = put(toys.Tiny(), names="c")
    foreign = ad.adapters(other)["c"].save(tmp_path / "c.safetensors")
    with pytest.raises(ad.AddendaError, match="trained on other base weights"):
        combine([saved[0], foreign], model=model)
    with pytest.raises(ad.AddendaError, match="trained on other base weights"):
        combine([foreign], model=model)
    put(model, names="d")
    with pytest.raises(ad.AddendaError, match="different models"):
        combine([ad.adapters(other)["c"], ad.adapters(model)["d"]])
    hidden = stir(attach(model, "pfeiffer", name="h"), 0.1).save(tmp_path / "h.safetensors")
    with pytest.raises(ad.AddendaError, match=r"pfeiffer.*Average"):
        combine(["d", "h"], model=model)
    ad.detach(model)
    with pytest.raises(ad.AddendaError, match="pfeiffer"):
        combine([hidden], model=model)
    assert not any(slots_of(m) for m in model.modules()), "nothing was put on the model"


def test_a_change_that_is_not_low_rank_wants_a_word_and_cat_wants_factors():
    model = put(toys.Tiny(), "oft:block=4")
    with pytest.raises(ad.AddendaError, match="rank= or energy="):
        combine(["a", "b"], model=model, how="linear")
    with pytest.raises(ad.AddendaError, match="side by side"):
        combine(["a", "b"], model=model)
    assert list(ad.adapters(model)) == ["a", "b"]
    assert combine(["a", "b"], model=model, how="linear", energy=0.9).error < 0.33


def test_what_is_interrupted_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model, saved = files(tmp_path)
    keys, before = list(model.state_dict()), hashlib.sha256(str(model).encode()).hexdigest()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("addenda.combining.combine.install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        combine(saved, model=model)
    assert list(model.state_dict()) == keys and hashlib.sha256(str(model).encode()).hexdigest() == before
    assert not any(slots_of(m) for m in model.modules())


def test_what_is_no_list_of_adapters_is_refused(tiny):
    attach(tiny, "lora", name="a")
    for given in (None, (name for name in "ab"), 3):
        with pytest.raises(ad.AddendaError, match="Give a list of adapters, names or files to combine"):
            combine(given, model=tiny)
