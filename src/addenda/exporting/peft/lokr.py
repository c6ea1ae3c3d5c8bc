"""PEFT's LOKR: W + s w1 ⊗ w2, s = alpha / r, where w1, w2 or both are products of two factors.

PEFT cuts widths by one `decompose_factor` for the whole adapter: where it divides a width, it is taken as it is, even
above the square root. Splits that no `factor` here gives are read as a LoRA of rank min(u, u') r, which is the same
matrix. Over a convolution's flattened kernel, w2 is a matrix with that many columns more.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, number, refuse
from addenda.exporting.peft.layers import dimensions, taps
from addenda.exporting.peft.loha import core_of, why_not, with_core
from addenda.exporting.peft.patterns import Ranks, ranked, ranks_of
from addenda.exporting.routes import Route
from addenda.methods.lokr import LoKr
from addenda.methods.lora import LoRA

W1, W1A, W1B, W2, W2A, W2B, CORE = (
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip


class LokrConversion(Conversion):
    """LoKr and KronA on linear layers and on convolutions over one and two dimensions."""

    type = "LOKR"
    suffixes = (W1, W1A, W1B, W2, W2A, W2B, CORE)
    reads = frozenset(
        ["r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d", "decompose_both", "decompose_factor"]
    )
    ignores = frozenset(["rank_dropout", "module_dropout", "rank_dropout_scale"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        problems, as_lora = [], []
        for s in saved:
            rank, alpha = ranks_of(config, s.path)
            shapes = {} if (reason := why_not(s.site)) else _shapes(s.site, config, rank)
            if not reason and W2 in shapes and dimensions(s.site) == 1:
                reason = "PEFT's own product of a whole w2 over a Conv1d is no Kronecker product"
            problem = [f"{s.path}: {reason}"] if reason else expect(s, shapes)
            problems += problem
            if problem:
                continue
            C, B, A = _factors(s.tensors, core_of(s.site, config, rank))
            method, p = _form(s.site, C, B, A, alpha / rank, number(config, "decompose_factor", int, -1))
            if method is None:
                problems.append(f"{s.path}: {len(C)} × {C.shape[1]} as the first factor has no form here of low rank")
                continue
            forms.sites[s.path] = method, p
            as_lora += [s.path] if isinstance(method, LoRA) else []
        if as_lora:
            forms.notes.append(
                f"{len(as_lora)} sites, e.g. {as_lora[0]}, became LoRA: addenda's lokr has no factor that splits the "
                "widths as this decompose_factor does"
            )
        refuse(problems, "This LOKR adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        if type(method) is not LoKr or why_not(site):
            return None
        cut = _cut(method, site)
        if cut is None or not _common([cut]):
            return Route("approximate", "LORA of the rank or energy asked for: no decompose_factor splits so")
        if dimensions(site) == 1 and _whole(method, site):
            return Route("approximate", "LORA of the rank or energy asked for: PEFT's w2 over a Conv1d is another")
        return Route("exact", "LOKR")

    def write(self, live: Sequence[Live]) -> Written:
        cuts = {each.path: _cut(each.method, each.site) for each in live}
        factors = _common(c for c in cuts.values() if c is not None)
        if not factors:
            (one, first), (other, second) = _apart({p: c for p, c in cuts.items() if c is not None})
            raise AddendaError(
                f"PEFT has one decompose_factor for a whole adapter, and none splits {one} into {first} and {other} "
                f"into {second} (width, rows of the first factor). Export to 'merged', or give rank= or energy= for a "
                "LoRA."
            )
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, Ranks] = {}
        for each in live:
            p = each.values()
            rank, parts = _parts(each.site, p["C"], p["B"], p.get("A"), each.method.rank or 1)
            ranks[each.path] = rank, each.method.scale * rank
            tensors |= {f"{each.path}.{k}": t for k, t in parts.items()}
        config = {"peft_type": self.type, "decompose_both": False, "decompose_factor": factors[0]}
        return Written(config | {"init_weights": True, "use_effective_conv2d": False} | ranked(ranks), tensors)


def split(width: int, factor: int) -> tuple[int, int]:
    """Return the two factors into which PEFT splits a width: `factor` itself, or the largest below it and the root."""
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    return _below(width, width if factor < 1 else factor)


@lru_cache(maxsize=4096)
def _below(width: int, most: int) -> tuple[int, int]:
    u = next(u for u in range(min(most, math.isqrt(width)), 0, -1) if width % u == 0)
    return u, width // u


def _inputs(site: Site) -> int:
    """The width of the inputs that is split: of a convolution, without its kernel."""
    return site.shape[1] // taps(site) if dimensions(site) else site.shape[1]


def _shapes(site: Site, config: Config, rank: int) -> dict[str, Sequence[int]]:
    """Return the tensors that PEFT has at a site, by name."""
    factor = number(config, "decompose_factor", int, -1)
    if factor != -1 and factor < 1:
        raise AddendaError(f"The config of this LOKR adapter has decompose_factor={factor}, not −1 or a width.")
    (u, rows), (v, columns) = split(site.shape[0], factor), split(_inputs(site), factor)
    kernel, many = (tuple(site.weight.shape[2:]), taps(site)) if dimensions(site) else ((), 1)
    thin = bool(config.get("decompose_both")) and rank < max(u, v) / 2
    shapes: dict[str, Sequence[int]] = {W1A: (u, rank), W1B: (rank, v)} if thin else {W1: (u, v)}
    if rank >= max(rows, columns) / 2:
        return shapes | {W2: (rows, columns, *kernel)}
    if core := core_of(site, config, rank):
        return shapes | {CORE: core, W2A: (rank, rows), W2B: (rank, columns)}
    return shapes | {W2A: (rows, rank), W2B: (rank, columns * many)}


def _factors(t: Mapping[str, Tensor], core: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return C (u × v), B and A of C ⊗ (B A), or C ⊗ B with A None, in float32."""
    t = {k: x.float() for k, x in t.items()}
    C = t[W1] if W1 in t else t[W1A] @ t[W1B]
    if W2 in t:
        return C, t[W2].flatten(1), None
    return (C, t[W2A].T, with_core(t[CORE], t[W2B])) if core else (C, t[W2A], t[W2B])


