"""Ctrl-C in the middle of undoing a merge, or of a switch: nothing is lost, and nothing acts in some layers alone."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import addenda as ad
from shared import bits, relative, same_bits, stir

SOURCE = str(Path(ad.__file__).parent)


def interrupted(call: Callable[[], None], at: int) -> bool:
    """Run a call of this library with a KeyboardInterrupt as its at-th function begins; return whether that came."""
    count = itertools.count(1)

    def look(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(SOURCE) and next(count) == at:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        call()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)


@pytest.fixture
def two(tiny):
    """A model with two adapters of which one acts."""
    stir(ad.attach(tiny, "lora:rank=2", targets="attention", name="a"), 0.3)
    stir(ad.attach(tiny, "shira:density=0.2", targets="mlp", also_train=["score"], name="b"), 0.3)
    return tiny.eval()


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("how", ["unmerge", "detach", "detach one"])
def test_an_interrupted_end_of_a_merge_can_be_gone_on_with(how, dtype, two, ids):
    ad.switch(two, ["a", "b"])
    before, y = bits(two), two(ids)
    undo = {
        "unmerge": lambda: ad.unmerge(two), "detach": lambda: ad.detach(two), "detach one": lambda: ad.detach(two, "a")
    }[how]  # fmt: skip
    merged, calls = False, 0
    for at in itertools.count(1, 7):
        if not merged:
            ad.merge(two, dtype=dtype)
        if not interrupted(undo, at):
            break
        calls += 1
        merged = "base merged" in ad.status(two)
        if not merged or at % 2:  # what was half undone is undone whole, now or by the next call
            ad.unmerge(two) if merged else None
            merged = False
            assert same_bits(bits(two), before)
            assert torch.equal(two(ids), y)
    assert calls > 10 and same_bits(bits(two), before)
    if how == "unmerge":
        assert torch.equal(two(ids), y)


def test_an_interrupted_switch_is_one_or_the_other_on_every_layer(two, ids):
    outputs = {"b": two(ids)}
    ad.switch(two, "a")
    outputs["a"] = two(ids)
    assert relative(outputs["a"], outputs["b"]) > 1e-3
    kept = 0
    for at in itertools.count(1):
        if not interrupted(lambda: ad.switch(two, "b"), at):
            break
        (acts,) = [n for n in outputs if f"{n}: active" in ad.status(two)]
        assert torch.equal(two(ids), outputs[acts])
        kept += acts == "a"
        ad.switch(two, "a")
    assert torch.equal(two(ids), outputs["b"]) and kept > 20
