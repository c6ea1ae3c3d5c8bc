"""An error can be printed, whatever names are in it."""

from addenda.core.base.errors import MOST, AddendaError
from addenda.core.disk.access import DiskError


def test_a_message_can_be_printed_and_has_an_end():
    for kind in (AddendaError, DiskError):
        assert str(kind("no \ud800 here")) == "no \\ud800 here"
        assert str(kind("plain é")) == "plain é"
        long = str(kind("x" * 10**6 + " and what to do"))
        assert len(long) < MOST and long.endswith("what to do")
    assert AddendaError().args == () and AddendaError(3).args == (3,)
