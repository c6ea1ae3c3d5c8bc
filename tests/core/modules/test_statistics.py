"""What a frozen base gathers about its inputs does not move, and acts again as it did once it is no longer frozen."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import addenda as ad
import toys
from addenda.core.modules.borrow import training_mode
from shared import EVERY, attach, bits, loss_of, same_bits, train, where


class Own(nn.BatchNorm1d):
    """As timm's and other libraries' batch norms: a forward of its own that asks for the mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return torch.nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


NORMS = {
    "batch": lambda: nn.BatchNorm1d(8),
    "cumulative": lambda: nn.BatchNorm1d(8, momentum=None),
    "plain": lambda: nn.BatchNorm1d(8, affine=False),
    "instance": lambda: nn.InstanceNorm1d(8, track_running_stats=True),
    "subclass": lambda: Own(8),
    "synchronised": lambda: nn.SyncBatchNorm(8),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "spectral, old": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
}


class Normed(toys.Tiny):
    """A tiny transformer whose activations pass a norm with statistics, over (batch, width, time)."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.gathering = norm

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = self.gathering(layer(x).transpose(1, 2)).transpose(1, 2)
        return self.score(x)


def everything(model: nn.Module) -> dict[str, Tensor]:
    return bits(model) | {n: b.clone() for n, b in model.named_buffers() if ".addenda." not in f".{n}"}


@pytest.mark.parametrize("name", EVERY)
def test_training_with_any_method_leaves_statistics_alone_and_a_file_acts_the_same_on_a_fresh_base(name, ids, tmp_path):
    model = Normed(nn.BatchNorm1d(8)).train()
    loss_of(model, ids)  # statistics of a pretrained model are not 0 and 1
    before, fresh = everything(model), copy.deepcopy(model)
    adapter = attach(model, name, ids, targets=where(name))
    model.train()
    train(model, adapter, ids, torch.optim.SGD(adapter.parameters(), 0.1), 3)
    after = everything(model)
    assert same_bits({k: after[k] for k in before}, before)
    adapter.save(tmp_path / "a.safetensors")
    ad.load(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(fresh.eval()(ids), model.eval()(ids))
    ad.detach(model)
    assert same_bits(everything(model), before)


@pytest.mark.parametrize("kind", NORMS)
def test_every_kind_of_module_that_gathers_is_held_and_let_go(kind, ids):
    model = Normed(NORMS[kind]()).train()
    if kind == "synchronised":
        model.eval()  # it runs on one device in evaluation only
    loss_of(model, ids)
    model.train()
    before, classes = everything(model), [type(m) for m in model.modules()]
    if kind != "synchronised":
        own = model if kind == "spectral, old" else copy.deepcopy(model)
        loss_of(own, ids)
        assert not same_bits(everything(own), before)
        before = everything(model)
    adapter = ad.attach(model, "lora:rank=2", targets="*.q_proj")
    train(model, adapter, ids, torch.optim.SGD(adapter.parameters(), 0.1), 3)
    made = [] if kind == "spectral, old" else [copy.deepcopy(model)]  # torch itself copies none
    if not kind.startswith("spectral"):  # nor pickles a parametrised module
        made.append(pickle.loads(pickle.dumps(model)))
    for other in (model, *made):
        loss_of(other.train(), ids)
        found = everything(other)
        assert [k for k in before if not torch.equal(before[k], found[k])] == []
        ad.detach(other)
        assert same_bits(everything(other), before)
        assert [type(m) for m in other.modules()] == classes or other is not model
        assert all(m.training for m in other.modules())
    if kind != "synchronised":
        loss_of(model, ids)
        assert not same_bits(everything(model), before)


def test_a_norm_whose_weights_are_trained_keeps_its_statistics(ids):
    for options in (
        {"targets": "*.q_proj", "also_train": "gathering"},
        {"targets": ["gathering.weight", "gathering.bias"]},
    ):
        model = Normed(nn.BatchNorm1d(8)).train()
        before = everything(model)
        adapter = ad.attach(model, "full" if "also_train" not in options else "lora:rank=2", **options)
        train(model, adapter, ids, torch.optim.SGD(adapter.parameters(), 0.1), 2)
        assert len(adapter.parameters()) >= 2
        after = everything(model)
        assert same_bits({k: after[k] for k in before}, before)
        ad.detach(model)
        assert type(model.gathering) is nn.BatchNorm1d
        assert same_bits(everything(model), before)


def test_a_base_that_is_not_frozen_goes_on_gathering(ids):
    model = Normed(nn.BatchNorm1d(8)).train()
    before = everything(model)
    ad.attach(model, "lora:rank=2", targets="*.q_proj", freeze=False)
    loss_of(model, ids)
    assert int(model.gathering.num_batches_tracked) == int(before["gathering.num_batches_tracked"]) + 2


def test_flags_come_back_as_they_were_set(ids):
    model = Normed(nn.BatchNorm1d(8)).eval()
    ad.attach(model, "lora:rank=2", targets="*.q_proj")
    model.train()
    with training_mode(model, False):
        assert not model.gathering.training
    ad.detach(model)
    assert model.gathering.training
    with training_mode(model, True):
        loss_of(model, ids)
    assert int(model.gathering.num_batches_tracked) == 0
    assert type(model.gathering) is nn.BatchNorm1d


def test_recalibrating_under_an_adapter_gathers(ids):
    model = Normed(nn.BatchNorm1d(8)).train()
    ad.attach(model, "lora:rank=2", targets="*.q_proj")
    assert ad.recalibrate(model, [ids]) == 1
    assert int(model.gathering.num_batches_tracked) == 2
    loss_of(model, ids)
    assert int(model.gathering.num_batches_tracked) == 2


def test_buffers_that_move_all_the_same_are_named(ids):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
            return x - self.mean

    model = Normed(Mean())
    adapter = ad.attach(model, "lora:rank=2", targets="*.q_proj")
    with pytest.warns(UserWarning, match=r"1 buffers of the frozen base have changed.*gathering.mean"):
        train(model, adapter, ids, torch.optim.SGD(adapter.parameters(), 0.1), 2)


@pytest.mark.filterwarnings("default")  # dynamo's own
def test_a_held_norm_compiles():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    ad.attach(model, "lora:rank=2", targets="0")
    x = torch.randn(5, 8)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    assert int(model[1].num_batches_tracked) == 0


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a subclass whose own forward asks for the mode, counts the batches, and ends in an activation."""

    def __init__(self, width: int):
        super().__init__(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        own = self.training or (self.running_mean is None and self.running_var is None)
        y = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, own, self.momentum, self.eps
        )
        return self.act(y)


