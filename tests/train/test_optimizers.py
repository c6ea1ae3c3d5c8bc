import sys

import pytest
import torch
from tiny_models import make_llama

import addenda as ad
from addenda.core.errors import AddendaError
from addenda.train.optimizers import adamw, named

CPU = torch.device("cpu")


def test_names_and_functions():
    assert named("adamw", CPU) == ("adamw", adamw)
    assert named(adamw, CPU) == ("adamw", adamw)
    with pytest.raises(AddendaError, match=r"got 'adamw8bit'\. Did you mean 'adamw-8bit'"):
        named("adamw8bit", CPU)
    with pytest.raises(AddendaError, match=r"the model is on the CPU\. Take 'adamw-8bit'"):
        named("paged-adamw-8bit", CPU)


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(AddendaError, match=r"pip install 'addenda\[bitsandbytes\]'"):
        named("adamw-8bit", CPU)


@pytest.mark.filterwarnings("ignore")
def test_moments_in_eight_bits():
    pytest.importorskip("bitsandbytes")
    model = make_llama()
    adapter = ad.attach(model, "full", targets=["lm_head", "embed_tokens"])  # tensors under 4,096 stay in float32
    made = named("adamw-8bit", CPU)[1](adapter, 1e-2, 0.0)
    for p in adapter.parameters():
        p.grad = torch.ones_like(p)
    made.step()
    kinds = {s["state1"].dtype for p, s in made.state.items() if p.numel() >= 4096}
    assert kinds <= {torch.uint8}
