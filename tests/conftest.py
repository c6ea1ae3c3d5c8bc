"""Fixtures of tiny models, and one thread: the machine is shared, and golden values want one order of sums."""

import gc
import itertools
import os

import pytest
import torch
from torch import Tensor, nn

import toys
from addenda.core.method import catalogue

_number = itertools.count()

torch.set_num_threads(1)
if hasattr(os, "register_at_fork"):  # torch's pool is made anew by whoever asks first, and several threads race for it
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests marked on_device run; all others want the CPU")


def pytest_collection_modifyitems(config, items):
    """On another device than the CPU only those run that are marked for it."""
    device = torch.device(config.getoption("--device"))
    if device.type == "cpu":
        return
    for item in items:
        if item.get_closest_marker("on_device") is None:
            item.add_marker(pytest.mark.skip(reason=f"makes its tensors on the CPU, not on {device}"))
        elif (only := item.get_closest_marker("cpu_only")) is not None:
            item.add_marker(pytest.mark.skip(reason=only.args[0]))


@pytest.fixture
def device(request) -> torch.device:
    """Where a test marked on_device makes its tensors."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _seeded(request):
    if torch.device(request.config.getoption("--device")).type == "cpu":
        torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a traceback of each call, for other devices
    else:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _methods(request, monkeypatch):
    """A test has no method that recipes register, which a worker that has imported one knows; theirs have."""
    if not request.path.name.startswith("test_recipe"):
        known = catalogue._catalogue
        for name in [k for k, e in known.items() if e.cls.__module__.startswith("recipes.")]:
            monkeypatch.delitem(known, name)


@pytest.fixture(autouse=True)
def _exact(request):
    """On a GPU: products and convolutions of float32 in float32, by kernels that give the same bits every time."""
    if torch.device(request.config.getoption("--device")).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


@pytest.fixture(autouse=True)
def _choices(tmp_path_factory, monkeypatch):
    """What is measured in a test is kept for that test and its children, not for this machine.

    The folder is named, and made by who writes to it: pytest looks through all that there are to number a new one, and
    most of 15,000 tests need none.
    """
    folder = tmp_path_factory.getbasetemp() / f"cache-of-{next(_number)}"
    monkeypatch.setattr("addenda.train.attention.cache_folder", lambda: folder)


@pytest.fixture(autouse=True, scope="module")
def _flushed(request):
    """Nothing waits for the disk, but for tests that are about it: what a loss of power leaves is not looked at."""
    if "disk" in request.path.parts or request.path.name == "test_kills.py":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def tiny(device) -> toys.Tiny:
    return toys.Tiny().to(device)


@pytest.fixture
def tiny_conv() -> toys.TinyConv:
    return toys.TinyConv()


@pytest.fixture
def ids(device) -> Tensor:
    return (torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB).to(device)


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


@pytest.fixture(autouse=True, scope="module")
def _set_aside():
    """What earlier files have imported stays, and is not walked again.

    Trainers and measurements of memory collect garbage: a third of the suite's time once torch's compiler, SymPy and
    fifty models have been imported by tests that needed them.
    """
    gc.collect()
    gc.freeze()
