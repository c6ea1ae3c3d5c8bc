"""Lets transformers know of our folders as soon as it looks for ways to read one, whichever of us is imported first.

transformers keeps its list in `transformers.quantizers.auto`, and its own decorators add to it. That module takes
seconds to import, so it is not imported here: the entry is made when somebody else imports it.
"""

import importlib
import sys

_LIST = "transformers.quantizers.auto"


def announce() -> None:
    """Register our folders with transformers now, if it is imported, else when it is. Once is enough."""
    if _LIST in sys.modules:
        _register()
    elif not any(isinstance(f, _Waiting) for f in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())  # type: ignore[arg-type]


def _register() -> None:
    importlib.import_module("addenda.compressing.folder")


class _Waiting:
    """A finder that finds nothing itself: it sees one import pass, adds our entry behind it, and is gone."""

    def find_spec(self, name, path=None, target=None):
        """Return None for every module but transformers' list, whose loader is made to register our folders."""
        if name != _LIST:
            return None
        import importlib.util  # takes longer than all of addenda, and only whoever reads that list needs it

        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # on this one loader object
        return spec
