"""What killed writers have left is removed by the next one; nothing of anybody who lives, and nothing else."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from addenda.core.base.errors import AddendaError
from addenda.core.disk import unfinished as made
from addenda.core.disk.atomic import write_atomically
from addenda.core.disk.lock import alone
from addenda.core.disk.unfinished import clear, discard, remove_dead, unfinished
from addenda.core.disk.whole import free_place, whole
from file_operations import supported, watch

pytest.importorskip("fcntl")
WRITER = """
import sys, time, pathlib
from addenda.core.disk.unfinished import unfinished
with unfinished(pathlib.Path(sys.argv[1]), folder=sys.argv[2] == "folder") as place:
    ((place / "half") if place.is_dir() else place).write_text("half")
    print("there", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def writer():
    """A process that is writing to a place until it is killed."""
    live = []

    def start(path, kind):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), kind], stdout=subprocess.PIPE, text=True)
        live.append(process)
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        return process

    yield start
    for process in live:
        process.kill()
        process.wait()
        process.stdout.close()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_has_left_goes_and_what_a_living_one_writes_stays(tmp_path, writer, kind):
    out = tmp_path / "out"
    dead, living = writer(out, kind), writer(out, kind)
    assert len(names(tmp_path)) == 2 and all(n.startswith(".out.addenda-") for n in names(tmp_path))
    remove_dead(out)
    clear(tmp_path)
    assert len(names(tmp_path)) == 2  # both live
    kill(dead)
    with unfinished(out, folder=kind == "folder") as place:
        assert place.name.endswith("-0") and (not os.listdir(place) if kind == "folder" else not place.stat().st_size)
    (left,) = tmp_path.iterdir()
    assert ((left / "half") if kind == "folder" else left).read_text() == "half"
    kill(living)
    remove_dead(out)  # although the first of the two has left nothing
    assert names(tmp_path) == []


@pytest.mark.parametrize("run", ["write_atomically", "whole", "free_place", "alone"])
def test_every_way_to_write_removes_what_is_dead(tmp_path, writer, run):
    out = tmp_path / "out"
    kill(writer(out, "folder" if run in ("whole", "free_place") else "file"))
    assert len(names(tmp_path)) == 1
    if run == "write_atomically":
        write_atomically(out, b"whole")
    elif run == "whole":
        with whole(out, folder=False) as place:
            place.write_text("whole")
    elif run == "alone":
        with alone(tmp_path):
            assert names(tmp_path) == [".addenda-lock"]
    else:  # the writer was killed when the file had its name already
        out.write_text("whole")
        with pytest.raises(AddendaError, match="is there already"):
            free_place(out)
    assert names(tmp_path) == ([] if run == "alone" else ["out"])


def test_nothing_of_anybody_else_is_removed(tmp_path):
    with unfinished(tmp_path / "out", folder=False) as place:
        mine = place.name
    theirs = {
        mine.replace("addenda-", "addenda-f00"): "another machine's",
        ".out.x7ab2": "of tempfile",
        "out": "a file",
        f"{mine}.txt": "a note",
        mine[1:]: "not hidden",
    }
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    (tmp_path / mine).symlink_to(tmp_path / "out")
    os.mkfifo(tmp_path / f"{mine[:-1]}1")
    for act in (lambda: clear(tmp_path), lambda: remove_dead(tmp_path / "out")):
        act()
        assert names(tmp_path) == sorted([*theirs, mine, f"{mine[:-1]}1"])
    write_atomically(tmp_path / "out", b"new")
    assert (tmp_path / mine).is_symlink() and (tmp_path / "out").read_text() == "new"
    assert {n: (tmp_path / n).read_text() for n in theirs if n != "out"} == {
        n: t for n, t in theirs.items() if n != "out"
    }


def test_writers_of_one_process_have_places_of_their_own(tmp_path):
    together, seen = threading.Barrier(8), []

    def write(i):
        with unfinished(tmp_path / "out", folder=bool(i % 2)) as place:
            seen.append(place)
            together.wait()
            clear(tmp_path)
            assert place.exists()
            together.wait()

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(seen)) == 8 and names(tmp_path) == []


def test_who_ends_removes_its_own_only(tmp_path):
    with unfinished(tmp_path / "out", folder=False) as first:
        os.replace(first, tmp_path / "out")
        with unfinished(tmp_path / "out", folder=False) as second:
            assert second == first  # the name is free again
            second.write_text("second")
            with unfinished(tmp_path / "out", folder=False):
                pass
            assert second.read_text() == "second"
    assert names(tmp_path) == ["out"]


def test_a_disk_without_locks_has_names_without_the_mark(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(made.fcntl, "flock", none)
    for folder in (True, False):
        with unfinished(tmp_path / "out", folder=folder) as place:
            assert place.is_dir() == folder and "addenda" not in place.name and names(tmp_path) == [place.name]
        assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["界" * 84, "x" * 251, "é" * 120, "a\udce4b"])
def test_every_name_that_a_disk_takes_can_be_written(tmp_path, name):
    write_atomically(tmp_path / name, b"1")
    with whole(tmp_path / (name[:-1] + "y"), folder=True):
        pass
    assert len(names(tmp_path)) == 2 and (tmp_path / name).read_bytes() == b"1"


@pytest.mark.skipif(not supported(), reason="wants the kernel's system calls, of Linux on x86-64")
def test_a_folder_that_is_removed_is_there_whole_or_not_at_all(tmp_path):
    def filled():
        (tmp_path / "folder").mkdir()
        for i in range(3):
            (tmp_path / "folder" / str(i)).write_text("whole")

    filled()
    operations = watch(lambda: discard(tmp_path / "folder"), tmp_path).operations
    named = [o.name for o in operations]
    at = named.index("rename")
    assert len(named) >= at + 5 and names(tmp_path) == []  # three files and a folder, afterwards
    for number in range(len(operations)):
        filled()
        assert watch(lambda: discard(tmp_path / "folder"), tmp_path, stop=number).killed
        there = (tmp_path / "folder").exists()
        assert there == (number <= at)
        assert not there or names(tmp_path / "folder") == ["0", "1", "2"]
        clear(tmp_path)
        assert names(tmp_path) == (["folder"] if there else [])
        discard(tmp_path / "folder")
    assert names(tmp_path) == []
