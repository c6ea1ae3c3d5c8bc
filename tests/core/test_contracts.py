"""The contracts of DESIGN.md, over every method of the catalogue: a new method is tested by existing.

With --device they run there, but for those that say why not.
"""

import copy
import io
import json
import multiprocessing
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.forward.slots import slots_of
from addenda.core.method.contract import to_float
from addenda.core.site.site import site_at
from shared import (
    EVERY,
    METHODS,
    NAMES,
    attach,
    bits,
    effective,
    flags,
    loss_of,
    relative,
    same_bits,
    sees_nothing,
    sites,
    stir,
    train,
    where,
    with_weight,
)

pytestmark = pytest.mark.on_device

every_method = pytest.mark.parametrize("name", EVERY)
every_weight_method = pytest.mark.parametrize("name", NAMES)

# -- 1. start ------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_start_is_the_base_as_declared(name, dtype, tiny, ids):
    tiny.to(dtype)
    expected = tiny(ids)
    adapter = attach(tiny, name, ids, targets=where(name))
    start = METHODS[name].start
    if start.bound == 0:
        assert torch.equal(tiny(ids), expected)
        assert torch.equal(tiny(ids).detach(), expected.detach()), "a second call too"
    else:
        assert start.why
        for site in sites(tiny, adapter):
            W = site.weight.float()
            assert relative(effective(site, torch.float32), W) <= start.bound


@every_method
def test_seed_and_path_decide_the_start_and_nothing_else_does(name, tiny, ids):
    torch.manual_seed(1)
    one = attach(tiny, name, ids, targets=where(name), seed=5).state_dict()
    one = {k: v.clone() for k, v in one.items()}
    ad.detach(tiny)
    torch.manual_seed(2)
    torch.rand(3)
    fewer = {"targets": "*.q_proj"} if name in NAMES else {"exclude": "layers.0*"}
    two = attach(tiny, name, ids, **fewer, seed=5).state_dict()
    assert two
    assert all(torch.equal(v, one[k]) for k, v in two.items())


@every_method
def test_trainable_count_is_the_formula(name, tiny, ids):
    adapter = attach(tiny, name, ids, targets=where(name))
    for path, tensors in adapter.sites():
        count = METHODS[name].trainable(*site_at(tiny, path).shape)
        assert sum(p.numel() for p in tensors._parameters.values()) == count, path


# -- 2. gradients --------------------------------------------------------------------------------------------------


def dense_gradients(site, x, live):
    """y and gradients through the dense effective weight, by autograd alone."""
    leaves = []
    W = site.kind.to_matrix(site.weight.detach())
    total = W
    for tensors in live:
        p = {k: t.detach().clone().requires_grad_(t.requires_grad) for k, t in tensors.tensors().items()}
        leaves += [p[k.removeprefix("pool.")] for k, _ in tensors.named_parameters()]
        total = total + tensors.method.effective(W, to_float(p, W.dtype)) - W
    bias = getattr(site.module, "bias", None)
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = with_weight(site, x, site.kind.from_matrix(total, site.weight))
    return y, x, leaves


def layers():
    yield "linear", nn.Linear(8, 16), torch.randn(2, 5, 8)
    yield "linear without bias", nn.Linear(16, 8, bias=False), torch.randn(3, 16)
    yield "one vector", nn.Linear(8, 8), torch.randn(8)
    yield "strided input", nn.Linear(8, 16), torch.randn(5, 8, 2).permute(2, 0, 1)
    yield "empty batch", nn.Linear(8, 16), torch.randn(0, 8)
    yield "conv1d", nn.Conv1d(4, 8, 4, padding=1, groups=2, bias=False), torch.randn(2, 4, 9)
    yield "conv2d", nn.Conv2d(4, 8, 2, stride=2, padding=1, padding_mode="reflect"), torch.randn(2, 4, 6, 6)
    yield "conv3d", nn.Conv3d(4, 8, (1, 2, 1), dilation=2, padding=2, groups=1), torch.randn(1, 4, 3, 4, 3)
    yield "depthwise", nn.Conv2d(8, 8, 2, groups=8, padding_mode="replicate", padding=1), torch.randn(2, 8, 4, 4)
    yield "embedding", nn.Embedding(16, 8, padding_idx=3), torch.tensor([[0, 3, 5], [3, 15, 5]])
    yield "sparse embedding", nn.Embedding(16, 8, sparse=True), torch.tensor([[0, 3, 5], [3, 15, 5]])


LAYERS = [name for name, _, _ in layers()]


