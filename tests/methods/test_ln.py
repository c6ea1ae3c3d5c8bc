"""LN tuning: which tensors it trains, and that nothing else moves."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.core.method.catalogue import build


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.proj, self.out_norm = nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6)

    def forward(self, x):
        return self.out_norm(self.proj(self.norm(x)))


def test_it_trains_every_parameter_of_every_norm_and_starts_at_the_base():
    model, x = Block(), torch.randn(3, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    y = model(x)
    adapter = ad.attach(model, "ln-tuning")
    assert list(adapter.methods) == ["norm.weight", "norm.bias", "out_norm.weight"]
    assert adapter.trainable == 3 * 6
    assert torch.equal(model(x), y)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), y)

    gamma, beta, scale = (t.value for _, t in adapter.sites())
    with torch.no_grad():
        assert not torch.equal(gamma, before["norm.weight"]) and beta.any()
        normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = model.proj(normal * gamma + beta)
        rms = h / (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt()
        torch.testing.assert_close(model(x), rms * scale, rtol=1e-4, atol=1e-5)
    ad.switch(model, None)
    assert torch.equal(model(x), y)
    ad.detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_on_a_language_model(llama, ids, tmp_path):
    y = llama(ids).logits
    adapter = ad.attach(llama, build("ln-tuning"))
    assert len(adapter.methods) == 2 * 2 + 1
    assert adapter.trainable == 5 * 8
    assert torch.equal(llama(ids).logits, y)
    llama(ids).logits.square().mean().backward()
    assert all(p.grad.any() for p in adapter.parameters())
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(1.1)
    changed, file = llama(ids).logits, adapter.save(tmp_path / "a.safetensors")
    assert not torch.equal(changed, y)
    ad.detach(llama)
    ad.load(llama, file)
    assert torch.equal(llama(ids).logits, changed)


def test_a_model_without_norms_is_refused():
    with pytest.raises(ad.AddendaError, match="'norm' matches nothing"):
        ad.attach(nn.Sequential(nn.Linear(2, 2)), "ln-tuning")
