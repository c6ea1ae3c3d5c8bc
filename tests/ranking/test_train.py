"""Training a reranker: it learns to order, a killed run ends with the same bits, and a loaded model is left alone."""

import json

import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.core.state.state import find_state
from addenda.models.load import load_model
from addenda.ranking.first_stage import first_stage
from addenda.ranking.losses import RankingLoss
from addenda.ranking.measures import by_query, means
from addenda.ranking.negatives import hard_negatives
from addenda.ranking.query_groups import query_groups
from addenda.ranking.train import train_reranker
from addenda.ranking.trec import strict
from ranking.toy import toy, toy_config, toy_model, toy_tokenizer
from shared import bits, same_bits, stir

SHORT = {"steps": 4, "batch": 2, "negatives": 3, "rate": 1e-2}


def folder_of(path, labels: int | None = None):
    """A bare encoder's folder, or a classifier's."""
    from transformers import BertModel

    torch.manual_seed(0)
    model = BertModel(toy_config()) if labels is None else toy_model(labels)
    model.save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return path


def values(model) -> dict[str, torch.Tensor]:
    return {k: t.clone() for k, t in ad.Adapter(model, "reranker").state_dict().items()}


def test_groups_hold_answers_by_grade_and_then_negatives():
    made, tokenizer = toy(), toy_tokenizer()
    graded = {"q0": {"d0": 2, "d4": 1, "d9": 0}, "q2": {"d2": 1}}
    made = type(made)(**{**vars(made), "qrels": {"train": graded}})
    groups = query_groups(made, {"q0": ["d9", "d7"], "q2": ["d1"]}, tokenizer, RankingLoss("listwise"), limit=32)
    assert groups.labels == [[2, 1, 0, 0], [1, 0]]
    rows = [tokenizer.decode(ids) for ids in groups.rows.ids]
    want = [("q0", "d0"), ("q0", "d4"), ("q0", "d9"), ("q0", "d7"), ("q2", "d2"), ("q2", "d1")]
    assert rows == [f"[CLS] {made.queries[q]} [SEP] {made.documents[d].whole} [SEP]" for q, d in want]


def test_a_teachers_scores_stand_beside_their_documents():
    made, tokenizer, loss = toy(), toy_tokenizer(), RankingLoss("distill", 2.0)
    run = first_stage(made, k=8)
    drawn = hard_negatives(made, [run], negatives=3).by_query
    teacher = {q: {d: float(len(d) + i) for i, d in enumerate(made.documents)} for q in drawn}
    groups = query_groups(made, drawn, tokenizer, loss, teacher=teacher)
    order = list(made.documents)
    first = next(iter(drawn))
    want = [teacher[first][d] for d in (*made.split("train")[first], *drawn[first])]
    assert groups.teacher is not None and groups.teacher[0] == want and len(order) == 48
    batch = groups.batch([1, 0])
    assert batch["teacher"].tolist() == groups.teacher[1] + groups.teacher[0]
    with pytest.raises(AddendaError, match=r"has not scored document 'd0' for query 'q0' \(96 of 96"):
        query_groups(made, drawn, tokenizer, loss, teacher={})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"loss": RankingLoss("distill")}, "give teacher="),
        ({"teacher": {}}, "'listwise' has none"),
        ({"negatives": {"q1": ["d2"]}}, "Query 'q1' of toy-a's 'train' has no answer"),
        ({"negatives": {"q0": ["d2", "d0"]}}, "Document 'd0' answers query 'q0' and is among"),
        ({"negatives": {"q0": ["d2", "d2"]}}, "is there twice"),
        ({"negatives": {"q0": ["d99"]}}, "'d99': one of them is not in toy-a"),
        ({"limit": 5}, "Query 'q0' has 3 tokens, which with 3 special ones leaves no room"),
        ({"split": "trian"}, "Did you mean 'train'"),
    ],
)
def test_groups_that_teach_nothing_are_refused(change, told):
    asked = {"negatives": {"q0": ["d2"]}, "tokenizer": toy_tokenizer(), "loss": RankingLoss("listwise")} | change
    with pytest.raises(AddendaError, match=told):
        query_groups(toy(), **asked)


