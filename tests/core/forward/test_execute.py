"""Which way a change takes through a layer, where a cheaper one would have other gradients."""

import pytest
import torch
from torch import nn

import addenda as ad
from shared import stir


@pytest.mark.parametrize("others", [[], ["lora:rank=2"], ["shira:density=0.3"]])
@pytest.mark.parametrize("method", ["lora:rank=2", "dora:rank=2", "svft:band=2", "shira:density=0.3"])
def test_an_embedding_that_divides_gradients_by_counts_does_so_for_every_change(method, others):
    """A row's gradient is the mean over where its token is, so tokens repeated as a whole give the same gradients."""
    layer = nn.Embedding(8, 8, padding_idx=2, scale_grad_by_freq=True).double()
    model, ids = nn.Sequential(layer), torch.tensor([[1, 3, 5], [7, 2, 0]])
    adapters = [stir(ad.attach(model, m, targets="0", name=f"a{i}"), 0.3) for i, m in enumerate([method, *others])]
    ad.switch(model, [a.name for a in adapters])
    model.double()
    g = torch.randn(2, 3, 8, dtype=torch.float64)

    def gradients(times):
        (model(ids.repeat(times, 1)) * g.repeat(times, 1, 1)).sum().backward()
        found = [p.grad for a in adapters for p in a.parameters()]
        for a in adapters:
            for p in a.parameters():
                p.grad = None
        return found

    torch.testing.assert_close(gradients(3), gradients(1))
