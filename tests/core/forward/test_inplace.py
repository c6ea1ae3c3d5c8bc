"""What a layer returns belongs to the caller: it may be changed in place, and the gradients stay those of copies."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import addenda as ad
import toys
from addenda.core.site.site import site_at
from addenda.quantizing.quantize import quantize
from shared import EVERY, METHODS, NAMES, attach, relative, sees_nothing, stir, where


def _first_doubled(y: Tensor) -> Tensor:
    y[..., :1] = y[..., :1] * 2
    return y


CHANGES = {  # the same change of y, of a copy and in place
    "relu": (torch.relu, torch.relu_),
    "added": (lambda y: y + 0.3, lambda y: y.add_(0.3)),
    "added a vector": (
        lambda y: y + torch.arange(y.shape[-1]).to(y),
        lambda y: y.add_(torch.arange(y.shape[-1]).to(y)),
    ),
    "multiplied": (lambda y: y * 1.7, lambda y: y.mul_(1.7)),
    "dropped": (lambda y: F.dropout(y, 0.4), lambda y: F.dropout(y, 0.4, inplace=True)),
    "a part": (lambda y: torch.cat([y[..., :1] * 2, y[..., 1:]], -1), _first_doubled),
    "filled": (lambda y: y.masked_fill(y > 0, 0.5), lambda y: y.masked_fill_(y > 0, 0.5)),
    "seen otherwise": (lambda y: y.flatten() * 2, lambda y: y.view(-1).mul_(2)),
}


def layers():
    for shape in ([8], [3, 8], [2, 3, 8], [2, 2, 3, 8]):
        yield f"linear {len(shape)}-D", nn.Linear(8, 16), torch.randn(shape)
        yield f"linear without bias {len(shape)}-D", nn.Linear(8, 16, bias=False), torch.randn(shape)
    yield "linear strided", nn.Linear(8, 16), torch.randn(5, 8, 2).permute(2, 0, 1)
    yield "linear, one token", nn.Linear(8, 16), torch.randn(1, 1, 8)
    yield "Conv1D 2-D", Conv1D(16, 8), torch.randn(3, 8)
    yield "Conv1D 3-D", Conv1D(16, 8), torch.randn(2, 3, 8)
    yield "conv1d", nn.Conv1d(4, 8, 4, padding=1), torch.randn(2, 4, 9)
    yield "conv1d, one example", nn.Conv1d(4, 8, 4, padding=1), torch.randn(4, 9)
    yield "conv2d", nn.Conv2d(4, 8, 2, padding=1, groups=2), torch.randn(2, 4, 6, 6)
    yield "conv2d, one example", nn.Conv2d(4, 8, 2, padding=1, padding_mode="reflect"), torch.randn(4, 6, 6)
    yield "embedding 1-D", nn.Embedding(16, 8, padding_idx=3), torch.tensor([0, 3, 5])
    yield "embedding 2-D", nn.Embedding(16, 8), torch.tensor([[0, 3, 5], [3, 15, 5]])


def layer_of(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    module, x = next((m, x) for n, m, x in layers() if n == kind)
    return nn.Sequential(module).double(), x.double() if x.is_floating_point() else x


def gradients(forward, change, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The changed output, and the gradients of x and the parameters."""
    torch.manual_seed(5)
    given = x.clone().requires_grad_(x.is_floating_point())
    y = change(forward(given))
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
    leaves = [*([given] if given.requires_grad else []), *parameters]
    return [y, *torch.autograd.grad((y.square() * weights).sum(), leaves)]


@pytest.mark.parametrize("kind", [n for n, _, _ in layers()])
@pytest.mark.parametrize("name", NAMES)
def test_a_layers_output_may_be_changed_in_place(name, kind):
    model, x = layer_of(kind)
    if METHODS[name].check(*site_at(model, "0").shape) or sees_nothing(model, name, x, "0"):
        return
    adapter = stir(attach(model, name, x, targets="0"), 0.3)
    for p in adapter.parameters():
        p.data = p.data.double()
    for copied, in_place in CHANGES.values():
        expected = gradients(model, copied, x, adapter.parameters())
        torch.testing.assert_close(gradients(model, in_place, x, adapter.parameters()), expected)