def test_a_reranker_learns_to_put_the_answer_on_top(tmp_path):
    made = toy(documents=24)  # of 12 queries, which it may learn by heart
    run = first_stage(made, k=8)
    found = train_reranker(
        folder_of(tmp_path / "encoder"), made, "full", steps=40, batch=6, rate=5e-3, dev="dev", eval_every=20,
        judge=5, runs=[run], group=False,
    )  # fmt: skip
    losses = [value for _, value in found.losses]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5]) and len(found.evaluations) == 2
    assert found.after is not None and found.after["queries"] == 5 and found.after["first stage"] > 0.7
    asked = {q: run[q] for q in made.split("train")}
    untrained = ad.Reranker(toy_model(seed=3), toy_tokenizer())
    runs = [r.rerank(made, asked, depth=8) for r in (found.reranker, untrained)]
    rr = [means(by_query(made.split("train"), strict(r), ["RR@10"]))["RR@10"] for r in runs]
    assert rr[0] > max(0.9, rr[1] + 0.2)


def test_a_run_writes_a_folder_and_a_killed_one_ends_with_the_same_bits(tmp_path):
    made, folder, method = toy(), folder_of(tmp_path / "encoder"), "pfeiffer:rank=4"
    options = SHORT | {"dev": "dev", "save_every": 2, "eval_every": 4}
    whole = train_reranker(folder, made, method, out=tmp_path / "whole", **options)
    assert whole.path is not None and whole.said[0].startswith("3 negatives for each of 24")
    note = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert note["options"]["loss"] == "listwise" and note["data"]["labels"] == ["relevance"] and note["steps"] == 4

    class KilledError(Exception):
        pass

    def kill(event):
        if event.step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train_reranker(folder, made, method, out=tmp_path / "cut", progress=kill, **options)
    again = train_reranker(folder, made, method, out=tmp_path / "cut", **options)
    assert again.resumed_from == 2 and again.losses == whole.losses
    want = values(whole.reranker.model)
    assert all(torch.equal(t, want[k]) for k, t in values(again.reranker.model).items())
    assert (tmp_path / "cut" / "adapter.safetensors").read_bytes() == whole.path.read_bytes()

    loaded = load_model(folder, task="label", labels=1, seed=9)
    ad.load(loaded.model, whole.path)
    pairs = [(made.queries["q1"], made.documents["d1"]), (made.queries["q1"], made.documents["d2"])]
    assert ad.Reranker(loaded.model, loaded.tokenizer).predict(pairs).tolist() == (
        whole.reranker.predict(pairs).tolist()
    )
    with pytest.raises(AddendaError, match="another run"):
        train_reranker(folder, made, method, out=tmp_path / "cut", **(options | {"loss": "pairwise"}))


