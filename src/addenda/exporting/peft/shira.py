"""PEFT's SHIRA: K = r (m + n) entries of W change, at positions that the folder holds as (row, column).

Read as SHiRA with given positions, index = row · n + column, in rising order. Written from every sparse method, and
from patches: where a site has fewer entries than r (m + n), further positions are named whose values are zero.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.largest import narrow
from addenda.core.method.contract import Method, WeightMethod, to_float
from addenda.core.site.kinds import LINEAR
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, number, refuse
from addenda.exporting.routes import Route
from addenda.methods.patch import Patch
from addenda.methods.shira import SHiRA

_VALUES, _INDEX = "shira_weight", "shira_indices"


class ShiraConversion(Conversion):
    """SHiRA at linear layers."""

    type = "SHIRA"
    suffixes = (_VALUES, _INDEX)
    reads = frozenset(["r"])
    ignores = frozenset(["mask_type", "random_seed", "fan_in_fan_out"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        problems: list[str] = []
        rank = number(config, "r", int, 32)
        for s in saved:
            m, n = s.site.shape
            count = rank * (m + n)
            wrong = expect(s, {_VALUES: (count,), _INDEX: (2, count)})
            if not wrong:
                where, limits = s.tensors[_INDEX].long(), torch.tensor([[m], [n]])
                flat = (where * torch.tensor([[n], [1]])).sum(0)
                if bool(((where < 0) | (where >= limits)).any()):
                    wrong.append(f"{s.path}: {_INDEX} names positions outside of {m} × {n}")
                elif len(flat.unique()) < count:
                    wrong.append(f"{s.path}: {_INDEX} names a position twice")
            problems += wrong
            if not wrong:
                index, order = ((s.tensors[_INDEX].long()) * torch.tensor([[n], [1]])).sum(0).sort()
                values = s.tensors[_VALUES].float()[order]
                method = SHiRA(mask="given", count=count)
                forms.sites[s.path] = method, {"values": values, "index": narrow(index, m * n)}
        refuse(problems, "This SHIRA adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        if not isinstance(method, WeightMethod) or site.kind != LINEAR:
            return None
        if not (method.has("sparse") or isinstance(method, Patch)):
            return None
        m, n = site.shape
        count = method.trainable(m, n)
        return Route("exact", "SHIRA") if -(-count // (m + n)) * (m + n) <= m * n else None

    def write(self, live: Sequence[Live]) -> Written:
        entries = {e.path: _entries(e) for e in live}
        rank = max(-(-len(entries[e.path][0]) // sum(e.site.shape)) for e in live)
        config = {"peft_type": self.type, "r": rank, "mask_type": "random", "random_seed": 0, "fan_in_fan_out": False}
        made = Written(config)
        for each in live:
            m, n = each.site.shape
            index, values = entries[each.path]
            count = rank * (m + n)
            if count > m * n:
                raise AddendaError(
                    f"PEFT has one r for all sites of SHIRA, and r={rank}, which the densest site wants, is more "
                    f"entries than {each.path} has ({m} × {n}). Export to 'merged', or give rank= for a LoRA."
                )
            free = torch.ones(m * n, dtype=torch.bool).index_fill(0, index.long(), False).nonzero().flatten()
            index = torch.cat([index.long(), free[: count - len(index)]])
            values = torch.cat([values.float(), values.new_zeros(count - len(values)).float()])
            made.tensors[f"{each.path}.{_INDEX}"] = torch.stack([index // n, index % n]).int()
            made.tensors[f"{each.path}.{_VALUES}"] = values
        return made


def _entries(live: Live) -> tuple[Tensor, Tensor]:
    """Return the flat positions at which a site's weight changes, and by how much."""
    p = to_float(live.values())
    if isinstance(live.method, Patch):
        return p["index"], p["values"] - live.site.matrix.cpu().float().flatten()[p["index"]]
    return live.method.sparse(p, live.site.shape)
