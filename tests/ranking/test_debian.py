"""Collections of Debian's descriptions, on a toy of its lists; the real ones with ADDENDA_NETWORK=1."""

import hashlib
import re

import pytest
from tests.ranking.debian_lists import entry, pretend, write

from addenda.core.base.errors import AddendaError
from addenda.ranking import beir, debian
from addenda.ranking.collection import SPLITS


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    return write(tmp_path_factory.mktemp("lists"), number=150)


def test_queries_are_english_and_documents_of_the_language(lists):
    found = debian.collection("de", folder=lists)
    assert (found.name, found.language, found.query_language) == ("debian-en-de", "de", "en")
    assert found.queries["tool7"] == "for hammer and orange number 7"
    assert (
        found.documents["tool7"].text == "Das Programm bearbeitet Hammer, Orange und Nadel zum 7. Mal in Ruhe. Mehr 7."
    )
    assert found.sections["tool7"] == "games" and set(found.sections.values()) == {"net", "games"}
    found.check()


def test_each_document_answers_one_query_of_the_split_of_its_source(lists):
    found = debian.collection("de", folder=lists)
    assert len(found.documents) == 149  # of tool1 the update's English text has no translation
    assert "old" not in found.documents and "tool0-doc" not in found.documents
    assert sum(len(q) for q in found.qrels.values()) == len(found.queries) == len(found.documents)
    for split, qrels in found.qrels.items():
        for query, graded in qrels.items():
            assert graded == {query: 1} and debian.split_of(query.replace("tool", "src")) == split
    sizes = [len(found.qrels[split]) for split in SPLITS]
    assert sizes[0] > 50 and sizes[1] > 5 and sizes[2] > 40


def test_splits_are_shares_by_hash_and_the_same_everywhere():
    splits = [debian.split_of(f"source-{i}") for i in range(20000)]
    assert [splits.count(s) / 20000 for s in SPLITS] == pytest.approx([0.5, 0.1, 0.4], abs=0.01)
    names = ("apt", "gimp", "vlc", "bash")
    places = [int(hashlib.sha256(f"split:{name}".encode()).hexdigest()[:16], 16) % 100 for name in names]
    assert [debian.split_of(name) for name in names] == [("test", "dev", "train")[(p > 39) + (p > 49)] for p in places]
    assert [debian.split_of(name) for name in names] == ["dev", "train", "dev", "test"]


def test_a_smaller_pool_holds_the_first_by_hash(lists):
    whole = debian.collection("de", folder=lists)
    pool = debian.collection("de", limit=60, folder=lists)
    assert len(pool.documents) == 60 and set(pool.documents) == set(list(whole.documents)[:60])
    assert debian.collection("de", limit=60, folder=lists).digest() == pool.digest() != whole.digest()
    trained = debian.collection("de", splits=("train", "dev"), folder=lists)
    assert list(trained.qrels) == ["train", "dev"] and not set(trained.documents) & set(whole.qrels["test"])


def test_a_language_with_its_own_queries_and_english_alone(lists):
    own = debian.collection("de", query_language="de", folder=lists)
    assert own.queries["tool7"] == "Werkzeug 7 für Hammer und Orange" and own.name == "debian-de-de"
    english = debian.collection("en", folder=lists)
    assert english.documents["tool7"].text == "The program handles hammer, orange and needle. More of 7."
    assert "tool1" in english.documents and set(own.documents) <= set(english.documents)


def test_names_are_blotted_out_and_shared_words_stay():
    assert debian.blotted("GIMP is to gimp as gimp-data, not Gimpy (gimp).", "gimp") == "is to as -data, not Gimpy ()."
    assert debian.blotted("libfoo1 of foo++ reads c++", "foo++", "c++") == "libfoo1 of reads"
    assert debian.blotted("FOO and libfoo for Perl, not food", "libfoo-perl") == "and for, not food"
    assert debian.blotted("an X of r and go", "r-cran-x", "go") == "an X of r and"
    assert debian.blotted("image editor", "gimp") == "image editor"


def test_names_are_nowhere_in_the_collection_and_shared_words_are(lists):
    found = debian.collection("de", folder=lists)
    for name, text in [*found.queries.items(), *((d, document.text) for d, document in found.documents.items())]:
        assert not re.search(rf"\b{name}\b", text, re.IGNORECASE)
    shared = sum("7" in found.documents[q].text.split() or "7." in found.documents[q].text for q in ("tool7",))
    assert shared == 1


def test_near_duplicates_are_known(lists):
    found = debian.collection("en", folder=lists)
    assert all(d not in near and near <= set(found.documents) for d, near in found.near.items())


def test_a_collection_goes_round_as_a_beir_folder(lists, tmp_path):
    found = debian.collection("de", limit=60, folder=lists)
    read = beir.read(beir.write(found, tmp_path / found.name))
    assert read == found and read.digest() == found.digest()


def test_plain_texts_are_of_training_packages_only(lists):
    texts = debian.texts("de", folder=lists)
    packages = [i for i in range(150) if i != 1 and debian.split_of(f"src{i}") == "train"]
    assert all(any(f" zum {i}. Mal" in text for text in texts) for i in packages)
    assert len(texts) == len(set(texts)) == len(packages) + (debian.split_of("old") == "train")
    assert texts[1].count("\n\n") == 2
    every = debian.texts("de", splits=SPLITS, folder=lists)
    assert len(every) == 150 and entry(3)[4].split("\n")[0] in "".join(every)


def test_lists_are_fetched_where_they_lack(monkeypatch, tmp_path):
    log = pretend(monkeypatch, tmp_path)
    assert len(debian.collection("de").documents) == 59
    assert len(debian.texts("de")) > 10 and log.read_text().count(" update\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"query_language": "fr"}, "query_language is 'en' or the documents' own"),
        ({"splits": ("tests",)}, "Splits are train, dev, test, got 'tests'"),
        ({"limit": 10}, "50 or more, got 10"),
        ({"splits": ("dev",)}, r"has \d+ usable documents, and 50 are the fewest"),
    ],
)
def test_what_makes_no_collection_is_refused(lists, options, words):
    with pytest.raises(AddendaError, match=words):
        debian.collection("de", folder=lists, **options)
