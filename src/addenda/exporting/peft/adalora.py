"""PEFT's ADALORA: W + s B diag(E) A with s = lora_alpha / (init_r + 1e-5), ranks cut where the budget took them.

rank_pattern says of each site which of the init_r ranks are left; the tensors hold these alone, under the scale of
init_r. The 1e-5 of the scale, and scales that differ by site, go into E, so that nothing is lost.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, number, refuse
from addenda.exporting.routes import Route
from addenda.methods.adalora import AdaLoRA

_A, _B, _E = "lora_A", "lora_B", "lora_E"
_ADDED = 1e-5  # PEFT's, to ranks that may be 0


class AdaLoraConversion(Conversion):
    """AdaLoRA at linear layers, Conv1D and, read only, convolutions."""

    type = "ADALORA"
    suffixes = (_A, _B, _E)
    reads = frozenset(["init_r", "target_r", "lora_alpha", "rank_pattern", "fan_in_fan_out"])
    ignores = frozenset([
        "r", "lora_dropout", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
        "init_lora_weights", "qalora_group_size", "alpha_pattern",
    ])  # fmt: skip

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        problems: list[str] = []
        most, target = number(config, "init_r", int, 12), number(config, "target_r", int, 8)
        alpha = number(config, "lora_alpha", float, 8)
        alpha = alpha if alpha > 0 else most
        for s in saved:
            rank = _left(config, s.path, most)
            m, n = s.site.shape
            wrong = expect(s, {_A: (rank, n), _B: (m, rank), _E: (rank, 1)})
            problems += wrong
            if wrong or rank == 0:
                forms.notes += [f"{s.path}: no rank of it is left"] if not wrong else []
                continue
            t = {k: v.float() for k, v in s.tensors.items()}
            E, A, B = t[_E].flatten() * (most / (most + _ADDED)), t[_A], t[_B]
            if rank > min(m, n):
                problems.append(f"{s.path} is {m} × {n}, and its rank {rank}")
                continue
            method = AdaLoRA(rank=rank, target_rank=min(max(target, 1), rank), alpha=float(alpha * rank / most))
            forms.sites[s.path] = method, {"A": A, "B": B, "E": E}
        refuse(problems, "This ADALORA adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        return Route("exact", "ADALORA") if isinstance(method, AdaLoRA) and site.kind.dense else None

    def write(self, live: Sequence[Live]) -> Written:
        most = max(e.method.rank for e in live)
        alpha = float(most)
        cut = any(e.method.rank < most for e in live)
        pattern = {
            f"{e.path}.{_E}": [True] * e.method.rank + [False] * (most - e.method.rank) for e in live
        }  # fmt: skip
        made = Written(
            {
                "peft_type": self.type,
                "init_r": most,
                "target_r": max(e.method.target_rank for e in live),
                "lora_alpha": int(alpha),
                "rank_pattern": pattern if cut else None,
                "total_step": 1,  # how long it is to be trained: PEFT wants a number
                "tinit": 0,
                "tfinal": 0,
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": any(e.site.kind.transposed for e in live),
            }
        )
        for each in live:
            p = each.values()
            E = p["E"].double() * (each.method.scale * (most + _ADDED) / alpha)
            made.tensors |= {f"{each.path}.{k}": t for k, t in ((_A, p["A"]), (_B, p["B"]), (_E, E.float()[:, None]))}
        return made


def _left(config: Config, path: str, most: int) -> int:
    """Return how many ranks a config leaves of a site."""
    patterns = config.get("rank_pattern")
    if not patterns:
        return most
    if not isinstance(patterns, dict):
        raise AddendaError(f"rank_pattern of an ADALORA config is a dict by path, got {str(patterns)[:80]}.")
    kept = next((v for k, v in patterns.items() if k.rpartition(f".{_E}")[0].endswith(path)), None)
    if kept is None:
        return most
    if not isinstance(kept, list) or not all(isinstance(k, bool | int) for k in kept):
        raise AddendaError(f"rank_pattern of this ADALORA config says {str(kept)[:60]!r} of {path}; a list is wanted.")
    return int(torch.tensor(kept).bool().sum()) if kept else 0
