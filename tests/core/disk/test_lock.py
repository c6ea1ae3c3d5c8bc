"""One holder at a time; a killed one holds nothing."""

import shutil
import signal
import subprocess
import sys

import pytest

from addenda.core.disk import lock
from addenda.core.disk.lock import Lock

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="this system has no such locks")
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
    def none(*_):
        raise OSError("no locks on this disk")

    with monkeypatch.context() as m:
        m.setattr(lock.fcntl, "flock", none)
        assert Lock(tmp_path / "lock").take() and Lock(tmp_path / "lock").take()
    monkeypatch.setattr(lock, "fcntl", None)
    assert Lock(tmp_path / "lock").take() and Lock(tmp_path / "lock").take()