def layer_of(kind, device="cpu"):
    torch.manual_seed(3)
    module, x = next((m, x) for n, m, x in layers() if n == kind)
    if kind == "embedding":
        nn.init.normal_(module.weight)  # the row of padding_idx is seldom zero in pretrained models
    x = x.double() if x.is_floating_point() else x
    return nn.Sequential(module).double().to(device), x.to(device)


@every_weight_method
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_gradients_equal_the_dense_form(name, kind, device):
    model, x = layer_of(kind, device)
    reason = METHODS[name].check(*site_at(model, "0").shape)
    if reason:  # a clear refusal: site and reason
        with pytest.raises(AddendaError, match=rf"0: {re.escape(reason)}"):
            attach(model, name, x, targets="0")
        assert not slots_of(model[0])
        return
    data = x if len(x) else torch.randn(3, 8, dtype=x.dtype).to(device)  # an empty batch has nothing to calibrate with
    if sees_nothing(model, name, data, "0"):
        return
    adapter = attach(model, name, data, targets="0")
    adapter = stir(adapter, 0.3)
    for p in adapter.parameters():
        p.data = p.data.double()
    site = site_at(model, "0")
    live = slots_of(model[0]).live["weight"]
    y0, x0, leaves = dense_gradients(site, x, live)
    x1 = x.detach().clone().requires_grad_() if x.is_floating_point() else x
    y1 = model(x1)
    torch.testing.assert_close(y1, y0, rtol=1e-5, atol=1e-6)
    g = torch.randn(y0.shape, dtype=y0.dtype).to(device)
    y0.backward(g)
    y1.backward(g)
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if all(t.dtype != torch.float32 for t in live[0].tensors().values()) else {
        "rtol": 1e-4, "atol": 1e-5}  # fmt: skip
    if x.is_floating_point():
        torch.testing.assert_close(x1.grad, x0.grad, **tolerance)
    detaches = getattr(METHODS[name], "detaches", False)
    for mine, theirs in zip(adapter.parameters(), leaves, strict=True):
        if not detaches:
            expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(mine.grad, expected, **tolerance)


@every_method
def test_only_what_needs_a_gradient_gets_one(name, tiny, ids):
    adapter = attach(tiny, name, ids, targets=where(name))
    loss_of(tiny, ids).backward()
    assert all(p.grad is None for n, p in tiny.named_parameters() if ".addenda." not in n)
    assert all(p.grad is not None for p in adapter.parameters())
    adapter.requires_grad_(False)
    assert not tiny(ids).requires_grad


@every_weight_method
def test_unfrozen_base_gets_the_gradients_of_the_dense_form(name, device):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16)).double().to(device), torch.randn(3, 8, dtype=torch.float64).to(device)
    stir(attach(model, name, x, targets="0", freeze=False), 0.2)
    for p in model.parameters():
        p.data = p.data.double()
    site = site_at(model, "0")
    (tensors,) = slots_of(model[0]).live["weight"]
    W = model[0].weight.detach().clone().requires_grad_()
    p = to_float({k: t.detach() for k, t in tensors.tensors().items()}, torch.float64)
    y = nn.functional.linear(x, tensors.method.effective(W, p), model[0].bias.detach())
    if not y.requires_grad:  # a whole copy: W plays no part
        return
    y.square().sum().backward()
    model(x).square().sum().backward()
    assert model[0].bias.grad is not None
    assert model[0].weight.grad is not None
    if not METHODS[name].has("apply"):  # an activation form may hold W fixed: PiSSA's and OFT's own convention
        torch.testing.assert_close(model[0].weight.grad, W.grad, rtol=1e-5, atol=1e-6)
    assert site.weight is model[0].weight


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "dropout" in m.__dataclass_fields__])
def test_dropout_acts_in_training_only(name, tiny, ids):
    entry = METHODS[name]
    method = type(entry)(**(entry.options() | {"dropout": 0.5}))
    stir(attach(tiny, method, ids, targets=where(name)), 0.5)
    tiny.eval()
    assert torch.equal(tiny(ids), tiny(ids))
    tiny.train()
    assert not torch.equal(tiny(ids), tiny(ids))
    with ad.disabled(tiny):
        assert torch.equal(tiny(ids), tiny(ids))


# -- 3. nothing else changes ---------------------------------------------------------------------------------------


