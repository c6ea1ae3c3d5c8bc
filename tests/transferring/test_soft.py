import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.data.read import read
from addenda.train.loss import score
from addenda.transferring import soft as soft_module
from addenda.transferring.soft import soft_cross_entropy, soften
from tiny_models import SUMS, make_llama, make_tokenizer


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("top_k", [None, 3, 7])
def test_gradients_are_those_of_kl_in_float64(top_k):
    """KL(p‖q) = Σ p (log p − log q), written out; with top_k over k tokens and the sum of the others."""
    torch.manual_seed(1)
    z, teacher = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7, dtype=torch.float64)
    p, q = torch.softmax(teacher, -1), torch.softmax(z, -1)
    batch = {"teacher": p.log()}
    if top_k is not None:
        order = p.argsort(-1, descending=True)
        among, others = order[:, :top_k], order[:, top_k:]
        batch = {"teacher": p.gather(1, among).log(), "among": among}
        p, q = (torch.cat([d.gather(1, among), d.gather(1, others).sum(1, keepdim=True)], 1) for d in (p, q))
        p, q = (p, q) if top_k < 7 else (p[:, :7], q[:, :7])
    kl = (p * (p.log() - q.log())).sum(1)
    [wanted] = torch.autograd.grad(kl.sum(), z, retain_graph=True)
    losses = soft_cross_entropy(z, batch)
    [found] = torch.autograd.grad(losses.sum(), z)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)
    assert torch.allclose(losses, kl - (p * p.log()).sum(1), rtol=1e-10)
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, batch), (z,))


def gradient(model, adapter, rows):
    for p in adapter.parameters():
        p.grad = None
    score(model, rows.batch(range(len(rows))), "causal", objective=rows.objective).mean.backward()
    return torch.cat([p.grad.flatten() for p in adapter.parameters()]).norm()


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_student_that_starts_as_the_teacher_has_nothing_to_learn(top_k, tmp_path):
    """Same base, same method, in float64: the gradient is below 1e-6 of the one after a step away."""
    model, tokenizer = make_llama().double(), make_tokenizer()
    adapter = ad.attach(model, "lora:rank=2")
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.1)
    rows = soften(model, tokenizer, read(SUMS[:6]), top_k=top_k, batch=2)
    at_start = gradient(model, adapter, rows)
    for p in adapter.parameters():
        p.data.add_(0.01 * torch.randn_like(p))
    assert at_start < 1e-6 * gradient(model, adapter, rows)


def test_prompt_tokens_carry_no_loss_and_labels_get_their_own_distribution():
    model, tokenizer = make_llama(), make_tokenizer()
    data = read(SUMS[:5])
    rows = soften(model, tokenizer, data, batch=2)
    for i in range(len(rows)):
        ids = torch.tensor([rows.ids[i]])
        logp = model(ids).logits[0].float().log_softmax(-1)
        places = [t for t, label in enumerate(rows.labels[i]) if label != -100]
        assert torch.allclose(rows.teacher[i], logp[[t - 1 for t in places]], atol=1e-5)
        assert rows.labels[i][:3] == [-100] * 3
    picked = rows.take([3, 1])
    batch = picked.batch([1, 0])
    assert torch.equal(batch["teacher"], torch.cat([rows.teacher[1], rows.teacher[3]]))
    made = score(model, picked.batch([0, 1]), "causal", objective=picked.objective, right=True)
    entropy = -(batch["teacher"].exp() * batch["teacher"]).sum()
    assert made.total.item() == pytest.approx(entropy.item(), rel=1e-5)  # of the teacher itself: its entropy
    assert made.count == len(batch["teacher"]) and made.right is not None


def test_the_likeliest_tokens_are_kept_on_disk():
    model, tokenizer = make_llama(), make_tokenizer()
    data = read(SUMS[:5])
    every, first = soften(model, tokenizer, data), soften(model, tokenizer, data, top_k=4)
    assert first.among is not None
    top = every.teacher[2].topk(4)
    assert torch.equal(first.among[2].long(), top.indices) and torch.equal(first.teacher[2], top.values)
    calls = []
    model.register_forward_pre_hook(lambda m, a: calls.append(1))
    again = soften(model, tokenizer, data, top_k=4)
    assert not calls and again.digest == first.digest != every.digest
    assert all(torch.equal(a, b) for a, b in zip(again.teacher, first.teacher, strict=True))


def test_too_much_for_the_memory(monkeypatch):
    monkeypatch.setattr(soft_module, "MOST", 1000)
    with pytest.raises(AddendaError, match=r"take \d+ KiB. Keep the likeliest tokens of each with top_k="):
        soften(make_llama(), make_tokenizer(), read(SUMS[:5]))
