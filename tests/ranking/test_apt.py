"""Fetching lists with an apt-get of the test's own: what it is told, what is kept, and what is left after failures."""

import json
import os
import shutil

import pytest
from tests.ranking.debian_lists import pretend, write

from addenda.core.base.errors import AddendaError
from addenda.ranking import apt


def test_lists_are_fetched_once_into_a_folder_of_our_own(monkeypatch, tmp_path):
    log, said = pretend(monkeypatch, tmp_path), []
    folder = apt.fetch(["de"], progress=said.append)
    assert folder == apt.lists_folder() == tmp_path / "cache" / "debian"
    assert apt.fetched_languages(folder) == {"en", "de"} and len(said) == 1 and "de, en into" in said[0]
    assert sorted({apt.language_of(p.name) for p in folder.iterdir()} - {None}) == ["de", "en"]
    assert apt.offered_languages(folder) == ["de", "en", "pt_BR"]
    assert apt.fetch(["de"], progress=said.append) == folder and len(said) == 1
    conf = log.read_text()
    assert conf.startswith("-c ") and " update\n" in conf and conf.count("#clear APT::Update::Post-Invoke") == 2
    places = [line.split('"')[1] for line in conf.splitlines() if line.startswith("Dir::") and '""' not in line]
    assert len(places) == 5 and all(place.startswith(str(tmp_path / "cache")) for place in places)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["debian"]
    apt.fetch(["de"], again=True)
    assert log.read_text().count(" update\n") == 2


def test_another_language_is_fetched_beside_those_there(monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path)
    assert apt.fetched_languages(apt.fetch([])) == {"en"}
    assert apt.fetched_languages(apt.fetch(["de"])) == {"en", "de"}


def failures(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").rglob("*")) if (tmp_path / "cache").exists() else []


@pytest.mark.parametrize(
    ("does", "code", "words"),
    [
        ("", 100, "failed .exit code 100.*needs the network"),
        ("print('E: no route to host', file=sys.stderr); sys.exit(100)", 0, "It says: E: no route to host"),
        ("sys.exit(0)", 0, "there are no descriptions; nothing is kept"),
    ],
)
def test_a_fetch_that_fails_leaves_nothing(monkeypatch, tmp_path, does, code, words):
    pretend(monkeypatch, tmp_path, does=does, code=code)
    with pytest.raises(AddendaError, match=words):
        apt.fetch(["de"])
    assert failures(tmp_path) == []


def test_a_fetch_that_does_not_end_is_given_up(monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path, does="import time; time.sleep(60)")
    monkeypatch.setattr(apt, "SECONDS", 0.5)
    with pytest.raises(AddendaError, match="had not ended after"):
        apt.fetch(["de"])
    assert failures(tmp_path) == []


def test_a_language_that_there_is_not_is_named_with_those_that_there_are(monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path)
    with pytest.raises(AddendaError, match=r"no descriptions in pt_PT. Did you mean 'pt_BR'.*in de, en, pt_BR"):
        apt.fetch(["pt_PT"])
    with pytest.raises(AddendaError, match="A language is a code such as de"):
        apt.fetch(['de"; Dir "/'])
    assert failures(tmp_path) == []


def test_without_apt_one_sentence_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(AddendaError, match="fetched by apt-get, which is not on this machine"):
        apt.fetch(["de"])
    assert failures(tmp_path) == []


def test_a_failed_fetch_keeps_what_was_there_and_nothing_of_anybody_else_is_replaced(monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path)
    folder = apt.fetch(["de"])
    before = failures(tmp_path)
    with pytest.raises(AddendaError, match="no descriptions in xx"):
        apt.fetch(["xx"])
    assert failures(tmp_path) == before and apt.fetched_languages(folder) == {"de", "en"}
    (folder / "mine.txt").write_text("x")
    with pytest.raises(AddendaError, match="holds what addenda has not written"):
        apt.fetch(["de"], again=True)
    (folder / "mine.txt").unlink()
    next(folder.glob("*Translation-de*")).write_bytes(b"cut")
    assert apt.fetched_languages(folder) == set()
    assert apt.fetched_languages(apt.fetch(["de"])) == {"de", "en"}


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"by": "addenda", "files": 5}', "[" * 5000])
def test_a_damaged_record_is_no_record(monkeypatch, tmp_path, record):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path))
    write(tmp_path / "debian")
    (tmp_path / "debian" / apt.RECORD).write_text(record)
    assert apt.fetched_languages(tmp_path / "debian") == set() and apt.offered_languages(tmp_path / "debian") == []
    with pytest.raises(AddendaError, match="Move it away"):
        apt.fetch(["de"])


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("apt-get") is None or os.environ.get("ADDENDA_NETWORK") != "1", reason="ADDENDA_NETWORK=1"
)
def test_the_real_apt_fetches_finnish(monkeypatch, tmp_path):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path))
    folder = apt.fetch(["fi"])
    assert apt.fetched_languages(folder) == {"en", "fi"}
    assert json.loads((folder / apt.RECORD).read_text())["languages"] == ["en", "fi"]
