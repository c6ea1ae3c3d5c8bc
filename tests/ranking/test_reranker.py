"""The reranker against loops written out: order, truncation, passages, and what it refuses."""

import math

import numpy as np
import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.ranking.collection import Collection, Document
from addenda.ranking.folder import save_folder
from addenda.ranking.pairs import passages
from addenda.ranking.reranker import Reranker
from ranking.toy import SPECIAL, toy, toy_model, toy_tokenizer
from shared import stir

CLS, SEP = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")


def one(model, ids: list[int], second: int) -> float:
    """The score of one row by itself; second: where the second text begins."""
    types = [0] * second + [1] * (len(ids) - second)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits.item()


def row(tokenizer, query: str, document: str, limit: int = 32) -> tuple[list[int], int]:
    """[CLS] query [SEP] document, cut, [SEP]; and where the document begins."""
    q, d = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (query, document))
    return [CLS, *q, SEP, *d[: limit - len(q) - 3], SEP], len(q) + 2


def test_scores_are_those_of_one_pair_after_another_in_order():
    made, model, tokenizer = toy(), toy_model(), toy_tokenizer()
    documents = [" ".join([d.text] * (1 + i % 4)) for i, d in enumerate(made.documents.values())]
    pairs = [(q, documents[(7 * i) % len(documents)]) for i, q in enumerate(made.queries.values())]
    want = [one(model, *row(tokenizer, q, d)) for q, d in pairs]
    for batch in (1, 7, 64):
        found = ad.Reranker(model, tokenizer, batch=batch).predict(pairs)
        assert found.dtype == np.float32 and found.shape == (len(pairs),)
        np.testing.assert_allclose(found, want, atol=1e-5)


def test_the_best_stand_first_and_equals_in_the_order_given():
    made, model, tokenizer = toy(), toy_model(), toy_tokenizer()
    query, texts = made.queries["q3"], {k: made.documents[k] for k in ("d5", "d3", "d9")}
    scores = {k: one(model, *row(tokenizer, query, d.text)) for k, d in texts.items()}
    ranked = Reranker(model, tokenizer).rank(query, texts)
    assert [k for k, _ in ranked] == sorted(scores, key=lambda k: -scores[k])
    assert [s for _, s in ranked] == pytest.approx([scores[k] for k, _ in ranked], abs=1e-5)

    with torch.no_grad():
        model.classifier.weight.zero_()
    doubled = [texts["d5"], "a1 a2", texts["d5"], texts["d3"].text]
    assert [i for i, _ in Reranker(model, tokenizer).rank(query, doubled)] == [0, 1, 2, 3]
    assert [i for i, _ in Reranker(model, tokenizer).rank(query, doubled, top_k=2)] == [0, 1]
    assert Reranker(model, tokenizer).rank(query, []) == []


def test_only_the_document_is_cut_and_the_separators_stay():
    tokenizer, query, document = toy_tokenizer(), "a1 a2 a3 a4 a5 a6 a7", " ".join(f"a{n}" for n in range(40))
    read = passages(tokenizer, [(query, document), (query, "a1")], 16)
    assert read.owner == [0, 1] and read.tokens.ids[0] == row(tokenizer, query, document, 16)[0]
    assert len(read.tokens.ids[0]) == 16 and read.tokens.ids[0][-1] == SEP and read.tokens.ids[0].count(SEP) == 2
    assert read.tokens.types is not None and read.tokens.types[0] == [0] * 9 + [1] * 7


def test_long_documents_are_read_in_overlapping_passages_of_which_the_best_counts():
    model, tokenizer, query = toy_model(), toy_tokenizer(), "a1 a2 a3"
    words = [f"a{(7 * n) % 60}" for n in range(50)]
    room, stride = 16 - 6, 4
    starts = range(0, len(words) - stride, room - stride)
    parts = [words[at : at + room] for at in starts]
    assert {w for p in parts for w in p} == set(words)
    want = max(one(model, *row(tokenizer, query, " ".join(p))) for p in parts)
    short = one(model, *row(tokenizer, query, "a9 a8"))
    reranker = Reranker(model, tokenizer, max_length=16, stride=stride, batch=3)
    found = reranker.predict([(query, " ".join(words)), (query, "a9 a8")])
    np.testing.assert_allclose(found, [want, short], atol=1e-5)
    assert Reranker(model, tokenizer, max_length=16).predict([(query, " ".join(words))])[0] != found[0]


