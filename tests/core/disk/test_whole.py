"""A folder or file that gets its name only when it is whole."""

import errno
import os

import pytest

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import file_of
from addenda.core.disk.atomic import write_atomically
from addenda.core.disk.whole import free_place, whole


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_folder_gets_its_name_at_the_end(tmp_path):
    out = tmp_path / "new" / "out"
    with whole(free_place(out), folder=True) as place:
        (place / "a").write_text("1")
        assert not out.exists()
    assert everything(tmp_path) == ["new", "new/out", "new/out/a"] and (out / "a").read_text() == "1"


def test_a_file_gets_its_name_at_the_end(tmp_path):
    out = tmp_path / "out.gguf"
    with whole(free_place(out), folder=False) as place:
        assert place.name == "out.gguf" and not place.exists()
        place.write_text("1")
    assert everything(tmp_path) == ["out.gguf"] and out.read_text() == "1"


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_where_it_ends_early(tmp_path, folder, stop):
    def stopped():
        with whole(tmp_path / "new" / "out", folder=folder) as place:
            ((place / "a") if folder else place).write_text("half")
            raise stop

    with pytest.raises(stop):
        stopped()
    assert everything(tmp_path) == []


def test_what_is_there_is_never_written_over(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("taken", "link"):
        with pytest.raises(AddendaError, match="there already"):
            free_place(tmp_path / name)
    with pytest.raises(AddendaError, match="has come to be"), whole(tmp_path / "late", folder=True):
        (tmp_path / "late").write_text("theirs")
    assert (tmp_path / "late").read_text() == "theirs" and everything(tmp_path) == ["late", "link", "taken"]


def test_a_path_that_no_disk_takes_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AddendaError), whole(tmp_path / "file" / "out", folder=True):
        raise AssertionError("no place was to be had")
    assert everything(tmp_path) == ["file"]


def test_a_file_in_the_place_of_a_folder_is_told_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    for check in (free_place, file_of):
        with pytest.raises(AddendaError, match=r"file is no folder\. Choose another --out"):
            check(tmp_path / "file" / "below" / "out", "--out")
    assert free_place(tmp_path / "new" / "out") == file_of(tmp_path / "new" / "out") == tmp_path / "new" / "out"


def test_an_error_names_the_place_and_not_the_hidden_one(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AddendaError, match="The disk is full") as raised, whole(tmp_path / "out", folder=True) as place:
        write_atomically(place / "a", b"1")
    assert str(tmp_path / "out" / "a") in str(raised.value) and everything(tmp_path) == []
