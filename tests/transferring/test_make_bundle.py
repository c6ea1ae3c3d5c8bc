"""Making a bundle: bad input is refused before anything is trained, and the model is as it was."""

import pytest
import torch

import addenda as ad
import tiny_models
from addenda.data.read import read
from addenda.transferring.make_bundle import make_bundle
from addenda.transferring.synthesise import synthesise
from lister import make_lister
from shared import stir

TOKENIZER = tiny_models.make_tokenizer()
ROWS = [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a in range(4) for b in range(5)]
HOW = {"answers": ("y", "n"), "steps": 2, "batch": 8, "negatives": [f"{x} is {y}" for x in "abcd" for y in "ef"]}


@pytest.fixture
def model(monkeypatch):
    made = tiny_models.make_llama()
    ad.attach(made, "lora:rank=2", name="a")
    return made


def test_an_adapter_on_the_model_stays_there_and_acts(model, tmp_path):
    before = ad.status(model)
    by_name = make_bundle(model, TOKENIZER, "a", ROWS, tmp_path / "1", name="sums", **HOW)
    itself = make_bundle(model, TOKENIZER, ad.adapters(model)["a"], ROWS, tmp_path / "2", name="sums", **HOW)
    assert by_name.bundle == itself.bundle and ad.status(model) == before
    assert by_name.path.read_bytes() == itself.path.read_bytes()


def test_seeds_can_be_given_and_the_name_is_the_files(model, tmp_path):
    (tmp_path / "my sums.jsonl").write_text("\n".join(f'{{"q": "{r["question"]}", "answer": "x"}}' for r in ROWS))
    made = make_bundle(
        model, TOKENIZER, "a", tmp_path / "my sums.jsonl", tmp_path / "b", seeds=["0+0=?", "1+1=?"], question="q", **HOW
    )
    assert made.bundle.name == "my-sums" and made.bundle.seeds == ("0+0=?", "1+1=?")


@pytest.mark.parametrize(("how", "why"), [
    ({"seeds": 1}, "2 at least, got 1"),
    ({"seeds": 21}, "21 seeds are wanted, and 20"),
    ({"seeds": "ab"}, "seeds must be a whole number"),
    ({"seeds": ["a", "A"]}, "1 of them different"),
    ({"seeds": ["a", ""]}, "empty"),
    ({"seeds": ["a" * 250, "b"]}, "1 of 22 texts have more than the 256 tokens"),
    ({"seeds": [letter * 60 for letter in "abc"]}, "list of the 3 seeds has"),
    ({"answers": ("yes", "no")}, "'yes' is 3 tokens"),
    ({"steps": 0}, "steps must be"),
    ({"count": 3}, "4 at least; got 3"),
    ({"count": 21}, "count= is how many of 20 inputs"),
    ({"format": "x"}, "refuses 5 of the 5 seeds"),
    ({"name": "two\nlines"}, "one line"),
    ({"negatives": ["a", "b", "c"]}, "3 different negatives"),
    ({"question": "nothing"}, "nothing"),
])  # fmt: skip
def test_bad_input_is_refused_and_nothing_is_left(model, tmp_path, how, why):
    before = ad.status(model)
    with pytest.raises(ad.AddendaError, match=why):
        make_bundle(model, TOKENIZER, "a", ROWS, tmp_path / "b", **HOW | how)
    assert ad.status(model) == before and not list(tmp_path.iterdir())


def test_negatives_are_what_the_base_alone_makes_of_the_seeds(tmp_path):
    lister, tokenizer = make_lister()
    stir(ad.attach(lister, "lora:rank=2", name="a"), 1.0)
    told: list[str] = []
    how = {k: v for k, v in HOW.items() if k != "negatives"}
    rows = [{"question": f"{a}+{b}=?", "answer": "x"} for a in range(10) for b in range(3)]
    made = make_bundle(lister, tokenizer, "a", rows, tmp_path / "b", count=12, temperature=2.0, say=told.append, **how)
    assert made.negatives == 12 == made.bundle.count and "12 of 12 inputs" in told[-1]
    ad.detach(lister)
    alone = synthesise(lister, tokenizer, made.bundle.seeds, 12, temperature=2.0, batch=16)
    assert made.bundle.judged.dropped == len({*alone.texts} & {r["question"] for r in rows})


def test_data_adapters_and_places_that_cannot_be_are_refused(model, tmp_path):
    with pytest.raises(ad.AddendaError, match="no adapter on this model is called so"):
        make_bundle(model, TOKENIZER, "b", ROWS, tmp_path / "b", **HOW)
    with pytest.raises(ad.AddendaError, match="is a folder"):
        make_bundle(model, TOKENIZER, "a", ROWS, tmp_path, **HOW)
    other = tiny_models.make_llama(seed=1)
    ad.adapters(model)["a"].save(tmp_path / "a.safetensors")
    with pytest.raises(ad.AddendaError, match="trained on other base weights"):
        make_bundle(other, TOKENIZER, tmp_path / "a.safetensors", ROWS, tmp_path / "b", **HOW)
    with pytest.raises(ad.AddendaError, match="not on this model"):
        make_bundle(other, TOKENIZER, ad.adapters(model)["a"], ROWS, tmp_path / "b", **HOW)
    with pytest.raises(ad.AddendaError, match="has 2 different inputs"):
        make_bundle(model, TOKENIZER, "a", read(ROWS[:2]), tmp_path / "b", seeds=2, **HOW)
    assert ad.status(other) == "LlamaForCausalLM: no adapter attached"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_adapter_with_new_tokens_is_refused_and_its_tokens_go_again(tmp_path):
    model, tokenizer = tiny_models.make_llama(), tiny_models.make_tokenizer()
    ad.grow(model, tokenizer, ["<call>"])
    ad.attach(model, "lora:rank=2").save(tmp_path / "calls.safetensors")
    base = tiny_models.make_llama()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(ad.AddendaError, match=r"has grown \('<call>'\).*cannot move to another base"):
        make_bundle(base, tokenizer, tmp_path / "calls.safetensors", ROWS, tmp_path / "b", name="sums", **HOW)
    assert ad.status(base) == "LlamaForCausalLM: no adapter attached" and not (tmp_path / "b").exists()
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())
