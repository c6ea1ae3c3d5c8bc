"""Weights that are read past their module's forward: found at the first forward, at attach, at merge, and named."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.state.bypass import Watch
from shared import bits, relative, same_bits, stir
from toys import make_llama

LORA = ad.LoRA(rank=2)
READS = {
    "matmul": lambda x, lin: x @ lin.weight.T,
    "linear": lambda x, lin: F.linear(x, lin.weight, lin.bias),
    "concatenated": lambda x, lin: F.linear(x, torch.cat([lin.weight, lin.weight]))[..., :8],
    "einsum": lambda x, lin: torch.einsum("bi,oi->bo", x, lin.weight),
    "data": lambda x, lin: x @ lin.weight.data.t(),
    "detached": lambda x, lin: x @ lin.weight.detach().t(),
    "cast": lambda x, lin: (x.double() @ lin.weight.double().t()).to(x.dtype),
    "scaled": lambda x, lin: x @ (lin.weight * 0.5).t(),
    "rows": lambda x, lin: x * lin.weight[0],
    "copied": lambda x, lin: x @ lin.weight.t().contiguous(),
    "parameters": lambda x, lin: x @ next(iter(lin.parameters())).t(),
}
LOOKS = {
    "dtype": lambda x, lin: x.to(lin.weight.dtype),
    "device": lambda x, lin: x.to(lin.weight.device),
    "shape": lambda x, lin: x.reshape(-1, lin.weight.shape[-1], *[1] * (lin.weight.dim() - 2)).flatten(1),
    "size": lambda x, lin: x * (lin.weight.numel() // lin.weight.numel()),
    "like": lambda x, lin: x + torch.zeros_like(lin.weight)[0] + lin.weight.new_zeros(8),
    "type_as": lambda x, lin: x.type_as(lin.weight),
    "to other": lambda x, lin: x.to(lin.weight),
    "identity": lambda x, lin: x if lin.weight is lin.weight else -x,
    "equality": lambda x, lin: x if torch.equal(lin.weight, lin.weight) else -x,
    "view": lambda x, lin: x + 0 * lin.weight.view(-1).shape[0],
    "forward": lambda x, lin: lin.forward(x),
}


class Reader(nn.Module):
    """One layer that is called, and one that is used as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how, self.called, self.lin, self.score = how, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(torch.tanh(self.how(self.called(x), self.lin)))


@pytest.mark.parametrize("how", READS)
def test_a_read_is_refused_at_the_first_forward_and_at_the_merge(how):
    model, x = Reader(READS[how]), torch.randn(3, 8)
    before, y = bits(model), model(x)
    stir(ad.attach(model, LORA, targets="*"), 0.3)
    for call in (lambda: model(x), lambda: model(x), lambda: ad.merge(model, verify=x),
                 lambda: ad.merge(model, verify=x, allow_loss=1.0)):  # fmt: skip
        with pytest.raises(AddendaError, match=r"^1 sites .* lin \(by .*test_bypass\.py\).*exclude=\['lin'\]"):
            call()
        assert same_bits(bits(model), before) and not _get_current_dispatch_mode_stack()
    ad.detach(model)
    assert torch.equal(model(x), y)
    stir(ad.attach(model, LORA, targets="*", exclude="lin"), 0.3)
    adapted = model(x)
    assert ad.merge(model, verify=x).compared == 1
    assert relative(model(x), adapted) < 1e-5


@pytest.mark.parametrize("how", LOOKS)
def test_a_look_is_no_read(how):
    model, x = Reader(LOOKS[how]), torch.randn(3, 8)
    stir(ad.attach(model, LORA, targets="*"), 0.3)
    y = model(x)
    y.sum().backward()
    ad.merge(model, verify=x)
    assert relative(model(x), y) < 1e-5


def test_a_hook_of_the_layer_itself_is_no_reader(tiny, ids):
    """Who watches weights does it there."""
    norms, layer = [], tiny.layers[0].up_proj
    layer.register_forward_hook(lambda module, args, y: norms.append(module.weight.norm()))
    layer.register_forward_pre_hook(lambda module, args: norms.append(module.weight.abs().max()))
    stir(ad.attach(tiny, LORA))
    tiny(ids)
    assert len(norms) == 2 and ad.merge(tiny, verify=ids).compared == 1


def test_what_the_error_advises_acts():
    """The matrix itself as the site: whoever reads it sees it changed."""
    model, x = Reader(READS["matmul"]), torch.randn(3, 8)
    stir(ad.attach(model, LORA, targets=["called", "lin.weight", "score"]), 0.3)
    y = model(x)
    ad.merge(model, verify=x)
    assert relative(model(x), y) < 1e-5
    ad.detach(model)
    assert relative(model(x), y) > 1e-2