def in_place_everywhere(model: nn.Module, in_place: bool) -> nn.Module:
    """A model that changes what every module of it returns, as it comes out."""
    for i, module in enumerate(m for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList)):

        def change(module, args, y, i=i):
            first = y[0] if isinstance(y, tuple) else y
            made = first.add_(0.1 * i).mul_(1.1) if in_place else first.add(0.1 * i).mul(1.1)
            return (made, *y[1:]) if isinstance(y, tuple) else made

        module.register_forward_hook(change)
    return model


def both(model: nn.Module, name: str, batch: Tensor, prepare=lambda model: None) -> list[tuple[nn.Module, ad.Adapter]]:
    """The model with stirred adapters, once changing outputs in place and once copying them."""
    stir(attach(model, name, batch, targets=where(name)))
    found = []
    for in_place in (True, False):
        own = in_place_everywhere(copy.deepcopy(model), in_place)
        prepare(own)
        found.append((own, ad.adapters(own)["default"]))
    return found


def outcome(model: nn.Module, adapter: ad.Adapter, forward) -> list[Tensor]:
    torch.manual_seed(7)
    y = forward(model)
    loss = y.float().square().mean()
    return [y, *torch.autograd.grad(loss, adapter.parameters(), allow_unused=True, materialize_grads=True)]


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    y = model(batch)
    return getattr(y, "logits", y)


@pytest.mark.parametrize("name", EVERY)
def test_a_model_that_changes_every_output_in_place_is_the_one_that_copies(name, tiny, ids):
    two = both(tiny, name, ids)
    one, other = (outcome(m, a, lambda m: logits(m, ids)) for m, a in two)
    torch.testing.assert_close(one, other)
    one, other = (outcome(m, a, lambda m: m.train()(ids)) for m, a in two)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", EVERY)
def test_in_place_under_autocast_and_checkpointing(name, tiny, ids):
    two = both(tiny, name, ids)

    def cast(m):
        with torch.autocast("cpu", torch.bfloat16):
            return m(ids)

    one, other = (outcome(m, a, cast) for m, a in two)
    assert relative(*(torch.cat([t.flatten() for t in found]) for found in (one, other))) < 0.05  # roundings differ
    one, other = (outcome(m, a, lambda m: checkpoint(m, ids, use_reentrant=False)) for m, a in two)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", EVERY)
def test_in_place_where_every_example_has_its_own_adapter(name, tiny, ids):
    tiny.train()
    stir(attach(tiny, name, ids, targets=where(name), name="b"), seed=2)
    two = both(tiny, name, ids)

    def mixed(m):
        with ad.per_example(m, ["default", "b"]):
            return m(ids)

    one, other = (outcome(m, a, mixed) for m, a in two)
    torch.testing.assert_close(one, other)

    def twice(m):
        ad.switch(m, ["b", "default"])
        return m(ids)

    one, other = (outcome(m, a, twice) for m, a in two)
    torch.testing.assert_close(one, other)


RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
REAL = {
    "deberta": ("DebertaConfig", "DebertaForSequenceClassification", RELATIVE),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForSequenceClassification", RELATIVE),
    "swinv2": ("Swinv2Config", "Swinv2ForImageClassification", WINDOWS),
}


def real(name: str) -> tuple[nn.Module, Tensor, dict]:
    """An architecture that adds in place, its batch, and what no method of rank 4 can take."""
    config, model, more = REAL[name]
    if name == "swinv2":
        tables = {"exclude": "*continuous_position_bias*"}
        return toys._small(config, model, initializer_range=0.5, **more), torch.randn(2, 3, 16, 16), tables
    sizes = {"vocab_size": toys.VOCAB, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 3, "initializer_range": 0.5}
    return toys._small(config, model, **sizes, **more), torch.arange(12).reshape(2, 6) % toys.VOCAB, {}


BLOCKS = "shira:density=0.1,mask=block,block=2"
PATHS = ["lora:rank=2", "dora:rank=2", "shira", BLOCKS, "oft:block=2", "vera:rank=8", "ia3", "houlsby:rank=2"]


