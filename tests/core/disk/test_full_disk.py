"""Every command on a disk that fills, on one that can only be read, and where a file is in the way.

What is run and what is asked of it stands in `bench.full_disk`, whose record is of more commands and sizes. Where
nothing can be mounted, what a file may have of bytes is limited instead, which every system does.
"""

import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("processes are forked", allow_module_level=True)

from bench import full_disk as disks
from bench.full_disk import COMMANDS, forked

QUICK = {"export gguf": 1, "import": 1, "combine": 1}  # how many sizes are tried
SLOW = ("tune", "compare", "compress", "merge")
FIRST = (
    "tune",
    "compare",
    "compress",
    "export peft",
    "import",
    "merge",
    "extract",
    "reduce",
    "combine",
    "items",
    "page",
)


def prepared(factory, names) -> Path:
    pytest.importorskip("gguf")
    disks.warm()
    folder = factory.mktemp("disks")
    assert forked(disks.prepare, folder / "in", 0, list(names)) is None
    return folder


@pytest.fixture
def mounts(tmp_path):
    if (reason := forked(disks.can_mount, tmp_path)) is not None:
        pytest.skip(f"no disk can be mounted here: {reason}")


def short(folder, name, *, real, parts):
    """Run a command on `parts` smaller disks and return what was wrong."""
    whole = forked(disks.trial, folder, name, None, None, real=real)
    assert not whole["faults"]
    most = whole["peak" if real else "most"]
    faults = []
    for k in range(parts):
        room = round(most * (k + 0.5) / parts) if real else most * k // parts
        row = forked(disks.trial, folder, name, room, whole["files"], real=real)
        faults += row["faults"]
        assert row["went_on"] or (real and not row["stopped"]), row["faults"]
    return faults


def test_a_disk_that_fills_is_an_error_and_the_same_command_goes_on(tmp_path_factory):
    folder = prepared(tmp_path_factory, QUICK)
    found = {name: short(folder, name, real=False, parts=parts) for name, parts in QUICK.items()}
    if forked(disks.can_mount, folder) is None:
        found["combine, mounted"] = short(folder, "combine", real=True, parts=1)
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.slow
@pytest.mark.usefixtures("mounts")
def test_commands_on_small_disks(tmp_path_factory):
    folder = prepared(tmp_path_factory, SLOW)
    found = {name: short(folder, name, real=True, parts=1) for name in SLOW}
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.usefixtures("mounts")
def test_where_nothing_can_be_written_every_command_is_refused_at_once(tmp_path_factory):
    folder = prepared(tmp_path_factory, ())

    def told() -> dict:
        disk, found = disks.mounted(folder), {}
        (disk / "theirs").write_text("1")
        disks.read_only(disk)
        before = disks.state(disk)
        reasons = {
            "out": r"\(Read-only file system.*The disk can only be read: name another place",
            "theirs/deep/out": r"is no folder\. Choose another|A file stands where a folder is wanted",
        }
        for name in FIRST:
            for place, reason in reasons.items():
                given = COMMANDS[name][1](folder / "in", disk / f"{place}{disks.suffix_of(name)}")
                code, text, _ = disks.command(given, folder / "told")
                found[f"{name} {place}"] = disks.refused(code, text, reason)
        found["disk"] = [] if disks.state(disk) == before else ["it has changed"]
        return {name: faults for name, faults in found.items() if faults}

    assert forked(told) == {}
