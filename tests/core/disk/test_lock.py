"""One holder at a time; a killed one holds nothing."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading

import filelock
import pytest

from addenda.core.base.errors import AddendaError
from addenda.core.disk import lock
from addenda.core.disk.lock import Lock, alone

HOLD = "import sys, time, pathlib; from addenda.core.disk.lock import Lock; a = Lock(pathlib.Path(sys.argv[1])); "


def test_one_holder_until_it_is_released(tmp_path):
    first, second = Lock(tmp_path / "new/lock"), Lock(tmp_path / "new/lock")
    assert first.take() and first.take()
    assert not second.take()
    first.release()
    assert second.take() and not first.take()
    shutil.rmtree(tmp_path / "new")  # a lock on a file that is gone keeps nobody out
    assert first.take()
    second.release()
    first.release()


def test_a_killed_holder_holds_nothing(tmp_path):
    code = HOLD + "print(a.take(), flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    mine = Lock(tmp_path / "lock")
    assert not mine.take()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert mine.take()
    mine.release()


def test_without_locks_everybody_gets_in(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert Lock(tmp_path / "lock").take() and Lock(tmp_path / "lock").take()


def test_a_disk_that_may_not_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Lock(tmp_path / "file" / "lock").take()


def test_who_comes_while_a_holder_leaves_gets_in(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT", 20.0)
    first, second = Lock(tmp_path / "new/lock"), Lock(tmp_path / "new/lock")
    assert first.take()

    def leave():
        shutil.rmtree(tmp_path / "new")
        first.release()

    leaving = threading.Timer(0.1, leave)
    leaving.start()
    assert second.take() and second.path.exists()
    leaving.join()
    second.release()


def test_a_folder_made_for_a_lock_goes_with_it(tmp_path):
    with alone(tmp_path / "new" / "out"):
        with pytest.raises(AddendaError, match="Another run is under way in"), alone(tmp_path / "new" / "out"):
            pass
        assert (tmp_path / "new" / "out").is_dir()
    assert not (tmp_path / "new").exists()


FORKED = """
import os, pathlib, sys, time
from addenda.core.disk.lock import alone
with alone(pathlib.Path(sys.argv[1])):
    if (child := os.fork()) == 0:  # a worker that loads data
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.skipif(int(filelock.__version__.split(".")[0]) < 4, reason="a child of an older filelock keeps the lock")
def test_a_killed_run_holds_nothing_though_its_workers_live(tmp_path):
    command = [sys.executable, "-c", FORKED, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(AddendaError, match="Another run is under way"), alone(tmp_path / "out"):
                pass
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # it lives
            with alone(tmp_path / "out"):
                entered = True
        finally:
            os.kill(child, signal.SIGKILL)
    assert entered
