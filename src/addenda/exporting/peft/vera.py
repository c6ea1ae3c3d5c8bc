"""PEFT's VERA: W + diag(b) B diag(d) A, with A and B shared by all sites; each takes their first columns and rows.

The projections come from torch's generator, which other releases and devices turn to other numbers, so a folder is
read where it holds them (save_projection, PEFT's default). As ours are drawn otherwise, it is read as a LoRA of the
same rank, A ← d ∘ A and B ← b ∘ B. Ours is written as VERA, with our projections in the folder.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, number, one, refuse
from addenda.exporting.peft.thin import narrow
from addenda.exporting.routes import Route
from addenda.methods.lora import LoRA
from addenda.methods.vera import VeRA

_ROWS, _MIDDLE = "vera_lambda_b", "vera_lambda_d"
_A, _B = "vera_A", "vera_B"


class VeraConversion(Conversion):
    """VeRA at linear layers and Conv1D."""

    type = "VERA"
    suffixes = (_ROWS, _MIDDLE)
    shared = (_A, _B)
    reads = frozenset(["r", "fan_in_fan_out"])
    ignores = frozenset(["vera_dropout", "d_initial", "projection_prng_key", "save_projection"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        if _A not in shared or _B not in shared:
            raise AddendaError(
                "This VERA adapter of PEFT has no projections in its folder (save_projection=false): they would have "
                "to be drawn by torch's generator, which may give others here. Load it in PEFT where it was made, set "
                "save_projection=True in its config, and save it again."
            )
        rank, problems = number(config, "r", int, 256), []
        A, B = shared[_A].float(), shared[_B].float()
        if A.dim() != 2 or B.dim() != 2 or len(A) != rank or B.shape[1] != rank:
            problems.append(f"{_A} is {list(A.shape)} and {_B} {list(B.shape)}, and the config's r is {rank}")
        for s in saved:
            m, n = s.site.shape
            wrong = expect(s, {_ROWS: (m,), _MIDDLE: (rank,)})
            if not problems and (A.shape[1] < n or len(B) < m):
                wrong.append(f"{s.path} is {m} × {n}, and the projections {list(B.shape)} and {list(A.shape)}")
            problems += wrong
            if not problems:
                rows, middle = s.tensors[_ROWS].float(), s.tensors[_MIDDLE].float()
                b, a = narrow(rows[:, None] * B[:m], middle[:, None] * A[:, :n])
                forms.sites[s.path] = LoRA(rank=len(a)), {"A": a, "B": b}
        refuse(problems, "This VERA adapter of PEFT does not fit")
        forms.notes.append(f"VeRA is read as a LoRA at {len(saved)} sites: addenda draws other projections")

    def route(self, method: Method, site: Site) -> Route | None:
        return Route("exact", "VERA") if isinstance(method, VeRA) and site.kind.dense else None

    def write(self, live: Sequence[Live]) -> Written:
        options = one(live, *(f.name for f in dataclasses.fields(VeRA)))  # other options, other projections
        p = live[0].values()
        made = Written(
            {
                "peft_type": self.type,
                "r": options["rank"],
                "save_projection": True,
                "projection_prng_key": 0,  # PEFT's default: what it draws from it is replaced by what is stored
                "d_initial": options["d_initial"],
                "vera_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": any(e.site.kind.transposed for e in live),
            },
            shared={_A: p["A"].float(), _B: p["B"].float()},
        )
        for each in live:
            p = each.values()
            made.tensors |= {f"{each.path}.{_ROWS}": p["b"], f"{each.path}.{_MIDDLE}": p["d"]}
        return made
