"""PEFT's MISS: one block D shared by all groups of the input, whole, `mini` (repeated) or `bat` (W guides the change).

The tensors are ours as they are. One rank, and one of the three forms, for a whole adapter; linear layers only.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method, WeightMethod
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, number, one, refuse
from addenda.exporting.peft.layers import is_linear
from addenda.exporting.routes import Route
from addenda.methods.bat import BAT
from addenda.methods.miss import MiSS

D = "miss_block"


class MissConversion(Conversion):
    """MiSS, its mini form, and BAT with blocks by strip of outputs."""

    type = "MISS"
    suffixes = (D,)
    reads = frozenset(["r", "mini_r", "init_weights"])
    ignores = frozenset(["miss_dropout"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        rank, mini, form = number(config, "r", int, 64), number(config, "mini_r", int, 1), config.get("init_weights")
        problems, name, method = [], "D", _method(rank, mini, form)
        if isinstance(method, BAT):
            name = "B"
        for s in saved:
            (m, n), problem = s.site.shape, []
            if not is_linear(s.site):
                problem = [f"{s.path}: a {type(s.site.module).__name__}, and PEFT has MISS for Linear only"]
            elif reason := method.check(m, n):
                problem = [f"{s.path}: {reason}"]
            else:
                shape = (m // rank, rank, rank) if isinstance(method, BAT) else (rank, mini if form == "mini" else m)
                problem = expect(s, {D: shape})
            problems += problem
            if not problem:
                forms.sites[s.path] = method, {name: s.tensors[D]}
        refuse(problems, "This MISS adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        if type(method) not in (MiSS, BAT) or not is_linear(site):
            return None
        if type(method) is BAT and method.axis == "in":
            return Route("approximate", "LORA of the rank or energy asked for: PEFT's bat is axis=out")
        return Route("exact", "MISS")

    def write(self, live: Sequence[Live]) -> Written:
        form = _form(live)
        config = {"peft_type": self.type, "r": one(live, "rank")["rank"], "mini_r": 1, "init_weights": form}
        if form == "mini":
            config["mini_r"] = one(live, "mini")["mini"]
        name = "B" if form == "bat" else "D"
        return Written(config, {f"{each.path}.{D}": each.values()[name] for each in live})


def _method(rank: int, mini: int, form: object) -> WeightMethod:
    if form == "bat":
        return BAT(rank=rank)
    return MiSS(rank=rank, mini=mini) if form == "mini" else MiSS(rank=rank)


def _form(live: Sequence[Live]) -> str | bool:
    """Return init_weights, which is how PEFT names the form. Raises AddendaError where sites have two."""
    forms = {each.path: "bat" if type(each.method) is BAT else True if each.method.mini is None else "mini"
             for each in live}  # fmt: skip
    path, form = next(iter(forms.items()))
    other = next((p for p, f in forms.items() if f != form), None)
    if other is not None:
        raise AddendaError(
            f"PEFT has one form of MISS for a whole adapter: {path} is {form!r} and {other} {forms[other]!r} as its "
            "init_weights. Export to 'merged', or give rank= or energy= for a LoRA."
        )
    return form
