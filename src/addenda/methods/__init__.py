"""One method, one file. Importing this package enters all of them in the catalogue."""

import importlib
import pkgutil

from addenda.core.method.catalogue import catalogue
from addenda.core.method.contract import Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

# Every class of the catalogue is an attribute here: addenda.methods.SVFT
globals().update({i.cls.__name__: i.cls for i in catalogue()})


def __getattr__(name: str) -> type[Method]:
    raise AttributeError(f"addenda.methods has no {name!r}; addenda.catalogue() lists what there is")
