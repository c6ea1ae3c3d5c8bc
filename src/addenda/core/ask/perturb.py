"""How flat a trained minimum is: a judge's scores of an adapter whose matrices are moved by Gaussian noise.

    W̃ = W + σ · std(W) · N(0, 1)        for every trained matrix, std over all its numbers

What all sites train together (a pool) is moved once a draw, and all sites see it so.

1-bit adapters rest on the observation that a trained adapter loses little where W̃ is far from W (Jie et al. 2023,
arXiv 2307.16867): rounding to 1 bit moves a matrix of normal numbers by 0.62 std, to 2 bits by 0.36, to 4 bits by 0.11.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.modules.borrow import training_mode
from addenda.core.state.state import record_of


@dataclass(frozen=True)
class Perturbation:
    """The scores of a perturbed adapter. found[σ]: the judge's with each seed; σ = 0, the adapter itself, has one."""

    found: dict[float, tuple[float, ...]]

    @property
    def means(self) -> dict[float, float]:
        return {sigma: sum(values) / len(values) for sigma, values in self.found.items()}

    def __str__(self) -> str:
        return "\n".join(
            f"σ = {sigma:g}: {sum(v) / len(v):.4f} ({min(v):.4f} to {max(v):.4f}, {len(v)} seed{'s' * (len(v) > 1)})"
            for sigma, v in self.found.items()
        )


@checked()
@torch.no_grad()
def perturbation_curve(
    model: nn.Module,
    adapter: Adapter | str,
    judge: Callable[[nn.Module], float],
    sigmas: Iterable[float] = (0.1, 0.3, 1.0),
    seeds: int | Iterable[int] = 3,
) -> Perturbation:
    """Score an active adapter by judge(model), a loss for example, with noise on every trained matrix.

    sigmas: sizes of the noise, relative to each matrix' standard deviation; seeds: how many draws, or their seeds.
    Vectors stay as they are. A matrix in few bits is moved after it was rounded. The model is in evaluation mode
    meanwhile; no tensor is written to.

    Raises AddendaError when the adapter is idle or merged, trains no matrix, or a size is negative or not finite.
    """
    if not isinstance(adapter, Adapter | str):
        raise AddendaError(f"A curve is of an adapter or its name, got a {type(adapter).__name__}.")
    name = adapter if isinstance(adapter, str) else adapter.name
    root, state, _ = record_of(model, name)
    sizes, draws = [float(s) for s in sigmas], list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if name not in state.active or state.merged is not None:
        raise AddendaError(f"{name!r} is idle or merged, so noise on it would change nothing. Call switch or unmerge.")
    if not sizes or not draws or not all(0 <= s < float("inf") for s in sizes):
        raise AddendaError(f"A curve wants sizes of noise from 0 and at least one seed, got {sizes} and {draws}.")
    sites, pools = list(Adapter(root, name).sites()), list(Adapter(root, name).pools())
    read = {path: {k: p for k, p in t.tensors().items() if k in t.matrices} for path, t in sites}
    pooled = {id(pool): (n, {k: p for k, p in pool.stored().items() if p.dim() >= 2}) for n, pool in pools}
    if not any([*read.values(), *(matrices for _, matrices in pooled.values())]):
        raise AddendaError(f"{name!r} trains no matrix at any site, so there is nothing to move.")
    curve: dict[float, tuple[float, ...]] = {}
    with training_mode(model, False):
        for sigma in dict.fromkeys([0.0, *sizes]):
            judged = []
            try:
                for seed in draws if sigma else draws[:1]:
                    shared = {
                        pool: {k: _moved(p, sigma, Stream(seed, "perturb", n, k), False) for k, p in matrices.items()}
                        for pool, (n, matrices) in pooled.items()
                    }
                    for path, t in sites:
                        matrices = {
                            k: _moved(p, sigma, Stream(seed, "perturb", path, k), t.stacked)
                            for k, p in read[path].items()
                        }
                        t.instead = matrices | shared.get(id(t._modules.get("pool")), {})
                    judged.append(float(judge(model)))
            finally:
                for _, t in sites:
                    t.instead = {}
            curve[sigma] = tuple(judged)
    return Perturbation(curve)


def _moved(W: Tensor, sigma: float, rng: Stream, stacked: bool) -> Tensor:
    wide = W.reshape(len(W) if stacked else 1, -1).float()
    std = wide.std(1, keepdim=True) if wide.shape[1] > 1 else wide.new_zeros(len(wide), 1)
    return (wide + sigma * std * rng.normal(*wide.shape).to(wide)).view(W.shape).to(W.dtype)
