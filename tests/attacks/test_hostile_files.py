"""A part of the campaign of `python -m bench hostile`, with seeds of its own, and every file that a campaign has found.

What a past failure was is said in PAST; each is refused now, for the reason that stands there.
"""

import os
import time
import warnings
from pathlib import Path

import pytest

from addenda.core.base.errors import AddendaError
from addenda.core.file import header
from attacks import campaign, mutate
from attacks.oracles import TARGETS, Target, read_all
from attacks.ranking_oracles import RANKING

FIRST = 10**6  # seed: the record's begin at 0
KEPT = Path(__file__).parent / "past"
_MADE: dict[str, Target] = {}
ALL = TARGETS | RANKING
PAST = {  # by kind and name: the refusal of today
    "adapter/a-checksum-left-out": "has no checksum of",  # a tensor made anew at load, of which nothing was compared
    "adapter/a-kind-without-end": "the file has linear",  # the message had the length of the name
    "adapter/half-a-character": "surrogates not allowed",  # the message could not be printed
    "adapter/options-of-heads-and-no-head": "and no head",  # they were forgotten without a word
    "model/neither-true-nor-false": "neither true nor false",  # read as bits that safetensors reads otherwise
    "peft/float8": "is float8",  # NotImplementedError: torch does not know which of these are finite
    "run-file/a-thousand-faults": "and 960 more",  # each of them was told
}


@pytest.fixture
def memory(tmp_path):
    """A folder in memory, where there is such a disk: a campaign writes thousands of files."""
    import shutil
    import tempfile

    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def made(name: str, folder: Path) -> Target:
    if name not in _MADE:
        _MADE[name] = ALL[name](folder / "sources")
    return _MADE[name]


def search(name: str, folder: Path, seconds: float, first: int) -> campaign.Tally:
    tally = campaign.run(made(name, folder), range(first, first + 10**6), folder / "files", until=seconds)
    assert not tally.faults, "\n".join(f"seed {a.seed} ({a.kind}): {a.fault}" for a in tally.faults[:8])
    assert tally.refused > tally.files / 10 > 1
    return tally


@pytest.mark.parametrize("name", ALL)
def test_for_a_moment(name, memory):
    search(name, memory, 0.7, FIRST)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_for_longer(name, memory):
    """All of them together: half a minute of the processor."""
    tally = search(name, memory, 1.5, FIRST * 2)
    assert tally.loaded  # what is told of as true is there to be looked at


@pytest.mark.parametrize("past", PAST)
def test_past_failures_stay_refused(past, memory):
    target, files = made(past.split("/")[0], memory), read_all(KEPT / past)
    mutant = mutate.Mutant("past", files, 0, True, sorted(files)[0])
    found = campaign.read_one(target, 0, mutant, memory / "files")
    assert not found.fault, found
    with pytest.raises(AddendaError, match=PAST[past]):
        target.read(memory / "files", mutant)
    target.clean()


def test_every_past_failure_is_told_of():
    assert {str(p.relative_to(KEPT)) for p in KEPT.glob("*/*")} == PAST.keys()


def test_a_mutant_is_its_seed(memory):
    target = made("adapter", memory)
    kinds = set()
    for seed in range(300):
        one, again = target.mutant(seed), target.mutant(seed)
        assert one == again
        kinds.add(one.kind)
        if one.sealed:
            data = one.files["adapter.safetensors"]
            assert mutate.resealed(data) == data
    assert len(kinds) > 40


def test_the_sources_are_sound(memory):
    target = made("adapter", memory)
    for i, files in enumerate(target.sources):
        mutant = mutate.Mutant("nothing", files, i, False, "adapter.safetensors")
        found = campaign.read_one(target, 0, mutant, memory / "files")
        assert found.outcome == "loaded", found
        assert mutate.resealed(files["adapter.safetensors"]) == files["adapter.safetensors"]
        header.read(memory / "files" / "adapter.safetensors")


def test_a_fault_is_seen(memory):
    """What a campaign must not miss: an error of another kind, a load that is not true, a child that hangs or dies."""

    class Faulty(Target):
        def __init__(self):
            self.sources, self.words = [{"x.json": b'{"a": 1}'}], ()

        def read(self, place, mutant):
            way, self.until = mutant.kind, time.process_time() + 1.2
            if way == "raises":
                raise KeyError("x")
            if way == "warns":
                warnings.warn("x", stacklevel=1)
            if way == "allocates":
                bytearray(100 << 20)
            if way == "takes long":
                while time.process_time() < self.until:
                    pass
            if way == "dies":
                os.kill(os.getpid(), 9)
            return way

        def check(self, place, mutant, made):
            if made == "is untrue":
                raise campaign.UntrueError("x")

        def clean(self):
            pass

        def mutant(self, seed):
            return mutate.Mutant(WAYS[seed], self.sources[0], 0, False, "x.json")

    tally = campaign.run(Faulty(), range(len(WAYS)), memory / "files")
    assert [a.kind for a in tally.faults] == WAYS[1:]
    assert (tally.files, tally.loaded) == (len(WAYS), 1)


WAYS = ["is fine", "raises", "warns", "allocates", "takes long", "dies", "is untrue"]
