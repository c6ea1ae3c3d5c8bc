"""PEFT's OFT: the inputs of a layer turn in blocks, y = (x R) Wᵀ, R by a Cayley transform of skew-symmetric numbers.

Its exact branch is R = (I − Q)(I + Q)⁻¹ as here. Its default, `use_cayley_neumann`, is a series of the inverse of that,
so that the numbers turn their sign: skew = −vec, with as many terms (its 3 terms are 4). `coft` projects the numbers in
every forward: they are read as projected. The side of a block is what the tensor says: PEFT moves `oft_block_size` and
`r` to what divides a width. An embedding's rows turn by the transpose: E R.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, number, one, refuse
from addenda.exporting.peft.layers import dimensions, is_linear, taps
from addenda.exporting.routes import Route
from addenda.methods.oft import OFT

R, EMBEDDED = "oft_R.weight", "oft_embedding_R.weight"


class OftConversion(Conversion):
    """OFT on linear layers, embeddings, and convolutions of a single tap."""

    type = "OFT"
    suffixes = (R, EMBEDDED)
    reads = frozenset(
        ["r", "oft_block_size", "block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"]
    )
    ignores = frozenset(["module_dropout", "fan_in_fan_out"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        series, share = _is_series(config), bool(config.get("block_share"))
        terms = number(config, "num_cayley_neumann_terms", int, 5) if series else 0
        if series and terms < 3:
            refuse(
                [f"{terms} terms of the series are no rotation that moves"], "This OFT adapter of PEFT has no form here"
            )
        problems = []
        for s in saved:
            name = EMBEDDED if s.site.kind.name == "embedding" else R
            problem = [f"{s.path}: {reason}"] if (reason := _why_not(s.site)) else []
            vec = s.tensors.get(name)
            side = 0 if vec is None or vec.dim() != 2 else (1 + math.isqrt(1 + 8 * vec.shape[1])) // 2
            n = s.site.shape[1]
            if not problem and vec is not None and (not side or side * (side - 1) // 2 != vec.shape[-1]):
                problem = [f"{s.path}: {name} is {list(vec.shape)}, and blocks × b (b − 1) / 2 is wanted"]
            if not problem and side and (side < 2 or n % side):
                problem = [f"{s.path}: blocks of {side} do not divide the width {n}"]
            blocks = 1 if share else n // max(side, 1)
            problem = problem or expect(s, {name: (blocks, side * (side - 1) // 2)})
            problems += problem
            if problem or vec is None:
                continue
            vec = vec.float()
            if config.get("coft"):
                vec = _projected(vec, number(config, "eps", float, 6e-5))
            sign = _sign(s.site, series)
            method = OFT(block=side, block_share=share, terms=4 if terms == 3 else terms)
            forms.sites[s.path] = method, {"skew": sign * vec}
        if config.get("coft"):
            forms.notes.append("coft: the numbers are as PEFT projects them in every forward; here they train free")
        refuse(problems, "This OFT adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        if type(method) is not OFT or _why_not(site):
            return None
        if method.terms == 3:
            return Route("approximate", "LORA of the rank or energy asked for: PEFT's series has 4 terms or more")
        return Route("exact", "OFT")

    def write(self, live: Sequence[Live]) -> Written:
        options = one(live, "block_share", "terms")
        terms = options["terms"]
        counts = {each.site.shape[1] // each.method.block for each in live}
        by_count = len({each.method.block for each in live}) > 1 and len(counts) == 1
        size = {"r": counts.pop(), "oft_block_size": 0} if by_count else {"r": 0, "oft_block_size": _block(live)}
        made = Written({"peft_type": self.type, "init_weights": True, "coft": False, "fan_in_fan_out": False, **size})
        made.config |= {"bias": "none", "block_share": options["block_share"], "use_cayley_neumann": terms > 0}
        made.config["num_cayley_neumann_terms"] = terms or 5
        for each in live:
            name = EMBEDDED if each.site.kind.name == "embedding" else R
            made.tensors[f"{each.path}.{name}"] = _sign(each.site, terms > 0) * each.values()["skew"]
        return made


def _is_series(config: Config) -> bool:
    """Return use_cayley_neumann. Raises AddendaError where a config lacks it, or an old PEFT meant another series.

    Either way the same numbers would turn the other way round, or not quite as far.
    """
    if not isinstance(config.get("use_cayley_neumann"), bool):
        raise AddendaError(
            "The config of this OFT adapter does not say use_cayley_neumann, true or false, and by it the numbers turn "
            "one way or the other. It was saved by an old PEFT: load it there and merge it (merge_and_unload)."
        )
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version", "")))
    if config["use_cayley_neumann"] and (version is None or (int(version[1]), int(version[2])) < (0, 18)):
        raise AddendaError(
            "This OFT adapter was saved by a PEFT before 0.18, whose series was another (PEFT itself says: retrain). "
            "Merge it in that PEFT (merge_and_unload)."
        )
    return config["use_cayley_neumann"]


def _block(live: Sequence[Live]) -> int:
    return one(live, "block")["block"]


def _sign(site: Site, series: bool) -> float:
    """Return what turns PEFT's numbers into those here, and back."""
    return -1.0 if series != (site.kind.name == "embedding") else 1.0


def _why_not(site: Site) -> str | None:
    """Return why PEFT's rotation has no form here at a site, or None."""
    if is_linear(site) or site.kind.name == "embedding":
        return None
    if dimensions(site) != 2:
        return f"a {type(site.module).__name__}, and PEFT has OFT for Linear, Conv2d and Embedding only"
    if taps(site) > 1:
        return "PEFT turns the patches of a convolution's input and adds them up again, which no weight does"
    if getattr(site.module, "groups", 1) > 1:
        return "PEFT turns all channels together, and groups see some of them"
    if getattr(site.module, "dilation", 1) != (1, 1):
        return "PEFT has no OFT for a convolution with dilation"
    return None


def _projected(vec: Tensor, eps: float) -> Tensor:
    """Return the numbers as coft keeps them: each block's ‖Q‖ at most eps / √blocks."""
    norm = vec.double().square().sum(1, keepdim=True).mul(2).sqrt()
    most = eps / math.sqrt(len(vec))
    return torch.where(norm <= most, vec, (vec * (most / norm.clamp_min(1e-300))).to(vec.dtype))
