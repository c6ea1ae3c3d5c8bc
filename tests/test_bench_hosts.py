"""Two hosts in network namespaces train what one process does; skipped where namespaces cannot be made."""

import pytest
from bench import two_hosts


@pytest.mark.slow
def test_two_hosts_give_the_adapter_of_one_process(tmp_path):
    if why := two_hosts.possible():
        pytest.skip(f"no network namespace can be made here: {why}")
    found = two_hosts.compare(tmp_path, ["ddp"])["ddp"]
    assert max(found["tensors"], found["merged"]) < 1e-4
    assert found["resumed_from"] > 0 and found["second_wrote"] == []
