"""Collections and texts by what a user calls them."""

import pytest

from addenda import AddendaError
from addenda.ranking import beir, sources
from addenda.ranking.collection import SPLITS
from addenda.ranking.sources import collection_of, texts_of
from ranking.toy import toy


def test_a_folder_is_read_whole(tmp_path):
    beir.write(toy(), tmp_path / "toy")
    assert collection_of(tmp_path / "toy").digest() == toy().digest()
    assert list(collection_of(tmp_path / "toy", splits=("test",)).qrels) == ["test"]
    with pytest.raises(AddendaError, match="limit= is for Debian"):
        collection_of(tmp_path / "toy", limit=60)
    assert texts_of(tmp_path / "toy") == [d.text for d in toy().documents.values()]


def test_debian_s_languages_are_asked_for_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr(sources.debian, "collection", lambda language, **more: asked.append((language, more)))
    monkeypatch.setattr(sources.debian, "texts", lambda language: [language])
    collection_of("debian:de", limit=600, splits=["train"])
    collection_of("debian:fi")
    assert asked == [("de", {"limit": 600, "splits": ("train",)}), ("fi", {"limit": None, "splits": SPLITS})]
    assert texts_of("debian:ja") == ["ja"]
    with pytest.raises(AddendaError, match="Which language"):
        texts_of("debian:")


def test_lines_of_a_file_are_texts(tmp_path):
    (tmp_path / "t.txt").write_text("eins\n\n zwei \n")
    assert texts_of(tmp_path / "t.txt") == ["eins", "zwei"]
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(AddendaError, match="holds no text"):
        texts_of(tmp_path / "empty.txt")
    (tmp_path / "t.jsonl").write_text('{"text": "eins"}\n{"text": "zwei"}\n')
    assert texts_of(tmp_path / "t.jsonl") == ["eins", "zwei"]
    (tmp_path / "latin.txt").write_bytes("für\n".encode("latin-1"))
    with pytest.raises(AddendaError, match="UTF-8"):
        texts_of(tmp_path / "latin.txt")
