"""Prompt tuning against the model run on trained embeddings, against PEFT, and against generation with a cache."""

import pytest
import torch

import addenda as ad
import toys

P, T = 3, 5
IDS = torch.arange(2 * (P + T)).reshape(2, P + T) * 5 % toys.VOCAB


def prompted(model):
    """The model with a prompt that says something, and the embeddings that it stands for."""
    adapter = ad.attach(model.double().eval(), ad.Prompt(places=P))
    (p,) = adapter.parameters()
    torch.manual_seed(4)
    p.data = torch.randn(P, 8, dtype=torch.float64)
    return p


@pytest.mark.parametrize("make", [toys.make_llama, toys.make_gpt2, toys.make_bert])
def test_the_model_on_trained_embeddings(make):
    model = make()
    p = prompted(model)
    got = model(IDS).logits
    (grad,) = torch.autograd.grad(got.square().sum(), p)
    ad.switch(model, None)
    e = model.get_input_embeddings()(IDS)
    P_now = p.detach().clone().requires_grad_()
    want = model(inputs_embeds=torch.cat([e[:, :P] + P_now, e[:, P:]], 1)).logits
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want.square().sum(), P_now)[0])


def test_in_front_of_what_an_encoder_reads():
    model = toys.make_t5()
    p = prompted(model)
    got = model(input_ids=IDS, decoder_input_ids=IDS[:, :P]).logits
    ad.switch(model, None)
    e = model.get_input_embeddings()(IDS)
    embeds = torch.cat([e[:, :P] + p, e[:, P:]], 1)
    torch.testing.assert_close(got, model(inputs_embeds=embeds, decoder_input_ids=IDS[:, :P]).logits)
    assert (got - model(input_ids=IDS, decoder_input_ids=IDS[:, :P]).logits).abs().max() > 1e-3
    ad.switch(model, "default")
    model.train()
    assert model(input_ids=IDS, labels=IDS[:, :P].contiguous()).loss.requires_grad, "labels shorter than the prompt"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's own
def test_the_same_as_peft():
    peft = pytest.importorskip("peft")
    model = toys.make_llama()
    p = prompted(model)
    ids = IDS.clone()
    ids[:, :P] = IDS[0, :P]  # one prompt for every example
    got = model(ids).logits
    prompt = model.get_input_embeddings().weight[IDS[0, :P]].detach() + p.detach()
    ad.detach(model)
    theirs = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    theirs.prompt_encoder.default.embedding.weight.data = prompt
    torch.testing.assert_close(theirs.eval()(ids[:, P:]).logits, got)


def test_generation_with_a_cache_is_that_without():
    model = toys.make_llama()
    prompted(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, use_cache=True, **options), model.generate(IDS, use_cache=False, **options))


def test_an_example_without_places_is_an_error_in_training():
    model = toys.make_llama()
    prompted(model)
    model.train()
    with pytest.raises(ad.AddendaError, match=r"wants \(batch, tokens, width\) with 3 places for the prompt"):
        model(IDS[:, :P])
    with pytest.raises(ad.AddendaError, match="places must be at least 1"):
        ad.Prompt(places=0)
    assert ad.Prompt(places=20).trainable(768) == 20 * 768
