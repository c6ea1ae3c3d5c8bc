"""The folder of an unfinished run: what it keeps, whose it is, and where it may be."""

from pathlib import Path

import pytest

from addenda.core.base.errors import AddendaError
from addenda.train.unfinished import Unfinished, check_apart


class Pieces(Unfinished):
    finished = "result"

    def pieces(self):
        return [self.folder / "piece"]


def test_a_finished_run_leaves_its_folder_alone_there(tmp_path):
    with Pieces(tmp_path / "out", {"a": 1}) as run:
        assert not run.resumed
        (run.folder / "piece").write_text("x")
    with Pieces(tmp_path / "out", {"a": 1}) as run:
        assert run.resumed and (run.folder / "piece").read_text() == "x"
        run.note(seen=[1, 2])
        assert run.notes() == {"identity": {"a": 1}, "seen": [1, 2]}
        (run.folder / "result").mkdir()
        (run.folder / "result" / "file").write_text("y")
        run.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "y"


def test_another_run_goes_on_with_nothing_of_this_one(tmp_path):
    with Pieces(tmp_path / "out", {"a": 1, "b": 2}) as run:
        (run.folder / "piece").write_text("x")
    with pytest.raises(AddendaError, match=r"other settings \(b differ\): b was 2, now 3"):
        Pieces(tmp_path / "out", {"a": 1, "b": 3}).open()
    assert (run.folder / "piece").read_text() == "x"


@pytest.mark.parametrize(
    ("source", "out", "says"),
    [
        ("a", "a", "is the source"),
        ("a", "a/b", "lies in the source"),
        ("a/b", "a", "holds the source"),
        ("a.unfinished", "a", "the work folder of .* is the source"),
        ("a.unfinished/model", "a", "the work folder of .* holds the source"),
        ("a", "b/../a/c", "lies in the source"),
        ("a", "/", "holds the source"),
    ],
)
def test_a_target_is_apart_from_the_source(tmp_path, source, out, says):
    (tmp_path / "b").mkdir()
    with pytest.raises(AddendaError, match=f"{says}.*never written to"):
        check_apart(tmp_path / source, tmp_path / out)
    (tmp_path / source).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / source)
    with pytest.raises(AddendaError, match="never written to"):
        check_apart(Path(tmp_path / "link"), tmp_path / out)
    check_apart(tmp_path / source, tmp_path / "apart")
