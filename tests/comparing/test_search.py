"""The search for a rate, driven by runs whose losses are made up."""

from addenda.comparing.entries import TrialRecord, Validation
from addenda.comparing.search import cost, driven, grid, rungs, search


def searched(rate, steps, loss, status="ok"):
    look = steps, Validation(loss=loss)
    return TrialRecord(method="lora", stage="search", status=status, rate=rate, steps=steps, validation=(look,))


def test_the_search_halves():
    assert grid(1e-3, 3) == (3.2e-4, 1e-3, 3.2e-3)
    assert grid(1e-3, 1) == (1e-3,)
    assert rungs(5, 10) == [(5, 10), (2, 20)] and cost(5, 10) == 100 and cost(1, 10) == 0
    ran = []

    def one(look):
        ran.append((look.rate, look.steps))
        status = "diverged" if look.rate > 3 else "ok"
        return searched(look.rate, look.steps, abs(look.rate - 2), status)

    assert driven(search((1.0, 2.0, 3.0, 4.0), 10), one).rate == 2.0
    assert ran == [(1.0, 10), (2.0, 10), (3.0, 10), (4.0, 10), (2.0, 20), (1.0, 20)]


def test_the_search_goes_beyond_an_edge_while_it_gains():
    ran = []

    def one(look):
        ran.append(look.rate)
        return searched(look.rate, look.steps, abs(look.rate - 50))

    assert driven(search((1.0, 2.0, 4.0), 10, further=2), one).rate == 16.0 and ran[3:] == [8.0, 16.0]
    ran.clear()
    assert driven(search((64.0, 128.0), 10, further=2), one).rate == 64.0 and ran == [64.0, 128.0, 32.0]
    assert driven(search((3.0,), 10), one).rate == 3.0
