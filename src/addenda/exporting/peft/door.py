"""PEFT as a door: how a method passes it, writing and reading."""

from typing import Any

from addenda.core.method.contract import Method
from addenda.core.site.site import Site
from addenda.exporting.peft.read import read as read
from addenda.exporting.peft.table import conversion_for
from addenda.exporting.peft.write import write as write
from addenda.exporting.routes import Route


def route(method: Method, site: Site, config: Any = None) -> Route:
    """Return the form in which PEFT has a method at a site."""
    return conversion_for(method, site, config)[1]