class Tied(nn.Module):
    """A head that reads the embedding's matrix; the convolution is called, but for one step reads."""

    def __init__(self, tied=False, stepwise=False):
        super().__init__()
        self.tied, self.stepwise = tied, stepwise
        self.embed, self.conv, self.head = nn.Embedding(16, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 16, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.stepwise and ids.shape[1] == 1:
            x = x @ self.conv.weight[..., 0].t()
        else:
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return F.linear(x, self.embed.weight) if self.tied else self.head(x)


def test_embeddings_and_convolutions():
    ids = torch.arange(6)[None]
    model = Tied(tied=True)
    ad.attach(model, LORA, targets="embed")
    with pytest.raises(AddendaError, match=r"embed \(by Tied\.forward"):
        model(ids)
    model = Tied(stepwise=True)  # as Mamba: the first forward of every kind is looked at
    stir(ad.attach(model, LORA, targets=["embed", "conv", "head"]))
    with torch.no_grad():
        model(ids)
        model(ids)
        with pytest.raises(AddendaError, match=r"conv \(by Tied\.forward"):
            model(ids[:, :1])
        model(ids)
    with pytest.raises(AddendaError, match=r"conv \(by Tied\.forward"):
        ad.merge(model, verify=ids[:, :1])


def test_attach_refuses_where_it_sees_a_batch():
    model, x = Reader(READS["linear"]), torch.randn(3, 8)
    before = dict(vars(model))
    with pytest.raises(AddendaError, match=r"lin \(by"):
        ad.attach(model, ad.EVA(rank=2), targets="*", calibration=[x])
    with pytest.raises(AddendaError, match=r"lin \(by"):
        ad.attach(model, ad.LoRAGA(rank=1), targets="*", calibration=[x], loss=lambda m, b: m(b).sum())
    assert dict(vars(model)) == before and not model._forward_hooks
    ad.attach(model, ad.LoRAGA(rank=1), targets="*", exclude="lin", calibration=[x], loss=lambda m, b: m(b).sum())
    model(x)


def test_a_merge_says_what_it_has_seen(tiny, ids):
    stir(ad.attach(tiny, LORA), 0.3)
    assert "weights read past their forward: not checked" in str(ad.merge(tiny))
    ad.unmerge(tiny)
    tiny(ids)
    told = str(ad.merge(tiny))
    assert "no weight is read past its forward in 1 kind(s)" in told and "outputs: not checked" in told
    ad.unmerge(tiny)
    ad.attach(tiny, LORA, targets="embedding", name="other")  # of other sites nothing is known
    assert "past their forward: not checked" in str(ad.merge(tiny, allow_loss=1.0))
    ad.unmerge(tiny)
    told = str(ad.merge(tiny, verify=ids, allow_loss=1.0))
    assert "compared 1 outputs" in told and "not checked" not in told


def test_forces_are_no_reads():
    """A model that differentiates inside its forward: gradients flow through weights."""

    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                energy = self.out(torch.tanh(self.lin(x))).sum()
                return torch.autograd.grad(energy, x, create_graph=True)[0]

    model, x = Forces(), torch.randn(3, 8)
    stir(ad.attach(model, LORA, targets="*"), 0.3)
    y = model(x)
    ad.merge(model, verify=x)
    assert relative(model(x), y) < 1e-5


def test_a_failed_and_an_interrupted_forward_leave_nothing(tiny, ids):
    stir(ad.attach(tiny, LORA))
    raised = [RuntimeError("mine"), KeyboardInterrupt()]

    def fail(module, args):
        if raised:
            raise raised.pop(0)

    tiny.score.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mine"):
        tiny(ids)
    assert not _get_current_dispatch_mode_stack()
    with pytest.raises(KeyboardInterrupt):
        tiny(ids)
    tiny(ids)  # ends what the interrupt has left, and watches
    assert not _get_current_dispatch_mode_stack()
    assert not any("forward" in vars(m) for m in tiny.modules())
    assert "in 1 kind(s)" in str(ad.merge(tiny))


def test_it_goes_with_copies_and_is_gone_after_detach(llama, ids):
    def watchers(model):
        hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
        return [h.__self__ for h in hooks if isinstance(getattr(h, "__self__", None), Watch)]

    stir(ad.attach(llama, LORA))
    y = llama(ids).logits
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert {id(w.state) for w in watchers(twin)} == {id(twin.__dict__["_addenda"])}
        assert torch.equal(twin(ids).logits, y)
        layers = {id(m) for m in twin.modules()}
        assert all(id(m) in layers for w in watchers(twin) for m in w.layers["default"].values())
        ad.detach(twin)
        assert not watchers(twin)
    assert watchers(llama)


def test_a_part_that_is_called_by_itself_is_watched_too():
    """A loss in pieces calls the decoder without its head, and encoders are called alone."""
    model, x = nn.Sequential(), torch.randn(3, 8)
    model.body = Reader(READS["matmul"])
    ad.attach(model, LORA, targets="body.lin")
    with pytest.raises(AddendaError, match=r"body\.lin \(by"):
        model.body(x)


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # dynamo's own
def test_compiled_forwards_pass(ids):
    model = make_llama()
    stir(ad.attach(model, LORA))
    y = model(ids).logits
    made = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(made(ids).logits, y)
    fresh = make_llama()
    stir(ad.attach(fresh, LORA))
    torch.testing.assert_close(torch.compile(fresh, fullgraph=True, backend="aot_eager")(ids).logits, y)
    torch.testing.assert_close(fresh(ids).logits, y)
    torch.compiler.reset()


def test_nothing_acting_is_nothing_refused():
    model, x = Reader(READS["matmul"]), torch.randn(3, 8)
    y = model(x)
    ad.attach(model, LORA, targets="lin")
    with ad.disabled(model):
        assert torch.equal(model(x), y)
    ad.switch(model, None)
    assert torch.equal(model(x), y)
