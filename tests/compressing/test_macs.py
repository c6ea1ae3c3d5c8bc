"""Multiplications against torch's own counter of operations, which looks at the operators and not at the layers."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from addenda.compressing.macs import macs
from addenda.core.base.errors import AddendaError


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, (3, 2), stride=2, padding=1, dilation=(1, 2))
        self.b = nn.Conv2d(8, 8, 3, groups=4, padding="same", padding_mode="circular")
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2)
        self.line = nn.Conv1d(4, 6, 3)
        self.fc = nn.Linear(6, 5, bias=False)
        self.idle = nn.Linear(2, 2)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.up(self.norm(self.b(self.b(self.a(x)))))
        return self.fc(self.line(x.flatten(2)).transpose(1, 2))


def test_it_is_what_the_operators_do():
    net, x = Mixed().train(), torch.randn(3, 3, 11, 10)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    found = macs(net, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(x)
    counts = counter.get_flop_counts().items()
    whole = {name.partition(".")[2]: sum(ops.values()) for name, ops in counts if "." in name}
    assert {k: 2 * 3 * v for k, v in found.items() if v} == {k: v for k, v in whole.items() if v}
    assert found["idle"] == 0 and found["a"] > 0
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items())


def test_a_transformer_and_keywords(gpt2, ids):
    found = macs(gpt2, input_ids=ids)
    hidden, rows = gpt2.config.n_embd, ids.shape[1]
    assert found["transformer.h.0.mlp.c_fc"] == rows * hidden * 4 * hidden
    assert found["lm_head"] == rows * hidden * gpt2.config.vocab_size
    with pytest.raises(AddendaError, match="none was given"):
        macs(gpt2)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.conv = nn.Linear(4, 3), nn.Conv2d(1, 2, 2)

    def forward(self, x):
        return self.fc(input=x), self.conv(input=x[None, None])


def test_layers_that_are_called_with_keywords():
    assert macs(Named(), torch.randn(2, 4)) == {"fc": 4 * 3, "conv": 2 * 4 * 3 // 2}


def test_what_is_no_model_is_refused():
    with pytest.raises(AddendaError, match=r"Expected a torch\.nn\.Module as the model, got str"):
        macs("folder", torch.zeros(1))