@every_method
def test_attach_adds_and_detach_takes_away_nothing_of_the_base(name, tiny, ids):
    tiny.layers[0].requires_grad_(False)
    classes = [type(m) for m in tiny.modules()]
    keys, before, bits0 = list(tiny.state_dict()), flags(tiny), bits(tiny)
    expected = tiny(ids)
    stir(attach(tiny, name, ids, targets=where(name)))
    assert list(bits(tiny)) == keys
    assert isinstance(tiny.layers[0].up_proj, nn.Linear)
    assert not any(flags(tiny).values())
    assert not torch.equal(tiny(ids), expected)
    ad.detach(tiny)
    assert [type(m) for m in tiny.modules()] == classes
    assert list(tiny.state_dict()) == keys
    assert flags(tiny) == before
    assert same_bits(bits(tiny), bits0)
    assert torch.equal(tiny(ids), expected)
    assert "_addenda" not in tiny.__dict__


@every_method
def test_deepcopy_and_pickle(name, tiny, ids):
    stir(attach(tiny, name, ids, targets=where(name)))
    expected = tiny(ids)
    twins = [copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))]
    buffer = io.BytesIO()
    torch.save(tiny, buffer)
    buffer.seek(0)
    twins.append(torch.load(buffer, weights_only=False))
    for twin in twins:
        assert torch.equal(twin(ids), expected)
        stir(ad.adapters(twin)["default"], seed=9)
        assert not torch.equal(twin(ids), expected), "the copy's tensors are the copy's"
        assert torch.equal(tiny(ids), expected)
        ad.switch(twin, None)
        ad.switch(twin, "default")
        assert not torch.equal(twin(ids), expected)
        ad.detach(twin)
        assert type(twin.layers[0].up_proj) is nn.Linear


def _outputs_in_child(payload: bytes, queue) -> None:
    torch.set_num_threads(1)
    model, ids = pickle.loads(payload)
    queue.put({name: twin(ids).tolist() for name, twin in model.items()})


@pytest.mark.cpu_only("compares with the outputs of another process, which has no device of its own")
def test_pickle_to_a_spawned_process(tiny, ids):
    base = tiny.state_dict()
    models = {}
    for name in EVERY:
        twin = copy.deepcopy(tiny)
        twin.load_state_dict(base)
        stir(attach(twin, name, ids, targets=where(name)))
        models[name] = twin
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_outputs_in_child, args=(pickle.dumps((models, ids)), queue))
    child.start()
    found = queue.get(timeout=120)
    child.join()
    for name, model in models.items():
        assert torch.equal(torch.tensor(found[name]), model(ids)), name


# -- 4. agreement --------------------------------------------------------------------------------------------------


@every_weight_method
def test_forms_agree(name, tiny, ids, device):
    adapter = stir(attach(tiny, name, ids, targets="linear"), 0.2)
    for path, tensors in adapter.sites():
        site, m = site_at(tiny, path), tensors.method
        W, p = site.matrix.double(), to_float(tensors.tensors(), torch.float64)
        delta = m.delta(W, p)
        assert delta.shape == W.shape
        assert relative(m.effective(W, p) - W, delta) < 1e-9
        if m.has("factors"):
            B, A = m.factors(p, site.shape).pair()
            dense = (W + B @ A) * m.magnitude(W, p)[:, None] - W if m.has("magnitude") else B @ A
            assert relative(dense, delta) < 1e-6
        if m.has("sparse"):
            index, values = m.sparse(p, site.shape)
            assert bool((index.diff() > 0).all())
            flat = W.new_zeros(W.numel()).index_add(0, index.long(), values.double())
            assert relative(flat.view_as(W), delta) < 1e-9
        x = torch.randn(4, site.shape[1]).to(device)
        expected = nn.functional.linear(x.double(), W + delta, None if site.module.bias is None else
                                        site.module.bias.double())  # fmt: skip
        assert relative(site.module(x), expected) < 1e-5


@every_weight_method
def test_merged_equals_adapter_and_unmerge_is_exact(name, tiny, ids):
    tiny.eval()
    stir(attach(tiny, name, ids, targets="linear"))
    before, adapted = bits(tiny), tiny(ids)
    report = ad.merge(tiny, verify=ids)
    assert relative(tiny(ids), adapted) < 1e-5
    assert max(report.sites.values()) < 1e-4
    ad.unmerge(tiny)
    assert same_bits(bits(tiny), before)
    assert torch.equal(tiny(ids), adapted)


