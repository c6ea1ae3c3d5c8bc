"""PEFT's BOFT: the inputs turn level by level, and every output has a factor of its own, s = 1 + scale.

PEFT stores whole blocks and uses their skew-symmetric half. How many levels there are is what the tensor says: where
its CUDA kernel does not compile, PEFT makes one, whatever `boft_n_butterfly_factor` says; such a PEFT loads no file of
more than one level, with an error.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from addenda.core.base.linalg import skew_symmetric
from addenda.core.method.contract import Method, Params
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, one, refuse
from addenda.exporting.peft.layers import computes_otherwise, dimensions, is_linear
from addenda.exporting.routes import Route
from addenda.methods.boft import BOFT

R, S = "boft_R", "boft_s"


class BoftConversion(Conversion):
    """BOFT on linear layers and on convolutions that PEFT computes as they are."""

    type = "BOFT"
    suffixes = (R, S)
    reads = frozenset(["boft_block_size", "boft_block_num", "boft_n_butterfly_factor"])
    ignores = frozenset(["boft_dropout", "fan_in_fan_out"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        problems = []
        for s in saved:
            m, n = s.site.shape
            blocks = s.tensors.get(R)
            levels, side = (0, 0) if blocks is None or blocks.dim() != 4 else (blocks.shape[0], blocks.shape[-1])
            problem = [f"{s.path}: {reason}"] if (reason := _why_not(s.site)) else []
            if not problem and side % 2:
                problem = [f"{s.path}: blocks of an odd side, {side}, which addenda's boft has not"]
            problem = problem or expect(s, {R: (levels, n // max(side, 1), side, side), S: _scale_shape(s.site)})
            if not problem and (reason := BOFT(block=side, levels=levels, scale=True).check(m, n)):
                problem = [f"{s.path}: {reason}"]
            problems += problem
            if problem or blocks is None:
                continue
            row, column = torch.triu_indices(side, side, 1)
            Q = blocks.double()
            skew = (Q - Q.mT)[..., row, column] / 2
            own: Params = {"skew": skew, "scale": s.tensors[S].double().flatten() - 1}
            forms.sites[s.path] = BOFT(block=side, levels=levels, scale=True), own
        refuse(problems, "This BOFT adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        if type(method) is not BOFT or _why_not(site):
            return None
        if method.levels > 1:
            return Route("exact", "BOFT, for a PEFT whose CUDA kernel compiles: others load one level only, levels=1")
        return Route("exact", "BOFT")

    def write(self, live: Sequence[Live]) -> Written:
        levels = one(live, "levels")["levels"]
        counts = {each.site.shape[1] // each.method.block for each in live}
        by_count = len({each.method.block for each in live}) > 1 and len(counts) == 1
        side = 0 if by_count else one(live, "block")["block"]
        size = {"boft_block_size": side, "boft_block_num": counts.pop() if by_count else 0}
        made = Written({"peft_type": self.type, "init_weights": True, "bias": "none", "fan_in_fan_out": False, **size})
        made.config["boft_n_butterfly_factor"] = levels
        for each in live:
            p = each.values()
            scale = p.get("scale", torch.zeros(each.site.shape[0]))
            made.tensors[f"{each.path}.{R}"] = skew_symmetric(p["skew"], each.method.block)
            made.tensors[f"{each.path}.{S}"] = (1 + scale).reshape(_scale_shape(each.site))
        return made


def _why_not(site: Site) -> str | None:
    """Return why a site has no BOFT in PEFT that is the layer's own, or None."""
    if not is_linear(site) and dimensions(site) != 2:
        return f"a {type(site.module).__name__}, and PEFT has BOFT for Linear and Conv2d only"
    return computes_otherwise(site)


def _scale_shape(site: Site) -> tuple[int, int]:
    m = site.shape[0]
    return (1, m) if dimensions(site) else (m, 1)
