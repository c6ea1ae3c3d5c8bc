"""The embedded model: that the real one is a language model."""

import pytest
import torch

from addenda.models import embedded


@pytest.mark.slow
@pytest.mark.skipif(not embedded.SMOLLM2.available(), reason="`addenda setup-demo` has not fetched it")
def test_the_embedded_model_knows_english_and_a_capital():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = embedded.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008

    text = "The cat sat on the mat, and looked out of the window at the birds in the garden."
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = model(input_ids=ids, labels=ids).loss.exp().item()
    assert 3 < perplexity < 40  # a model with random weights: about 50,000

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**asked, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, asked["input_ids"].shape[1] :])
