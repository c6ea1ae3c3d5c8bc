"""PEFT's HRA: W times a chain of r reflections, whose vectors are the columns of hra_u (n × r).

A pair here is two of them, u an even column and v the odd one behind it; only their directions matter. Not `apply_GS`,
which makes the columns orthogonal in every forward, and no odd r: one reflection more is no rotation.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, number, one, refuse
from addenda.exporting.peft.layers import computes_otherwise, dimensions, is_linear
from addenda.exporting.routes import Route
from addenda.methods.hra import HRA

U = "hra_u"
_MERGED = (
    "Merge it in PEFT (merge_and_unload, then save_pretrained) and take the change out of the two checkpoints: "
    "addenda extract --base … --tuned …"
)


class HraConversion(Conversion):
    """HRA of an even rank, on linear layers and on convolutions that PEFT computes as they are."""

    type = "HRA"
    suffixes = (U,)
    reads = frozenset(["r", "apply_GS"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        rank = number(config, "r", int, 8)
        if config.get("apply_GS"):
            raise AddendaError(
                "This HRA adapter of PEFT has apply_GS: it makes its vectors orthogonal in every forward, which "
                f"addenda's hra does not. {_MERGED}"
            )
        if rank < 2 or rank % 2:
            raise AddendaError(
                f"This HRA adapter of PEFT has r={rank}: addenda's hra has reflections in pairs, an even r. {_MERGED}"
            )
        problems = []
        for s in saved:
            problem = [f"{s.path}: {reason}"] if (reason := _why_not(s.site)) else []
            problem = problem or expect(s, {U: (s.site.shape[1], rank)})
            problems += problem
            if not problem:
                u = s.tensors[U].T
                forms.sites[s.path] = HRA(rank=rank), {"u": u[::2], "v": u[1::2]}
        refuse(problems, "This HRA adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        return None if type(method) is not HRA or _why_not(site) else Route("exact", "HRA")

    def write(self, live: Sequence[Live]) -> Written:
        rank = one(live, "rank")["rank"]
        made = Written({"peft_type": self.type, "r": rank, "apply_GS": False, "init_weights": True, "bias": "none"})
        for each in live:
            p = each.values()
            made.tensors[f"{each.path}.{U}"] = torch.stack([p["u"], p["v"]], 1).flatten(0, 1).T
        return made


def _why_not(site: Site) -> str | None:
    """Return why a site has no HRA in PEFT that is the layer's own, or None."""
    if not is_linear(site) and dimensions(site) != 2:
        return f"a {type(site.module).__name__}, and PEFT has HRA for Linear and Conv2d only"
    return computes_otherwise(site)
