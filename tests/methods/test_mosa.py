"""MoSA against a true mixture of N whole copies, and against the plain adapters of its forms."""

import copy

import pytest
import torch
import torch.nn.functional as F

import addenda as ad
import toys
from addenda import AddendaError, optim
from addenda.core.method.catalogue import build
from addenda.exporting import mixture
from published import changed, same

FORMS = {
    "mosa": ("adaptformer", toys.make_vit),
    "mosa-pfeiffer": ("pfeiffer", toys.make_bert),
    "mosa-houlsby": ("houlsby", toys.make_gpt2),
    "mosl": ("lora", toys.make_bert),
}
every_form = pytest.mark.parametrize("name", FORMS)


def fed(model):
    ids = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB
    if "ViT" in type(model).__name__:
        side = model.config.image_size
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * side * side).reshape(2, 3, side, side)}
    return {"input_ids": ids}


def loss_of(model):
    return (model(**fed(model)).logits - 1).square().mean()


def trained(model, spec, steps=6, trained_by="auto", **options):
    adapter = ad.attach(model.train(), spec, seed=4, **options)
    optimizer = optim.build(adapter, trained_by, 2e-2, weight_decay=0.1)
    torch.manual_seed(9)  # of dropout
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()
    return adapter


def test_published_sum_with_one_module_of_a_true_mixture():
    """N copies of one adapter, of which each holds its own entries of U alone: module 2 acts."""
    model, (p, *_) = changed(toys.make_vit(), ad.MoSA(rank=4, parts=3, norm=True, activation="gelu"))
    adapter = ad.adapters(model)["default"]
    t = next(t for _, t in adapter.sites())
    copies = [p["up"].detach() * (t.tensors()["up_part"] == k) for k in (1, 2, 3)]
    torch.testing.assert_close(sum(copies), p["up"].detach())
    block = model.vit.layers[0]
    block.train()
    for m in block.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    t.draw({"up_drawn": torch.tensor(2)})

    def reference(h):
        h = h + block.attention(block.layernorm_before(h))[0]
        read = F.layer_norm(h, (8,), p["norm_weight"], p["norm_bias"])
        z = F.gelu(read @ p["down"].T + p["down_bias"])
        own = p["up"] * (t.tensors()["up_part"] == 2)  # its gradient is masked, as the copy's own
        return h + block.mlp(block.layernorm_after(h)) + 0.1 * (z @ own.T + p["up_bias"])

    same(model, block, reference, (p,), None)


@every_form
@pytest.mark.parametrize("share", ["down", "none"])
def test_with_one_part_it_is_the_plain_adapter_bit_for_bit(name, share):
    plain, make = FORMS[name]
    one, two = make(), make()
    two.load_state_dict(one.state_dict())
    a = trained(one, f"{name}:rank=4,parts=1,share={share},dropout=0.2", 4)
    b = trained(two, f"{plain}:rank=4,dropout=0.2", 4)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(t, b.state_dict()[k]) for k, t in a.state_dict().items())
    one.eval(), two.eval()
    assert torch.equal(one(**fed(one)).logits, two(**fed(two)).logits)


@every_form
def test_the_start_of_what_is_shared_is_the_plain_adapters(name):
    plain, make = FORMS[name]
    model = make()
    one = ad.attach(model, f"{name}:rank=4", seed=4).state_dict()
    two = ad.attach(model, f"{plain}:rank=4", seed=4, name="plain").state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(t, two[k]) for k, t in one.items())


@every_form
@pytest.mark.parametrize("share", ["down", "up", "none"])
@pytest.mark.parametrize("merge", ["mean", "concat"])
def test_an_export_is_the_plain_adapter_and_computes_the_same(name, share, merge, tmp_path):
    plain, make = FORMS[name]
    model = make()
    adapter = trained(model, f"{name}:rank=4,share={share},merge={merge},dropout=0.1", 3)
    model.train()
    made = mixture.export(adapter)
    assert model.training and ad.status(model).count("idle") == 1
    assert not any(p.requires_grad for p in made.parameters())
    model.eval()
    y = model(**fed(model)).logits
    ad.switch(model, "plain")
    assert torch.equal(model(**fed(model)).logits, y)
    assert set(made.methods.values()) == {build(f"{plain}:rank=4,dropout=0.1")}
    file, own = made.save(tmp_path / "plain.safetensors"), adapter.save(tmp_path / "own.safetensors")
    assert made.trainable == adapter.trainable
    assert file.stat().st_size <= own.stat().st_size < file.stat().st_size + 400 * len(list(adapter.methods)) + 400
    ad.detach(model)
    ad.load(model, file)
    torch.testing.assert_close(model(**fed(model)).logits, y, rtol=1e-4, atol=1e-5)


def test_heads_come_along_and_others_are_refused():
    model = toys.make_bert()
    adapter = trained(model, "mosa-houlsby:rank=4", 3, also_train=["classifier"])
    made = mixture.export(adapter, "out")
    assert torch.equal(made.state_dict()["classifier.weight/value"], adapter.state_dict()["classifier.weight/value"])
    with pytest.raises(AddendaError, match="called 'out' is attached already"):
        mixture.export(adapter, "out")
    with pytest.raises(AddendaError, match=r"'out' \(houlsby, full copy\) has no site of a mixture"):
        mixture.export(made, "again")
    mixed = ad.attach(model, {"attention": "mosa-houlsby:rank=4", "mlp": "houlsby:rank=4"}, name="mixed")
    with pytest.raises(AddendaError, match="'mixed' is no mixture at 2 sites"):
        mixture.export(mixed, "more")
    assert set(ad.adapters(model)) == {"default", "out", "mixed"}


def test_an_export_of_stacked_experts(mixtral, ids):
    adapter = ad.attach(mixtral, ad.MoSL(rank=4, share="none"), targets=["*.experts.*", "q_proj"])
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    y = mixtral.eval()(ids).logits
    mixture.export(adapter)
    ad.switch(mixtral, "plain")
    torch.testing.assert_close(mixtral(ids).logits, y, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(mixtral)
    assert torch.equal(twin(ids).logits, mixtral(ids).logits)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, from Dynamo
def test_a_drawn_part_does_not_recompile():
    model = toys.make_bert().train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    adapter = ad.attach(model, "mosa-houlsby:rank=4")
    for p in adapter.parameters():
        p.data.normal_()
    layer, h = model.bert.encoder.layer[0], torch.randn(2, 5, 8)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    seen = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(6):
            adapter.draw(step)
            y = compiled(h)
            torch.testing.assert_close(y, layer(h))
            seen.add(float((y[0] if isinstance(y, tuple) else y).detach().sum()))
    assert len(seen) > 2
    torch._dynamo.reset()
