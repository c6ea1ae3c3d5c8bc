"""Every method of the catalogue with options that fit the tiny models, and what the contract tests do to it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file import container
from addenda.core.file.header import BEFORE_DIGEST, read
from addenda.core.forward.adapted import effective_weight
from addenda.core.forward.slots import slots_of
from addenda.core.method.contract import Method, WeightMethod
from addenda.core.modules.classes import original_class
from addenda.core.modules.ours import is_ours
from addenda.core.site.site import Site, site_at
from addenda.core.site.targets import resolve
from addenda.train.fit import Event

OPTIONS = {  # what the shapes 8 × 8, 16 × 8, 8 × 16 and 32 × 8 need
    "oft": {"block": 4},
    "boft": {"block": 2, "levels": 2},
    "ether": {"parts": 2},
    "vera": {"rank": 8},
    "miss": {"rank": 4},
    "bat": {"rank": 4},
    "shira": {"density": 0.2},
    "sparse": {"density": 0.25},  # a share of which a stack of three has three times as many
    "svft": {"band": 2},
    "fourierft": {"frequencies": 16},
    "c3a": {"block": 4},
    "lokr": {"rank": 1, "alpha": 1.0},
    "krona": {"rank": None, "alpha": None},
    "nola": {"basis": 16},
    "mora": {"rank": 2},
    "adalora": {"target_rank": 2},
    "lora-ga": {"rank": 2},
    "vb-lora": {"vectors": 8, "length": 3},
    "clover": {"block": 4},
    "ether-plain": {"parts": 2},
    "prompt": {"places": 2},
    "prefix": {"places": 2},
}
SMALL = {"rank": 4, "alpha": 8.0}  # for methods that have these options


def method_of(name: str) -> Method:
    entry = ad.core.method.catalogue.info(name)
    fields = {f for f in entry.cls.__dataclass_fields__ if f not in ("dropout",)}
    given = {k: v for k, v in SMALL.items() if k in fields} | OPTIONS.get(name, {})
    return entry.build(**{k: v for k, v in given.items() if k in fields})


NAMES = [i.name for i in ad.catalogue() if issubclass(i.cls, WeightMethod)]
HIDDEN = [i.name for i in ad.catalogue() if i.family == "hidden"]
EVERY = NAMES + HIDDEN
METHODS = {name: method_of(name) for name in EVERY}


def where(name: str) -> str | None:
    """The targets of a contract test: every linear layer for what changes weights; hidden methods know their places."""
    return "linear" if name in NAMES else None


def shape_for(name: str, m: int, n: int) -> tuple[int, ...]:
    """A weight's shape, or an activation's, as the method sees it."""
    return (m, n) if name in NAMES else (m,)


def loss_of(model: nn.Module, batch) -> Tensor:
    y = model(batch)
    return getattr(y, "logits", y).square().mean()


def attach(model: nn.Module, which: str | Method, batch=None, /, **options) -> ad.Adapter:
    """Attach with data where the method wants it."""
    method = METHODS[which] if isinstance(which, str) else which
    if method.calibration:
        options = {"calibration": [batch], "loss": loss_of} | options
    return ad.attach(model, method, **options)


def sees_nothing(model: nn.Module, which: str | Method, batch, targets) -> bool:
    """Whether the method looks at inputs and a site has none to show; then attach must say so and change nothing."""
    method = METHODS[which] if isinstance(which, str) else which
    if method.calibration != "input" or all(site.kind.dense for site in resolve(model, targets)):
        return False
    with pytest.raises(AddendaError, match="have no inputs to look at"):
        attach(model, method, batch, targets=targets)
    assert not any(slots_of(m) for m in model.modules())
    return True


def stir(adapter: ad.Adapter, size: float = 0.05, seed: int = 1) -> ad.Adapter:
    """Move every trainable tensor away from its start, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=g).to(p) * size)
    return adapter


def sites(model: nn.Module, adapter: ad.Adapter) -> Iterator[Site]:
    for path in adapter.methods:
        yield site_at(adapter.model, path)


def effective(site: Site, dtype: torch.dtype) -> Tensor:
    slots = slots_of(site.module)
    assert slots is not None
    return effective_weight(site, slots.live[site.parameter], dtype)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """The base's entries, copied."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if not is_ours(k)}


def values(adapter: ad.Adapter) -> dict[str, Tensor]:
    """The adapter's tensors, copied."""
    return {k: t.clone() for k, t in adapter.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def call(*arguments: object, code: int = 0) -> None:
    """Run a command line of addenda, which must exit with this code."""
    from addenda.cli.main import run

    with pytest.raises(SystemExit) as stopped:
        run([str(a) for a in arguments])
    assert (stopped.value.code or 0) == code


class KilledError(Exception):
    """What `killed_at` raises."""


def killed_at(step: int) -> Callable[[Event], None]:
    """A progress function of a run that ends it after a step, as a kill would."""

    def watch(event: Event) -> None:
        if event.step == step and event.evaluation is None:
            raise KilledError

    return watch


def read_raw(file: Path) -> tuple[dict, dict[str, Tensor]]:
    """The header of an adapter file as JSON, to be changed into what no `Header` can be, and its tensors."""
    header, tensors = read(file)
    return header.to_json(), tensors


def write_raw(path: Path, header: dict | str, tensors: dict[str, Tensor]) -> Path:
    """A file as anybody can write one, whatever is in its header; with a digest where that asks for one."""
    text = header if isinstance(header, str) else json.dumps(header)
    asked = BEFORE_DIGEST if text.startswith('{"schema": 2, "sha256": "' + "0" * 64) else None
    container.write(path, {"addenda": text}, tensors, asked)
    return path


def with_weight(site: Site, x: Tensor, weight: Tensor) -> Tensor:
    """What torch itself computes at a site with another weight: an oracle that shares no code with the core."""
    m, bias = site.module, getattr(site.module, "bias", None)
    if isinstance(m, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(m, nn.Embedding):
        return F.embedding(x, weight, m.padding_idx)
    if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        same = {k: getattr(m, k) for k in _CONV}
        other = original_class(m)(**same, bias=bias is not None).to(weight)
        state = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(other, state, (x,))
    return x @ weight + bias  # transformers' Conv1D


def flags(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters() if not is_ours(n)}


def train(model: nn.Module, adapter: ad.Adapter, batch: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        loss_of(model, batch).backward()
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()
