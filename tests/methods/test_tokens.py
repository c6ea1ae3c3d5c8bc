"""Trainable tokens: the rows named are trained, all others keep their bits, a tied head follows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import addenda as ad
from addenda import AddendaError, attach
from addenda.core.method.contract import to_float
from addenda.methods.tokens import TrainableTokens


def test_reference(check):
    at = check.make(TrainableTokens(tokens="7+2-4"), 10, 6)
    want = torch.zeros(10, 6, dtype=torch.float64)
    for k, row in enumerate((2, 3, 4, 7)):
        want[row] = at.p["values"].detach()[k]
    torch.testing.assert_close(at.delta.detach(), want, rtol=0, atol=0)
    check.forms_agree(at)
    G, got = check.upstream(at)[1], check.gradients(at)
    torch.testing.assert_close(got["values"], G[[2, 3, 4, 7]], rtol=1e-12, atol=1e-12)


def test_start_and_counts(check):
    method = TrainableTokens(tokens="0-2+40")
    check.starts_exactly(method)
    check.starts_exactly(method, 50, 70)
    check.counts(method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_of_which_three_rows_are_trained(dtype):
    model = nn.Sequential(nn.Embedding(12, 6)).to(dtype)
    with torch.no_grad():
        model[0].weight[1] = -0.0
    W, ids = model[0].weight.detach().clone(), torch.arange(12).repeat(2).view(4, 6)
    adapter = attach(model, "trainable-tokens:tokens=5+7+9")  # targets the embedding by itself
    assert list(adapter.methods) == ["0"] and adapter.trainable == 3 * 6
    assert torch.equal(model(ids), F.embedding(ids, W))
    model(ids).float().square().sum().backward()
    (tensors,) = (t for _, t in adapter.sites())
    torch.testing.assert_close(tensors.values.grad, 2 * 2 * W[[5, 7, 9]].float(), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        tensors.values.normal_()
    new = (W[[5, 7, 9]].float() + tensors.values.detach()).to(dtype)
    y = model(ids).detach()
    torch.testing.assert_close(y, F.embedding(ids, W.index_copy(0, torch.tensor([5, 7, 9]), new)), rtol=1e-2, atol=1e-2)
    others = [i for i in range(12) if i not in (5, 7, 9)]
    untouched = torch.isin(ids, torch.tensor(others))
    assert torch.equal(y[untouched], F.embedding(ids, W)[untouched])
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    effective = tensors.method.effective(W.float(), to_float(tensors.tensors())).to(dtype)
    assert torch.equal(effective[others].view(bits), W[others].view(bits))  # the sign of −0.0 too
    ad.merge(model, allow_loss=1.0)
    assert torch.equal(model[0].weight[others].view(bits), W[others].view(bits))


def test_a_tied_head_sees_the_change(llama, ids):
    with pytest.raises(AddendaError, match=r"tied to lm_head.*name the parameter 'model.embed_tokens.weight'"):
        attach(llama, "trainable-tokens:tokens=5+7")
    W = llama.lm_head.weight.detach().clone()
    hidden = llama.model(ids).last_hidden_state.detach()
    adapter = attach(llama, "trainable-tokens:tokens=5+7", targets="embed_tokens.weight")
    (tensors,) = (t for _, t in adapter.sites())
    with torch.no_grad():
        tensors.values.normal_()
        new = W.index_add(0, torch.tensor([5, 7]), tensors.values)
        torch.testing.assert_close(llama.lm_head(hidden), hidden @ new.T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(llama.model.embed_tokens(ids), new[ids], rtol=1e-5, atol=1e-5)
    others = [i for i in range(len(W)) if i not in (5, 7)]
    assert torch.equal(llama.lm_head.weight[others], W[others])
    llama(ids).logits.square().mean().backward()
    assert tensors.values.grad.any(1).all()
    ad.detach(llama)
    assert torch.equal(llama.lm_head.weight, W)


@pytest.mark.filterwarnings("default")
def test_peft_computes_the_same(ids):
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"embed": nn.Embedding(32, 6)}), nn.ModuleDict({"embed": nn.Embedding(32, 6)})
    theirs.load_state_dict(base.state_dict())
    config = peft.TrainableTokensConfig(token_indices=[5, 9, 20], target_modules=["embed"])
    layer = peft.get_peft_model(theirs, config).base_model.model["embed"]
    (tensors,) = (t for _, t in attach(base, TrainableTokens(tokens="5+9+20")).sites())
    with torch.no_grad():
        tensors.values.normal_()
        layer.trainable_tokens_delta["default"].add_(tensors.values)
    torch.testing.assert_close(base["embed"](ids), layer(ids))


def test_options_are_checked():
    for tokens in ("", "a", "5+", "5,7", "-1", "1-2-3", " 5", "5\n"):
        with pytest.raises(AddendaError, match=r"rows and stretches joined by \+"):
            TrainableTokens(tokens=tokens)
    for tokens, message in (
        ("7-5", "the stretch 7-5 ends before it begins"),
        ("5+5", "names row 5 twice"),
        ("3-6+1+5", "names row 5 twice"),
    ):
        with pytest.raises(AddendaError, match=message):
            TrainableTokens(tokens=tokens)
    assert TrainableTokens(tokens="9").check(10, 4) is None
    assert TrainableTokens(tokens="3+8-10").check(10, 4) == "tokens names row 10, and the weight has rows 0 to 9"
    vast = TrainableTokens(tokens="0-999999999999")  # what a hostile file may say
    assert vast.check(10, 4) and vast.trainable(10, 4) == 4 * 10**12
    with pytest.raises(AddendaError, match="tokens must be str"):
        TrainableTokens(tokens=5)
