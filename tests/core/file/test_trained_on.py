"""What an adapter was trained on, in its file: by hash, read strictly, and another tokenizer refused."""

import json
from dataclasses import replace

import pytest
import torch

import addenda as ad
import tiny_models
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read, write
from addenda.core.file.tokenizer import mark
from addenda.core.file.trained_on import content_hash, note_training, of_json, to_json, trained_on
from addenda.core.state.trained_on import Beside, TrainedOn
from shared import stir

HASH = "0123456789abcdef" * 4


def two(tmp_path, method="lora:rank=2"):
    model = tiny_models.make_bert()
    language = stir(ad.attach(model, method, name="en"))
    task = stir(ad.attach(model, "lora:rank=2", also_train=["classifier"], name="task"))
    return model, language, task


@pytest.mark.parametrize(
    "method", ["lora:rank=2", "pfeiffer:rank=2", "shira:density=0.1", "lora:rank=4,bits=4", "vera:rank=8"]
)
def test_the_hash_is_of_what_an_adapter_holds(tmp_path, method):
    _, language, task = two(tmp_path, method)
    before = content_hash(language)
    file = language.save(tmp_path / "en.safetensors")
    other = tiny_models.make_bert()
    again = ad.load(other, file, name="english")
    if "bits" not in method:  # a file has codes, what trains has more
        assert content_hash(again) == before
    assert content_hash(again) == content_hash(ad.load(tiny_models.make_bert(), file, name="x"))
    assert content_hash(task) != before
    with torch.no_grad():
        next(iter(language.parameters())).view(-1)[0] += 1e-3
    assert content_hash(language) != before


def test_equal_tensors_of_other_options_have_another_hash():
    found = []
    for alpha in (2, 4, 2):
        found.append(content_hash(stir(ad.attach(tiny_models.make_bert(), f"lora:rank=2,alpha={alpha}", name="x"))))
    assert found[0] == found[2] != found[1]


def test_a_file_names_tokenizer_and_language_part(tmp_path):
    _, language, task = two(tmp_path)
    tokenizer = tiny_models.make_tokenizer()
    plain, _ = read(task.save(tmp_path / "plain.safetensors"))
    assert plain.trained_on is None and "trained_on" not in json.dumps(plain.to_json())
    noted = note_training(task, tokenizer=tokenizer, beside=[language])
    assert noted == TrainedOn(*mark(tokenizer), (Beside("en", content_hash(language)),))
    file = task.save(tmp_path / "task.safetensors")
    header, _ = read(file)
    assert header.trained_on == noted and of_json(to_json(noted)) == noted
    model = tiny_models.make_bert()
    loaded = ad.load(model, file, name="task", tokenizer=tiny_models.make_tokenizer())
    assert trained_on(loaded) == noted
    again, _ = read(loaded.save(tmp_path / "again.safetensors"))
    assert again.trained_on == noted
    text = ad.inspect(file)
    assert f"trained beside: en, SHA-256 {content_hash(language)}" in text
    assert f"trained with a tokenizer of {mark(tokenizer).entries} tokens, SHA-256 {mark(tokenizer).sha256}" in text


def test_another_tokenizer_is_an_error_and_nothing_is_loaded(tmp_path):
    _, language, task = two(tmp_path)
    note_training(task, tokenizer=tiny_models.make_tokenizer(), beside=[language])
    file = task.save(tmp_path / "task.safetensors")
    model, other = tiny_models.make_bert(), tiny_models.make_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(AddendaError, match="trained with another tokenizer: it has 77 tokens, and that of training 76"):
        ad.load(model, file, tokenizer=other)
    assert "addenda" not in dir(model) and type(model).__name__ == "BertForSequenceClassification"
    ad.load(model, file)


def test_an_adapter_does_not_act_beside_itself(tmp_path):
    _, language, task = two(tmp_path)
    for beside in ([task], [language, language]):
        with pytest.raises(AddendaError, match="beside other adapters, each once"):
            note_training(task, beside=beside)
    assert trained_on(task) is None
    assert str(note_training(task, beside=[language])).startswith("trained beside en (")


BAD = {
    "nothing": {},
    "a list": [],
    "another key": {"tokenizer": HASH, "entries": 3, "code": "x"},
    "no entries": {"tokenizer": HASH},
    "no tokenizer": {"entries": 3},
    "no hash": {"tokenizer": HASH[:-1] + "G", "entries": 3},
    "a short hash": {"tokenizer": HASH[:-1], "entries": 3},
    "a number": {"tokenizer": 3, "entries": 3},
    "true": {"tokenizer": HASH, "entries": True},
    "none": {"tokenizer": HASH, "entries": 0},
    "empty": {"beside": []},
    "a text": {"beside": "en"},
    "too many": {"beside": [{"name": f"l{i}", "sha256": HASH} for i in range(65)]},
    "names only": {"beside": ["en"]},
    "more": {"beside": [{"name": "en", "sha256": HASH, "path": "/"}]},
    "no name": {"beside": [{"name": "", "sha256": HASH}]},
    "a long name": {"beside": [{"name": "n" * 65, "sha256": HASH}]},
    "a terminal": {"beside": [{"name": "e\x1bn", "sha256": HASH}]},
    "twice": {"beside": [{"name": "en", "sha256": HASH}, {"name": "en", "sha256": HASH}]},
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_malformed_is_refused_as_all_of_a_header_is(case, tmp_path):
    with pytest.raises((ValueError, KeyError, TypeError)):
        of_json(BAD[case])
    _, _, task = two(tmp_path)
    header, tensors = read(task.save(tmp_path / "task.safetensors"))
    if case == "names only":  # once through a whole file: it is written by hand, since `write` refuses it too
        bad = replace(header, trained_on=TrainedOn(beside=(Beside("en", "no hash"),)))
        with pytest.raises(AddendaError, match="was not saved"):
            write(tmp_path / "bad.safetensors", bad, tensors)
        assert not (tmp_path / "bad.safetensors").exists()
