"""Files that are whole or not there, and JSON that people can read."""

import errno
import json
import os

import pytest

from addenda.core.base.errors import AddendaError
from addenda.core.disk.atomic import readable, replacing, write_atomically


@pytest.mark.parametrize("value", [
    {"a": [1, 2.5, None], "b": {"c": []}, "d": {}},
    [{"a": 1}, {"b": [[{"c": "é \" \n"}]]}],
    {0: 0.5, 8: {True: 1, None: 2}, 0.25: "x"},  # json.dumps makes text of these keys, and so must this
    [], {}, "text", 3, None,
], ids=str)  # fmt: skip
def test_readable_is_the_same_json(value):
    assert json.loads(readable(value)) == json.loads(json.dumps(value))


def test_readable_keeps_plain_lists_on_a_line():
    assert readable({"losses": [1, 2, 3], "rows": [{"a": 1}]}) == (
        '{\n "losses": [1, 2, 3],\n "rows": [\n  {\n   "a": 1\n  }\n ]\n}'
    )


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    target = tmp_path / "deep" / "file.json"
    write_atomically(target, b"old")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def test_folders_made_for_a_file_that_is_not_written_go_again(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "there").mkdir()
    for name in ("new/deep/a.json", "there/a.json", "there/new/a.json"):
        with pytest.raises(AddendaError, match="The disk is full"):
            write_atomically(tmp_path / name, b"{}")
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_file_of_another_writer_replaces_the_old_one_whole_or_not_at_all(error, tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def stopped():
        with replacing(target) as beside:
            beside.write_bytes(b"ne")
            raise error

    with pytest.raises(error):
        stopped()
    assert target.read_bytes() == b"old"
    with replacing(target) as beside:
        assert beside.parent == tmp_path and target.read_bytes() == b"old"
        beside.write_bytes(b"new")
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]
