"""Entries dealt into parts: the masks, the draws, and what acts with and without them."""

import itertools

import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda import AddendaError
from addenda.core.base.random import Stream
from addenda.core.method.bottleneck import Bottleneck
from addenda.methods.mosa import Mixture


def test_a_deal_is_a_partition_whose_parts_differ_by_one_at_most():
    for n, parts in ((24, 4), (31, 5), (7, 7), (600, 200), (0, 3)):
        dealt = Stream(3, "x").deal(n, parts)
        sizes = [int((dealt == k).sum()) for k in range(parts)]
        assert sum(sizes) == len(dealt) == n
        assert max(sizes) - min(sizes) <= 1
    assert dealt.dtype == torch.int8 and Stream(0).deal(600, 200).dtype == torch.int16
    assert Stream(1, "golden").deal(12, 3).tolist() == [2, 2, 2, 2, 0, 0, 1, 1, 0, 0, 1, 1]
    shares = torch.stack([Stream(s, "y").deal(40, 4) for s in range(400)])
    assert all(70 < int((shares[:, i] == k).sum()) < 135 for i in range(40) for k in range(4))  # no place is favoured


def test_a_fork_depends_on_the_keys_alone():
    one, two = Stream(4, "a", "b"), Stream(4, "a", "b")
    two.raw(7)
    assert one.fork("c").raw(5).tolist() == two.fork("c").raw(5).tolist() == Stream(4, "a", "b", "c").raw(5).tolist()


@pytest.mark.parametrize(("share", "split"), [("down", {"up"}), ("up", {"down"}), ("none", {"down", "up"})])
def test_masks_are_disjoint_cover_everything_and_differ_from_site_to_site(share, split):
    adapter = ad.attach(toys.make_vit(), ad.MoSA(rank=4, parts=3, share=share))
    found = []
    for _, t in adapter.sites():
        dealt = t.method.dealt(t.tensors())
        assert dealt.keys() == split
        for name, part in dealt.items():
            masks = torch.stack([part == k for k in (1, 2, 3)])
            assert bool((masks.sum(0) == 1).all())
            assert part.shape == t._parameters[name].shape
            found.append(part.flatten().tolist())
    assert len({tuple(f) for f in found}) == len(found)
    assert not any("part" in k or "drawn" in k or "start" in k for k in adapter.state_dict())


def test_every_site_draws_for_itself_and_a_step_says_what():
    def draws(adapter, **how):
        adapter.draw(**how)
        return {path: int(t.tensors()["up_drawn"]) for path, t in adapter.sites()}

    model = toys.make_bert().train()
    whole = ad.attach(model, "mosa-houlsby:rank=4", seed=2)
    steps = [draws(whole, step=i) for i in range(200)]
    assert len(steps[0]) == 4
    for path in steps[0]:
        seen = [s[path] for s in steps]
        assert all(30 < seen.count(k) < 70 for k in (1, 2, 3, 4))
    assert sum(len(set(s.values())) == 1 for s in steps) < 10  # 200 / 4³ of them agree everywhere, about three
    assert draws(whole, step=7) == steps[7] != draws(whole, step=7, again=1)
    assert draws(whole, step=7, again=1) == draws(whole, again=1) != draws(whole, again=2)
    ad.detach(model)
    part = ad.attach(model, "mosa-houlsby:rank=4", targets="mlp", seed=2)
    assert all(steps[7][path] == k for path, k in draws(part, step=7).items()), "others at other sites change nothing"
    model.eval()
    assert set(draws(part, step=7).values()) == {0}


def linear(parts=3, **options):
    """Two layers in a row with a MoSL each that changes something."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    adapter = ad.attach(model, ad.MoSL(rank=3, parts=parts, **options), targets=["0", "1"])
    for p in adapter.parameters():
        p.data = torch.randn_like(p.data).double()
    return model, adapter, torch.randn(2, 6, dtype=torch.float64)


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_what_acts_outside_training_is_the_mean_over_all_draws(share):
    model, adapter, x = linear(share=share)
    model.train()
    sites = [t for _, t in adapter.sites()]
    names = [f"{name}_drawn" for name in sites[0].method.split]
    outputs = []
    for draw in itertools.product((1, 2, 3), repeat=len(names) * len(sites)):
        for i, t in enumerate(sites):
            t.draw({k: torch.tensor(draw[i * len(names) + j]) for j, k in enumerate(names)})
        outputs.append(model(x))
    model.eval()
    torch.testing.assert_close(torch.stack(outputs).mean(0), model(x), rtol=1e-10, atol=1e-12)
    assert torch.stack(outputs).std(0).max() > 0.1


def test_one_place_with_a_non_linearity_is_the_mean_over_its_draws_too():
    model = nn.Sequential(nn.Linear(6, 6)).double()
    adapter = ad.attach(model, ad.MoSAPfeiffer(rank=4, parts=4, activation="gelu", scale=0.3), targets="0")
    for p in adapter.parameters():
        p.data = torch.randn_like(p.data).double()
    ((_, t),) = adapter.sites()
    x = torch.randn(3, 6, dtype=torch.float64)
    model.train()
    outputs = []
    for k in (1, 2, 3, 4):
        t.draw({"up_drawn": torch.tensor(k)})
        own = t.up * (t.tensors()["up_part"] == k)
        y = nn.functional.linear(x, model[0].weight, model[0].bias)
        h = nn.functional.gelu(y @ t.down.T + t.down_bias)
        outputs.append(model(x))
        torch.testing.assert_close(outputs[-1], y + 0.3 * (h @ own.T + t.up_bias), rtol=1e-10, atol=1e-12)
    model.eval()
    torch.testing.assert_close(torch.stack(outputs).mean(0), model(x), rtol=1e-10, atol=1e-12)


def test_put_together_without_the_mean_it_is_the_sum_of_all_parts():
    model, adapter, x = linear(merge="concat", alpha=6.0)
    model.eval()
    want = x
    for (_, t), layer in zip(adapter.sites(), model, strict=True):
        want = want @ (layer.weight + 2 * t.B @ t.A).T + layer.bias
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mosa", "mosa-pfeiffer", "mosa-houlsby", "mosl"])
def test_more_parts_than_ranks_are_refused(name):
    with pytest.raises(AddendaError, match=r"parts must be from 1 to rank=4, so that each has an entry a row, got 5"):
        ad.core.method.catalogue.build(f"{name}:rank=4,parts=5")
    with pytest.raises(AddendaError, match="parts must be from 1 to rank=4"):
        ad.core.method.catalogue.build(f"{name}:rank=4,parts=0")


def test_size_and_count_are_those_of_the_plain_method():
    assert issubclass(Mixture, Bottleneck)
    assert ad.MoSA().trainable(768) == ad.AdaptFormer().trainable(768) == 2 * 64 * 768 + 64 + 768
    assert ad.MoSL(rank=16).trainable(100, 70) == ad.LoRA(rank=16).trainable(100, 70)
