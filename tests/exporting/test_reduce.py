"""Reductions of adapters: every method, several at once, every kind of layer, against dense algebra in float64."""

import copy

import numpy as np
import pytest
import torch
from bases import Kinds
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.packed.few_bits import FewBits
from addenda.core.site.site import site_at
from addenda.exporting import reduce as module
from marks import differences, snapshot
from shared import NAMES, attach, relative, stir
from shared import sites as sites_of

every_weight_method = pytest.mark.parametrize("name", NAMES)


def change(model: nn.Module, adapter: ad.Adapter, path: str) -> torch.Tensor:
    """ΔW of a site of one adapter in float64, as the method's own definition says."""
    site, tensors = site_at(model, path), dict(adapter.sites())[path]
    p = {k: t.detach().double() if t.is_floating_point() else t for k, t in tensors.tensors().items()}
    return tensors.method.delta(site.matrix.double(), p)


def lost(made: torch.Tensor, D: torch.Tensor) -> float:
    return float((made - D).norm() / D.norm())


@every_weight_method
def test_any_method_becomes_a_lora_that_acts_as_it(name, tiny, ids):
    adapter = stir(attach(tiny.eval(), name, ids, targets="linear"), 0.2)
    with torch.no_grad():
        live = tiny(ids)
    report = ad.reduce(adapter, probe=ids)
    assert [s.path for s in report.sites] == list(adapter.methods)
    for s in report.sites:
        D, made = (change(tiny, a, s.path) for a in (adapter, report.adapter))
        assert lost(made, D) < 2e-6 and s.error < 1e-6 and s.size == pytest.approx(float(D.norm()), rel=1e-6)
    ad.switch(tiny, "reduced")
    with torch.no_grad():
        assert relative(tiny(ids), live) < 1e-5
    assert report.outputs is not None and report.outputs.relative < 1e-4 and report.outputs.moved > 1e-3


@every_weight_method
def test_a_given_rank_loses_the_tail_of_the_singular_values(name, tiny, ids):
    adapter = stir(attach(tiny.eval(), name, ids, targets="linear"), 0.2)
    for s in ad.reduce(adapter, rank=2).sites:
        D = change(tiny, adapter, s.path)
        values = np.linalg.svd(D.numpy(), compute_uv=False) ** 2
        tail = float(values[2:].sum() / values.sum())
        assert s.error == pytest.approx(tail**0.5, rel=1e-5, abs=1e-6) and s.energy == pytest.approx(1 - tail, abs=1e-9)


def test_each_form_is_its_reduction_of_the_sum(tiny, ids):
    tiny.eval()
    one = stir(attach(tiny, "lora", ids, targets="linear", name="one"), 0.2)
    two = stir(attach(tiny, "oft", ids, targets=["q_proj", "up_proj"], name="two"), 0.2, seed=4)
    ad.switch(tiny, ["one", "two"])
    with torch.no_grad():
        live = tiny(ids)
    path = "layers.1.up_proj"
    D = change(tiny, one, path) + change(tiny, two, path)
    options = {
        "lora": {"rank": 3}, "sparse": {"density": 0.25}, "bits": {"bits": 4}, "patch": {},
    }  # fmt: skip
    for to, given in options.items():
        report = ad.reduce([one, two], to, name=to, probe=ids, **given)
        assert list(ad.adapters(tiny)) == ["one", "two", *list(options)[: list(options).index(to) + 1]]
        row = next(s for s in report.sites if s.path == path)
        made = change(tiny, report.adapter, path)
        assert row.error == pytest.approx(lost(made, D), rel=1e-5, abs=1e-7), to
        assert len(report.sites) == len(one.methods) and report.to == to
        ad.switch(tiny, to)
        with torch.no_grad():
            moved = tiny(ids)
        assert report.outputs is not None
        ad.switch(tiny, None)
        with torch.no_grad():
            base = tiny(ids)
        assert report.outputs.relative == pytest.approx(relative(moved - base, live - base) and float(
            (moved - live).double().norm() / (live - base).double().norm()), rel=1e-3, abs=1e-6)  # fmt: skip
    sparse = dict(ad.adapters(tiny)["sparse"].sites())[path]
    assert sparse.method == ad.SHiRA(mask="given", count=32)
    kept = D.abs().flatten().topk(32).indices.sort().values
    assert torch.equal(sparse.tensors()["index"].long(), kept)
    assert isinstance(dict(ad.adapters(tiny)["bits"].sites())[path].change, FewBits)
    exact = ad.reduce([one, two], name="again", energy=1.0, probe=ids)
    assert exact.error < 1e-6 and exact.outputs is not None and exact.outputs.relative < 1e-4


