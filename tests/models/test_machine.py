"""The machine: what garbage collections leave out, and what they take back."""

import gc
import weakref

import pytest

from addenda.models.machine import resident, set_aside


class Ring:
    def __init__(self):
        self.itself = self


@pytest.fixture
def thawed():
    """No object set aside, as in a process of its own; the tests' are put back behind it."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_what_was_there_before_is_not_walked_and_comes_back_behind(thawed):
    old = Ring()
    gone = weakref.ref(old)
    with set_aside():
        assert gc.get_freeze_count() > 0
        del old
        new = weakref.ref(Ring())
        resident()
        assert gone() is not None and new() is None  # garbage of the block goes, an older ring waits
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert gone() is None


def test_an_error_takes_them_back_too(thawed):
    with pytest.raises(ValueError, match="inside"), set_aside():
        raise ValueError("inside")
    assert gc.get_freeze_count() == 0


def test_a_process_that_has_set_objects_aside_keeps_them_so(thawed):
    gc.freeze()
    with set_aside():
        pass
    assert gc.get_freeze_count() > 0
