"""The machine: what garbage collections leave out, and what they take back."""

import gc
import weakref

import pytest
import torch

from addenda.core.base.errors import AddendaError
from addenda.models.machine import pick_dtype, resident, set_aside


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


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_bfloat16_is_not_taken_where_the_library_that_multiplies_is_kept_from_it(name, monkeypatch):
    monkeypatch.setattr("addenda.models.machine._cpu_flags", lambda: {"avx512_bf16"})
    for value, kind in (("avx2", torch.float32), ("AVX512_CORE", torch.float32), ("AVX512_CORE_BF16", torch.bfloat16)):
        monkeypatch.setenv(name, value)
        found, why = pick_dtype("auto")
        assert found == kind and (f"{name}={value}" in why) == (kind == torch.float32)


def test_a_list_is_no_dtype():
    with pytest.raises(AddendaError, match=r"dtype must be 'auto'.*got \['float32'\]"):
        pick_dtype(["float32"])
