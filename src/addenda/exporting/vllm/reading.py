"""What vLLM's loader makes of a folder, as methods and tensors at the sites of a model: the proof of an export.

The rules are vLLM's, not PEFT's: names are looked up as its model has them, the scale is alpha / rank (√rank with
use_rslora) of the patterns that match a name, experts come one by one, gate and up apart.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.site.site import site_at
from addenda.exporting.install import Forms
from addenda.exporting.peft.folder import read_folder
from addenda.exporting.peft.lora import ranks
from addenda.exporting.vllm.contents import contents_of
from addenda.exporting.vllm.places import Place, places
from addenda.exporting.vllm.rules import check
from addenda.methods.lora import LoRA

Factors = tuple[Tensor, Tensor]  # B: m × r, A: r × n


def read(path: str | Path, model: nn.Module) -> Forms:
    """Return the changes that vLLM serves from a folder: a LoRA of scale 1 at each site, and the head.

    Raises AddendaError for whatever `check` finds, and for an embedding that is also the head where the two are
    changed otherwise, which no one weight can hold.
    """
    if problems := check(path, config=model):
        raise AddendaError(f"vLLM would not serve {Path(path).name} as it is meant: {'; '.join(problems[:8])}.")
    folder = read_folder(path)
    contents, known = contents_of(folder), places(model)
    sites: dict[str, dict[str, Factors]] = {}
    for name, pair in contents.pairs.items():
        if name not in known:
            raise AddendaError(f"{name} is a stack of experts, which addenda reads from PEFT's folders only.")
        rank, alpha = ranks(folder.config, name)
        scale = alpha / math.sqrt(rank) if folder.config.get("use_rslora") else alpha / rank
        B, A = pair["B"].float() * scale, pair["A"].float()
        sites.setdefault(known[name].site, {})[name] = (A.T, B.T) if known[name].embedding else (B, A)
    forms = Forms()
    for site, parts in sites.items():
        B, A = _unpadded(*_whole(site, parts, known, model))
        if B.dim() > 2 and not bool(B.any() and A.any()):
            continue  # experts that are written because vLLM wants all of a layer
        rank = A.shape[-2]
        forms.sites[site] = LoRA(rank=rank, alpha=float(rank)), {"B": B.contiguous(), "A": A.contiguous()}
    for name, tensors in contents.heads.items():
        at = next(path for path in known if path.rpartition(".")[2] == name)
        forms.heads |= {f"{at}.{key}": {"value": t} for key, t in tensors.items()}
    return forms


def _whole(site: str, parts: dict[str, Factors], known: dict[str, Place], model: nn.Module) -> Factors:
    """Return the factors of a site from those of its places."""
    first = known[next(iter(parts))]
    if first.expert is None:
        B, A = next(iter(parts.values()))
        if any(not torch.allclose(b @ a, B @ A, rtol=1e-5, atol=1e-7) for b, a in list(parts.values())[1:]):
            raise AddendaError(f"{', '.join(parts)} share one weight, and are changed otherwise one from the other.")
        return B, A
    height = site_at(model, site).shape[0]
    experts: dict[int, dict[tuple[int, int], Factors]] = {}
    for name, factors in parts.items():
        place = known[name]
        experts.setdefault(place.expert or 0, {})[place.rows or (0, height)] = factors
    stacked = [_rows(experts[e]) for e in sorted(experts)]
    return torch.stack([B for B, _ in stacked]), torch.stack([A for _, A in stacked])


def _unpadded(B: Tensor, A: Tensor) -> Factors:
    """Return factors without the ranks that are zero on both sides, which padding to one rank has added."""
    used = ((B != 0).any(-2) | (A != 0).any(-1)).reshape(-1, A.shape[-2]).any(0)
    used[0] = True
    return B[..., used], A[..., used, :]


def _rows(halves: dict[tuple[int, int], Factors]) -> Factors:
    """Return one pair from those of a matrix's rows: of the same A where they share it, else of the sum of ranks."""
    ordered = [halves[key] for key in sorted(halves)]
    Bs, As = [b for b, _ in ordered], [a for _, a in ordered]
    if all(torch.equal(a, As[0]) for a in As[1:]):
        return torch.cat(Bs), As[0]
    return torch.block_diag(*Bs), torch.cat(As)
