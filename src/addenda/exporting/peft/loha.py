"""PEFT's LOHA: W + s (w1_a w1_b) ∘ (w2_a w2_b), s = alpha / r; ranks and alphas may differ by site.

With `use_effective_conv2d` a convolution has a core t (r × r × kernel) between its factors, w_a (r × m) and w_b
(r × inputs). Over the flattened kernel that is the same product of two matrices, m × r and r × n, and is read as these.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from addenda.core.method.contract import Method, Params
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, refuse
from addenda.exporting.peft.layers import dimensions, is_linear, pads_otherwise, taps
from addenda.exporting.peft.patterns import ranked, ranks_of
from addenda.exporting.routes import Route
from addenda.methods.loha import LoHa

_NAMES = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
_CORES = ("hada_t1", "hada_t2")


class LohaConversion(Conversion):
    """LoHa on linear layers and on convolutions over one and two dimensions."""

    type = "LOHA"
    suffixes = (*_NAMES.values(), *_CORES)
    reads = frozenset(["r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d"])
    ignores = frozenset(["rank_dropout", "module_dropout"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        problems = []
        for s in saved:
            if reason := why_not(s.site):
                problems.append(f"{s.path}: {reason}")
                continue
            rank, alpha = ranks_of(config, s.path)
            (m, n), core = s.site.shape, core_of(s.site, config, rank)
            if core:
                inputs = s.site.weight.shape[1]
                sides = dict.fromkeys(_NAMES.values(), (rank, m)) | {_NAMES[k]: (rank, inputs) for k in ("A1", "A2")}
                shapes = sides | dict.fromkeys(_CORES, core)
            else:
                shapes = dict.fromkeys(_NAMES.values(), (m, rank)) | {_NAMES[k]: (rank, n) for k in ("A1", "A2")}
            problem = expect(s, shapes)
            problems += problem
            if problem:
                continue
            p: Params = {k: s.tensors[name] for k, name in _NAMES.items()}
            if core:
                for B, A, t in (("B1", "A1", _CORES[0]), ("B2", "A2", _CORES[1])):
                    p[B], p[A] = p[B].T, with_core(s.tensors[t], p[A])
            forms.sites[s.path] = LoHa(rank=rank, alpha=alpha), p
        refuse(problems, "This LOHA adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        if type(method) is not LoHa:
            return None
        return None if why_not(site) else Route("exact", "LOHA")

    def write(self, live: Sequence[Live]) -> Written:
        ranks = {each.path: (each.method.rank, each.method.scale * each.method.rank) for each in live}
        made = Written({"peft_type": self.type, "init_weights": True, "use_effective_conv2d": False, **ranked(ranks)})
        for each in live:
            p = each.values()
            made.tensors |= {f"{each.path}.{name}": p[k] for k, name in _NAMES.items()}
        return made


def why_not(site: Site) -> str | None:
    """Return why a site is none of LOHA and LOKR, or None."""
    if not is_linear(site) and dimensions(site) not in (1, 2):
        return f"a {type(site.module).__name__}, and PEFT has this type for Linear, Conv1d and Conv2d only"
    return pads_otherwise(site)


def core_of(site: Site, config: Config, rank: int) -> tuple[int, ...]:
    """Return the shape of the core t that a convolution has in a config, () where it has none."""
    if not dimensions(site) or taps(site) == 1 or not config.get("use_effective_conv2d"):
        return ()
    kernel = tuple(site.weight.shape[2:])
    return (rank, rank, *kernel, *(1 for _ in range(2 - len(kernel))))


def with_core(core: Tensor, inner: Tensor) -> Tensor:
    """Return r × (inputs · kernel) from a core t (r × r × kernel) and a factor of the inputs (r × inputs)."""
    return torch.einsum("ijkl,jc->ickl", core.float(), inner.float()).flatten(1)
