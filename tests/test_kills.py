"""Killed anywhere, a command loses nothing: at file operations and at random moments; `bench/kills.py` does more."""

import json

import pytest

import file_operations
import kills

pytestmark = pytest.mark.skipif(not file_operations.supported(), reason="wants Linux on x86-64: see file_operations")
SOME = {
    "tune lora": 6, "tune adalora": 4, "tune dylora": 4, "tune mosa": 4, "compress lord": 4, "compare": 2,
    "compare long runs": 2, "export peft": 4, "merge": 4, "combine": 4, "transfer": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return kills.Place(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("name", ["export peft", "combine"])
def test_at_every_file_operation(place, name):
    case = place.prepared(name)
    operations = case.operations()
    assert len(operations) > 5 and any(o.split()[0] in file_operations.WRITES for o in operations)
    for number, operation in enumerate(operations):
        for half in (False, True) if operation.split()[0] in file_operations.WRITES else (False,):
            verdict = case.at_operation(number, half)
            assert verdict is not None and verdict.fine, verdict


def test_at_what_gives_a_checkpoint_its_name_and_takes_an_older_one_away(place):
    case = place.prepared("tune lora")
    operations = case.operations()
    named = [i for i, o in enumerate(operations) if o.startswith("rename") and o.endswith("/checkpoint-12")]
    assert len(named) == 1
    after = [i for i in range(named[0], len(operations)) if "checkpoint-5" in operations[i]]
    assert len(after) > 4  # hidden, and its files removed one by one
    staged = [i for i in range(named[0]) if "/.checkpoint-12/.tmp" in operations[i]]  # of safetensors' own writer
    for number in (*staged[1:2], named[0], named[0] + 1, after[0], after[1], after[-1], len(operations) - 1):
        verdict = case.at_operation(number)
        assert verdict is not None and verdict.fine, verdict


@pytest.mark.slow
def test_in_each_stage_of_a_transfer(place):
    """Behind the first batch of inputs, in a checkpoint, in what is written of the result, and as it gets its name."""
    case = place.prepared("transfer")
    operations = case.operations()
    ends = ("synthesis.safetensors", "/checkpoint-5", "result/adapter.safetensors", "result/transfer.json", "-> out")
    named = [next(i for i, o in enumerate(operations) if o.startswith("rename") and o.endswith(e)) for e in ends]
    for number in (*named, len(operations) - 1):
        verdict = case.at_operation(number)
        assert verdict is not None and verdict.fine, verdict


@pytest.mark.slow
def test_forty_kills_at_random_moments(place):
    assert sum(SOME.values()) == 40
    for name, quota in SOME.items():
        case, count, runs = place.prepared(name), 0, 0
        while count < quota:
            verdict = case.at_moments(runs, most=min(kills.MOST, quota - count))
            assert verdict.fine, verdict
            count, runs = count + verdict.kills, runs + 1


def test_only_fields_of_time_and_memory_may_differ():
    run = {"created": "now", "losses": [[1, 0.5]], "files": {"README.md": "a", "adapter.safetensors": "b"}}

    def found(**other):
        return kills.differences("out/run.json", json.dumps(run).encode(), json.dumps(run | other).encode())

    assert found(created="later", files=run["files"] | {"README.md": "x"}) == []
    assert found(losses=[[1, 0.25]]) == ["out/run.json: .losses[0][1] 0.5 -> 0.25"]
    assert found(files=run["files"] | {"adapter.safetensors": "x"}) == [
        "out/run.json: .files.adapter.safetensors b -> x"
    ]
    assert found(more=1) != []
    assert kills.differences("out/adapter.safetensors", b"abc", b"abd") != []
    assert kills.differences("out/adapter.safetensors", b"abc", None) == ["out/adapter.safetensors is not there"]
    card = b"| speed | 1 |\n| loss | 2 |\n"
    assert kills.differences("out/README.md", card, card.replace(b"1", b"3")) == []
    assert len(kills.differences("out/README.md", card, card.replace(b"2", b"3"))) == 1


def test_a_half_of_what_was_to_be_written(tmp_path):
    def work():
        (tmp_path / "file").write_bytes(b"0123456789")

    assert [str(o) for o in file_operations.watch(work, tmp_path).operations] == [
        "openat file",
        "write file (10 bytes)",
    ]
    assert (tmp_path / "file").read_bytes() == b"0123456789"
    (tmp_path / "file").unlink()
    for number, half, left in ((0, False, None), (1, False, b""), (1, True, b"01234")):
        seen = file_operations.watch(work, tmp_path, stop=number, half=half)
        assert seen.killed and seen.code == -9
        assert ((tmp_path / "file").read_bytes() if (tmp_path / "file").exists() else None) == left
    assert not file_operations.watch(work, tmp_path, stop=2).killed
