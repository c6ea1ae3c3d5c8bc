"""Every idea is refused, quickly and in little memory, with the model, the disk and the system left alone."""

import pytest

from attacks.run import MEMORY, SECONDS, Outcome, attack, ideas, warm

IDEAS = ideas()


@pytest.fixture(scope="module", autouse=True)
def _warm():
    warm()


@pytest.mark.parametrize("name", IDEAS)
def test_it_is_refused(name):
    found: Outcome = attack(name, IDEAS[name])
    for _ in range(2):  # the machine is shared: a wait of others is no cost of the file
        if found.seconds > SECONDS and not found.wrong:
            found = attack(name, IDEAS[name])
    assert not found.wrong, found
    assert found.seconds < SECONDS, found
    assert found.memory < MEMORY, found


def test_there_are_ideas_for_every_reader():
    from attacks.readers import READERS

    names = {name.split("_")[0] if "/" not in name else name.split("/")[0] for name in IDEAS}
    assert {r.split("_")[0] for r in READERS} <= names
    assert len(IDEAS) > 60
