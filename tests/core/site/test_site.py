"""Kinds of layer, what a site is, and every place where a change must either act or be refused."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.forward.slots import slots_of
from addenda.core.site.kinds import CONV, CONV1D, EMBEDDING, LINEAR, PARAMETER, kind_of
from addenda.core.site.site import has_another_forward, owners_of, site_at
from shared import METHODS, NAMES, attach, bits, effective, relative, same_bits, sees_nothing, sites, stir, train

LORA = ad.LoRA(rank=2)


def test_kinds(gpt2):
    assert kind_of(nn.Linear(2, 3)) == LINEAR
    assert [kind_of(c(2, 2, 1)) for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d)] == [CONV] * 3
    assert kind_of(nn.Embedding(2, 3)) == EMBEDDING
    assert kind_of(gpt2.transformer.h[0].attn.c_attn) == CONV1D
    assert kind_of(nn.LayerNorm(2)) is None
    assert kind_of(nn.ConvTranspose1d(2, 2, 1)) is None


def test_matrices_and_back(gpt2):
    for model, path, shape in (
        (nn.Sequential(nn.Linear(3, 5)), "0", (5, 3)),
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), "0", (6, 18)),
        (nn.Sequential(nn.Embedding(7, 3)), "0", (7, 3)),
        (gpt2, "transformer.h.0.attn.c_attn", (24, 8)),
    ):
        site = site_at(model, path)
        assert site.shape == shape
        assert site.copies == 1
        assert torch.equal(site.kind.from_matrix(site.matrix, site.weight), site.weight)


def test_stacks_vectors_and_scalars(mixtral):
    experts = site_at(mixtral, "model.layers.0.mlp.experts.gate_up_proj")
    assert (experts.kind, experts.shape, experts.copies) == (PARAMETER, (32, 8), 4)
    norm = site_at(mixtral, "model.norm.weight")
    assert (norm.shape, norm.copies) == ((8, 1), 1)
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(1.0))
    assert site_at(model, "scale").shape == (1, 1)


def test_nothing_there(tiny):
    with pytest.raises(AddendaError, match=r"no module 'layers\.9'"):
        site_at(tiny, "layers.9.up_proj")
    with pytest.raises(AddendaError, match=r"no module and no parameter 'layers\.0\.nope'"):
        site_at(tiny, "layers.0.nope")
    with pytest.raises(AddendaError, match="no module and no parameter ''"):
        site_at(tiny, "")
    with pytest.raises(AddendaError, match=r"LayerNorm.*'layers\.0\.norm\.weight'"):
        site_at(tiny, "layers.0.norm")


def test_an_adapters_own_tensors_are_no_sites(tiny):
    ad.attach(tiny, LORA, targets="q_proj")
    with pytest.raises(AddendaError, match="belongs to an adapter"):
        site_at(tiny, "layers.0.self_attn.q_proj.addenda.default.weight.A")


def test_owners_in_order(llama):
    held = owners_of(llama)[id(llama.lm_head.weight)]
    assert [path for path, _, _ in held] == ["model.embed_tokens", "lm_head"]


def test_a_tied_parameter_is_one_site_by_any_of_its_names(llama):
    one, two = site_at(llama, "lm_head.weight"), site_at(llama, "model.embed_tokens.weight")
    assert one == two
    assert one.path == "model.embed_tokens.weight"
    assert one.ties == ((llama.lm_head, "weight"),)


def test_tied_modules_are_refused_with_the_way_out(llama):
    with pytest.raises(AddendaError, match=r"tied to lm_head.*'model\.embed_tokens\.weight'"):
        ad.attach(llama, LORA, targets="embedding")


class Alone(nn.Module):
    """One module under test."""

    def __init__(self, module, *more):
        super().__init__()
        self.inner = module

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


def refused(module, target, pattern):
    model = Alone(module)
    before, keys = model.state_dict(), list(model.state_dict())
    with pytest.raises(AddendaError, match=pattern):
        ad.attach(model, LORA, targets=target)
    assert all(v is before[k] or v.data_ptr() == before[k].data_ptr() for k, v in model.state_dict().items())
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_what_no_method_can_change_is_refused():
    refused(nn.Embedding(8, 4, max_norm=1.0), "inner", "max_norm")
    refused(nn.LSTM(4, 4), "inner.weight_ih_l0", "LSTM keeps its weights in a list")
    refused(nn.Linear(4, 4, device="meta"), "inner", "meta device")
    refused(nn.ConvTranspose2d(4, 4, 3), "inner.weight", "4 dimensions")
    refused(nn.Linear(4, 4), "inner.bias", "a vector of 4 is no matrix")
    refused(parametrizations.spectral_norm(nn.Linear(4, 4)), "inner", r"computes its weight.*'inner\.parametriz")


def test_a_lazy_weight_is_refused():
    model = Alone(nn.LazyLinear(4))
    with pytest.raises(AddendaError, match="no shape yet"):
        ad.attach(model, LORA, targets="inner")


def test_an_integer_weight_is_refused():
    model = Alone(nn.Linear(4, 4))
    model.inner.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AddendaError, match="only floating weights"):
        ad.attach(model, LORA, targets="inner")


def test_a_forward_replaced_on_the_instance_is_refused_for_it_would_be_a_silent_no_op():
    model = Alone(nn.Linear(4, 4))
    inner = model.inner
    inner.forward = lambda x: torch.nn.functional.linear(x, inner.weight, inner.bias)
    with pytest.raises(AddendaError, match=r"replaced on the instance.*'inner\.weight'"):
        ad.attach(model, LORA, targets="inner")
    adapter = ad.attach(model, LORA, targets="inner.weight")
    x = torch.randn(2, 4)
    before = model(x)
    stir(adapter)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("spec", ["lora:rank=2", "dora:rank=2", "houlsby:rank=2"])
def test_hooks_that_came_after_an_adapter_may_outlive_it(spec):
    hooks, x = pytest.importorskip("accelerate.hooks"), torch.arange(6)[None] % toys.VOCAB
    model = toys.make_llama(tie_word_embeddings=False)
    expected = model(x).logits
    stir(ad.attach(model, spec))
    adapted = model(x).logits
    for module in list(model.modules()):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    assert torch.equal(model(x).logits, adapted)
    ad.detach(model)
    assert torch.equal(model(x).logits, expected)
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(x).logits, expected)
    stir(ad.attach(model, spec))  # the forward that the hooks have left on the instance is the class's own
    assert torch.equal(model(x).logits, adapted)


def test_a_forward_of_the_base_put_back_over_an_adapted_one_is_another():
    model = Alone(nn.Linear(4, 4))
    forward = model.inner.forward
    ad.attach(model, LORA, targets="inner")
    assert not has_another_forward(model.inner)
    model.inner.forward = forward
    assert has_another_forward(model.inner)


@pytest.mark.parametrize("spec", ["lora:rank=2", "miss:rank=2", "shira:density=0.1", "houlsby:rank=2"])
def test_what_was_offloaded_after_attach_is_told(spec, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = toys.make_llama(tie_word_embeddings=False)
    adapter = stir(ad.attach(model, spec))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(AddendaError, match=r"on the meta device, without values.*remove_hook_from_submodules"):
        model(torch.arange(6)[None])
    with pytest.raises(AddendaError, match=r"was not saved.*on the meta device"):
        adapter.save(tmp_path / "a.safetensors")
    assert not [*tmp_path.iterdir()]
    if "houlsby" not in spec:
        with pytest.raises(AddendaError, match="on the meta device, without values"):
            ad.merge(model)


@pytest.mark.parametrize("spec", ["lora:rank=2", "dora:rank=2", "houlsby:rank=2"])
@pytest.mark.parametrize("how", ["devices", "offload", "disk"])
def test_the_way_out_of_a_device_map_works(spec, how, tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")
    accelerate = pytest.importorskip("accelerate")
    x, cpu = torch.arange(6)[None] % toys.VOCAB, torch.device("cpu")
    model = toys.make_llama(tie_word_embeddings=False)
    expected, before = model(x).logits, {k: v.clone() for k, v in model.state_dict().items()}
    dispatch = {
        "devices": lambda: hooks.attach_align_device_hook(model, execution_device=cpu),
        "offload": lambda: accelerate.cpu_offload(model, execution_device=cpu),
        "disk": lambda: accelerate.disk_offload(model, str(tmp_path), execution_device=cpu),
    }[how]
    dispatch()
    with pytest.raises(AddendaError, match=r"accelerate.hooks.remove_hook_from_submodules\(model\)"):
        ad.attach(model, spec)
    hooks.remove_hook_from_submodules(model)
    stir(ad.attach(model, spec))
    adapted = model(x).logits
    assert not torch.equal(adapted, expected)
    if how == "devices":  # offloading takes the adapter's tensors along only where accelerate is told of them
        dispatch()
        torch.testing.assert_close(model(x).logits, adapted)
        hooks.remove_hook_from_submodules(model)
    ad.detach(model)
    assert torch.equal(model(x).logits, expected)
    assert same_bits(bits(model), before)


def test_dropout_without_an_input_to_drop_is_refused():
    model = Alone(nn.Embedding(8, 4))
    with pytest.raises(AddendaError, match="dropout acts on the input"):
        ad.attach(model, ad.LoRA(rank=2, dropout=0.1), targets="inner")
    with pytest.raises(AddendaError, match="dropout acts on the input"):
        ad.attach(model, ad.LoRA(rank=2, dropout=0.1), targets="inner.weight")


class Scaled(nn.Embedding):
    """Like Gemma's and BART's word embeddings."""

    def forward(self, ids):
        return super().forward(ids) * 3.0


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w, self.bias)


class OffsetLinear(nn.Linear):
    def forward(self, x, plus=0.0):
        return super().forward(x) + 1.0 + plus


@pytest.mark.parametrize(
    ("module", "x"),
    [(Scaled(9, 4), torch.arange(9)), (OffsetLinear(4, 6), torch.randn(3, 4))],
    ids=["embedding", "linear"],
)
def test_subclasses_with_a_forward_of_their_own_keep_it(module, x):
    model = Alone(module)
    before = model(x)
    adapter = ad.attach(model, LORA, targets=["inner"])
    assert torch.equal(model(x), before)
    stir(adapter, 0.3)
    (site,) = sites(model, adapter)
    W, y = effective(site, torch.float32), model(x)
    ad.detach(model)
    with torch.no_grad():
        model.inner.weight.copy_(W)
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)


def test_extra_arguments_reach_a_linear_subclass():
    model = Alone(OffsetLinear(4, 6))
    stir(ad.attach(model, LORA, targets=["inner"]))
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x, plus=2.0), model(x) + 2.0)


def test_a_standardised_convolution_is_no_plain_one():
    model = Alone(Standardised(2, 4, 3))
    with pytest.raises(AddendaError, match=r"inner\.weight.*4 dimensions"):
        ad.attach(model, LORA, targets="inner")


# -- every method at raw parameters and where parents read weights ---------------------------------------------------


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat = nn.Parameter(torch.randn(16, 8))
        self.stack = nn.Parameter(torch.randn(3, 8, 16))
        self.reads = 0

    def forward(self, x):
        x = torch.tanh(x @ self.flat.t())
        return sum(torch.tanh(x @ self.stack[e].t()) for e in range(3)) @ self.flat.t()


@pytest.mark.on_device
@pytest.mark.parametrize("name", NAMES)
def test_raw_matrices_and_stacks(name, device):
    torch.manual_seed(0)
    model, x = Raw().eval().to(device), torch.randn(4, 8).to(device)
    if sees_nothing(model, name, x, ["flat", "stack"]):
        return
    before, clean = model(x), bits(model)
    adapter = attach(model, name, x, targets=["flat", "stack"])
    assert torch.equal(model(x), before) or METHODS[name].start.bound > 0
    stir(adapter, 0.1)
    adapted = model(x)
    assert not torch.equal(adapted, before)
    weights = {s.path: effective(s, torch.float32) for s in sites(model, adapter)}
    twin = Raw().eval().to(device)
    twin.load_state_dict(weights)
    assert relative(adapted, twin(x)) < 1e-5
    adapted.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapter.parameters())
    ad.merge(model, verify=x)
    assert relative(model(x), adapted) < 1e-5
    ad.detach(model)
    assert same_bits(bits(model), clean)
    assert torch.equal(model(x), before)


@pytest.mark.on_device
@pytest.mark.parametrize("name", NAMES)
def test_stacks_are_adapted_one_matrix_at_a_time(name, tmp_path, device):
    torch.manual_seed(0)
    model, x = Raw().eval().to(device), torch.randn(4, 8).to(device)
    if sees_nothing(model, name, x, "stack"):
        return
    adapter = stir(attach(model, name, x, targets="stack"), 0.1)
    assert adapter.trainable == 3 * METHODS[name].trainable(8, 16) + METHODS[name].pooled([(8, 16)])
    y = model(x)
    file = adapter.save(tmp_path / "a.safetensors", basis=True)
    ad.detach(model)
    ad.load(model, file)
    assert torch.equal(model(x), y)
    model.train()
    adapter = ad.adapters(model)["default"].requires_grad_()
    for step in range(3):  # schedules reach every matrix of the stack
        model(x).square().sum().backward()
        adapter.draw(step)


def test_a_raw_parameter_is_computed_once_in_a_forward(monkeypatch):
    model, x = Raw(), torch.randn(4, 8)
    ad.attach(model, LORA, targets=["flat", "stack"])
    calls = []
    import addenda.core.forward.adapted as adapted

    real = adapted.effective
    monkeypatch.setattr(adapted, "effective", lambda *a: calls.append(1) or real(*a))
    model(x)
    assert len(calls) == 2
    assert slots_of(model).now is None
    with torch.no_grad():
        model(x)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(4, 7))
    assert slots_of(model).now is None


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # dynamo's own
def test_raw_parameters_compile_whole():
    model, x = Raw(), torch.randn(4, 8)
    adapter = stir(ad.attach(model, LORA, targets=["flat", "stack"]), 0.2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    ad.switch(model, None)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_raw_parameters_under_autocast_are_changed_in_float32():
    model, x = Raw(), torch.randn(4, 8)
    stir(ad.attach(model, LORA, targets="flat"), 0.3)
    plain = model.flat
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.flat, plain)
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("name", NAMES)
def test_multihead_attention_reads_its_weights(name):
    torch.manual_seed(0)
    model, x = Alone(nn.MultiheadAttention(8, 2, batch_first=True)).eval(), torch.randn(2, 5, 8)
    before, targets = model(x, x, x), ["inner.out_proj", "inner.in_proj_weight"]
    if sees_nothing(model, name, x, targets):
        return
    adapter = attach(model, name, x, targets=targets, loss=lambda m, x: m(x, x, x).square().mean())
    assert set(adapter.methods) == {"inner.out_proj.weight", "inner.in_proj_weight"}
    stir(adapter, 0.2)
    check_against_plain_weights(model, adapter, before, x, x, x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [True, False])
def test_the_encoder_layers_fast_path_sees_the_change(name, grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = Alone(layer).eval(), torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad):
        before = model(x)
        if sees_nothing(model, name, x, "linear"):
            return
        adapter = attach(model, name, x, targets="linear")
        assert sorted(p.rpartition(".")[0] for p in adapter.methods) == [
            "inner.linear1", "inner.linear2", "inner.self_attn.out_proj",
        ]  # fmt: skip
        stir(adapter, 0.2)
        check_against_plain_weights(model, adapter, before, x)


def check_against_plain_weights(model, adapter, before, *inputs):
    adapted = model(*inputs)
    weights = {s.path: effective(s, torch.float32) for s in sites(model, adapter)}
    ad.switch(model, None)
    torch.testing.assert_close(model(*inputs), before)  # not torch.equal: frozen layers may take torch's fast path
    ad.detach(model)
    model.load_state_dict({**model.state_dict(), **weights})
    assert relative(adapted, model(*inputs)) < 1e-5
    assert relative(before, model(*inputs)) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_conv1d_of_gpt2(name, gpt2, ids):
    before = gpt2(ids).logits
    adapter = stir(attach(gpt2, METHODS[name], ids, targets="linear"), 0.2)
    adapted = gpt2(ids).logits
    weights = {f"{s.path}.weight": effective(s, torch.float32) for s in sites(gpt2, adapter)}
    ad.detach(gpt2)
    assert torch.equal(gpt2(ids).logits, before)
    gpt2.load_state_dict({**gpt2.state_dict(), **weights})
    assert relative(adapted, gpt2(ids).logits) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_fused_experts(name, mixtral, ids):
    before, targets = mixtral(ids).logits, ["*.experts.*", "q_proj"]
    if sees_nothing(mixtral, name, ids, targets):
        return
    adapter = attach(mixtral, name, ids, targets=targets)
    assert torch.equal(mixtral(ids).logits, before) or METHODS[name].start.bound > 0
    mixtral(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    stir(adapter, 0.2)
    adapted = mixtral(ids).logits
    weights = {s.path if s.kind == PARAMETER else f"{s.path}.weight": effective(s, torch.float32)
               for s in sites(mixtral, adapter)}  # fmt: skip
    ad.detach(mixtral)
    mixtral.load_state_dict({**mixtral.state_dict(), **weights})
    assert relative(adapted, mixtral(ids).logits) < 1e-4


def test_parametrized_originals_and_old_weight_norm_follow():
    for wrap, path in (
        (parametrizations.weight_norm, "inner.parametrizations.weight.original1"),
        (parametrizations.orthogonal, "inner.parametrizations.weight.original"),
    ):
        torch.manual_seed(0)
        model, x = Alone(wrap(nn.Linear(4, 4))), torch.randn(3, 4)
        before = model(x)
        adapter = ad.attach(model, LORA, targets=path)
        torch.testing.assert_close(model(x), before)
        stir(adapter, 0.5)
        assert relative(model(x), before) > 1e-3
        ad.detach(model)
        torch.testing.assert_close(model(x), before)


def test_parameter_lists_and_dicts():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.many = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
            self.named = nn.ParameterDict({"a": torch.randn(4, 4)})

        def forward(self, x):
            return x @ self.many[0] @ self.many[1] @ self.named["a"]

    model, x = Lists(), torch.randn(2, 4)
    before = model(x)
    adapter = stir(ad.attach(model, LORA, targets="parameters"), 0.5)
    assert list(adapter.methods) == ["many.0", "many.1", "named.a"]
    y = model(x)
    W = [effective(s, torch.float32) for s in sites(model, adapter)]
    torch.testing.assert_close(y, x @ W[0] @ W[1] @ W[2])
    ad.detach(model)
    assert torch.equal(model(x), before)


def test_a_module_used_twice_is_one_site():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    adapter = ad.attach(model, LORA, targets="linear")
    assert list(adapter.methods) == ["0"]
    x = torch.randn(2, 4)
    stir(adapter, 0.3)
    (site,) = sites(model, adapter)
    W = effective(site, torch.float32)
    once = nn.functional.linear(x, W, shared.bias)
    torch.testing.assert_close(model(x), nn.functional.linear(torch.tanh(once), W, shared.bias))


def test_a_trained_bias_acts_beside_an_adapted_weight(tiny, ids):
    adapter = ad.attach(tiny, LORA, targets="up_proj", also_train=["layers.0.up_proj.bias"])
    before, y = bits(tiny), tiny(ids)
    train(tiny, adapter, ids, torch.optim.SGD(adapter.parameters(), lr=0.1), 2)
    with torch.no_grad():
        adapter.state_dict()["layers.0.up_proj.bias/value"].add_(1.0)
    assert not torch.equal(tiny(ids), y)
    ad.switch(tiny, None)
    assert torch.equal(tiny(ids), y)
    assert same_bits(bits(tiny), before)
