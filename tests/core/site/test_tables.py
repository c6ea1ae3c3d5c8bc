"""Where a model keeps an entry for every token, and how many its folder says that it had."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import toys
from addenda.core.base.errors import AddendaError
from addenda.core.site.tables import rows_in_folder, tables_of

FOUND = {
    "make_llama": ["model.embed_tokens.weight"],
    "make_gpt2": ["transformer.wte.weight"],
    "make_bert": ["bert.embeddings.word_embeddings.weight"],
    "make_mixtral": ["model.embed_tokens.weight", "lm_head.weight"],
    "make_t5": ["shared.weight"],
    "make_bart": ["model.shared.weight", "final_logits_bias"],
}


@pytest.mark.parametrize("name", FOUND)
def test_every_table_is_found_once_by_its_first_name(name):
    tables = tables_of(getattr(toys, name)())
    assert list(tables) == FOUND[name]
    assert all(toys.VOCAB in t.shape for t in tables.values())


class Two(nn.Module):
    """A model with a second embedding of as many rows, of which nothing says what it is."""

    def __init__(self, name: str):
        super().__init__()
        self.words = nn.Embedding(32, 4)
        setattr(self, name, nn.Embedding(32, 4))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words


def test_a_second_table_of_as_many_rows_is_refused_and_positions_are_none():
    with pytest.raises(AddendaError, match="decoder_words has 32 rows too"):
        tables_of(Two("decoder_words"))
    assert list(tables_of(Two("positions"))) == ["words.weight"]
    with pytest.raises(AddendaError, match="does not say where its table of tokens is"):
        tables_of(toys.make_vit())
    model = Two("positions")
    model.words._parameters["weight"] = nn.Parameter(torch.zeros(32, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AddendaError, match="quantised table"):
        tables_of(model)


CONFIGS = {
    "plain": ({"vocab_size": 7}, 7),
    "of two modes": ({"vocab_size": 7, "text_config": {"vocab_size": 9}, "vision_config": {}}, 9),
    "nothing said": ({"hidden_size": 4}, None),
    "a text": ({"vocab_size": "7"}, None),
    "a list": ([1], None),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_how_many_rows_there_were_is_read_from_the_folder_or_the_hubs_cache(case, tmp_path, monkeypatch):
    raw, rows = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert rows_in_folder(SimpleNamespace(_name_or_path=str(tmp_path))) == rows
    asked = []

    def cached(name, file, revision):
        asked.append((name, file, revision))
        return str(tmp_path / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(try_to_load_from_cache=cached))
    assert rows_in_folder(SimpleNamespace(_name_or_path="somebody/model", _commit_hash="c0")) == rows
    assert asked == [("somebody/model", "config.json", "c0")]


def test_what_cannot_be_asked_is_not_known(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{")
    assert rows_in_folder(SimpleNamespace(_name_or_path=str(tmp_path))) is None
    assert rows_in_folder(SimpleNamespace()) is None
    missing = SimpleNamespace(try_to_load_from_cache=lambda *args, **options: None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", missing)
    assert rows_in_folder(SimpleNamespace(_name_or_path="somebody/model")) is None
