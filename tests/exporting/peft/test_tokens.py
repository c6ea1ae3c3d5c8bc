"""Trained rows: PEFT stores the rows themselves, in the order of its config."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from peft_folders import WEIGHTS, by_peft, edited, given, take
from shared import stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def make_untied():
    return toys.make_llama(tie_word_embeddings=False)


def test_rows_are_stored_whole_and_read_in_any_order(tmp_path):
    by_peft(make_untied, peft.TrainableTokensConfig(token_indices=[9, 2, 3]), tmp_path / "peft", IDS)
    rows = load_file(tmp_path / "peft" / WEIGHTS)["base_model.model.model.embed_tokens.trainable_tokens_delta"]
    model = make_untied()
    adapter = take(model, tmp_path / "peft")
    (_, t), *_ = adapter.sites()
    assert t.method.tokens == "2-3+9"
    table = model.get_input_embeddings().weight.detach()
    assert torch.allclose(t.values.detach() + table[[2, 3, 9]], rows[[1, 2, 0]], atol=1e-7)
    stored = load_file(given(adapter, tmp_path / "back") / WEIGHTS)
    assert torch.allclose(*(s["base_model.model.model.embed_tokens.trainable_tokens_delta"] if o is None else rows[o]
                            for s, o in ((stored, None), (stored, [1, 2, 0]))), atol=1e-7)  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "words"),
    [([1, 1, 2], "names a token twice"), ([1, 2, 99], "rows 0 to 31, and the config names token 99"),
     ([1, 2], r"\[3, 8\], and the config and the model say \[2, 8\]"), ("all", "a list of tokens is wanted"),
     ([True, 2, 3], "a list of tokens is wanted"), ([-1, 2, 3], "a list of tokens is wanted")],
)  # fmt: skip
def test_tokens_that_cannot_be_are_refused(tokens, words, tmp_path):
    by_peft(make_untied, peft.TrainableTokensConfig(token_indices=[9, 2, 3]), tmp_path / "peft", IDS)
    with pytest.raises(AddendaError, match=words):
        take(make_untied(), edited(tmp_path / "peft", {"token_indices": tokens}))


def test_two_embeddings_with_tokens_of_their_own_go_as_lora(tmp_path):
    spec = {"model.embed_tokens": ad.TrainableTokens(tokens="1-3"), "lm_head": ad.TrainableTokens(tokens="7")}
    adapter = stir(ad.attach(make_untied(), spec))
    given(adapter, tmp_path / "out")
    back = take(make_untied(), tmp_path / "out")
    assert {p: m.tokens for p, m in back.methods.items()} == {"model.embed_tokens": "1-3", "lm_head": "7"}


def test_rows_of_a_vector_are_refused(tmp_path):
    adapter = stir(ad.attach(make_untied(), ad.TrainableTokens(tokens="5-6"), targets="model.embed_tokens"))
    folder = given(adapter, tmp_path / "out")

    def move(tensors: dict) -> None:
        rows = tensors.pop(next(k for k in tensors if "embed_tokens" in k))
        tensors["base_model.model.model.norm.weight.trainable_tokens_delta"] = rows

    with pytest.raises(AddendaError, match=r"model\.norm\.weight is no embedding"):
        take(make_untied(), edited(folder, {"target_modules": ["norm.weight"]}, move))
