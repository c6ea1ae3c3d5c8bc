"""One site in each form: what becomes a matrix, and where a stack's matrices are filled up."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.core.site.site import site_at
from addenda.exporting.reduced import form_of, is_matrix, total_delta


def at(model: nn.Module, *adapters: ad.Adapter, path: str = "0"):
    return site_at(model, path), [dict(a.sites())[path] for a in adapters]


def moved(model: nn.Module, method: str, name: str) -> ad.Adapter:
    adapter = ad.attach(model, method, targets="0", name=name)
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return adapter


def test_known_factors_are_put_side_by_side_and_dense_ones_are_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7))
    one, two = moved(model, "lora:rank=2", "one"), moved(model, "lora:rank=1", "two")
    site, live = at(model, one, two)
    D = sum(t.B.double() @ t.A.double() for t in live)
    torch.testing.assert_close(total_delta(site, live), D, rtol=0, atol=1e-7)
    made = form_of(site, live, "lora", {"rank": None, "energy": None}, None)
    assert made is not None
    (method, tensors), row = made
    assert method == ad.LoRA(rank=3) and row.form == "rank 3" and row.numbers == 3 * 16
    torch.testing.assert_close(tensors["B"].double() @ tensors["A"].double(), D, rtol=0, atol=1e-6)
    narrow = form_of(site, live, "lora", {"rank": 100, "energy": None}, None)
    assert narrow is not None and narrow[0][0] == ad.LoRA(rank=3)  # no more than the change has


def test_a_zero_change_has_no_form():
    model = nn.Sequential(nn.Linear(5, 4))
    site, live = at(model, ad.attach(model, "lora:rank=1", targets="0"))
    for to, given in (("lora", {"rank": 1, "energy": None}), ("sparse", {"count": 1, "density": None}),
                      ("bits", {"bits": 1}), ("patch", {})):  # fmt: skip
        assert form_of(site, live, to, given, None) is None


def test_a_change_that_half_precision_rounds_away_has_no_patch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).bfloat16()
    adapter = ad.attach(model, "dense-delta", targets="0")
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(1e-9)
    site, live = at(model, adapter)
    assert form_of(site, live, "patch", {}, None) is None
    assert form_of(site, live, "lora", {"rank": 1, "energy": None}, None) is not None


def test_counts_are_cut_to_the_matrix_and_bits_are_one_where_nobody_says():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    site, live = at(model, moved(model, "lora:rank=1", "one"))
    sparse = form_of(site, live, "sparse", {"count": 1000, "density": None}, None)
    coded = form_of(site, live, "bits", {"bits": None}, None)
    assert sparse is not None and sparse[0][0] == ad.SHiRA(mask="given", count=6) and sparse[1].error == 0
    assert coded is not None and coded[0][0].bits == 1 and coded[1].energy == pytest.approx(1 - coded[1].error ** 2)


def test_heads_and_vectors_are_no_matrices():
    model = nn.Sequential(nn.Linear(3, 2))
    adapter = ad.attach(model, "full", targets=["0.weight", "0.bias"])
    kinds = {path: is_matrix(*at(model, adapter, path=path)) for path in adapter.methods}
    assert kinds == {"0.weight": True, "0.bias": False}