@every_method
def test_bfloat16_stays_within_twice_the_noise_floor(name, tiny, ids):
    exact = copy.deepcopy(tiny).bfloat16().float()  # the same rounded weights, so that arithmetic is all that differs
    theirs = stir(attach(exact, name, ids, targets=where(name)))
    tiny.bfloat16()
    base_noise = relative(tiny(ids), copy.deepcopy(tiny).float()(ids))
    attach(tiny, name, ids, targets=where(name)).load_state_dict(theirs.state_dict())  # what came from data differs
    assert relative(tiny(ids), exact(ids)) < 2 * base_noise + 0.01


# -- 5. files ------------------------------------------------------------------------------------------------------

CHILD = """
    import json, sys
    sys.path[:0] = json.loads(sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from toys import Tiny
    import addenda as ad

    torch.manual_seed(123)
    folder, names = sys.argv[2], json.loads(sys.argv[3])
    ids = torch.load(f"{folder}/ids.pt")
    for name in names:
        for form in ("plain", "basis"):
            model = Tiny()
            model.load_state_dict(torch.load(f"{folder}/base.pt"))
            ad.load(model, f"{folder}/{name}-{form}.safetensors", name="other-name")
            expected = torch.load(f"{folder}/{name}.pt")
            print(name, form, torch.equal(model(ids), expected))
"""


@pytest.mark.cpu_only("compares bits with those of another process, on the CPU")
def test_save_and_load_in_a_fresh_process(tiny, ids, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "base.pt")
    torch.save(ids, tmp_path / "ids.pt")
    for name in EVERY:
        adapter = stir(attach(tiny, name, ids, targets=where(name), also_train=["score"], seed=7))
        torch.save(tiny(ids).detach(), tmp_path / f"{name}.pt")
        adapter.save(tmp_path / f"{name}-plain.safetensors")
        adapter.save(tmp_path / f"{name}-basis.safetensors", basis=True)
        ad.detach(tiny)
    here = Path(__file__).parent
    paths = [str(here.parent)]
    arguments = [json.dumps(paths), str(tmp_path), json.dumps(EVERY)]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(CHILD), *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == 2 * len(EVERY)
    assert all(line.endswith("True") for line in lines), done.stdout


@every_method
def test_another_base_is_refused_and_another_dtype_is_compatible(name, tiny, ids, tmp_path):
    adapter = stir(attach(tiny, name, ids, targets=where(name)))
    file, expected = adapter.save(tmp_path / "a.safetensors"), tiny(ids)
    *_, last = sites(tiny, adapter)
    count, weight = len(adapter.methods), last.weight
    basis = adapter.save(tmp_path / "b.safetensors", basis=True)
    ad.detach(tiny)
    half = copy.deepcopy(tiny).bfloat16()
    with pytest.raises(AddendaError, match=r"other base weights.*base='compatible'.*Nothing was loaded"):
        ad.load(half, file)
    assert not any(slots_of(m) for m in half.modules())
    ad.load(half, basis, base="compatible")
    assert relative(half(ids), expected) < 0.1
    with torch.no_grad():
        weight[0, 0] += 1e-6
    with pytest.raises(AddendaError, match=rf"1 of {count} sites differ.*{re.escape(last.path)}"):
        ad.load(tiny, file)
    nn.init.normal_(weight)
    with pytest.raises(AddendaError, match="another model"):
        ad.load(tiny, file, base="compatible")


