"""A predicted step is the real one: the same storages live and die, byte for byte; and nothing real is touched."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import addenda as ad
import toys
from addenda import optim
from addenda.core.ask import memory
from addenda.core.base.errors import AddendaError
from shared import EVERY, METHODS, attach, bits, flags, same_bits, where

B, T = 3, 10


def real_step(model: nn.Module) -> tuple[tuple[int, int, int], int]:
    model.train()
    log = memory._follow(model, B, T, 1.0)
    trained = [p for p in model.parameters() if p.grad is not None]
    return log.at_peak(p.grad for p in trained if p.grad is not None), log.flops


@pytest.mark.parametrize("name", [n for n in EVERY if METHODS[n].calibration is None])
def test_fake_tensors_live_as_long_as_real_ones(name, llama):
    step = ad.plan(llama, METHODS[name], targets=where(name), batch=B, length=T).step
    adapter = attach(llama, name, targets=where(name))
    assert ((step.gradients, step.activations, step.temporaries), step.flops) == real_step(llama)
    storages = {s.data_ptr(): s.nbytes() for _, t in adapter.sites() for s in map(_storage, memory._tensors(t))}
    assert step.adapter == sum(storages.values())
    assert step.optimizer == 8 * adapter.trainable
    assert step.weights == sum({s.data_ptr(): s.nbytes() for s in map(_storage, _base(llama))}.values())


def _storage(t):
    return t.untyped_storage()


def _base(model):
    return [t for n, t in [*model.named_parameters(), *model.named_buffers()] if ".addenda." not in n]


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(32, 8), nn.Linear(8, 16), nn.Linear(16, 64)

    def forward(self, ids):
        return self.down(torch.tanh(self.up(self.embed(ids))))


def test_a_step_counted_by_hand():
    N, step = B * T, ad.plan(Chain(), "lora:rank=2", targets="linear", batch=B, length=T).step
    products = 2 * N * (8 * 16 + 16 * 64)
    assert step.floor_flops == 2 * products
    low_rank = 2 * N * 2 * (8 + 16 + 16 + 64)
    to_the_first_input = 2 * N * 8 * (16 + 2)  # which needs no gradient in the adapter's own step
    assert step.flops == 2 * products + 3 * low_rank - to_the_first_input
    loss = 3 * 64 * N * 4 + 4 + 4  # the log-softmax, its gradient and that of the logits; the loss and its own
    assert step.floor == (8 + 16) * N * 4 + loss  # the embedding's output, whose gradient is wanted, and tanh's
    kept = (8 + 2 + 16 + 2) * N * 4  # both inputs (tanh's output is one) and the two r-wide products
    assert step.activations + step.temporaries == kept + loss
    assert step.gradients == 0
    assert step.above == kept + loss + 3 * 4 * 2 * (8 + 16 + 16 + 64)


def test_gradients_that_are_there_at_the_peak_are_named():
    step = ad.plan(Chain(), "full", targets="linear", batch=1, length=1).step
    assert step.gradients > 0
    assert step.above > 3 * step.adapter + step.gradients


def test_planning_touches_nothing(llama, monkeypatch):
    svd = torch.linalg.svd

    def only_fake(W, **options):
        assert isinstance(W, FakeTensor)
        return svd(W, **options)

    monkeypatch.setattr(torch.linalg, "svd", only_fake)
    before, values, random = flags(llama), bits(llama), torch.get_rng_state()
    llama.model.layers[0].eval()
    modes = [m.training for m in llama.modules()]
    ad.plan(llama, METHODS["svft"], batch=B, length=T)
    assert flags(llama) == before and same_bits(bits(llama), values)
    assert [m.training for m in llama.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert "_addenda" not in llama.__dict__ and all(p.grad is None for p in llama.parameters())
    assert not any(isinstance(t, FakeTensor) for t in memory._tensors(llama))


def test_a_method_that_looks_at_values_sees_one_weight_of_each_shape(llama, monkeypatch):
    seen, derive = [], ad.SHiRA.derive

    def watched(self, W, rng):
        if not isinstance(W, FakeTensor):
            seen.append(tuple(W.shape))
        return derive(self, W, rng)

    monkeypatch.setattr(ad.SHiRA, "derive", watched)
    ad.plan(llama, METHODS["shira"], batch=B, length=T)
    assert sorted(seen) == [(4, 8), (8, 8), (8, 16), (16, 8)]


def test_calibrated_methods_need_no_data_here(llama):
    same = ad.plan(llama, ad.SHiRA(density=0.2), batch=B, length=T).step
    assert ad.plan(llama, ad.SHiRA(density=0.2, mask="gradient"), batch=B, length=T).step == same


def test_adapters_that_are_there_do_not_count(llama):
    step = ad.plan(llama, "lora:rank=2", batch=B, length=T).step
    ad.attach(llama, "full", targets="linear", name="there")
    ad.merge(llama)
    assert ad.plan(llama, "lora:rank=2", batch=B, length=T).step == step
    ad.unmerge(llama)
    assert ad.plan(llama, "lora:rank=2", batch=B, length=T).step == step


def test_heads_and_stacked_experts():
    mixtral = toys.make_mixtral().bfloat16()
    step = ad.plan(mixtral, "lora:rank=2", targets="*.experts.*", also_train=["lm_head"], batch=B, length=T).step
    assert step.adapter == 4 * (2 * 4 * 2 * (40 + 24) + 32 * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets", ["*.experts.*", "attention"])
def test_products_in_groups_of_every_dtype(targets, dtype):
    step = ad.plan(toys.make_mixtral().to(dtype), "lora:rank=2", targets=targets, batch=B, length=T).step
    assert step.flop_ratio > 1
    assert step.weights == sum(p.numel() * p.itemsize for p in toys.make_mixtral().to(dtype).parameters()) + sum(
        b.numel() * b.itemsize for b in toys.make_mixtral().to(dtype).buffers()
    )


def test_fewer_labels_and_checkpointing_take_less(llama):
    whole = ad.plan(llama, "lora:rank=2", batch=B, length=T).step
    fewer = ad.plan(llama, "lora:rank=2", batch=B, length=T, labelled=0.2).step
    assert whole.flops - fewer.flops == 2 * (2 * B * 8 * 8 * 32)  # 8 of 10 positions through the head, both ways
    assert fewer.above < whole.above
    llama.activation_checkpointing_enable()
    less = ad.plan(llama, "lora:rank=2", batch=B, length=T).step
    assert less.above < whole.above and less.flops > whole.flops


def test_the_text_says_where_memory_goes(llama):
    plan = ad.plan(llama, "lora:rank=2", batch=B, length=T)
    assert f"a step of 3 × 10 tokens: {plan.step.flop_ratio:.2f} × the floor's FLOPs" in str(plan)
    assert "activations" in str(plan)
    assert "peak" not in str(ad.plan(llama, "lora:rank=2"))


def test_refusals(llama, vit):
    for options, pattern in (
        ({"batch": 4}, "give both or neither"),
        ({"batch": 0, "length": 4}, "batch must be at least 1"),
        ({"batch": 1, "length": 4, "labelled": 0.0}, "labelled must be"),
    ):
        with pytest.raises(AddendaError, match=pattern):
            ad.plan(llama, "lora:rank=2", **options)
    with pytest.raises(AddendaError, match="ViTForImageClassification on 1 inputs of length 4 could not be followed"):
        ad.plan(vit, "lora:rank=2", batch=1, length=4)  # it takes 8 × 8 pixels


OPTIMIZERS = {
    "adamw": "lora:rank=2",
    "lora+": "lora:rank=2",
    "lora-fa": "lora:rank=2",
    "lora-pro": "lora:rank=2",
    "lora-pro:mode=efficient": "pissa:rank=2",
    "lora-pro:mode=sgd": "lora:rank=2",
    "rowwise-adamw": "lora:rank=2",
    "adalora": "adalora:rank=2,target_rank=1",
    "pooled-adamw": "vb-lora:rank=2,vectors=4,length=8",
}


@pytest.mark.parametrize("spec", OPTIMIZERS)
def test_an_optimizer_is_asked_what_it_keeps(spec, llama):
    def make(adapter):
        return optim.build(adapter, spec, steps=4)

    method = OPTIMIZERS[spec]
    step = ad.plan(llama, method, targets="linear", batch=B, length=T, optimizer=make).step
    plain = ad.plan(llama, method, targets="linear", batch=B, length=T).step
    adapter = ad.attach(llama, method, targets="linear")
    made = make(adapter)
    assert ((step.gradients, step.activations, step.temporaries), step.flops) == real_step(llama)
    made.step()
    state = [t for s in made.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert step.optimizer == sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state}.values())
    numbers = {  # what the optimizers' own pages say, but for their step counts
        "lora-fa": sum(2 * t.B.numel() for _, t in adapter.sites() if "B" in t._parameters),
        "lora-pro": 2 * sum(ad.core.site.site.site_at(llama, path).weight.numel() for path in adapter.methods),
        "lora-pro:mode=sgd": 0,
        "adalora": 4 * adapter.trainable,
    }.get(spec, 2 * adapter.trainable)
    counts = sum(t.numel() for t in state) - numbers
    assert 0 <= counts <= (16 if spec == "rowwise-adamw" else 2) * len(adapter.parameters())
    if spec == "lora-fa":
        assert step.activations < plain.activations  # no input is kept for a factor that stays
    assert (step.optimizer > 8 * adapter.trainable + 999) == (spec in ("lora-pro", "adalora"))


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_models_of_images_are_followed_on_pixels(name, request):
    model = request.getfixturevalue(name)
    plan = ad.plan(model, "lora:rank=2", targets="linear", also_train=["classifier"], batch=B, length=8)
    step = plan.step
    assert f"a step of {B} images of 8 × 8 pixels:" in str(plan)
    sites = [r for r in plan.rows if r.method == "lora"]
    tokens = B * (4 + 1)  # patches of 4 × 4 pixels, and the first token
    thin = sum(2 * 2 * sum(r.shape) for r in sites) * tokens  # one product with A and one with B, two FLOPs an entry
    head = 2 * B * 3 * model.classifier.in_features
    assert step.flops - step.floor_flops == pytest.approx(3 * thin + head, rel=0.25)
    assert step.adapter == 4 * plan.trainable and 0 < step.floor < step.above
