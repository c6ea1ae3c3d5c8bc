import math

import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from shared import attach, loss_of, stir


def test_noise_is_of_the_stated_size_and_nothing_is_written(tiny, ids):
    adapter = stir(attach(tiny, ad.AdaptFormer(rank=4)), 0.1)
    before = {k: t.clone() for k, t in adapter.state_dict().items()}
    (path, t), *_ = adapter.sites()
    seen = []

    def judge(model):
        seen.append({k: v.clone() for k, v in t.tensors().items()})
        assert not model.training
        return float(loss_of(model, ids))

    tiny.train()
    curve = ad.perturbation_curve(tiny, adapter, judge, sigmas=(0.5, 2.0), seeds=(3, 4))
    assert tiny.training
    assert list(curve.found) == [0.0, 0.5, 2.0]
    assert [len(v) for v in curve.found.values()] == [1, 2, 2]
    assert len(set(curve.found[0.5])) == 2
    assert str(curve).count("\n") == 2
    own = before[f"{path}/down"]
    noise = Stream(4, "perturb", path, "down").normal(1, own.numel()).view_as(own)
    torch.testing.assert_close(seen[2]["down"], own + 0.5 * own.std() * noise)
    assert all(torch.equal(s["down_bias"], before[f"{path}/down_bias"]) for s in seen), "vectors stay"
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())
    assert curve.found[0.0] == (loss_of(tiny.eval(), ids).item(),)
    again = ad.perturbation_curve(tiny, "default", judge, sigmas=[2.0], seeds=[3])
    assert again.found[2.0] == curve.found[2.0][:1]


@pytest.mark.parametrize(
    ("method", "key"), [("compacter:rank=4,parts=2", "rule"), ("vb-lora:rank=2,vectors=8,length=4", "bank")]
)
def test_a_pool_is_moved_once_a_draw_and_all_sites_see_it(tiny, ids, method, key):
    adapter = stir(ad.attach(tiny, method), 0.1)
    (name, pool), *_ = adapter.pools()
    own = pool.stored()[key].clone()
    seen = []

    def judge(model):
        seen.append([t.tensors()[key] for _, t in adapter.sites()])
        return float(loss_of(model, ids))

    ad.perturbation_curve(tiny, adapter, judge, sigmas=[0.5], seeds=[3, 4])
    for each, seed in zip(seen[1:], (3, 4), strict=True):
        noise = Stream(seed, "perturb", name, key).normal(1, own.numel()).view_as(own)
        for t in each:
            torch.testing.assert_close(t, own + 0.5 * own.std() * noise)
    assert all(torch.equal(t, own) for t in [*seen[0], *(t.tensors()[key] for _, t in adapter.sites())])


def test_few_bits_are_moved_after_rounding_and_a_failing_judge_leaves_nothing(tiny, ids):
    stir(attach(tiny, ad.LoRA(rank=2, bits=1)))
    expected, levels = tiny(ids), []
    _, t = next(ad.adapters(tiny)["default"].sites())

    def judge(model):
        levels.append(len(t.tensors()["A"].unique()))
        if len(levels) == 3:
            raise ValueError("no more")
        return 0.0

    with pytest.raises(ValueError, match="no more"):
        ad.perturbation_curve(tiny, "default", judge, sigmas=[0.1], seeds=2)
    assert levels[0] == 2
    assert levels[1] > 2
    assert torch.equal(tiny(ids), expected)


def test_what_cannot_be_moved(tiny, ids):
    ad.attach(tiny, "ia3", targets="up_proj")
    with pytest.raises(AddendaError, match="trains no matrix"):
        ad.perturbation_curve(tiny, "default", lambda m: 0.0)
    ad.attach(tiny, "lora", name="other")
    said = r"sizes of noise from 0 and at least one seed|seeds must be at least 1"
    for given in ({"sigmas": [-1.0]}, {"sigmas": [math.nan]}, {"sigmas": []}, {"seeds": 0}):
        with pytest.raises(AddendaError, match=said):
            ad.perturbation_curve(tiny, "other", lambda m: 0.0, **given)
    with pytest.raises(AddendaError, match="idle or merged"):
        ad.perturbation_curve(tiny, "default", lambda m: 0.0)


def test_a_curve_is_of_an_adapter(tiny):
    attach(tiny, "lora")
    for given in (None, tiny, ["default"]):
        with pytest.raises(AddendaError, match=f"A curve is of an adapter or its name, got a {type(given).__name__}"):
            ad.perturbation_curve(tiny, given, lambda model: 0.0)
