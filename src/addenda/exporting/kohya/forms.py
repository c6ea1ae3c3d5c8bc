"""The tensors of one module in a file of kohya or LyCORIS, as a method and its tensors here.

| file                                             | method | conversion                                               |
| ------------------------------------------------ | ------ | -------------------------------------------------------- |
| lora_up, lora_down                               | lora   | B, A; those of a convolution flattened                   |
| … with lora_mid (Tucker)                         | lora   | A ← Σ_j mid[·, j] ⊗ down[j]                              |
| … with dora_scale, one number for each output    | dora   | magnitude ← dora_scale − ‖W_i‖                           |
| hada_w1_a, w1_b, w2_a, w2_b (hada_t1, t2)        | loha   | B1, A1, B2, A2; a Tucker core multiplied into its A      |
| lokr_w1 or w1_a w1_b, lokr_w2 or w2_a w2_b (t2)  | lokr   | C ← w1, B A ← w2, where LoKr splits the widths as the fi |
|                                                  | lora   | does; else (I ⊗ B)(C ⊗ A), whose rank is a multiple of r |

s = alpha / rank, and 1 where a file has no alpha, as in sd-scripts. LoKr's rank is that of whichever side has
factors; where neither has, LyCORIS scales by 1 whatever alpha says.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from addenda.core.base.visible import label
from addenda.core.method.contract import Method, Params
from addenda.core.site.site import Site
from addenda.methods.dora import DoRA
from addenda.methods.loha import LoHa
from addenda.methods.lokr import LoKr
from addenda.methods.lora import LoRA

LORA = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
BESIDE = ("alpha", "dora_scale")
UNREAD = {  # by a suffix that shows it: what LyCORIS calls the method
    "oft_blocks": "diag-OFT or BOFT, whose blocks turn the output here and not the input",
    "oft_diag": "diag-OFT",
    "rescale": "diag-OFT or BOFT",
    "diff": "a full difference; merge it where it was made and take it out with addenda extract",
    "diff_b": "a change of a bias",
    "a1.weight": "GLoRA",
    "on_input": "IA³",
    "w_norm": "a norm's difference",
    "b_norm": "a norm's difference",
    "lambda_layer": "T-LoRA, whose rank follows the noise's time step",
    "lokr_t1": "a Tucker core of LoKr's first factor",
    "scalar": "a trained scalar of an old LyCORIS, which newer ones multiply into the factors",
    "bias_values": "sparse biases",
    "lora_A.weight": "PEFT's names; its files are read as folders with their config",
}


class MisfitError(Exception):
    """What is wrong with the tensors of a module, as part of a sentence."""


class Form(NamedTuple):
    """A site's method with its tensors, and what was converted on the way, if anything."""

    method: Method
    tensors: Params
    note: str = ""


def form_of(site: Site, tensors: Mapping[str, Tensor]) -> Form:
    """Return the method and tensors at a site for what a file holds of it. Raises MisfitError with the reason."""
    unread = next((s for s in tensors if s in UNREAD), None)
    if unread is not None:
        raise MisfitError(f"{unread}: {UNREAD[unread]}; this is not read")
    for names, make in FAMILIES.items():
        if any(n in tensors for n in names):
            other = [s for s in tensors if s not in names and s not in BESIDE]
            if other:
                raise MisfitError(f"{', '.join(other[:4])} beside {next(n for n in names if n in tensors)}")
            if lone := [n for n in names if n in tensors and not tensors[n].dim()]:
                raise MisfitError(f"{lone[0]} is a single number, and a factor is a matrix")
            if empty := [n for n in names if n in tensors and not tensors[n].numel()]:
                raise MisfitError(f"{empty[0]} is {list(tensors[empty[0]].shape)}, which holds no number")
            return make(site, {k: t.float() for k, t in tensors.items()})
    known = [s for s in tensors if s in BESIDE]
    if known:
        raise MisfitError(f"{', '.join(known)} without factors")
    raise MisfitError(f"unknown tensors {', '.join(label(s) for s in [*tensors][:4])}")


