"""The card of a run: what the Hub reads of it, and names of anybody's that stay names."""

import re

import pytest
from huggingface_hub import ModelCard

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.train.card import CARD, card_of, check_ours
from tiny_models import make_llama

HOSTILE = "a`b``c|d\n---\nlicense: mit\n---\n# <script>alert(1)</script>\r\x1b[31m\u202e\udcff"


@pytest.fixture
def adapter():
    return ad.attach(make_llama(), "lora:rank=2")


def run_of(base="org/model", train="org/data", form="pair", **more):
    return {
        "base": base,
        "options": {"targets": "linear", "batch": 8, "rate": 1e-3, "seed": 0, "dtype": "float32"},
        "data": {"train": train, "form": form, "examples": 9, "digest": "0" * 64, "labels": None},
        "losses": [[1, 2.0], [2, 1.0]], "steps": 2, "trainable": 10, "tokens": 0, "before": None, "after": None,
        "peak_memory_above_model": None,
    } | more  # fmt: skip


def front(card):
    return ModelCard(card).data.to_dict()


def test_the_hub_reads_what_is_known(adapter):
    judged = {"loss": 0.5, "accuracy": 0.75, "items": [True] * 4}
    card = card_of(adapter, run_of(after=judged))
    assert front(card) == {
        "base_model": "org/model", "datasets": "org/data", "library_name": "addenda", "metrics": ["accuracy"],
        "pipeline_tag": "text-generation", "tags": ["adapter", "addenda"],
    }  # fmt: skip
    assert "| after | evaluation loss 0.5000, 75.0% of 4 right |" in card
    assert front(card_of(adapter, run_of(form="image")))["pipeline_tag"] == "image-classification"
    cached = "/home/me/.cache/huggingface/hub/models--org--model/snapshots/0123"
    assert front(card_of(adapter, run_of(base=cached)))["base_model"] == "org/model"


@pytest.mark.parametrize("own", ["/home/me/model", "model/", "LlamaForCausalLM", "a/b/c", "", "../model", HOSTILE])
def test_what_is_not_of_the_hub_is_not_named_to_it(adapter, own):
    said = front(card_of(adapter, run_of(base=own, train=own)))
    assert said == {"library_name": "addenda", "pipeline_tag": "text-generation", "tags": ["adapter", "addenda"]}


def test_a_folder_here_is_not_of_the_hub(adapter, tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front(card_of(adapter, run_of()))


def test_hostile_names_stay_names(adapter):
    card = card_of(adapter, run_of(base=HOSTILE, train=HOSTILE))
    plain = card_of(adapter, run_of(base="model", train="data"))
    assert card.encode()
    assert card.count("\n") == plain.count("\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", card)
    assert [line for line in card.splitlines() if line == "---"] == ["---"] * 2
    shown = re.sub(r"(?s)(```+)python\n.*?\n\1|(`+) .*? \2(?!`)", "", card)  # without blocks and spans of code
    assert "<script>" not in shown and "license" not in shown
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_a_card_is_known_as_ours_and_another_is_not(adapter, tmp_path):
    (tmp_path / CARD).write_text(card_of(adapter, run_of()))
    check_ours(tmp_path)
    (tmp_path / CARD).write_text("---\nlibrary_name: addenda\ntags: [adapter, addenda]\n---\n")  # of earlier versions
    check_ours(tmp_path)
    (tmp_path / CARD).write_text("---\nlibrary_name: peft\n---\n")
    with pytest.raises(AddendaError, match=re.escape(CARD)):
        check_ours(tmp_path)