def test_a_run_is_reordered_as_far_as_the_depth_goes():
    made, model, tokenizer = toy(), toy_model(), toy_tokenizer()
    run = {"q1": {"d4": 9.0, "d1": 8.0, "d7": 8.0, "d2": 1.0}, "q2": {"d2": 1.0}, "q3": {}}
    found = Reranker(model, tokenizer).rerank(made, run, depth=3)
    scores = {d: one(model, *row(tokenizer, made.queries["q1"], made.documents[d].text)) for d in ("d4", "d1", "d7")}
    assert list(found["q1"]) == [*sorted(scores, key=lambda d: -scores[d]), "d2"]
    values = list(found["q1"].values())
    assert values == sorted(values, reverse=True) and values[2] > values[3]
    assert list(found["q2"]) == ["d2"] and found["q3"] == {}


def test_an_adapter_that_acts_and_a_composition_are_what_ranks():
    made, model, tokenizer = toy(), toy_model(), toy_tokenizer()
    pairs = [(made.queries["q1"], made.documents[f"d{i}"]) for i in range(5)]
    base = Reranker(model, tokenizer).predict(pairs)
    for name in ("a", "b"):
        adapter = ad.attach(model, "lora:rank=2", targets="linear", exclude=["classifier"], name=name)
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_(0, 0.2)
    ad.switch(model, "a")
    alone = Reranker(model, tokenizer).predict(pairs)
    both = Reranker(model, tokenizer, ad.Stack("a", "b")).predict(pairs)
    with ad.composed(model, ad.Stack("a", "b")):
        want = Reranker(model, tokenizer).predict(pairs)
    np.testing.assert_array_equal(both, want)
    assert np.abs(base - alone).max() > 1e-3 and np.abs(both - alone).max() > 1e-3


def test_a_title_is_read_with_its_text():
    model, tokenizer = toy_model(), toy_tokenizer()
    found = Reranker(model, tokenizer).predict([("a1", Document("a2 a3", "a4")), ("a1", "a4 a2 a3")])
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # another row of a batch, whose rounding may be another


def documents(**texts: str) -> Collection:
    return Collection("small", {"q": "a1"}, {k: Document(v) for k, v in texts.items()})


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda r: r.rank(" ", ["a1"]), "is empty: the query"),
        (lambda r: r.rank("a1", ["a2", "", "a3", "\n"]), "is empty: document 1, document 3"),
        (lambda r: r.rank("a1", {"x": "a2", "y": ""}), "is empty: document 'y'"),
        (lambda r: r.predict([("a1", "a2"), ("a1", "")]), "is empty: the document of pair 1"),
        (lambda r: r.predict(["a1"]), "Pair 0 is not a"),
        (lambda r: r.predict([("a1", "a2"), ("a1",)]), "Pair 1 is not a"),
        (lambda r: r.rank("a1", [3]), "as document 0, got int"),
        (lambda r: r.rank("a1", "a2 a3"), "not one text"),
        (lambda r: r.rank("a1 " * 29, ["a2"]), "The query has 29 tokens, which with 3 special .* within 32"),
        (lambda r: r.predict([("a1", "a2"), ("a1 " * 40, "a2")]), "The query of pair 1 has 40 tokens"),
        (lambda r: r.rerank(documents(d="a1", e=" "), {"q": {"d": 1, "e": 0}}), "is empty: document 'e'"),
        (lambda r: r.rerank(documents(d="a1"), {"p": {"d": 1}}), "run of another collection"),
        (lambda r: r.rerank(documents(d="a1"), {"q": {"c": 1, "d": 0}}), "names document 'c'"),
        (lambda r: r.rank("a1", ["a2"], top_k=0), "top_k must be"),
        (lambda r: Reranker(r.model, r.tokenizer, stride=12, max_length=16).rank("a1", ["a2"]), "only 12 fit beside"),
        (lambda r: Reranker(r.model, r.tokenizer, batch=0), "batch must be"),
        (lambda r: Reranker(toy_model(labels=2), r.tokenizer), "has 2 outputs"),
    ],
)
def test_bad_input_is_named(ask, told):
    with pytest.raises(AddendaError, match=told):
        ask(Reranker(toy_model(), toy_tokenizer()))