class FrozenBatchNorm2d(nn.Module):
    """torchvision's and DETR's: no BatchNorm2d, four buffers, never in training."""

    def __init__(self, width: int):
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.1, "running_mean": 0.2, "running_var": 1.5}.items():
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def convolutional(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 2), norm, nn.Conv2d(8, 4, 2))


@pytest.mark.parametrize("norm", [BatchNormAct2d, FrozenBatchNorm2d])
def test_norms_of_other_libraries_keep_their_statistics(norm):
    model, x = convolutional(norm(8)).train(), torch.randn(4, 3, 6, 6)
    model(x)
    before, reference = everything(model), copy.deepcopy(model).eval()
    adapter = ad.attach(model, "lora:rank=2", targets=["0", "2"])
    torch.testing.assert_close(model.train()(x), reference(x))
    train(model, adapter, x, torch.optim.SGD(adapter.parameters(), 0.1), 3)
    after = everything(model)
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    ad.detach(model)
    assert type(model[1]) is norm
    assert all(m.training for m in model.modules())


@pytest.mark.filterwarnings("default")  # SyncBatchNorm's own
def test_norms_that_were_made_after_attach_are_named_where_they_move():
    """`convert_sync_batchnorm` puts other modules in the place of those that are held."""
    model, x = convolutional(nn.BatchNorm2d(8)), torch.randn(4, 3, 6, 6)
    adapter = ad.attach(model, "lora:rank=2", targets=["0", "2"])
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model[1], nn.SyncBatchNorm)
    model[1].forward = partial(nn.BatchNorm2d.forward, model[1])  # as on one device, where it is a batch norm
    model[1]._check_input_dim = lambda x: None
    with pytest.warns(
        UserWarning,
        match=r"buffers of the frozen base have changed.*1\.running_mean, 1\.running_var, 1\.num_batches_tracked",
    ):
        train(model.train(), adapter, x, torch.optim.SGD(adapter.parameters(), 0.1), 3)
