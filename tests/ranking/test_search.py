"""A search index: what is found is what the first stage and the reranker say, and a changed file is refused."""

import pytest
from tokenizers import normalizers
from transformers import BertModel

from addenda import AddendaError
from addenda.ranking import search
from addenda.ranking.first_stage import first_stage
from addenda.ranking.reranker import Reranker
from addenda.ranking.search import SearchIndex, build
from ranking.toy import toy, toy_config, toy_model, toy_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    import torch

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    BertModel(toy_config()).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bm25", "bi-encoder"])
def test_search_finds_what_the_first_stage_finds_and_reranks_it(encoder, tmp_path, kind):
    from addenda.ranking.bi_encoder import BiEncoder

    first = "bm25" if kind == "bm25" else str(encoder)
    collection = toy()
    index = SearchIndex.load(build(collection, tmp_path / "i.safetensors", first=first))
    by = "bm25" if kind == "bm25" else BiEncoder.load(encoder)
    expected = first_stage(collection, by, queries=["q5"], k=4)["q5"]
    hits = index.search(collection.queries["q5"], top_k=4)
    assert [h.id for h in hits] == list(expected)
    assert [h.score for h in hits] == pytest.approx(list(expected.values()), rel=1e-5)
    reranker = Reranker(toy_model(), toy_tokenizer())
    ranked = reranker.rank(collection.queries["q5"], {i: collection.documents[i] for i in expected}, top_k=2)
    hits = index.search(collection.queries["q5"], reranker, top_k=2, depth=4)
    assert [(h.id, h.score) for h in hits] == ranked
    assert hits[0].document == collection.documents[hits[0].id]
    hits = index.search(collection.queries["q5"], reranker, top_k=4, depth=2)
    assert {h.id for h in hits[:2]} == set(list(expected)[:2]) and [h.id for h in hits[2:]] == list(expected)[2:]
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)


def test_a_changed_index_or_another_encoder_is_refused(encoder, tmp_path):
    path = build(toy(), tmp_path / "i.safetensors", first=str(encoder))
    data = path.read_bytes()
    for place in range(len(data) - 1, 8, -997):
        changed = bytearray(data)
        changed[place] ^= 4
        (tmp_path / "changed.safetensors").write_bytes(changed)
        with pytest.raises(AddendaError):
            SearchIndex.load(tmp_path / "changed.safetensors")
    import torch

    torch.manual_seed(1)
    BertModel(toy_config()).save_pretrained(encoder)
    with pytest.raises(AddendaError, match="another encoder"):
        SearchIndex.load(path)
    with pytest.raises(AddendaError, match="is there already"):
        build(toy(), path)


def test_an_index_is_refused_where_the_tokenizer_reads_otherwise(tmp_path):
    """Though its tokens are the same: normalisers are no part of a tokenizer's mark."""
    tokenizer = toy_tokenizer()
    BertModel(toy_config()).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    path = build(toy(), tmp_path / "i.safetensors", first=str(tmp_path / "encoder"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "b")
    tokenizer.save_pretrained(tmp_path / "encoder")
    with pytest.raises(AddendaError, match="a tokenizer that reads otherwise"):
        SearchIndex.load(path)


def test_what_cannot_be_searched_is_refused(tmp_path):
    index = SearchIndex.load(build(toy(), tmp_path / "i.safetensors", first="bm25"))
    with pytest.raises(AddendaError, match="query is empty"):
        index.search("  ")
    assert index.search("nothing of it") == []
    empty = type(toy())("none", {}, {})
    with pytest.raises(AddendaError, match="holds no document"):
        build(empty, tmp_path / "none.safetensors", first="bm25")
    assert not (tmp_path / "none.safetensors").exists() and search.FORMAT


def test_an_index_that_is_empty_says_how_it_is_made_anew(tmp_path):
    (tmp_path / "index").write_bytes(b"")
    with pytest.raises(AddendaError, match=r"index is damaged.*empty\. Make the index anew: addenda rerank index"):
        SearchIndex.load(tmp_path / "index")
