"""PEFT's ROAD: pairs of outputs, half a group apart, are turned and scaled. theta as it is, alpha = 1 + scale.

PEFT turns a layer's bias too, which no change of the weight does: only where a layer has none is it the same. One
variant and one group for a whole adapter; linear layers only.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from addenda.core.method.contract import Method
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, number, one, refuse
from addenda.exporting.peft.layers import is_linear
from addenda.exporting.routes import Route
from addenda.methods.road import RoAd

THETA, ALPHA = "road_theta", "road_alpha"


class RoadConversion(Conversion):
    """RoAd in its three variants, on linear layers without a bias."""

    type = "ROAD"
    suffixes = (THETA, ALPHA)
    reads = frozenset(["variant", "group_size"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        variant: str = str(config.get("variant", "road_1")).rpartition(".")[2].lower()
        method, problems = RoAd(variant=variant, group=number(config, "group_size", int, 64)), []  # type: ignore[arg-type]
        for s in saved:
            m, n = s.site.shape
            if not is_linear(s.site):
                problem = [f"{s.path}: a {type(s.site.module).__name__}, and PEFT has ROAD for Linear only"]
            elif _has_bias(s.site):
                problem = [
                    f"{s.path}: PEFT turns the layer's bias too, which no change of the weight does; merge it in PEFT "
                    "(merge_and_unload) and use that checkpoint as the model"
                ]
            elif reason := method.check(m, n):
                problem = [f"{s.path}: {reason}"]
            else:
                problem = expect(s, dict.fromkeys((THETA, ALPHA), (method.trainable(m, n) // 2,)))
            problems += problem
            if not problem:
                forms.sites[s.path] = method, {"angle": s.tensors[THETA], "scale": s.tensors[ALPHA].double() - 1}
        refuse(problems, "This ROAD adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        if type(method) is not RoAd or not is_linear(site):
            return None
        if _has_bias(site):
            return Route("approximate", "LORA of the rank or energy asked for: PEFT's ROAD turns the layer's bias too")
        return Route("exact", "ROAD")

    def write(self, live: Sequence[Live]) -> Written:
        options = one(live, "variant", "group")
        made = Written({"peft_type": self.type, "variant": options["variant"], "group_size": options["group"]})
        made.config["init_weights"] = True
        for each in live:
            p = each.values()
            made.tensors |= {f"{each.path}.{THETA}": p["angle"], f"{each.path}.{ALPHA}": 1 + p["scale"]}
        return made


def _has_bias(site: Site) -> bool:
    return getattr(site.module, "bias", None) is not None
