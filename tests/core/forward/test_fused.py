"""The fused paths against dense algebra, and what they keep between forward and backward."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

import addenda as ad
from addenda.core.forward.fused import factored_linear
from addenda.core.method.contract import Factors

M, N, R, TOKENS = 7, 5, 3, 4


def numbers(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


FORMS = {
    "plain": (None, None, None),
    "diagonal": (numbers(R, seed=1), None, None),
    "entries": (numbers(4, seed=2), torch.tensor([0, 3, 4, 8], dtype=torch.int32), None),
    "rows": (None, None, numbers(M, seed=3)),
    "rows and diagonal": (numbers(R, seed=4), None, numbers(M, seed=5)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_values_and_gradients_are_those_of_the_dense_form(form, with_bias, with_c, drop):
    x, W, B, A = numbers(2, TOKENS, N), numbers(M, N), numbers(M, R), numbers(R, N)
    bias, c = numbers(M, seed=6) if with_bias else None, numbers(M, seed=7) if with_c else None
    middle, index, rows = FORMS[form]

    def run(x, W, bias, c, B, A, middle, rows):
        torch.manual_seed(1)  # the same entries are dropped every time
        return factored_linear(x, drop, W, bias, c, Factors(B, A, middle, index, rows, False))

    arguments = (x, W, bias, c, B, A, middle, rows)
    assert gradcheck(run, arguments, eps=1e-6, atol=1e-6)
    if drop == 0:
        left, right = Factors(B, A, middle, index, rows).pair()
        dense = W + left @ right
        want = x @ (dense if c is None else c[:, None] * dense).T + (0 if bias is None else bias)
        torch.testing.assert_close(run(*arguments), want)


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("side", [R, N, 2])  # of the identities: the last one cut, none, whole ones
def test_sums_are_the_product_with_identities(side, drop):
    width = N if side != 2 else 6
    x, W, B, middle = numbers(2, TOKENS, width), numbers(M, width), numbers(M, side), numbers(side, seed=1)
    A = torch.eye(side, dtype=torch.float64).repeat(1, width)[:, :width]

    def run(x, W, B, middle, sums=True):
        torch.manual_seed(1)
        return factored_linear(x, drop, W, None, None, Factors(B, A, middle, None, None, sums))

    assert gradcheck(run, (x, W, B, middle), eps=1e-6, atol=1e-6)
    torch.testing.assert_close(run(x, W, B, middle), run(x, W, B, middle, sums=False))


def test_dropout_leaves_the_mean_and_acts_on_the_change_alone():
    x, W, B, A = (t.detach() for t in (numbers(1, N), numbers(M, N), numbers(M, R), numbers(R, N)))
    torch.manual_seed(0)
    y = factored_linear(x.expand(20000, N), 0.4, W, None, None, Factors(B, A, None, None, None, False))
    torch.testing.assert_close(y.mean(0), (x @ (W + B @ A).T)[0], rtol=0.05, atol=0.05)
    zero = factored_linear(x, 0.4, W, None, None, Factors(torch.zeros_like(B), A, None, None, None, False))
    assert torch.equal(zero, x @ W.T)


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, parameters and the input itself left out; each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(size for at, size in found.items() if at not in own)


WIDTH, SEEN = 64, 512
KEPT = {  # numbers a token besides the input, which adapted neighbours share
    "lora:rank=4": 4,
    "dora:rank=4": 4 + WIDTH,  # the output, which its reader mostly keeps anyway
    "loldu:rank=4": 4,
    "vera:rank=16": 16,
    "svft:pattern=banded,band=2": WIDTH,
    "miss:rank=8": 8,
    "shira": 0,
    "shira:mask=block,block=16": 0,
    "oft:block=4": 0,
}


@pytest.mark.parametrize("method", KEPT)
def test_what_is_kept_for_backward(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).bfloat16()
    x = torch.randn(SEEN, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    ad.attach(model, method, targets="0")
    assert kept(model, x) <= 2 * SEEN * KEPT[method] + 4 * 16 * WIDTH, "no copy of the input, of a weight or the output"


def test_the_input_is_kept_only_where_it_is_needed():
    x = numbers(TOKENS, N)
    W, B, A = numbers(M, N).detach(), numbers(M, R), numbers(R, N)
    for frozen in (False, True):
        y = factored_linear(x, 0.0, W, None, None, Factors(B, A.detach() if frozen else A, None, None, None, False))
        saved = [t for t in y.grad_fn.saved_tensors if t is not None]
        assert any(t.data_ptr() == x.data_ptr() for t in saved) is not frozen


def test_two_low_rank_adapters_run_as_one_product(tiny, ids):
    ad.attach(tiny, "lora:rank=2", targets="linear", name="a")
    ad.attach(tiny, "svft:pattern=banded,band=1", targets="linear", name="b")
    for adapter in ad.adapters(tiny).values():
        for p in adapter.parameters():
            nn.init.normal_(p, std=0.1)
    linear = tiny.layers[0].up_proj
    eye = torch.eye(linear.in_features)
    bias = linear(0 * eye)
    W = bias.new_zeros(linear.weight.shape) - linear.weight.detach()
    for name in ("a", "b"):
        ad.switch(tiny, name)
        W = W + (linear(eye) - bias).T
    ad.switch(tiny, ["a", "b"])
    y = linear(eye)
    assert type(y.grad_fn).__name__ == "FactoredLinearBackward"
    torch.testing.assert_close(y, W.T + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", ["lora:rank=2", "dora:rank=2", "shira", "houlsby:rank=2"])
@pytest.mark.parametrize("recording", [True, False])
def test_exports(recording, name, tiny, ids):
    adapter = ad.attach(tiny.eval(), name)
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.05 * torch.randn_like(p)
    with torch.set_grad_enabled(recording):
        made = torch.export.export(tiny, (ids,)).module()
    torch.testing.assert_close(made(ids), tiny(ids))


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_narrower_adapter_costs_no_precision_without_gradients(tokens):
    x, W, B, A = (t.detach().float() for t in (numbers(tokens, N), numbers(M, N), numbers(M, R), numbers(R, N)))
    factors = Factors(B.bfloat16(), A.bfloat16())
    want = factored_linear(x, 0.0, W, None, None, factors)
    with torch.no_grad():
        torch.testing.assert_close(factored_linear(x, 0.0, W, None, None, factors), want)
        wide = factored_linear(x.bfloat16(), 0.0, W.bfloat16(), None, None, Factors(B, A))
    assert wide.dtype == torch.bfloat16
