"""Lean modules keep less and compute the same bits, whatever is attached to them."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.forward.lean import Lean
from addenda.core.modules.classes import original_class
from shared import EVERY, attach, bits, relative, same_bits, stir, where

B, T = 3, 10
IDS = torch.arange(B * T).reshape(B, T) % toys.VOCAB


ORDERS = ([0, 1, 2], [2, 1, 0], [1, 2, 0])  # of the rows of a batch: other orders of the same sums


def out_and_grads(
    model: nn.Module, trained: list[nn.Parameter], autocast: bool = False, ids: Tensor = IDS
) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(input_ids=ids).logits
    wide = y if y.dtype == torch.float64 else y.float()
    return [y.detach(), *(g.detach() for g in torch.autograd.grad(wide.square().mean(), trained))]


class Plain:
    """What a model computes before it is lean, and what float64 says of it."""

    def __init__(self, model: nn.Module, trained: list[nn.Parameter], autocast: bool = False):
        self.model, self.trained, self.autocast = model, trained, autocast
        self.runs = [out_and_grads(model, trained, autocast, IDS[order]) for order in ORDERS]
        where = {id(p): n for n, p in model.named_parameters()}
        twin = copy.deepcopy(model).double()
        named = dict(twin.named_parameters())
        self.exact = out_and_grads(twin, [named[where[id(p)]] for p in trained])

    def agrees(self, model: nn.Module | None = None, trained: list[nn.Parameter] | None = None) -> bool:
        """Whether the lean model (or a copy of it) computes the same bits.

        In bfloat16 all of them. In float32 a norm's input sums its gradients in another order, as there is no cast
        before it: there they are as near to float64's as four times the plain model's own, whose sums have orders, too.
        """
        found = out_and_grads(model or self.model, trained or self.trained, self.autocast)
        if not torch.equal(found[0], self.runs[0][0]):
            return False
        if not self.autocast and found[0].dtype == torch.bfloat16:
            return all(map(torch.equal, found, self.runs[0]))
        for mine, exact, *plain in zip(found[1:], self.exact[1:], *(run[1:] for run in self.runs), strict=True):
            noise = max(float((p - exact).norm()) for p in plain)
            if float((mine - exact).norm()) > 4 * noise + torch.finfo(torch.float32).eps * float(exact.norm()):
                return False
        return True


def classes(model: nn.Module) -> dict[str, type]:
    return {n: type(m) for n, m in model.named_modules() if "addenda" not in n}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_same_bits_with_every_method(name, dtype):
    model = toys.make_llama().to(dtype).train()
    adapter = stir(attach(model, name, IDS, targets=where(name)))
    plain, cast = Plain(model, adapter.parameters()), Plain(model, adapter.parameters(), autocast=True)
    ad.lean(model)
    assert plain.agrees()
    assert cast.agrees()


def test_same_bits_of_two_adapters_and_of_none(llama):
    one, two = (stir(ad.attach(llama, "lora:rank=2", name=n), seed=i) for i, n in enumerate("ab"))
    ad.switch(llama, ["a", "b"])
    trained = [*one.parameters(), *two.parameters()]
    plain = Plain(llama, trained)
    ad.lean(llama)
    assert plain.agrees()
    ad.detach(llama)
    x = llama.model.embed_tokens(IDS).detach().requires_grad_()
    y = llama(inputs_embeds=x).logits
    gradient = torch.autograd.grad(y.sum(), x)[0]
    ad.unlean(llama)
    assert torch.equal(y, llama(inputs_embeds=x).logits)
    plain, wide = torch.autograd.grad(llama(inputs_embeds=x).logits.sum(), x)[0], x.detach().double().requires_grad_()
    exact = torch.autograd.grad(copy.deepcopy(llama).double()(inputs_embeds=wide).logits.sum(), wide)[0]
    assert relative(gradient, exact) < 2 * relative(plain, exact)


def test_dropout_of_adapters_draws_the_same(llama):
    adapter = stir(ad.attach(llama.bfloat16().train(), ad.LoRA(2, dropout=0.5)))
    torch.manual_seed(3)
    plain = out_and_grads(llama, adapter.parameters())
    torch.manual_seed(3)
    assert sum("mlp" in p for p in ad.lean(llama)) == 2
    assert all(map(torch.equal, out_and_grads(llama, adapter.parameters()), plain))


def test_what_is_no_longer_kept():
    """Bytes per token in bfloat16: act and product of each MLP; of each norm a float32 copy, 1 / rms and, under adapted
    layers, the output, for the input. In the adapter's step the first norm's input needs no gradient: nothing changes
    there. In the floor's it is kept anyhow. A vocabulary of 4096 puts the peak into the loss, where all is alive.
    """
    model, d, f, layers = toys.make_llama(vocab_size=4096).bfloat16(), 8, 16, 2
    plain = ad.plan(model, "lora:rank=2", batch=B, length=T).step
    ad.lean(model)
    less = ad.plan(model, "lora:rank=2", batch=B, length=T).step
    copy, product, output = (4 - 2) * d + 4, 2 * f, 2 * d
    per_token = layers * 2 * product + 2 * layers * copy + (2 * layers - 1) * output
    assert plain.activations - less.activations == B * T * per_token
    assert plain.flops == less.flops and plain.temporaries == less.temporaries
    assert plain.floor - less.floor == B * T * (layers * product + (2 * layers + 1) * copy + 2 * d)


def test_under_gradient_checkpointing(llama):
    llama.train().activation_checkpointing_enable()
    adapter = stir(ad.attach(llama, "lora:rank=2"))
    plain = Plain(llama, adapter.parameters())
    memory = ad.plan(llama, "lora:rank=2", batch=B, length=T).step
    ad.lean(llama)
    assert plain.agrees()
    assert ad.plan(llama, "lora:rank=2", batch=B, length=T).step == memory


def test_backward_twice(llama):
    adapter = stir(ad.attach(llama, "dora:rank=2"))
    ad.lean(llama)
    loss = llama(input_ids=IDS).logits.square().mean()
    first = torch.autograd.grad(loss, adapter.parameters(), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(loss, adapter.parameters()), first))


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # dynamo's own
def test_compiled(llama):
    adapter = stir(ad.attach(llama, "lora:rank=2"))
    plain = Plain(llama, adapter.parameters())
    ad.lean(llama)
    compiled = torch.compile(llama.model.layers[1].mlp, backend="eager", fullgraph=True)
    x = torch.randn(B, T, 8)
    assert torch.equal(compiled(x), llama.model.layers[1].mlp(x))
    assert plain.agrees()


def test_a_trained_norm_and_an_adapted_one_get_their_gradients(llama):
    norm = llama.model.layers[1].input_layernorm
    adapter = stir(ad.attach(llama, {"linear": ad.LoRA(2)}, also_train=["model.norm"]))
    norm.weight.requires_grad_(True)
    trained = [*adapter.parameters(), norm.weight]
    plain = Plain(llama, trained)
    ad.lean(llama)
    assert issubclass(original_class(llama.model.norm), Lean)
    assert plain.agrees()


@pytest.mark.parametrize("first", ["attach", "lean"])
def test_classes_come_and_go_in_any_order(first, llama):
    before, values = classes(llama), bits(llama)
    for call in ("attach", "lean") if first == "attach" else ("lean", "attach"):
        ad.lean(llama) if call == "lean" else ad.attach(llama, ad.LoRA(2), also_train=["norm"])
    paths = ad.lean(llama)
    assert paths == [n for n in before if n.endswith(("mlp", "norm"))]
    lean_and_adapted = classes(llama)
    ad.detach(llama)
    assert [n for n, c in classes(llama).items() if issubclass(c, Lean)] == paths
    ad.attach(llama, ad.LoRA(2), also_train=["norm"])
    assert classes(llama) == lean_and_adapted
    ad.unlean(llama)
    ad.detach(llama)
    assert classes(llama) == before and same_bits(bits(llama), values)


def test_copies_and_pickles_stay_lean(llama):
    adapter = stir(ad.attach(llama, ad.LoRA(2), also_train=["norm"]))
    expected = Plain(llama, adapter.parameters())
    ad.lean(llama)
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert classes(twin) == classes(llama)
        assert expected.agrees(twin, ad.adapters(twin)["default"].parameters())


def test_fused_projections():
    sizes = {"vocab_size": toys.VOCAB, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    model = toys._small("Phi3Config", "Phi3ForCausalLM", **sizes, **heads).bfloat16()
    adapter = stir(ad.attach(model, "lora:rank=2"))
    plain, memory = Plain(model, adapter.parameters()), ad.plan(model, "lora:rank=2", batch=B, length=T).step
    assert sum("mlp" in p for p in ad.lean(model)) == 2
    assert plain.agrees()
    assert ad.plan(model, "lora:rank=2", batch=B, length=T).step.above < memory.above


def test_what_only_looks_like_a_gated_mlp_is_left_alone(gpt2):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    class Routed(Other):
        def forward(self, x, weights):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * weights

    with torch.device("meta"):
        empty = Other()
    for model in (nn.ModuleList([Other()]), nn.ModuleList([Routed()]), nn.ModuleList([empty]), gpt2):
        with pytest.raises(AddendaError, match=r"Nothing in this \w+ can be lean"):
            ad.lean(model)
        with pytest.raises(AddendaError, match="No module of this"):
            ad.unlean(model)
