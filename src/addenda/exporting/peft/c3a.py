"""PEFT's C3A: every b × b block of the change is circulant; kernels (m/b × n/b × b) as they are, on linear layers."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from addenda.core.method.contract import Method
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import (
    Config,
    Conversion,
    Live,
    Saved,
    Written,
    expect,
    number,
    pattern_value,
    refuse,
)
from addenda.exporting.peft.layers import is_linear
from addenda.exporting.peft.patterns import patterned
from addenda.exporting.routes import Route
from addenda.methods.c3a import C3A

KERNEL = "c3a_kernel"


class C3aConversion(Conversion):
    """C3A, whose block may differ from site to site (`block_size_pattern`)."""

    type = "C3A"
    suffixes = (KERNEL,)
    reads = frozenset(["block_size", "block_size_pattern"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        most, problems = number(config, "block_size", int, 256), []
        for s in saved:
            block = pattern_value(config.get("block_size_pattern"), s.path, most, "block_size_pattern")
            method, (m, n) = C3A(block=number({"block_size": block}, "block_size", int)), s.site.shape
            if not is_linear(s.site):
                problem = [f"{s.path}: a {type(s.site.module).__name__}, and PEFT has C3A for Linear only"]
            elif reason := method.check(m, n):
                problem = [f"{s.path}: {reason}"]
            else:
                problem = expect(s, {KERNEL: (m // block, n // block, block)})
            problems += problem
            if not problem:
                forms.sites[s.path] = method, {"kernel": s.tensors[KERNEL]}
        refuse(problems, "This C3A adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        return Route("exact", "C3A") if type(method) is C3A and is_linear(site) else None

    def write(self, live: Sequence[Live]) -> Written:
        blocks = patterned({each.path: each.method.block for each in live}, "block_size", "block_size_pattern")
        made = Written({"peft_type": self.type, "init_weights": True, "bias": "none", **blocks})
        made.tensors = {f"{each.path}.{KERNEL}": each.values()["kernel"] for each in live}
        return made
