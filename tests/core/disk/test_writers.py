"""Two processes that write to one place at once: one wins whole, or the last whole one stands; never a mix."""

import os
import sys

import pytest

if sys.platform == "win32":
    pytest.skip("processes are forked", allow_module_level=True)

from bench.full_disk import fork

from addenda.core.base.errors import AddendaError
from addenda.core.disk.atomic import write_atomically
from addenda.core.disk.lock import alone
from addenda.core.disk.whole import whole

PAIRS = 20


def at_once(first, second) -> list[int]:
    """Call two functions, each in a process of its own, at the same moment; return how the processes ended.

    0: well, 2: with an AddendaError, 1: in another way.
    """
    ready, go = os.pipe(), os.pipe()
    children = []
    for function in (first, second):
        if (child := fork()) == 0:
            code = 1
            try:
                os.write(ready[1], b".")
                os.read(go[0], 1)
                function()
                code = 0
            except AddendaError:
                code = 2
            finally:
                os._exit(code)
        children.append(child)
    for _ in children:
        os.read(ready[0], 1)
    os.write(go[1], b"..")
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for end in (*ready, *go):
        os.close(end)
    return codes


@pytest.mark.parametrize("folder", [True, False])
def test_of_two_that_make_one_place_exactly_one_wins(tmp_path, folder):
    def write(name):
        with whole(tmp_path / "out", folder=folder) as place:
            for file in (place / "a", place / "b") if folder else (place,):
                file.write_text(name)

    for _ in range(PAIRS):
        codes = at_once(lambda: write("first"), lambda: write("second"))
        assert sorted(codes) == [0, 2]
        (out,) = tmp_path.iterdir()
        files = [out / "a", out / "b"] if folder else [out]
        assert [f.read_text() for f in files] == [("first", "second")[codes.index(0)]] * len(files)
        for file in files:
            file.unlink()
        if folder:
            out.rmdir()


def test_of_two_that_write_one_file_the_last_stands_whole(tmp_path):
    def write(letter):
        for _ in range(5):
            write_atomically(tmp_path / "out", letter * 100_000)

    for _ in range(PAIRS):
        assert at_once(lambda: write(b"1"), lambda: write(b"2")) == [0, 0]
        assert (tmp_path / "out").read_bytes() in (b"1" * 100_000, b"2" * 100_000)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_of_two_runs_in_one_folder_one_is_refused_or_comes_later(tmp_path):
    folder = tmp_path / "out"

    def run(name):
        with alone(folder):
            assert not (folder / "busy").exists()
            (folder / "busy").write_text(name)
            os.unlink(folder / "busy")
            write_atomically(folder / name, b"done")

    for _ in range(PAIRS):
        codes = at_once(lambda: run("first"), lambda: run("second"))
        assert 0 in codes and set(codes) <= {0, 2}
        done = [n for n, code in zip(("first", "second"), codes, strict=True) if code == 0]
        assert sorted(p.name for p in folder.iterdir()) == sorted(done)
        for name in done:
            (folder / name).unlink()
