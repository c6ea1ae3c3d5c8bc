"""Probing finds what is there, and does not find what is not."""

from dataclasses import dataclass

import torch
from torch import nn

import addenda
from addenda.core.ask.capabilities import probe
from addenda.core.method.contract import Factors, WeightMethod
from addenda.core.method.hidden import HiddenMethod


def test_the_catalogue_can_what_its_mathematics_says():
    can = {i.name: probe(i.build()) for i in addenda.catalogue()}
    hidden = {i.name for i in addenda.catalogue() if issubclass(i.cls, HiddenMethod)}
    assert all(c.linear and c.mergeable and not c.hidden for n, c in can.items() if n not in hidden)
    assert all(can[n].hidden and not (can[n].linear or can[n].mergeable) for n in hidden - {"fusion"})
    assert all(can[i.name].exact_start == (i.build().start.bound == 0) for i in addenda.catalogue())
    assert {n for n, c in can.items() if c.sparse} == {"shira", "sparse"}
    assert not any(can[n].low_rank for n in ("dora", "oft", "shira", "bat", "full", "flora", "ln-tuning"))
    assert all(can[n].low_rank for n in ("lora", "pissa", "rslora", "dylora", "miss", "svft", "loldu"))
    assert all(can[n].low_rank for n in ("olora", "lora-ga", "eva", "adalora", "trainable-tokens"))
    eva = can["eva"]  # which has no inputs to look at elsewhere
    assert not (eva.conv or eva.embedding or eva.parameter or eva.stacked)
    assert "low rank" in str(can["lora"])


def test_a_method_with_calibrated_masks_is_probed_too():
    assert probe(addenda.SHiRA(mask="gradient")).sparse


def test_a_wrong_claim_is_not_believed():
    @dataclass(frozen=True)
    class Wrong(WeightMethod):
        """Its factors are not its ΔW, and its start is not the base."""

        def init(self, W, rng, p):
            return {"b": nn.Parameter(torch.ones(W.shape[0])), "a": nn.Parameter(torch.ones(W.shape[1]))}

        def delta(self, W, p):
            return p["b"][:, None] * p["a"]

        def factors(self, p, shape):
            return Factors(2 * p["b"][:, None], p["a"][None])

        def trainable(self, m, n):
            return m + n

    found = probe(Wrong())
    assert not found.low_rank and not found.exact_start and not found.linear
    assert found.parameter  # there only ΔW is asked