# -- 6. frozen is frozen -------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_training_leaves_the_base_alone(name, kind, tiny, ids):
    before = bits(tiny)
    adapter = attach(tiny, name, ids, targets=where(name))
    optimizer = (
        torch.optim.AdamW(tiny.parameters(), lr=0.02, weight_decay=0.5)
        if kind == "adamw"
        else torch.optim.SGD(tiny.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    )
    first = float(loss_of(tiny, ids).detach())
    train(tiny, adapter, ids, optimizer, 4)
    assert same_bits(bits(tiny), before)
    assert float(loss_of(tiny, ids).detach()) != first
    ad.switch(tiny, None)
    assert same_bits(bits(tiny), before)


def test_switching_is_exact_in_any_order(tiny, ids):
    outputs = {None: tiny(ids)}
    for name in EVERY:
        stir(attach(tiny, name, ids, targets=where(name), name=name), 0.1)
        outputs[name] = tiny(ids)
    g = torch.Generator().manual_seed(0)
    order = [[*EVERY, None][i] for _ in range(4) for i in torch.randperm(len(EVERY) + 1, generator=g)]
    for name in order:
        ad.switch(tiny, name)
        assert torch.equal(tiny(ids), outputs[name]), name


@every_weight_method
def test_several_at_once_are_the_sum_of_their_deltas(name, tiny, ids, device):
    tiny.eval()
    others = [n for n in ("lora", "shira", "oft") if n != name]
    one = stir(attach(tiny, name, ids, targets="linear", name="one"), 0.1, seed=2)
    deltas = {s.path: effective(s, torch.float32) - s.weight for s in sites(tiny, one)}
    for other in others:
        ad.switch(tiny, None)
        adapter = stir(attach(tiny, other, ids, targets="linear", name=other), 0.1, seed=3)
        for s in sites(tiny, adapter):
            deltas[s.path] = deltas[s.path] + effective(s, torch.float32) - s.weight
    ad.switch(tiny, ["one", *others])
    for s in sites(tiny, one):
        expected = s.weight + deltas[s.path]
        assert relative(effective(s, torch.float32), expected) < 1e-5
        x = torch.randn(3, s.shape[1]).to(device)
        assert relative(s.module(x), nn.functional.linear(x, expected, s.module.bias)) < 1e-5
    loss_of(tiny, ids).backward()
    assert all(p.grad is not None for a in ad.adapters(tiny).values() for p in a.parameters())
    adapted = tiny(ids)
    ad.merge(tiny, verify=ids)
    assert relative(tiny(ids), adapted) < 1e-5


# -- execution around it -------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(name, reentrant, tiny, ids):
    adapter = stir(attach(tiny, name, ids, targets=where(name)), 0.1)

    def run(checkpointed: bool):
        x = tiny.embed(ids).requires_grad_()
        for layer in tiny.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        tiny.score(x).square().mean().backward()
        found = [p.grad.clone() for p in adapter.parameters()]
        for p in adapter.parameters():
            p.grad = None
        return found

    pooled = {id(p) for _, pool in adapter.pools() for p in pool.parameters()}  # sums over sites, in another order
    for p, a, b in zip(adapter.parameters(), run(False), run(True), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-9) if id(p) in pooled else torch.equal(a, b)


@every_method
def test_autocast_agrees_with_plain(name, tiny, ids, device):
    with torch.autocast(device.type, torch.bfloat16):
        base = tiny(ids)
    noise = relative(base, tiny(ids))
    adapter = stir(attach(tiny, name, ids, targets=where(name)), 0.1)
    loss_of(tiny, ids).backward()
    plain, grads = tiny(ids), torch.cat([p.grad.flatten() for p in adapter.parameters()])
    for p in adapter.parameters():
        p.grad = None
    with torch.autocast(device.type, torch.bfloat16):
        y = tiny(ids)
        loss = loss_of(tiny, ids)
    loss.backward()
    assert y.dtype == torch.bfloat16
    assert relative(y, plain) < 2 * noise + 0.02
    found = torch.cat([p.grad.flatten() for p in adapter.parameters()])
    assert all(p.grad.dtype == p.dtype for p in adapter.parameters())
    assert relative(found, grads) < 0.1


@every_method
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # dynamo's own
def test_compiles_whole(name, tiny, ids, device):
    adapter = stir(attach(tiny, name, ids, targets=where(name)), 0.1)
    expected = tiny(ids)
    expected.square().mean().backward()
    grads = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    torch._dynamo.reset()
    part = tiny.layers[0].up_proj if name in NAMES else tiny.layers[0]
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 8).to(device)
    torch.testing.assert_close(compiled(x), part(x), rtol=1e-5, atol=1e-6)
    loss_of(tiny, ids).backward()
    torch.testing.assert_close([p.grad for p in adapter.parameters()], grads)
    torch._dynamo.reset()


@every_method
def test_keyword_input_and_mutation_of_the_model(name, tiny, ids, device):
    adapter = stir(attach(tiny, name, ids, targets=where(name)), 0.1)
    up, x = tiny.layers[0].up_proj, torch.randn(3, 8).to(device)
    part, key = (up, "input") if name in NAMES else (tiny.layers[0], "x")
    x = x if name in NAMES else torch.randn(2, 3, 8).to(device)
    assert torch.equal(part(**{key: x}), part(x))
    expected = tiny(ids)
    state = copy.deepcopy(tiny.state_dict())
    stir(adapter, 0.3, seed=4)
    assert not torch.equal(tiny(ids), expected)
    tiny.load_state_dict(state)
    assert torch.equal(tiny(ids), expected)
    tiny.to(torch.float64)
    assert relative(tiny(ids), expected) < 1e-5
    tiny.to(torch.bfloat16)
    assert tiny(ids).dtype == torch.bfloat16
    assert relative(tiny(ids), expected) < 0.1
    ad.detach(tiny)
    assert type(up) is nn.Linear
