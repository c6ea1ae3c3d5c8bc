"""A bi-encoder's vectors against a loop over single texts, and the cache that keeps them."""

import os

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import BertModel

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file import states
from addenda.ranking import bi_encoder
from addenda.ranking.bi_encoder import BiEncoder
from ranking.toy import toy, toy_config, toy_model, toy_tokenizer


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path))
    return tmp_path / "embeddings"


def encoder(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    return BertModel(toy_config()).eval()


def texts(n: int = 64, words: int = 0) -> list[str]:
    made = [d.text for d in toy(documents=n).documents.values()]
    return [" ".join([text] * (1 + i % 3)) for i, text in enumerate(made)] if words else made


def alone(model, tokenizer, text: str) -> np.ndarray:
    with torch.no_grad():
        states = model(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).last_hidden_state[0]
    mean = states.double().mean(0)
    return (mean / mean.norm()).numpy()


def test_vectors_are_those_of_one_text_after_another():
    model, tokenizer, some = encoder(), toy_tokenizer(), texts(20, words=1)
    found = BiEncoder(model, tokenizer, batch=7).embed(some, "passage: ")
    want = [alone(model, tokenizer, f"passage: {text}") for text in some]
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert found.dtype == np.float32


def test_scores_are_cosines_of_a_query_with_every_document():
    model, tokenizer, some = encoder(), toy_tokenizer(), texts(10)
    index = BiEncoder(model, tokenizer).index(some)
    (scores,) = index.scores(["a1 a2"])
    query = alone(model, tokenizer, "query: a1 a2")
    np.testing.assert_allclose(scores, [query @ alone(model, tokenizer, f"passage: {t}") for t in some], atol=1e-5)
    with pytest.raises(AddendaError, match="Call index"):
        next(BiEncoder(model, tokenizer).scores(["a1"]))


def test_embeddings_are_kept_by_texts_and_weights(cache, monkeypatch):
    tokenizer, otherwise, some = toy_tokenizer(), toy_tokenizer(), texts()
    otherwise.backend_tokenizer.normalizer = normalizers.Replace("a", "b")
    first = BiEncoder(encoder(), tokenizer).embed(some)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(BiEncoder, "_read", lambda *_: pytest.fail("the model was asked"))
    np.testing.assert_array_equal(BiEncoder(encoder(), tokenizer).embed(some), first)
    monkeypatch.undo()
    monkeypatch.setenv("ADDENDA_CACHE", str(cache.parent))
    for other in (
        lambda: BiEncoder(encoder(seed=1), tokenizer).embed(some),
        lambda: BiEncoder(encoder(), tokenizer).embed([*some[1:], some[0]]),
        lambda: BiEncoder(encoder(), tokenizer).embed(some, "query: "),
        lambda: BiEncoder(encoder(), tokenizer, max_length=6).embed(some),
        lambda: BiEncoder(encoder(), otherwise).embed(some),
    ):
        before = len(list(cache.iterdir()))
        assert other().shape == first.shape and len(list(cache.iterdir())) == before + 1
    before = len(list(cache.iterdir()))
    BiEncoder(encoder(seed=2), tokenizer, cache=False).embed(some)
    BiEncoder(encoder(seed=2), tokenizer).embed(some[:9])  # few
    adapted = encoder(seed=2)
    ad.attach(adapted, "lora:rank=2")
    BiEncoder(adapted, tokenizer).embed(some)
    assert len(list(cache.iterdir())) == before


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_damaged_file_of_the_cache_is_made_anew(cache, damage):
    tokenizer, some = toy_tokenizer(), texts()
    first = BiEncoder(encoder(), tokenizer).embed(some)
    (file,) = cache.iterdir()
    data = file.read_bytes()
    if damage == "other":
        states.write_state(file, {"vectors": torch.ones(3, 2)})
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    np.testing.assert_array_equal(BiEncoder(encoder(), tokenizer).embed(some), first)
    assert file.read_bytes() == data


def test_the_cache_is_bounded_and_what_was_unused_longest_goes(cache, monkeypatch):
    tokenizer, some = toy_tokenizer(), texts()
    kept = []
    for seed in range(3):
        BiEncoder(encoder(seed), tokenizer).embed(some)
        (new,) = set(cache.iterdir()) - set(kept)
        os.utime(new, (seed, seed))
        kept.append(new)
    BiEncoder(encoder(0), tokenizer).embed(some)  # used again
    monkeypatch.setattr(bi_encoder, "ROOM", 3 * kept[0].stat().st_size)
    BiEncoder(encoder(3), tokenizer).embed(some)
    assert kept[0].is_file() and not kept[1].exists() and len(list(cache.iterdir())) == 3
    monkeypatch.setattr(bi_encoder, "ROOM", 100)
    BiEncoder(encoder(4), tokenizer).embed(some)  # larger than all that is kept
    assert len(list(cache.iterdir())) == 3


def test_a_folder_that_cannot_be_written_to_keeps_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "file"))
    assert BiEncoder(encoder(), toy_tokenizer()).embed(texts()).shape == (64, 32)


def test_an_encoder_of_a_folder(tmp_path, cache):
    folder, some = tmp_path / "model", texts()
    toy_tokenizer().save_pretrained(folder)
    whole = encoder()
    whole.save_pretrained(folder)
    np.testing.assert_array_equal(
        BiEncoder.load(folder).embed(some), BiEncoder(whole, toy_tokenizer(), cache=False).embed(some)
    )
    state = {k: v for k, v in whole.state_dict().items() if not k.startswith("pooler.")}
    whole.save_pretrained(folder, state_dict=dict(state))
    found = BiEncoder.load(folder)
    assert not any(p.any() for p in found.model.pooler.parameters())
    found.embed(some)
    before = len(list(cache.iterdir()))
    BiEncoder.load(folder).embed(some)  # the same model again, whatever its pooler would have been
    assert len(list(cache.iterdir())) == before
    whole.save_pretrained(folder, state_dict={k: v for k, v in state.items() if "layer.1" not in k})
    with pytest.raises(AddendaError, match=r"lacks weights of its BertModel: encoder\.layer\.1"):
        BiEncoder.load(folder)
    with pytest.raises(AddendaError, match=r"no config\.json"):
        BiEncoder.load(tmp_path / "nothing")


def test_a_folder_is_taken_before_an_embedded_encoder_of_its_name(tmp_path, monkeypatch):
    whole = encoder()
    for part in (toy_tokenizer(), whole):
        part.save_pretrained(tmp_path / "minilm")
    monkeypatch.chdir(tmp_path)
    found, want = BiEncoder.load("minilm", cache=False), BiEncoder(whole, toy_tokenizer(), cache=False)
    np.testing.assert_array_equal(found.embed(texts()), want.embed(texts()))


def test_what_cannot_be_embedded_is_named():
    made = BiEncoder(encoder(), toy_tokenizer())
    with pytest.raises(AddendaError, match=r"are no texts: \[1, 3\]"):
        made.embed(["a1", " ", "a2", None])
    with torch.no_grad():
        made.model.embeddings.word_embeddings.weight[toy_tokenizer().convert_tokens_to_ids("a3")] = torch.nan
    with pytest.raises(AddendaError, match=r"vector of text 1 is not finite \(1 of 2\)"):
        made.embed(["a1", "a3"])
    with pytest.raises(AddendaError, match=r"returns none\. Give the encoder itself"):
        BiEncoder(toy_model(), toy_tokenizer()).embed(["a1"])
