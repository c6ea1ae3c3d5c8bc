"""PEFT's DELORA: W + (λ/r) Σ b̂_i â_iᵀ diag(w), read as a LoRA of rank r; norms below 1e-4 count as that.

addenda's DeLoRA trains offsets from starts of its own, so the two forms are not each other's. Ours is written as LORA.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from addenda.core.method.contract import Method
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import (
    Config,
    Conversion,
    Saved,
    expect,
    number,
    pattern_value,
    refuse,
)
from addenda.exporting.peft.thin import narrow
from addenda.exporting.routes import Route
from addenda.methods.lora import LoRA

_A, _B, _STRENGTH, _NORMS = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"


class DeloraConversion(Conversion):
    """DELORA, read only."""

    type = "DELORA"
    suffixes = (_A, _B, _STRENGTH, _NORMS)
    reads = frozenset(["r", "rank_pattern"])
    ignores = frozenset(["delora_lambda", "lambda_pattern", "module_dropout"])  # λ is in the tensors

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        problems: list[str] = []
        for s in saved:
            m, n = s.site.shape
            rank = pattern_value(config.get("rank_pattern"), s.path, number(config, "r", int, 8), "rank_pattern")
            wrong = expect(s, {_A: (rank, n), _B: (m, rank), _STRENGTH: (1,), _NORMS: (n,)})
            problems += wrong
            if not wrong:
                t = {k: v.float() for k, v in s.tensors.items()}
                lengths = t[_A].norm(dim=1).clamp_min(1e-4) * t[_B].norm(dim=0).clamp_min(1e-4)
                B, A = narrow(t[_B] * (t[_STRENGTH] / rank / lengths), t[_A] * t[_NORMS])
                forms.sites[s.path] = LoRA(rank=len(A)), {"A": A, "B": B}
        refuse(problems, "This DELORA adapter of PEFT does not fit")
        forms.notes.append(f"DeLoRA is read as a LoRA at {len(saved)} sites: addenda's starts elsewhere")

    def route(self, method: Method, site: Site) -> Route | None:
        return None
