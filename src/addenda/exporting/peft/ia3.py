"""PEFT's IA3: what a layer returns, or with `feedforward_modules` what it reads, times a trained vector l = 1 + d.

PEFT scales a layer's bias with its outputs, which no change of the weight does: there it is `ia3-output`, which changes
what the layer returns. A convolution's inputs are scaled by channel, all entries of the kernel alike.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method
from addenda.core.site.kinds import CONV1D, LINEAR, kind_of
from addenda.core.site.site import Point, Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, is_quick, refuse
from addenda.exporting.peft.layers import dimensions, taps
from addenda.exporting.routes import Route
from addenda.methods.ia3 import IA3
from addenda.methods.ia3_output import IA3Output

L, OUTPUT = "ia3_l", "@output"
_LONGEST = 1 << 16  # characters of an expression for feedforward_modules


class Ia3Conversion(Conversion):
    """(IA)³ on linear layers, GPT-2's Conv1D, and convolutions over two and three dimensions."""

    type = "IA3"
    suffixes = (L,)
    reads = frozenset(["feedforward_modules", "fan_in_fan_out"])
    ignores = frozenset(["init_ia3_weights"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        problems = []
        for s in saved:
            inside = _is_feedforward(config, s.path)
            problem = [f"{s.path}: {reason}"] if (reason := _why_not(s.site, inside)) else []
            problem = problem or expect(s, {L: _shape(s.site, inside)})
            problems += problem
            if problem:
                continue
            d = s.tensors[L].double().flatten() - 1
            if not inside and _has_bias(s.site):
                forms.sites[f"{s.path}{OUTPUT}"] = IA3Output(), {"d": d}
                continue
            many = taps(s.site) if inside and dimensions(s.site) else 1
            forms.sites[s.path] = IA3(side="in" if inside else "out"), {"d": d.repeat_interleave(many)}
        refuse(problems, "This IA3 adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        if type(method) is IA3Output:
            return Route("exact", "IA3") if _is_output(site) else None
        if type(method) is not IA3:
            return None
        inside = method.side == "in"
        if not inside and _has_bias(site) and _is_flat(site):
            return Route(
                "approximate",
                "LORA of the rank or energy asked for: PEFT's IA3 scales the bias too, as ia3-output does here",
            )
        if _why_not(site, inside) or (inside and dimensions(site) and taps(site) > 1):
            return None
        return Route("exact", "IA3")

    def write(self, live: Sequence[Live]) -> Written:
        paths = {each.path: each.path.removesuffix(OUTPUT) for each in live}
        inside = [paths[each.path] for each in live if _scales_inputs(each)]
        outside = [path for path in paths.values() if path not in set(inside)]
        made = Written({"peft_type": self.type, "feedforward_modules": _named(inside, outside)})
        kinds = [kind_of(each.site.module) for each in live]
        made.config |= {"fan_in_fan_out": all(k == CONV1D for k in kinds), "init_ia3_weights": True}
        made.modules = [*paths.values()]
        for each in live:
            factor = 1 + each.values()["d"]
            shape = (len(factor), 1) if isinstance(each.site, Point) else _shape(each.site, _scales_inputs(each))
            made.tensors[f"{paths[each.path]}.{L}"] = factor.reshape(shape)
        return made


def _scales_inputs(live: Live) -> bool:
    return type(live.method) is IA3 and live.method.side == "in"


def _is_output(site: Site) -> bool:
    """Whether a place is what a linear layer returns, bias included, as PEFT scales it."""
    own = isinstance(site, Point) and site.reads == "output" and site.back is None
    return own and kind_of(site.module) in (LINEAR, CONV1D)


def _is_flat(site: Site) -> bool:
    return site.kind.name in ("linear", "conv1d")


def _has_bias(site: Site) -> bool:
    return getattr(site.module, "bias", None) is not None


def _why_not(site: Site, inside: bool) -> str | None:
    """Return why PEFT's vector has no form here at a site, or None."""
    if not _is_flat(site) and dimensions(site) not in (2, 3):
        return f"a {type(site.module).__name__}, and PEFT has IA3 for Linear, Conv1D, Conv2d and Conv3d only"
    if dimensions(site) and inside and getattr(site.module, "groups", 1) > 1:
        return "groups share a kernel's columns, and PEFT scales each input channel on its own"
    if dimensions(site) and not inside and _has_bias(site):
        return (
            "PEFT scales the bias too, which no change of the weight does. Merge it in PEFT (merge_and_unload) and use "
            "that checkpoint as the model"
        )
    return None


def _shape(site: Site, inside: bool) -> tuple[int, ...]:
    m, n = site.shape
    if dimensions(site):
        return (1, n // taps(site) if inside else m, *(1 for _ in range(dimensions(site))))
    return (1, n) if inside else (m, 1)


def _is_feedforward(config: Config, path: str) -> bool:
    """Return whether a config says that a module's inputs are scaled: a list of ends of paths, or one expression."""
    named = config.get("feedforward_modules") or []
    if isinstance(named, str):
        if not is_quick(named, _LONGEST):
            raise AddendaError(f"feedforward_modules is {named[:80]!r}, which could take for ever to match.")
        try:
            return re.fullmatch(named, path) is not None
        except re.error as error:
            raise AddendaError(f"feedforward_modules is {named[:80]!r}, which is no expression: {error}.") from None
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named):
        raise AddendaError(f"feedforward_modules is a list of names or an expression, got {str(named)[:80]}.")
    return any(path.endswith(n) for n in named)


def _named(inside: list[str], outside: list[str]) -> list[str] | str:
    """Return feedforward_modules: whole paths, or one expression where a path ends another module's too."""
    if any(other.endswith(path) for path in inside for other in outside):
        return "|".join(re.escape(path) for path in sorted(inside))
    return sorted(inside)
