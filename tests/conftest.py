"""Fixtures of tiny models, and one thread: the machine is shared, and golden values want one order of sums."""

import gc

import pytest
import torch
from torch import Tensor, nn

import toys

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _choices(tmp_path_factory, monkeypatch):
    """What is measured in a test is kept for that test, not for this machine."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("addenda.train.attention.cache_folder", lambda: folder)


@pytest.fixture
def tiny() -> toys.Tiny:
    return toys.Tiny()


@pytest.fixture
def tiny_conv() -> toys.TinyConv:
    return toys.TinyConv()


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


@pytest.fixture
def llama() -> nn.Module:
    return toys.make_llama()


@pytest.fixture
def gpt2() -> nn.Module:
    return toys.make_gpt2()


@pytest.fixture
def bert() -> nn.Module:
    return toys.make_bert()


@pytest.fixture
def mixtral() -> nn.Module:
    return toys.make_mixtral()


@pytest.fixture
def t5() -> nn.Module:
    return toys.make_t5()


@pytest.fixture
def vit() -> nn.Module:
    return toys.make_vit()


@pytest.fixture
def dinov2() -> nn.Module:
    return toys.make_dinov2()


def pytest_collection_finish(session):
    """What was imported stays: trainers and measurements of memory collect garbage, and need not walk all of it."""
    gc.freeze()
