"""Threads: a limit holds inside its block, and what was before comes back after an error too."""

import pytest
import torch

from addenda.core.base.threads import at_most


def test_a_limit_holds_inside_its_block():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with at_most(2):
            assert torch.get_num_threads() == 2
        with at_most(None):
            assert torch.get_num_threads() == 3
        with at_most(8):
            assert torch.get_num_threads() == 3
        with pytest.raises(ValueError, match="ended"), at_most(1):
            raise ValueError("ended")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