def test_energy_is_kept_at_every_site(tiny, ids):
    adapter = stir(attach(tiny, "loha", ids, targets="linear"), 0.3)
    report = ad.reduce(adapter, energy=0.8)
    for s in report.sites:
        values = np.linalg.svd(change(tiny, adapter, s.path).numpy(), compute_uv=False) ** 2
        wanted = int(np.searchsorted(np.cumsum(values) / values.sum(), 0.8) + 1)
        assert s.form == f"rank {wanted}" and s.energy >= 0.8


@pytest.mark.parametrize("to", ["lora", "sparse", "bits", "patch"])
def test_every_kind_of_layer(to, tmp_path):
    torch.manual_seed(0)
    model = Kinds().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    ids = torch.arange(12).reshape(2, 6) % 16
    paths = ["embed", "linear", "conv1d", "line", "plane", "volume", "matrix", "experts"]
    adapter = stir(ad.attach(model, "boft:block=2,levels=2", targets=paths), 0.2)
    given = {"lora": {}, "sparse": {"density": 1.0}, "bits": {"bits": 8}, "patch": {}}[to]
    with torch.no_grad():
        live = model(ids)
    report = ad.reduce(adapter, to, probe=ids, **given)
    assert sorted(s.path for s in report.sites) == sorted(paths) and report.outputs is not None
    assert report.error < (0.1 if to == "bits" else 1e-6)
    assert report.outputs.relative < (0.1 if to == "bits" else 1e-5)
    file = report.adapter.save(tmp_path / "a.safetensors")
    ad.detach(model)
    with torch.no_grad():
        assert relative(model(ids), live) > 1e-2
        ad.load(model, file)
        assert relative(model(ids), live) < (0.1 if to == "bits" else 1e-5)