def _lora(site: Site, given: Params) -> Form:
    _all_of(given, LORA[:2])
    (m, n), down, up = site.shape, given[LORA[0]], given[LORA[1]]
    rank, kernel = down.shape[0], tuple(site.weight.shape[2:])
    if "lora_mid.weight" in given:
        core = given["lora_mid.weight"]
        A = _tucker(core, _matrix(down, rank, n // _numel(kernel), "lora_down"), kernel, "lora_mid")
    else:
        A = _like(down, (rank, *site.weight.shape[1:]), "lora_down").reshape(rank, n)
    B = _matrix(up, m, rank, "lora_up")
    scale = _scale(given, rank)
    if "dora_scale" in given:
        return _dora(site, A, B, scale, given["dora_scale"])
    if rank <= min(m, n):
        return Form(LoRA(rank=rank, alpha=None if scale == 1 else scale * rank), {"A": A, "B": B})
    change = scale * (B.double() @ A.double())
    B, A = (torch.eye(m), change.float()) if m <= n else (change.float(), torch.eye(n))
    return Form(LoRA(rank=min(m, n)), {"A": A, "B": B}, f"rank {rank} is more than {m} × {n} can have")


def _dora(site: Site, A: Tensor, B: Tensor, scale: float, lengths: Tensor) -> Form:
    (m, n), rank = site.shape, len(A)
    if lengths.shape[:1] != (m,) or lengths.numel() != m:
        raise MisfitError(
            f"dora_scale is {list(lengths.shape)}, and one number for each of {m} outputs is read; older versions of "
            "LyCORIS have one for each input, which no method here does"
        )
    if rank > min(m, n):
        raise MisfitError(f"rank {rank} with dora_scale is above {min(m, n)}")
    start = site.matrix.float().square().sum(1).sqrt().cpu()
    magnitude = lengths.reshape(m) - start
    return Form(DoRA(rank=rank, alpha=None if scale == 1 else scale * rank), {"A": A, "B": B, "magnitude": magnitude})


def _loha(site: Site, given: Params) -> Form:
    _all_of(given, LOHA[:4])
    _no_lengths(given)
    (m, n), kernel = site.shape, tuple(site.weight.shape[2:])
    made: Params = {}
    tucker = [name for name in LOHA[4:] if name in given]
    if len(tucker) == 1:
        raise MisfitError(f"{tucker[0]} alone, and a Tucker form has hada_t1 and hada_t2")
    rank = given["hada_w1_b"].shape[0]
    for i in (1, 2):
        a, b = given[f"hada_w{i}_a"], given[f"hada_w{i}_b"]
        if tucker:
            inner = _matrix(b, rank, n // _numel(kernel), f"hada_w{i}_b")
            made[f"A{i}"] = _tucker(given[f"hada_t{i}"], inner, kernel, f"hada_t{i}")
            made[f"B{i}"] = _matrix(a, rank, m, f"hada_w{i}_a").T.clone(memory_format=torch.contiguous_format)
        else:
            made[f"A{i}"], made[f"B{i}"] = (
                _matrix(b, rank, n, f"hada_w{i}_b"),
                _matrix(a, m, rank, f"hada_w{i}_a"),
            )
    scale = _scale(given, rank)
    return Form(LoHa(rank=rank, alpha=None if scale == 1 else scale * rank), made)


# -- Kronecker products ------------------------------------------------------------------------------------------------


def _lokr(site: Site, given: Params) -> Form:
    _no_lengths(given)
    (m, n), kernel = site.shape, tuple(site.weight.shape[2:])
    ranks = []
    if "lokr_w1" in given:
        left = right = given["lokr_w1"]
    else:
        _all_of(given, LOKR[1:3])
        left, right = given["lokr_w1_a"], given["lokr_w1_b"]
        ranks.append(right.shape[0])
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise MisfitError(f"lokr_w1_a {list(left.shape)} and lokr_w1_b {list(right.shape)} have no product")
    split = [left.shape[0], right.shape[-1]] if left.dim() == 2 else list(left.shape)
    if len(split) != 2 or not all(split) or m % split[0] or (n // _numel(kernel)) % split[1]:
        raise MisfitError(f"the first factor is {split}, which does not divide {m} × {n // _numel(kernel)}")
    C = left if left is right else left @ right
    rows, columns = m // C.shape[0], n // C.shape[1]
    if "lokr_w2" in given:
        full = given["lokr_w2"]
        B, A = _like(full, (rows, columns // _numel(kernel), *kernel), "lokr_w2").reshape(rows, columns), None
    else:
        _all_of(given, LOKR[4:6])
        rank = given["lokr_w2_b"].shape[0]
        ranks.append(rank)
        if "lokr_t2" in given:
            inner = _matrix(given["lokr_w2_b"], rank, columns // _numel(kernel), "lokr_w2_b")
            A = _tucker(given["lokr_t2"], inner, kernel, "lokr_t2")
            B = _matrix(given["lokr_w2_a"], rank, rows, "lokr_w2_a").T.clone(memory_format=torch.contiguous_format)
        else:
            A, B = (
                _matrix(given["lokr_w2_b"], rank, columns, "lokr_w2_b"),
                _matrix(given["lokr_w2_a"], rows, rank, "lokr_w2_a"),
            )
    if ("lokr_w1" in given and len({*LOKR[1:3]} & {*given})) or ("lokr_w2" in given and len({*LOKR[4:]} & {*given})):
        raise MisfitError("a whole factor and the parts of it")
    scale = _scale(given, ranks[0]) if ranks else 1.0
    return _kronecker(site, C, B, A, scale)


def _kronecker(site: Site, C: Tensor, B: Tensor, A: Tensor | None, scale: float) -> Form:
    """Return s C ⊗ (B A), A None for the identity, as a LoKr of the same split, or else as a LoRA that is the same."""
    (m, n), (u, v) = site.shape, C.shape
    rank = None if A is None else len(A)
    if rank is not None and rank * (len(B) + A.shape[1]) >= len(B) * A.shape[1]:  # type: ignore[union-attr]
        B, A, rank = B @ A, None, None  # type: ignore[operator]  LoKr trains such a product whole
    for most in (None, *range(1, max(u, v) + 1)):
        method = LoKr(rank=rank, alpha=None if scale == 1 else scale * (rank or 1), factor=most)
        if (method._split(m)[0], method._split(n)[0]) == (u, v):
            return Form(method, {"C": C, "B": B} if A is None else {"C": C, "B": B, "A": A})
    if A is None:
        B, A = (torch.eye(len(B)), B) if len(B) <= B.shape[1] else (B, torch.eye(B.shape[1]))
    C = scale * C
    if u <= v:
        left, right = torch.kron(torch.eye(u), B), torch.kron(C, A)
    else:
        left, right = torch.kron(C, B), torch.kron(torch.eye(v), A)
    note = f"a Kronecker product of {u} × {v} with {m // u} × {n // v}, which LoKr would split otherwise"
    return Form(LoRA(rank=len(right)), {"A": right, "B": left}, note)


# -- shapes ------------------------------------------------------------------------------------------------------------


def _tucker(core: Tensor, inner: Tensor, kernel: tuple[int, ...], name: str) -> Tensor:
    """Return Σ_j core[i, j, kernel] inner[j, column] as r × (columns · kernel)."""
    rank = len(inner)
    if tuple(core.shape) != (rank, rank, *kernel) or not kernel:
        raise MisfitError(f"{name} is {list(core.shape)}, expected {[rank, rank, *kernel]}")
    return torch.einsum("ijk,jc->ick", core.flatten(2), inner).reshape(rank, -1)


def _all_of(given: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    missing = [n for n in names if n not in given]
    if missing:
        raise MisfitError(f"{', '.join(missing)} missing beside {', '.join(n for n in given if n not in BESIDE)}")


def _no_lengths(given: Mapping[str, Tensor]) -> None:
    if "dora_scale" in given:
        raise MisfitError("dora_scale with a change that is no LoRA, which no method here is")


def _matrix(t: Tensor, rows: int, columns: int, name: str) -> Tensor:
    """Return a tensor as rows × columns, where those are its first dimension and the product of the others."""
    if t.dim() < 2 or t.shape[0] != rows or t.numel() != rows * columns:
        raise MisfitError(f"{name} is {list(t.shape)}, expected {[rows, columns]}")
    return t.reshape(rows, columns)


def _like(t: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Return a tensor of this shape, dimensions of one at the ends there or not."""
    if _bare(tuple(t.shape)) != _bare(shape):
        raise MisfitError(f"{name} is {list(t.shape)}, expected {list(shape)}")
    return t.reshape(shape)


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _scale(given: Mapping[str, Tensor], rank: int) -> float:
    alpha = given.get("alpha")
    if alpha is None:
        return 1.0
    if alpha.numel() != 1 or not float(alpha) > 0:
        given_as = f"{float(alpha):g}" if alpha.numel() == 1 else str(list(alpha.shape))
        raise MisfitError(f"alpha is {given_as}, expected a number above 0")
    return float(alpha) / rank


FAMILIES: dict[tuple[str, ...], Callable[[Site, Params], Form]] = {LORA: _lora, LOHA: _loha, LOKR: _lokr}