def test_a_long_query_is_named_by_its_id():
    made = Collection("small", {"ok": "a1", "long": "a1 " * 31}, {"d": Document("a1")})
    with pytest.raises(AddendaError, match=r"Query 'long' has 31 tokens.*1 of 2 queries"):
        Reranker(toy_model(), toy_tokenizer()).rerank(made, {"ok": {"d": 1.0}, "long": {"d": 1.0}})


def test_scores_that_are_no_numbers_are_named():
    model, tokenizer = toy_model(), toy_tokenizer()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("a7")] = math.nan
    with pytest.raises(AddendaError, match=r"The score of the query and document 'bad' is nan \(1 of 3"):
        Reranker(model, tokenizer).rank("a1", {"fine": "a2", "bad": "a7", "too": "a3"})


def test_a_tokenizer_without_passages_says_so():
    class Slow:
        is_fast, pad_token_id = False, 0

    with pytest.raises(AddendaError, match="A Slow has no passages"):
        passages(Slow(), [("a", "b")], None, stride=2)


def test_a_folder_of_base_adapters_and_composition_is_opened(tmp_path):
    model, tokenizer, pairs = toy_model(), toy_tokenizer(), [("a1 a2", "a2 a3"), ("a1", "a9 a8 a7")]
    for name in ("de", "task"):
        stir(ad.attach(model, "pfeiffer:rank=4", name=name), seed=len(name))
    composition = ad.Stack("de", "task", skip="own")
    want = Reranker(model, tokenizer, composition).predict(pairs)
    save_folder(model, tokenizer, composition, tmp_path / "out", max_length=16, batch=8)
    opened = ad.Reranker.load(tmp_path / "out")
    assert (opened.max_length, opened.stride, opened.batch) == (16, None, 8)
    np.testing.assert_allclose(opened.predict(pairs), want, rtol=1e-5)  # mapped weights lie otherwise in memory


def test_a_cross_encoders_folder_is_opened_and_a_bare_encoder_is_none(tmp_path):
    model, tokenizer = toy_model(), toy_tokenizer()
    for folder, some in (("whole", model), ("bare", model.bert)):
        some.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    pairs = [("a1 a2", "a2 a3")]
    np.testing.assert_allclose(
        Reranker.load(tmp_path / "whole").predict(pairs), Reranker(model, tokenizer).predict(pairs), rtol=1e-5
    )
    with pytest.raises(AddendaError, match="has no weights for classifier"):
        Reranker.load(tmp_path / "bare")
    with pytest.raises(AddendaError, match="base= is for a folder"):
        Reranker.load(tmp_path / "whole", base=tmp_path / "bare")


def test_what_is_no_list_is_not_ranked():
    reranker = Reranker(toy_model(), toy_tokenizer())
    with pytest.raises(AddendaError, match=r"rank wants a list of documents, or texts by id, not a NoneType"):
        reranker.rank("a", None)
    for pairs in (None, "ab", 3):
        with pytest.raises(AddendaError, match=r"predict wants a list of pairs"):
            reranker.predict(pairs)
    with pytest.raises(AddendaError, match=r"Pair 1 is not a \(query, document\): 'None'"):
        reranker.predict([("a", "b"), None])
    with pytest.raises(AddendaError, match="path is the path of a file or folder"):
        Reranker.load(None)
