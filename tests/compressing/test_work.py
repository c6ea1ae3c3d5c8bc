"""The work folder: whose it is, what is in it, and one run at a time."""

import json

import pytest
import torch

from addenda.compressing.work import Work
from addenda.core.base.errors import AddendaError
from addenda.reducing.solve import LowRank


def solved() -> dict[str, LowRank]:
    return {"fc": LowRank(torch.randn(4, 2), torch.randn(2, 3), torch.tensor([1.0, 0.5, 0.0]))}


def test_one_run_at_a_time(tmp_path):
    with Work(tmp_path / "out", {"how": "lord"}) as first:
        first.write("piece-000", solved(), {"fc": 1.0})
        with pytest.raises(AddendaError, match=r"Another run is under way in .*out\.unfinished.*Wait"):
            Work(tmp_path / "out", {"how": "lord"}).open()
    with Work(tmp_path / "out", {"how": "lord"}) as second:
        assert second.resumed and second.has("piece-000")
        (second.folder / "model").mkdir()
        second.finish()
    assert not second.folder.exists() and (tmp_path / "out").is_dir()
    (tmp_path / "out/file").write_text("")
    with pytest.raises(AddendaError, match="is there already"):
        Work(tmp_path / "out", {}).open()
    assert not second.folder.exists()


def test_a_run_that_ended_between_the_look_and_the_lock_is_seen(tmp_path):
    work = Work(tmp_path / "out", {})
    take = work._lock.take

    def late() -> bool:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/file").write_text("")
        return take()

    work._lock.take = late
    with pytest.raises(AddendaError, match="is there already"):
        work.open()
    assert not work.folder.exists()


def test_what_a_run_killed_at_its_very_end_has_left_goes_and_unfinished_work_stays(tmp_path, monkeypatch):
    class KilledError(BaseException): ...

    def killed(self):
        raise KilledError

    work = Work(tmp_path / "out", {"how": "lord"}).open()
    work.write("piece-000", solved(), {"fc": 1.0})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")  # of somebody else, who came while the work is not done
    with pytest.raises(AddendaError, match="is there already"):
        Work(tmp_path / "out", {"how": "lord"}).open()
    work.close()
    assert work.has("piece-000")
    (tmp_path / "out" / "file").unlink()
    (work.folder / "model").mkdir()
    (work.folder / "model" / "config.json").write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(Work, "_clear", killed)
        with pytest.raises(KilledError):
            work.finish()
    assert work.has("piece-000")
    with pytest.raises(AddendaError, match="is there already"):
        Work(tmp_path / "out", {"how": "lord"}).open()
    assert not work.folder.exists() and (tmp_path / "out" / "config.json").is_file()
    for left in ([], [".lock"]):  # killed a little later
        work.folder.mkdir()
        for name in left:
            (work.folder / name).write_text("")
        with pytest.raises(AddendaError, match="is there already"):
            Work(tmp_path / "out", {"how": "lord"}).open()
        assert not work.folder.exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished/thesis.txt").write_text("x")
    with pytest.raises(AddendaError, match=r"holds something else \(thesis\.txt\)"):
        Work(tmp_path / "out", {}).open()
    assert (tmp_path / "out.unfinished/thesis.txt").read_text() == "x"
    Work(tmp_path / "new", {"a": 1}).open().close()
    assert json.loads((tmp_path / "new.unfinished/plan.json").read_text()) == {"identity": {"a": 1}}
    with pytest.raises(AddendaError, match=r"other settings \(a differ\)"):
        Work(tmp_path / "new", {"a": 2}).open()


def test_a_piece_that_was_cut_short_is_absent(tmp_path):
    with Work(tmp_path / "out", {}) as work:
        assert not work.has("piece-000")
        work.write("piece-000", solved(), {"fc": 1.0})
        assert work.has("piece-000")
        file = work.folder / "piece-000.safetensors"
        whole = file.read_bytes()
        for left in (0, 4, 40, len(whole) - 1):
            file.write_bytes(whole[:left])
            assert not work.has("piece-000")