def test_matrices_of_a_stack_that_differ_in_other_numbers_of_entries():
    model = nn.Module()
    model.experts = nn.Parameter(torch.ones(3, 4, 5))
    adapter = ad.attach(model, "dense-delta", targets="experts")
    (moved,) = adapter.parameters()
    with torch.no_grad():
        moved[0, 1, 2], moved[2, :, 0] = 0.5, 1.0  # 1, 0 and 4 entries
    report = ad.reduce(adapter, "patch")
    tensors = dict(report.adapter.sites())["experts"]
    assert tensors.method.count == 4 and tensors.values.shape == (3, 4)
    ad.switch(model, "reduced")
    assert torch.equal(model.experts, torch.ones(3, 4, 5) + moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patch_is_what_merging_writes_bit_for_bit(dtype, tiny, ids, tmp_path):
    tiny.eval().to(dtype)
    adapter = stir(attach(tiny, "lora", ids, targets="linear", also_train=["score"]), 0.02)
    merged = copy.deepcopy(tiny)
    ad.merge(merged, allow_loss=1.0)
    report = ad.reduce(adapter, "patch")
    if dtype == torch.bfloat16:  # most of so small a change is less than half a step
        assert (
            report.bytes[0] < 6 * sum(site.weight.numel() for site in sites_of(tiny, adapter)) and report.error > 0.01
        )
    file = report.adapter.save(tmp_path / "patch.safetensors")
    ad.detach(tiny)
    ad.load(tiny, file)
    with torch.no_grad():
        assert torch.equal(tiny(ids), merged(ids))
    ad.merge(tiny)
    ad.detach(tiny, keep_merged=True)
    ad.detach(merged, keep_merged=True)
    for (n, p), (_, q) in zip(tiny.named_parameters(), merged.named_parameters(), strict=True):
        assert torch.equal(p, q), n


def test_a_tied_embedding_stays_one(llama, tmp_path):
    tied = toys.make_llama(tie_word_embeddings=True).eval()
    batch = {"input_ids": torch.arange(8).reshape(1, 8)}
    adapter = stir(ad.attach(tied, "boft:block=2,levels=2", targets=["model.embed_tokens.weight", "q_proj"]), 0.2)
    with torch.no_grad():
        live = tied(**batch).logits
    report = ad.reduce(adapter, probe=batch)
    assert report.outputs is not None and report.outputs.relative < 1e-4 and report.outputs.top1 == 1
    file = report.adapter.save(tmp_path / "a.safetensors")
    ad.detach(tied)
    ad.load(tied, file)
    with torch.no_grad():
        assert relative(tied(**batch).logits, live) < 1e-5
    ad.detach(tied)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_heads_and_vectors_come_along_as_copies(tiny, ids):
    tiny.eval()
    adapter = stir(
        ad.attach(tiny, "lora:rank=2", targets="q_proj", also_train=["score"]), 0.3,
    )  # fmt: skip
    norms = stir(ad.attach(tiny, "ln-tuning", name="norms"), 0.3)
    ad.switch(tiny, ["default", "norms"])
    with torch.no_grad():
        live = tiny(ids)
    report = ad.reduce([adapter, norms], rank=2, probe=ids)
    assert set(report.copies) == {"score.weight", "score.bias", *norms.methods} and len(report.sites) == 2
    ad.switch(tiny, "reduced")
    with torch.no_grad():
        torch.testing.assert_close(tiny(ids), live, rtol=1e-5, atol=1e-6)
    assert "as whole copies: " in str(report)


def test_weighed_by_inputs_the_outputs_lose_less(llama):
    llama.eval()
    g = torch.Generator().manual_seed(1)
    batches = [
        {"input_ids": torch.randint(0, 20, (4, 12), generator=g), "attention_mask": torch.ones(4, 12).long()}
        for _ in range(4)
    ]
    adapter = stir(attach(llama, "loha", targets="linear"), 0.3)
    seen, site = [], llama.model.layers[1].mlp.down_proj
    handle = site.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().double().flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            llama(**batch)
    handle.remove()
    X, D = torch.cat(seen), change(llama, adapter, "model.layers.1.mlp.down_proj")
    tail = np.linalg.svd((X @ D.T).numpy(), compute_uv=False) ** 2
    plain = ad.reduce(adapter, rank=2, name="plain", probe=batches[0])
    weighed = ad.reduce(adapter, rank=2, name="weighed", weigh=batches, probe=batches[0])
    row = next(s for s in weighed.sites if s.path.endswith("1.mlp.down_proj"))
    assert row.weighed and 1 - row.energy == pytest.approx(float(tail[2:].sum() / tail.sum()), rel=1e-5)
    assert plain.outputs is not None and weighed.outputs is not None
    assert weighed.error >= plain.error and weighed.outputs.relative < plain.outputs.relative
    sparse = ad.reduce(adapter, "sparse", density=0.1, name="sparse", weigh=batches)
    assert all(s.weighed for s in sparse.sites)
    assert "* of the outputs' energy" in str(weighed) and "*" not in str(plain)


def test_batches_of_any_form_weigh_and_what_has_no_inputs_is_not_weighed(tiny, ids):
    adapter = stir(attach(tiny, "boft", ids, targets=["embed", "q_proj", "up_proj"]), 0.3)
    report = ad.reduce(adapter, rank=2, weigh=[ids, ids.flip(0)])
    assert {s.path: s.weighed for s in report.sites} == {p: p != "embed" for p in adapter.methods}
    assert ad.adapters(tiny).keys() == {"default", "reduced"}
    stacked = ad.reduce(adapter, rank=2, name="stacked", weigh=torch.stack([ids, ids.flip(0)]))
    assert [s.energy for s in stacked.sites] == [s.energy for s in report.sites]


def test_sites_without_a_change_are_left_out(tiny, ids):
    adapter = attach(tiny, "lora", ids, targets=["q_proj", "up_proj"])
    with pytest.raises(AddendaError, match=r"changes no matrix .*was it trained"):
        ad.reduce(adapter, rank=1)
    assert list(ad.adapters(tiny)) == ["default"]
    tensors = dict(adapter.sites())["layers.0.up_proj"]
    nn.init.normal_(tensors.B)
    report = ad.reduce(adapter, rank=1)
    assert [s.path for s in report.sites] == ["layers.0.up_proj"] and len(report.unchanged) == 3
    assert "unchanged, and left out: layers.0.self_attn.q_proj" in str(report)


def test_a_reduced_adapter_trains_and_is_idle_until_it_is_switched_to(tiny, ids):
    adapter = stir(attach(tiny, "loha", ids, targets="linear"), 0.2)
    before = tiny(ids)
    for to, given in (("lora", {"rank": 2}), ("sparse", {"count": 5}), ("patch", {})):
        reduced = ad.reduce(adapter, to, name=to, **given).adapter
        assert torch.equal(tiny(ids), before) and not any(p.requires_grad for p in reduced.parameters())
        ad.switch(tiny, to)
        reduced.requires_grad_()
        tiny(ids).square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in reduced.parameters()), to
        ad.switch(tiny, "default")