def _form(
    site: Site, C: Tensor, B: Tensor, A: Tensor | None, scale: float, peft_factor: int
) -> tuple[LoKr | LoRA | None, dict[str, Tensor]]:
    """Return the method here that is s C ⊗ (B A), and its tensors; None where it is neither LoKr nor of low rank."""
    (m, n), (u, v) = site.shape, (C.shape[0], C.shape[1])
    like = (peft_factor if peft_factor > 0 else m * n, m * n, max(u, v))
    most = next((f for f in like if (_below(m, f)[0], _below(n, f)[0]) == (u, v)), None)
    if most is not None:
        rows, columns, factor = m // u, n // v, None if most == m * n else most
        if A is not None and len(A) * (rows + columns) < rows * columns:
            return LoKr(rank=len(A), alpha=scale * len(A), factor=factor), {"C": C, "B": B, "A": A}
        return LoKr(rank=None, alpha=scale, factor=factor), {"C": C, "B": B if A is None else B @ A}
    if A is None:
        B, A = (torch.eye(len(B)), B) if len(B) < B.shape[1] else (B, torch.eye(B.shape[1]))
    rank = min(u, v) * len(A)
    if rank >= min(m, n):
        return None, {}
    left, right = (torch.eye(u), C) if u < v else (C, torch.eye(v))
    return LoRA(rank=rank, alpha=scale * rank), {"B": torch.kron(left, B), "A": torch.kron(right, A)}


def _parts(site: Site, C: Tensor, B: Tensor, A: Tensor | None, rank: int) -> tuple[int, dict[str, Tensor]]:
    """Return the rank that makes PEFT keep w2 as it is written, and PEFT's tensors."""
    rows, columns = len(B), _inputs(site) // C.shape[1]
    half = -(-max(rows, columns) // 2)
    if A is not None and len(A) < max(rows, columns) / 2:
        return len(A), {W1: C, W2A: B, W2B: A}
    whole = B if A is None else B @ A
    kernel = tuple(site.weight.shape[2:]) if dimensions(site) else ()
    return max(rank, half), {W1: C, W2: whole.reshape(rows, columns, *kernel)}


Cut = tuple[tuple[int, int], tuple[int, int]]  # (m, u), (inputs, v)


def _cut(method: LoKr, site: Site) -> Cut | None:
    """Return how a method splits a site's two widths; None where the cut goes through a convolution's kernel."""
    (m, n), inputs = site.shape, _inputs(site)
    u, v = _below(m, method.factor or m)[0], _below(n, method.factor or n)[0]
    return None if inputs % v else ((m, u), (inputs, v))


def _whole(method: LoKr, site: Site) -> bool:
    """Whether w2 would stand whole in PEFT."""
    (m, n), cut = site.shape, _cut(method, site)
    assert cut is not None
    (_, u), (inputs, v) = cut
    rows, columns, rank = m // u, n // v, method.rank
    return rank is None or rank * (rows + columns) >= rows * columns or rank >= max(rows, inputs // v) / 2


def _common(cuts: Iterable[Cut]) -> list[int]:
    """Return the decompose_factors with which PEFT splits all these widths so, −1 first."""
    wanted = {pair for cut in cuts for pair in cut}
    most = max(max(math.isqrt(width), u) for width, u in wanted) + 1
    return [f for f in (-1, *range(1, most + 1)) if all(split(width, f)[0] == u for width, u in wanted)]


def _apart(cuts: Mapping[str, Cut]) -> tuple[tuple[str, Cut], tuple[str, Cut]]:
    """Return two sites that no one factor splits, or the first two."""
    sites = [*cuts.items()]
    pairs = ((a, b) for i, a in enumerate(sites) for b in sites[i + 1 :] if not _common([a[1], b[1]]))
    return next(pairs, (sites[0], sites[-1]))
