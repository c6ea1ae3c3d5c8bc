"""The largest entries against a sort, with ties, and without values."""

import torch

from addenda.core.base.largest import largest, narrow


def test_ties_fall_to_the_first_positions():
    score = torch.tensor([[1.0, 3.0, 1.0], [1.0, 5.0, 0.0]])
    assert largest(score, 2).tolist() == [1, 4]
    assert largest(score, 3).tolist() == [0, 1, 4]
    assert largest(score, 4).tolist() == [0, 1, 2, 4]
    g = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(0)).float()
    wanted = sorted(sorted(range(200), key=lambda i: (-float(g[i]), i))[:77])
    assert largest(g, 77).tolist() == wanted


def test_a_template_has_positions_without_values():
    assert largest(torch.empty(4, 5, device="meta"), 7).shape == (7,)


def test_positions_are_as_narrow_as_the_matrix_allows():
    last = torch.tensor([2**31 - 1])
    assert narrow(last, 2**31).dtype == torch.int32 and narrow(last, 2**31).item() == 2**31 - 1
    assert narrow(last + 1, 2**31 + 1).dtype == torch.int64 and narrow(last + 1, 2**31 + 1).item() == 2**31