def test_an_adapter_in_training_mode_with_a_schedule_is_reduced_as_it_acts_outside(tiny, ids):
    adapter = stir(ad.attach(tiny.train(), "mosl:rank=4,parts=2", targets="linear"), 0.3)
    report = ad.reduce(adapter, probe=ids)
    assert tiny.training and report.outputs is not None and report.outputs.relative < 1e-5
    tiny.eval()
    with torch.no_grad():
        live = tiny(ids)
        ad.switch(tiny, "reduced")
        assert relative(tiny(ids), live) < 1e-5


BAD = {
    "form": (lambda a: ad.reduce(a, "sparce", density=0.1), "no form 'sparce'.*Did you mean 'sparse'"),
    "unread": (lambda a: ad.reduce(a, "lora", density=0.1), "density= is not read with to='lora'"),
    "unread patch": (lambda a: ad.reduce(a, "patch", rank=1), "reads no option"),
    "both": (lambda a: ad.reduce(a, rank=1, energy=0.5), "not both"),
    "neither": (lambda a: ad.reduce(a, "sparse"), "density= or count="),
    "rank": (lambda a: ad.reduce(a, rank=0), "rank must be"),
    "energy": (lambda a: ad.reduce(a, energy=1.5), "energy must be"),
    "bits": (lambda a: ad.reduce(a, "bits", bits=9), "bits must be"),
    "option": (lambda a: ad.reduce(a, rnak=1), "no option 'rnak'"),
    "none": (lambda a: ad.reduce([], rank=1), "Expected an adapter"),
    "a model": (lambda a: ad.reduce([a, a.model], rank=1), "Expected an adapter"),
    "twice": (lambda a: ad.reduce([a, a], rank=1), "named twice"),
    "name": (lambda a: ad.reduce(a, rank=1, name="default"), "default"),
    "no batch": (lambda a: ad.reduce(a, rank=1, weigh=[]), "holds no batch"),
    "a number for batches": (lambda a: ad.reduce(a, rank=1, weigh=3), "list of batches.*got a int"),
    "one batch": (lambda a: ad.reduce(a, rank=1, weigh={"x": torch.ones(2, 3)}), r"list of batches.*Give \[batch\]"),
    "a text for batches": (lambda a: ad.reduce(a, rank=1, weigh="some words"), "list of batches.*got a str"),
    "batch": (lambda a: ad.reduce(a, rank=1, weigh=[torch.ones(2, 3)]), "does not run"),
    "probe": (lambda a: ad.reduce(a, rank=1, probe=torch.ones(2, 3)), "does not run"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_refused_and_leaves_the_model_as_it_was(what, tiny, ids):
    adapter = stir(attach(tiny, "lora", ids, targets="linear"), 0.2)
    call, says = BAD[what]
    before = snapshot(tiny)
    with pytest.raises(AddendaError, match=says):
        call(adapter)
    assert not differences(before, snapshot(tiny))


def test_hidden_methods_other_models_and_merged_changes_are_refused(tiny, ids):
    hidden = stir(attach(tiny, "pfeiffer", ids, name="hidden"))
    with pytest.raises(AddendaError, match=r"'hidden' has pfeiffer at 2 places"):
        ad.reduce(hidden, rank=1)
    ad.detach(tiny)
    adapter, other = stir(attach(tiny, "lora", ids, targets="linear"), 0.2), toys.Tiny()
    theirs = stir(attach(other, "lora", ids, targets="linear", name="theirs"), 0.2)
    with pytest.raises(AddendaError, match=r"'default' \+ 'theirs' are adapters of 2 models"):
        ad.reduce([adapter, theirs], rank=1)
    ad.merge(tiny)
    with pytest.raises(AddendaError, match="merged into the base"):
        ad.reduce(adapter, rank=1)


def test_a_change_that_is_not_finite_is_named(tiny, ids):
    adapter = stir(attach(tiny, "lora", ids, targets="linear"), 0.2)
    with torch.no_grad():
        dict(adapter.sites())["layers.1.up_proj"].B[0, 0] = float("nan")
    for to, given in (("lora", {"rank": 1}), ("sparse", {"count": 2}), ("bits", {})):
        with pytest.raises(AddendaError, match=r"layers.1.up_proj: .*not finite.*Nothing was attached"):
            ad.reduce(adapter, to, **given)
    assert list(ad.adapters(tiny)) == ["default"]


def test_a_patch_of_packed_weights_is_refused_and_other_forms_are_not(tiny, ids):
    ad.quantize(tiny, "int8")
    adapter = stir(attach(tiny, "lora", ids, targets="q_proj"), 0.2)
    with pytest.raises(AddendaError, match="kept in few bits"):
        ad.reduce(adapter, "patch")
    assert ad.reduce(adapter, "sparse", count=3).sites[0].form == "3 entries"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_of_a_reduction_that_breaks_off(error, tiny, ids, monkeypatch):
    adapter = stir(attach(tiny, "lora", ids, targets="linear"), 0.2)
    before = snapshot(tiny)

    def broken(*_):
        raise error

    for place in ("_output_error", "form_of", "input_moments"):
        with monkeypatch.context() as patched:
            patched.setattr(module, place, broken)
            with pytest.raises(error):
                ad.reduce(adapter, rank=1, probe=ids, weigh=[ids])
        assert not [d for d in differences(before, snapshot(tiny)) if "hooks" not in d], place  # taken off and put on


def test_labels_come_along(llama):
    from tiny_models import make_llama_classifier

    model = make_llama_classifier()
    adapter = stir(ad.attach(model, "lora:rank=2", targets="q_proj", also_train=["score"]), 0.2)
    adapter.labels = [f"class {i}" for i in range(model.config.num_labels)]
    assert ad.reduce(adapter, rank=1).adapter.labels == adapter.labels


@pytest.mark.parametrize("given", [None, "default", 3, {"default": None}])
def test_what_is_no_adapter_is_not_reduced(given, tiny):
    attach(tiny, "lora")
    with pytest.raises(AddendaError, match=r"Expected an adapter of addenda.*adapters\(model\)\[name\]"):
        ad.reduce(given)
