"""kohya's files as a door: how a method passes it, writing, reading, and what a file holds."""

from typing import Any

from addenda.core.method.contract import Method, Replace
from addenda.core.site.kinds import CONV, LINEAR
from addenda.core.site.site import Site
from addenda.exporting.kohya.describe import describe as describe
from addenda.exporting.kohya.read import read as read
from addenda.exporting.kohya.write import write as write
from addenda.exporting.pairs import is_low_rank
from addenda.exporting.routes import Route


def route(method: Method, site: Site, config: Any = None) -> Route:
    """Return the form in which a method goes into a file at a site: a LoRA of linear layers and of convolutions."""
    if type(method) is Replace:
        return Route("refused", "a head that is trained whole has no place in this format; use 'merged'")
    module: Any = site.module
    if site.kind not in (LINEAR, CONV):
        return Route(
            "refused", f"{site.kind.name} layers have no place in this format; leave them out, or use 'merged'"
        )
    if site.kind == CONV and module.groups > 1:
        return Route("refused", "readers differ about convolutions with groups; leave it out, or use 'merged'")
    form = "LoCon" if site.kind == CONV else "LoRA"
    if is_low_rank(method):
        return Route("exact", f"{form} of its rank")
    return Route("approximate", f"{form} of the rank= or energy= asked for, with its error")
