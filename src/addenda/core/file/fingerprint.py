"""What tells one base from another: a hash of its stored bytes at a site, samples, checksums of what is derived."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from addenda.core.base.random import Stream
from addenda.core.base.sharded import is_sharded, whole
from addenda.core.packed.tensor import bits_sum, parts_of
from addenda.core.site.site import Site
from addenda.core.state.state import State

_SAMPLE = 16


def fingerprint(state: State, site: Site) -> str:
    """SHA-256 of the base's own stored bytes at a site (before any merge), remembered until the tensor changes."""
    parts = parts_of(state.base(site))
    if any(is_sharded(own) for own in parts):  # every process must gather, whatever it remembers
        return _hash(parts)
    identity = tuple(_identity(own) for own in parts)
    known = state.fingerprints.get(site.path)
    if known is None or known[0] != identity:
        state.fingerprints[site.path] = known = (identity, _hash(parts))
    return known[1]


def _hash(parts: list[Tensor]) -> str:
    made = hashlib.sha256()
    for own in parts:
        made.update(whole(own).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def _identity(own: Tensor) -> tuple:
    version = 0 if own.is_inference() else own._version
    return own.data_ptr(), version, own.dtype, tuple(own.shape), bits_sum(own)


def sample(state: State, site: Site) -> list[float]:
    """Some values of the base at seeded positions: what another dtype of the same weights must agree with."""
    own = whole(state.base(site)).flatten()
    positions = Stream(0, "sample", site.path).choice(own.numel(), min(_SAMPLE, own.numel()))
    return own[positions.to(own.device)].double().tolist()


def checksum(name: str, tensor: Tensor) -> tuple[float, float] | str:
    """What tells a recomputed tensor from another: ±1 projections in float64, or a hash for integers."""
    if not tensor.is_floating_point():
        return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    values = tensor.detach().cpu().double().flatten().numpy()
    words = Stream(0, "checksum", name).raw((values.size + 63) // 64)
    signs = np.unpackbits(words.view(np.uint8))[: values.size] * 2.0 - 1.0
    with np.errstate(invalid="ignore", over="ignore"):  # a NaN agrees with nothing, and the load says so
        return float(values @ signs), float(np.sqrt(values @ values))