@pytest.mark.parametrize(
    ("which", "name"), [*(("deberta", n) for n in PATHS), *((w, "lora:rank=2") for w in list(REAL)[1:])]
)
def test_gradients_in_architectures_that_add_in_place_are_those_of_finite_differences(which, name):
    model, batch, options = real(which)
    model, batch = model.double(), batch.double() if batch.is_floating_point() else batch
    adapter = stir(ad.attach(model, name, **options), 0.3)
    learned = {n: p for n, p in adapter.named_parameters() if "dora" not in name or "magnitude" in n}  # the rest detach
    found = torch.autograd.grad(logits(model, batch).square().sum(), list(learned.values()))
    length = torch.cat([g.flatten() for g in found]).norm()
    values = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            for p, g in zip(learned.values(), found, strict=True):
                p += step / length * g
            values.append(logits(model, batch).square().sum())
    assert relative((values[0] - values[1]) / 2e-3, length) < 0.02, "DeBERTa's norms work in float32"


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("which", ["deberta", "swinv2"])
def test_architectures_that_add_in_place_train_with_every_method(which, name):
    model, batch, options = real(which)
    options |= {"targets": where(name)} if name in NAMES else {}
    try:
        adapter = attach(model, name, batch, **options)
    except ad.AddendaError as why:
        if name in NAMES or "Name the modules whose output is changed" not in str(why):
            raise
        return
    stir(adapter)
    logits(model.train(), batch).square().mean().backward()
    got = [p.grad is not None and bool(p.grad.any()) for p in adapter.parameters()]
    assert sum(got) > len(got) / 2


def test_a_lean_module_whose_output_is_changed_in_place_keeps_no_recipe_of_it(llama):
    """An adapted layer keeps what it was given, which is no longer what the norm made."""
    ids = torch.arange(12).reshape(2, 6)
    stir(ad.attach(llama, "lora:rank=2"))
    found = []
    for in_place in (True, False):
        own = copy.deepcopy(llama)
        ad.lean(own)
        for module in own.modules():
            if "RMSNorm" in type(module).__name__:
                module.register_forward_hook(lambda m, a, y, do=in_place: y.mul_(1.5) if do else y * 1.5)
        found.append(outcome(own, ad.adapters(own)["default"], lambda m: logits(m, ids)))
    torch.testing.assert_close(*found)


def test_an_mlp_whose_activation_works_in_place_is_not_lean(llama):
    ids = torch.arange(12).reshape(2, 6)
    stir(ad.attach(llama, "lora:rank=2"))
    llama.model.layers[0].mlp.act_fn = nn.ReLU(inplace=True)
    assert "model.layers.0.mlp" not in ad.lean(llama)
    logits(llama, ids).square().mean().backward()
    assert all(p.grad is not None for p in ad.adapters(llama)["default"].parameters())


def test_a_lean_module_whose_input_is_changed_in_place_says_so():
    class RMSNorm(nn.Module):
        def forward(self, x):
            return x / x.square().mean(-1, keepdim=True).sqrt()

    net = nn.Sequential(nn.Linear(8, 8), RMSNorm(), nn.Linear(8, 8))
    adapter = ad.attach(net, "lora:rank=2", targets="*")
    ad.lean(net)
    x = net[0](torch.randn(3, 8))
    y = net[2](net[1](x))
    x.mul_(2)
    with pytest.raises(ad.AddendaError, match="changed in place"):
        torch.autograd.grad(y.sum(), dict(adapter.named_parameters())["2/A"])


@pytest.mark.parametrize("name", ["none", "lora:rank=2", "dora:rank=2", "vera:rank=8", "ia3", "oft:block=4"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_quantised_layers_output_may_be_changed_in_place(form, name):
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize(net, form, targets="*")
    own = [] if name == "none" else stir(ad.attach(net, name, targets="0")).parameters()
    x = torch.randn(2, 5, 64)
    for copied, in_place in CHANGES.values():
        two = [gradients(lambda x: net[1](net[0](x)), change, x, own) for change in (copied, in_place)]
        torch.testing.assert_close(*two, rtol=1e-5, atol=1e-4)
        two = [gradients(lambda x, c=c: net[1](c(net[0](x)).view(2, 5, 64)), lambda y: y * 1, x, own)
               for c in (copied, in_place)]  # fmt: skip
        torch.testing.assert_close(*two, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("default")  # dynamo's own
@pytest.mark.parametrize(
    "name", ["lora", "dora", "shira", "shira:density=0.1,mask=block,block=2", "oft:block=4", "houlsby:rank=2"]
)
def test_in_place_in_a_compiled_model(name):
    """A compiler sees the same changes; what backward keeps of an output is what it was."""
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    adapter = stir(ad.attach(net, name, targets="0"))
    x = torch.randn(2, 5, 8)

    def forward(x):
        y = net[0](x)
        y += 0.2
        y.mul_(1.5)
        return net[2](net[1](y))

    expected = torch.autograd.grad(forward(x).square().sum(), adapter.parameters())
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), adapter.parameters()), expected)
