"""Marks that tell bases apart: hashes of stored bytes at a site, sampled values, checksums of derived tensors."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

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
    """Return the SHA-256 of the base's own bytes at a site (before any merge), remembered until the tensor changes."""
    parts = parts_of(state.base(site))
    if any(is_sharded(part) for part in parts):  # every process must gather, whatever it remembers
        return _hash(parts)
    identity = tuple(_identity(part) for part in parts)
    entry = state.fingerprints.get(site.path)
    if entry is None or entry[0] != identity:
        state.fingerprints[site.path] = entry = (identity, _hash(parts))
    return entry[1]


def fingerprints(state: State, sites: Sequence[Site]) -> list[str]:
    """Return the fingerprints of many sites, taken by as many threads as torch uses: hashing lets others run."""
    threads = torch.get_num_threads()
    if threads == 1 or any(is_sharded(part) for s in sites for part in parts_of(state.base(s))):
        return [fingerprint(state, site) for site in sites]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda site: fingerprint(state, site), sites))


def hash_of(weight: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, computed now: `fingerprint` of a weight that no model keeps."""
    return _hash(parts_of(weight))


def _hash(parts: list[Tensor]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(whole(part).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _identity(part: Tensor) -> tuple:
    version = 0 if part.is_inference() else part._version
    return part.data_ptr(), version, part.dtype, tuple(part.shape), bits_sum(part)


def sample(state: State, site: Site) -> list[float]:
    """Return values of the base at seeded positions, with which another dtype of the same weights must agree."""
    values = whole(state.base(site)).flatten()
    positions = Stream(0, "sample", site.key).choice(values.numel(), min(_SAMPLE, values.numel()))
    return values[positions.to(values.device)].double().tolist()


def checksum(name: str, tensor: Tensor) -> tuple[float, float] | str:
    """Return a mark of a recomputed tensor: ±1 projections in float64, or a hash for integers."""
    if not tensor.is_floating_point():
        return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    values = tensor.detach().cpu().double().flatten().numpy()
    words = Stream(0, "checksum", name).raw((values.size + 63) // 64)
    signs = np.unpackbits(words.view(np.uint8))[: values.size] * 2.0 - 1.0
    with np.errstate(invalid="ignore", over="ignore"):  # a NaN agrees with nothing, and the load says so
        return float(values @ signs), float(np.sqrt(values @ values))
