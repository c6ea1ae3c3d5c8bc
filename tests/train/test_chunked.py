import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

import addenda as ad
from addenda.data.batches import Collator
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train import chunked
from addenda.train import loss as module
from addenda.train.loss import score
from tiny_models import SUMS, config, make_bert, make_llama, make_tokenizer


def train():
    return encode(read(SUMS), make_tokenizer())


def a_batch(rows=(0, 63, 9, 40)):
    made = train()
    return Collator(made.pad, "causal")([made[i] for i in rows])


def both(model, batch, whole):
    model.zero_grad()
    made = score(model, batch, "causal", whole=whole)
    made.mean.backward()
    return made.mean.item(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()


@pytest.mark.parametrize("how", ["mask", "positions", ""])
@pytest.mark.parametrize("torchs", [True, False])
def test_every_example_has_the_loss_that_its_logits_give(monkeypatch, how, torchs):
    monkeypatch.setattr(module, "keeps", lambda _: how)
    monkeypatch.setattr(chunked, "rows", lambda h: 3)
    if not torchs:
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
    model = make_llama()
    for rows in [(0, 63, 9, 40), (0,), (63,), (9,)]:
        batch = a_batch(rows)
        seen, plain = both(model, batch, whole=False), both(model, batch, whole=True)
        assert abs(seen[0] - plain[0]) < 1e-5
        torch.testing.assert_close(seen[1], plain[1], atol=1e-6, rtol=1e-4)
    assert "forward" not in vars(model.lm_head)


def test_in_bfloat16_the_loss_is_not_rounded():
    model = make_llama().to(torch.bfloat16)
    head, h, wanted = model.lm_head, torch.randn(200, 32, dtype=torch.bfloat16), torch.arange(200) % 70
    losses = nn.functional.cross_entropy(head(h).float(), wanted, reduction="none")
    assert chunked.total(head, h, wanted).item() == pytest.approx(losses.sum().item(), rel=1e-4)


def test_logits_are_never_whole(monkeypatch):
    """No float tensor of a chunked step has as many numbers as the logits."""
    monkeypatch.setattr(chunked, "rows", lambda h: 2)
    model, batch, sizes = make_llama().requires_grad_(False), a_batch(), []
    ad.attach(model, "lora:rank=2", targets="q_proj")
    (labels,) = {int((batch["labels"][:, 1:] != -100).sum())}

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            sizes.append(out.shape if isinstance(out, torch.Tensor) else ())
            return out

    for whole in (True, False):
        sizes.clear()
        with Sizes():
            score(model, batch, "causal", whole=whole).total.backward()
        assert ((labels, model.config.vocab_size) in map(tuple, sizes)) == whole


def small(kind, of, **options):
    torch.manual_seed(0)
    return of(config(kind, num_key_value_heads=1, bos_token_id=None, eos_token_id=2, **options)).eval()


def test_only_a_plain_product_is_taken_apart():
    batch = a_batch()
    assert chunked.why_not(make_llama(), batch) == ""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2))
    assert chunked.why_not(gpt2, batch) == ""
    softcap = small(Gemma2Config, Gemma2ForCausalLM, head_dim=16, final_logit_softcapping=30.0)
    assert chunked.why_not(softcap, batch) == "it changes what its head returns"
    none = small(Gemma2Config, Gemma2ForCausalLM, head_dim=16, final_logit_softcapping=None)
    assert chunked.why_not(none, batch) == ""
    scale = small(GraniteConfig, GraniteForCausalLM, logits_scaling=8.0)
    assert chunked.why_not(scale, batch) == "it changes what its head returns"
    assert "has no output embedding" in chunked.why_not(make_bert(), batch)
    adapted = make_llama()
    ad.attach(adapted, "lora", targets="lm_head")
    assert chunked.why_not(adapted, batch) == "its head is AdaptedLinear, not a plain Linear"
    ad.detach(adapted)
    assert chunked.why_not(adapted, batch) == ""

    class Biased(type(adapted)):
        def forward(self, **inputs):
            made = super().forward(**inputs)
            made.logits = made.logits + torch.arange(self.config.vocab_size)
            return made

    adapted.__class__ = Biased
    assert "does not run without its head" in chunked.why_not(adapted, batch)
    assert "forward" not in vars(adapted.lm_head)


def test_what_auto_takes(monkeypatch):
    model, data = make_llama(), train()
    assert chunked.choose("auto", model, data, [[0, 1]]) == {"name": "logits", "why": "they take 0 MiB at most"}
    assert chunked.choose("chunked", model, data, [[0, 1]])["name"] == "chunked"
    one = 4 * model.config.vocab_size * sum(t != -100 for t in data.labels[0])
    monkeypatch.setattr(chunked, "MANY", one)
    assert chunked.choose("auto", model, data, [[0]])["name"] == "logits"
    assert chunked.choose("auto", model, data, [[0], [0, 1]])["name"] == "chunked"
    assert chunked.choose("logits", model, data, [[0, 1]])["name"] == "logits"
    softcap = small(Gemma2Config, Gemma2ForCausalLM, head_dim=16)
    assert chunked.choose("chunked", softcap, data, [[0, 1]]) == {
        "name": "logits",
        "why": "it changes what its head returns",
    }
