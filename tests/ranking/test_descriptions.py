"""Debian's lists, packed in each way, and damaged in several."""

import gzip

import pytest
from tests.ranking.debian_lists import MAIN, PACK, entry, md5, write

from addenda.core.base.errors import AddendaError
from addenda.ranking import descriptions
from addenda.ranking.descriptions import Description, Package, packages, translations


@pytest.mark.parametrize("packed", PACK)
def test_lists_are_read_however_they_are_packed(tmp_path, packed):
    write(tmp_path, packed)
    found = packages(tmp_path)
    assert len(found) == 62 and list(found) == sorted(found)
    assert found["tool3"] == Package("tool3", "src3", "games", md5(entry(3)[3]))
    assert found["old"].source == "old" and found["tool0-doc"].source == "src0"
    german = translations(tmp_path, "de")
    assert german[md5(entry(3)[3])] == Description(
        "Werkzeug 3 für Drache und Garten",
        ("Das Programm TOOL3 bearbeitet Drache, Garten und Spiegel zum 3. Mal in Ruhe.", "Mehr 3."),
    )
    assert len(german) == 61 and len(translations(tmp_path, "en")) == 62


def test_updates_count_over_the_release_and_servers_without_descriptions_do_not(tmp_path):
    write(tmp_path)
    found = packages(tmp_path)
    new = entry(1)[3].replace("More", "News")
    assert found["tool1"].md5 == md5(new) and found["tool1"].section == "net"
    assert translations(tmp_path, "en")[md5(new)].long[1] == "News of 1."
    assert found["tool2"].section == "net" and found["tool2"].md5 == md5(entry(2)[3])


def test_a_language_that_is_not_there_is_named(tmp_path):
    write(tmp_path)
    with pytest.raises(AddendaError, match=r"no descriptions in 'fr'; it has de, en"):
        translations(tmp_path, "fr")
    with pytest.raises(AddendaError, match="cannot be read"):
        packages(tmp_path / "nothing")


def cut(data):
    return data[: len(data) // 2]


def begun_otherwise(data):
    return b"x" + data[1:]


@pytest.mark.parametrize("packed", [p for p in PACK if p])
@pytest.mark.parametrize("damage", [cut, begun_otherwise])
def test_a_damaged_list_is_refused_by_name(tmp_path, packed, damage):
    write(tmp_path, packed)
    path = tmp_path / f"{MAIN}_i18n_Translation-de{packed}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AddendaError, match=r"Translation-de.* is damaged .*it is fetched again"):
        translations(tmp_path, "de")


def test_lists_that_unpack_to_gigabytes_are_not_unpacked(tmp_path, monkeypatch):
    write(tmp_path, ".gz")
    path = tmp_path / f"{MAIN}_i18n_Translation-de.gz"
    path.write_bytes(gzip.compress(b"x" * (3 << 20)))
    with pytest.raises(AddendaError, match="a paragraph"):
        translations(tmp_path, "de")
    monkeypatch.setattr(descriptions, "MOST", 1 << 20)
    path.write_bytes(gzip.compress(b"x\n\n" * (1 << 20)))
    with pytest.raises(AddendaError, match="larger than 1,024 KiB"):
        translations(tmp_path, "de")


def test_lines_of_scripts_without_spaces_are_joined_without_one(tmp_path):
    write(tmp_path, "")
    text = "Description-md5: 5\nDescription-ja: 短い 説明\n これは文の\n 途中です。 ABC と\n DEF。\n"
    (tmp_path / f"{MAIN}_i18n_Translation-ja").write_text(text, encoding="utf-8")
    assert translations(tmp_path, "ja")["5"].long == ("これは文の途中です。 ABC と DEF。",)
