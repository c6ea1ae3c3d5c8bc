"""Sparse: the change is at the given positions and nowhere else, in every kind of weight, alone and beside another."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import addenda as ad
import toys
from addenda import AddendaError
from addenda.core.forward.slots import slots_of
from addenda.core.merge.write import rounded_to
from addenda.core.modules.rows import changed_rows
from addenda.core.site.site import site_at
from addenda.core.site.targets import resolve
from addenda.methods.sparse import Sparse
from shared import bits, relative, same_bits, stir

KINDS = {  # layer, input, positions
    "linear": (lambda: nn.Linear(6, 5), torch.randn(3, 6), [0, 7, 29]),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), [3, 50, 107]),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=2), torch.tensor([[0, 2, 2], [8, 0, 5]]), [1, 8, 9, 22, 35]),
}


def dense(site, positions, values):
    """W + ΔW by a loop over the positions, in float64."""
    total = site.weight.detach().double().clone()
    view = site.kind.to_matrix(total)
    for flat, value in zip(positions, values, strict=True):
        if view.dim() == 1:
            view[flat] += value
        else:
            view[flat // view.shape[1], flat % view.shape[1]] += value
    return total


@pytest.mark.parametrize("shape", [(12, 12), (15, 10)])
def test_reference(check, shape):
    at = check.make(Sparse(density=0.3), *shape)
    values, index = at.p["values"].detach(), at.p["index"].tolist()
    assert (
        len(index) == len(set(index)) == len(values) == at.method.trainable(*shape) == round(0.3 * shape[0] * shape[1])
    )
    want = torch.zeros(shape, dtype=torch.float64)
    for v, flat in zip(values, index, strict=True):
        want[flat // shape[1], flat % shape[1]] = v
    torch.testing.assert_close(at.delta.detach(), want, rtol=0, atol=0)
    check.forms_agree(at)
    G = check.upstream(at)[1]
    torch.testing.assert_close(check.gradients(at)["values"], G.flatten()[index], rtol=0, atol=0)


def test_start_and_counts(check):
    check.starts_exactly(Sparse(density=0.2))
    check.counts(Sparse())
    check.counts(Sparse(count=7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_two_live_changes_add_entry_by_entry(kind, dtype):
    make, x, positions = KINDS[kind]
    model = nn.ModuleDict({"layer": make()}).to(dtype)
    layer, x = model["layer"], x.to(dtype) if x.is_floating_point() else x
    one = stir(ad.attach(model, "sparse", positions={"layer": positions}, name="one"), 0.5)
    two = stir(ad.attach(model, "sparse", positions={"layer": positions[1:]}, name="two"), 0.5, seed=2)
    ad.switch(model, ["one", "two"])
    one.requires_grad_(False)
    site = site_at(model, "layer")
    (p,), (q,) = one.parameters(), two.parameters()
    total = dense(site, positions, p.tolist()) + dense(site, positions[1:], q.tolist()) - site.weight.double()
    W = rounded_to(total, dtype, "nearest", None).requires_grad_()
    want = {
        "linear": lambda: F.linear(x, W, layer.bias),
        "conv": lambda: F.conv2d(x, W, layer.bias, groups=2),
        "embedding": lambda: F.embedding(x, W, padding_idx=2),
    }[kind]()  # fmt: skip
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, want, **({} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-7}))
    g = torch.randn_like(want)
    y.backward(g)
    want.backward(g)
    G = site.kind.to_matrix(W.grad).flatten()[positions[1:]]
    torch.testing.assert_close(q.grad, G.float(), rtol=1e-5 if dtype != torch.bfloat16 else 3e-2, atol=1e-6)
    assert p.grad is None
    ad.merge(model, verify=None, allow_loss=1.0)
    torch.testing.assert_close(layer(x), want, **({} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-7}))


def test_vectors_and_transposed_weights(gpt2):
    ids = torch.arange(8).view(1, 8) % toys.VOCAB
    sites = [s.path for s in resolve(gpt2, ["re:.*h.0.*c_fc", "bias", "norm"])]
    positions = {p: [0, site_at(gpt2, p).weight.numel() - 1] for p in sites}
    plain = gpt2(ids).logits
    adapter = ad.attach(gpt2, "sparse", positions=positions)
    assert torch.equal(gpt2(ids).logits, plain), "exact start, transposed weights too"
    stir(adapter, 0.5)
    twin = copy.deepcopy(gpt2)
    ad.detach(twin)
    with torch.no_grad():
        for path, tensors in adapter.sites():
            site_at(twin, path).weight.copy_(dense(site_at(twin, path), positions[path], tensors.tensors()["values"]))
    assert relative(gpt2(ids).logits, twin(ids).logits) < 1e-6
    gpt2(ids).logits.square().mean().backward()
    for p in twin.parameters():
        p.requires_grad_()
    twin(ids).logits.square().mean().backward()
    for path, tensors in adapter.sites():
        site = site_at(twin, path)
        G = site.kind.to_matrix(site.weight.grad).flatten()[positions[path]]
        torch.testing.assert_close(tensors._parameters["values"].grad, G, rtol=1e-4, atol=1e-7)


def test_an_embedding_makes_nothing_as_large_as_its_table():
    rows, width = 20_000, 8
    table = nn.Embedding(rows, width)
    model = nn.ModuleDict({"layer": table})
    adapter = stir(ad.attach(model, "sparse:count=500", targets="layer"), 0.5)
    ids = torch.randint(0, rows, (4, 6))

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
            known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            new = [t.numel() for t in made if t.untyped_storage().data_ptr() not in known]
            Largest.size = max([Largest.size, *new])
            return out

    with Largest():
        model["layer"](ids).square().sum().backward()
    assert Largest.size <= 500, "neither a copy of the table nor a dense gradient"
    (values,) = adapter.parameters()
    touched = set(ids.flatten().tolist())
    ((_, tensors),) = adapter.sites()
    index = tensors.tensors()["index"]
    assert all((int(i) // width in touched) or not g for i, g in zip(index, values.grad, strict=True))


def test_rows_are_found_where_positions_are_few_many_or_none():
    rows, width = 7, 3
    W, ids = torch.randn(rows, width, dtype=torch.float64), torch.tensor([6, 0, 3, 3])
    for index in ([], [0], [20], list(range(21)), [2, 3, 9, 10, 11, 12]):
        values = torch.randn(len(index), dtype=torch.float64)
        whole = W.flatten().index_add(0, torch.tensor(index, dtype=torch.long), values).view(rows, width)
        for kind in (torch.int32, torch.int64):
            y = changed_rows(W[ids], ids, [(torch.tensor(index, dtype=kind), values)], None)
            assert torch.equal(y, whole[ids])


def test_tied_embeddings_are_one_site(llama):
    ids = torch.arange(8).view(1, 8)
    paths = [s.path for s in resolve(llama, "weights")]
    assert [p for p in paths if "embed" in p or "lm_head" in p] == ["model.embed_tokens.weight"]
    assert "model.layers.0.self_attn.q_proj" in paths
    before = bits(llama)
    adapter = stir(ad.attach(llama, "sparse", targets="weights"), 0.3)
    twin = copy.deepcopy(llama)
    ad.detach(twin)
    W = site_at(twin, "model.embed_tokens.weight").weight
    tensors = dict(adapter.sites())["model.embed_tokens.weight"].tensors()
    total = dense(site_at(twin, "model.embed_tokens.weight"), tensors["index"], tensors["values"])
    with torch.no_grad():
        W.copy_(total)
    want = twin.model.embed_tokens(ids)
    assert torch.equal(llama.model.embed_tokens(ids), want.to(W.dtype))
    ad.merge(llama, verify={"input_ids": ids})
    ad.unmerge(llama)
    assert same_bits(bits(llama), before)


def test_weights_are_every_parameter_once_layers_by_themselves(bert):
    sites = resolve(bert, "weights")
    assert sum(s.weight.numel() for s in sites) == sum(p.numel() for p in bert.parameters())
    kinds = {s.path: s.kind.name for s in sites}
    assert kinds["bert.embeddings.word_embeddings"] == "embedding"
    assert kinds["bert.encoder.layer.0.attention.self.query"] == "linear"
    assert kinds["bert.encoder.layer.0.attention.self.query.bias"] == "parameter"
    assert kinds["bert.embeddings.LayerNorm.weight"] == "parameter"


def test_a_total_is_dealt_out_by_size(tiny):
    adapter = ad.attach(tiny, "sparse:total=101", targets="linear")
    sizes = {path: site_at(tiny, path).weight.numel() for path in adapter.methods}
    counts = {path: t.tensors()["values"].numel() for path, t in adapter.sites()}
    assert sum(counts.values()) == adapter.trainable == 101
    assert all(abs(counts[p] - 101 * n / sum(sizes.values())) < 1 for p, n in sizes.items())
    assert ad.plan(copy.deepcopy(tiny), "sparse:total=101", targets="linear", exclude=()).trainable == 101
    ad.detach(tiny)
    few = ad.attach(tiny, "sparse:total=3", targets=["linear", "norm"])
    assert few.trainable == 3
    assert len(few.methods) == 3, "sites without an entry are left out"
    ad.detach(tiny)
    with pytest.raises(AddendaError, match="total=100,000 is above"):
        ad.attach(tiny, "sparse:total=100000", targets="linear")
    assert not slots_of(tiny.layers[0].up_proj)


def test_files_hold_the_positions(tiny, ids, tmp_path):
    positions = {"embed": [3, 200, 5], "layers.0.up_proj": torch.tensor([7, 1]), "layers.1.norm.weight": [2]}
    adapter = stir(ad.attach(tiny, "sparse", positions=positions), 0.5)
    held = {p: t.tensors()["index"].tolist() for p, t in adapter.sites()}
    assert held == {"embed": [3, 5, 200], "layers.0.up_proj": [1, 7], "layers.1.norm.weight": [2]}
    y, file = tiny(ids), adapter.save(tmp_path / "a.safetensors")
    ad.detach(tiny)
    ad.load(tiny, file)
    assert torch.equal(tiny(ids), y)


@pytest.mark.parametrize(
    ("positions", "told"),
    [
        ({"layers.0.up_proj": [1, 1]}, "position 1 is named twice"),
        ({"layers.0.up_proj": [128]}, "positions are from 0 to 127, got 128 to 128"),
        ({"layers.0.up_proj": [-1, 3]}, "got -1 to 3"),
        ({"layers.0.up_proj": []}, "there is no position; leave the site out"),
        ({"layers.0.up_proj": [0.5]}, "whole numbers in one row"),
        ({"layers.0.up_proj": [[1, 2]]}, r"got \[1, 2\] of int64"),
        ({"layers.0.up_proj": "abc"}, "expected flat positions"),
        ({"layers.0.up_porj": [1]}, "paths name no layer.*layers.0.up_proj"),
        ({}, "matches nothing|name"),
    ],
)
def test_positions_that_cannot_be(positions, told, tiny):
    with pytest.raises(AddendaError, match=told):
        ad.attach(tiny, "sparse", positions=positions)
    assert not any(slots_of(m) for m in tiny.modules())


def test_positions_and_targets_must_agree(tiny):
    with pytest.raises(AddendaError, match=r"layers\.0\.self_attn\.k_proj has no position"):
        ad.attach(tiny, "sparse", targets="*.k_proj", positions={"layers.1.self_attn.k_proj": [1]})
    with pytest.raises(AddendaError, match=r"embed is no site of it"):
        ad.attach(tiny, "sparse", targets="layers.1.up_proj", positions={"layers.1.up_proj": [1], "embed": [1]})
    with pytest.raises(AddendaError, match=r"positions= is for a method that takes positions as given.*lora does not"):
        ad.attach(tiny, "lora", positions={"layers.1.up_proj": [1]})
    with pytest.raises(AddendaError, match="count is of each site and total of all"):
        Sparse(count=1, total=2)


def test_a_file_with_positions_that_do_not_rise_is_refused(tiny, tmp_path):
    adapter = ad.attach(tiny, "sparse", positions={"embed": [3, 5, 200]})
    ((_, tensors),) = adapter.sites()
    tensors._buffers["index"] = torch.tensor([5, 5, 200], dtype=torch.int32)
    file = adapter.save(tmp_path / "a.safetensors")
    ad.detach(tiny)
    with pytest.raises(AddendaError, match="embed/index holds positions that do not rise"):
        ad.load(tiny, file)