def test_a_languages_adapter_acts_beside_and_stays_as_it_is(tmp_path):
    made, model, tokenizer = toy(), toy_model(), toy_tokenizer()
    base = bits(model)
    language = stir(ad.attach(model, "pfeiffer:rank=4", name="en"))
    file = language.save(tmp_path / "en.safetensors")
    before = {k: t.clone() for k, t in language.state_dict().items()}
    beside = train_reranker(model, made, "pfeiffer:rank=4", tokenizer=tokenizer, language="en", **SHORT)
    assert all(torch.equal(t, before[k]) for k, t in language.state_dict().items())
    other = toy_model()
    ad.attach(other, "lora", name="reranker")
    with pytest.raises(AddendaError, match="both called 'reranker'"):
        train_reranker(other, made, tokenizer=tokenizer, language="reranker", **SHORT)
    ad.detach(model, "reranker")
    ad.switch(model, None)
    alone = train_reranker(model, made, "pfeiffer:rank=4", tokenizer=tokenizer, **SHORT)
    assert alone.losses[0] != beside.losses[0] and same_bits(bits(model), base)

    fresh = toy_model()
    out = {"out": tmp_path / "run", "language": file}
    again = train_reranker(fresh, made, "pfeiffer:rank=4", tokenizer=tokenizer, **SHORT, **out)
    assert again.losses == beside.losses
    stir(ad.attach(third := toy_model(), "pfeiffer:rank=4", name="en"), seed=5).save(tmp_path / "other.safetensors")
    ad.detach(third, "en")
    with pytest.raises(AddendaError, match="another run: start was"):
        train_reranker(
            third, made, "pfeiffer:rank=4", tokenizer=tokenizer, out=tmp_path / "run",
            language=tmp_path / "other.safetensors", **SHORT,
        )  # fmt: skip
    assert same_bits(bits(third), base)
    header, _ = read(again.path)
    assert header.trained_on is not None and [b.name for b in header.trained_on.beside] == ["en"]


def test_a_task_can_skip_from_the_modules_own_output():
    made, losses, tokenizer = toy(), [], toy_tokenizer()
    for skip in ("last", "own"):
        model = toy_model()
        stir(ad.attach(model, "pfeiffer:rank=4", name="en"))
        found = train_reranker(
            model, made, "pfeiffer:rank=4", tokenizer=tokenizer, language="en", skip=skip, **SHORT
        )  # fmt: skip
        losses.append([value for _, value in found.losses])
        pairs = [(made.queries["q1"], made.documents[f"d{i}"]) for i in range(4)]
        with ad.composed(model, ad.Stack("en", "reranker", skip=skip)):
            want = ad.Reranker(model, tokenizer).predict(pairs)
        assert found.reranker.predict(pairs).tolist() == want.tolist()
    assert losses[0] != losses[1]


def test_k_numbers_are_chosen_and_trained_beside_a_language(tmp_path):
    made, tokenizer, model = toy(), toy_tokenizer(), toy_model()
    base = bits(model)
    stir(ad.attach(model, "pfeiffer:rank=4", name="en"))
    options = SHORT | {"tokenizer": tokenizer, "language": "en", "lottery": {"k": 50, "full": {"steps": 2}}}
    found = train_reranker(model, made, "sparse", out=tmp_path / "run", **options)
    adapter = ad.Adapter(model, "reranker")
    assert sum(t.numel() for n, t in adapter.state_dict().items() if n.endswith("/values")) == 50
    assert set(find_state(model).state.active) == {"en", "reranker"} and len(found.losses) == 4
    header, _ = read(found.path)
    assert header.trained_on is not None and header.trained_on.beside[0].name == "en"
    want = found.reranker.predict([(made.queries["q1"], made.documents["d1"])])
    trained = values(model)
    ad.detach(model, "reranker")
    assert same_bits(bits(model), base)
    again = train_reranker(model, made, "sparse", out=tmp_path / "run", **options)
    assert all(torch.equal(t, trained[k]) for k, t in values(model).items())
    assert again.reranker.predict([(made.queries["q1"], made.documents["d1"])]) == want


def test_a_lottery_run_that_is_killed_before_its_last_file_goes_on(tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def killed(*args, **more):
        raise KilledError

    options = SHORT | {"tokenizer": toy_tokenizer(), "lottery": {"k": 50, "full": {"steps": 2}}}
    with monkeypatch.context() as patch:
        patch.setattr("addenda.ranking.train.write_all", killed)
        with pytest.raises(KilledError):
            train_reranker(toy_model(), toy(), "sparse", out=tmp_path, **options)
    assert not (tmp_path / "run.json").exists()
    before = (tmp_path / "adapter.safetensors").read_bytes()
    train_reranker(toy_model(), toy(), "sparse", out=tmp_path, **options)
    assert (tmp_path / "run.json").exists() and (tmp_path / "adapter.safetensors").read_bytes() == before


def test_a_run_of_the_other_kind_is_not_written_over(tmp_path):
    """A lottery in the folder of a run that is none, and the other way round: refused, or begun anew where asked."""
    made, plain = toy(), SHORT | {"tokenizer": toy_tokenizer()}
    drawn = plain | {"lottery": {"k": 50, "positions": "random"}}
    kinds = [("lora:rank=2", plain), ("sparse", drawn)]
    for (method, options), (other, others) in (kinds, kinds[::-1]):
        folder = tmp_path / method.partition(":")[0]
        train_reranker(toy_model(), made, method, out=folder, **options)
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        with pytest.raises(AddendaError, match=r"lottery.*resume=False"):
            train_reranker(toy_model(), made, other, out=folder, **others)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        train_reranker(toy_model(), made, other, out=folder, resume=False, **others)
        assert json.loads((folder / "run.json").read_text())["options"]["method"]["name"] == other.partition(":")[0]
        assert (folder / "lottery").exists() == (other == "sparse")
        assert (folder / "checkpoints").exists() == (other != "sparse")


def test_a_languages_file_gets_a_name_that_is_free(tmp_path):
    model = toy_model()
    for name in ("de", "de-language", "de-2"):
        stir(ad.attach(model, "lora:rank=2", name=name))
    ad.Adapter(model, "de").save(tmp_path / "de.safetensors")
    train_reranker(
        model, toy(), "lora:rank=2", tokenizer=toy_tokenizer(), language=tmp_path / "de.safetensors",
        **SHORT | {"steps": 1},
    )  # fmt: skip
    assert set(find_state(model).state.active) == {"de-3", "reranker"}


def test_a_call_that_fails_leaves_a_loaded_model_as_it_was():
    made, model, tokenizer = toy(), toy_model(), toy_tokenizer()
    before = bits(model)

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_reranker(model, made, "lora:rank=2", tokenizer=tokenizer, progress=stop, **SHORT)
    assert same_bits(bits(model), before) and find_state(model) is None
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"negatives": 60}, "60 were asked for"),
        ({"loss": "listwize"}, "Did you mean 'listwise'"),
        ({"loss": "distill"}, "give teacher="),
        ({"dev": "valid"}, "no split 'valid'"),
        ({"judge": 5}, "give dev="),
        ({"steps": 0}, "steps must be"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"max_length": 5}, "leaves no room"),
        ({"tokenizer": None}, "wants its tokenizer="),
        ({"language": "fi"}, "fi"),
        ({"lr": 1e-3}, "no option 'lr'"),
        ({"lottery": {"k": 3}}, "is for the method 'sparse'"),
        ({"method": "sparse"}, "give lottery="),
        ({"method": "sparse", "lottery": {"k": 3}, "skip": "own"}, "sparse changes add up"),
        ({"method": "sparse", "lottery": {"k": 3, "steps": 3}}, "holds 'steps'"),
        ({"method": "sparse", "lottery": {"k": 10**9}}, "k=1,000,000,000 is above"),
        ({"method": "sparse", "lottery": {"k": 0}}, "k must be"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(options, told):
    model = toy_model()
    asked = {"tokenizer": toy_tokenizer()} | SHORT | options
    with pytest.raises(AddendaError, match=told):
        train_reranker(model, toy(), **({"method": "lora:rank=2"} | asked))
    assert find_state(model) is None


def test_a_model_with_other_outputs_is_refused(tmp_path):
    with pytest.raises(AddendaError, match="has 3 outputs"):
        train_reranker(folder_of(tmp_path / "three", labels=3), toy(), **SHORT)
    with pytest.raises(AddendaError, match="has 3 outputs"):
        train_reranker(toy_model(labels=3), toy(), tokenizer=toy_tokenizer(), **SHORT)
