"""What `import addenda` offers, and what it costs."""

import subprocess
import sys
import textwrap
from importlib import metadata
from importlib.resources import files

import pytest

import addenda


def test_every_public_name_is_there():
    for name in dir(addenda):
        assert getattr(addenda, name) is not None
    assert addenda.SVFT(pattern="banded", band=2).band == 2
    with pytest.raises(AttributeError, match="SFVT"):
        addenda.SFVT  # noqa: B018


NAMES_AFTER_ALL = """
    import importlib, pkgutil, warnings
    import addenda
    warnings.simplefilter("ignore")
    optional = {"addenda.quantizing.bridges.bitsandbytes", "addenda.quantizing.bridges.hqq"}
    names = [m.name for m in pkgutil.walk_packages(addenda.__path__, "addenda.") if not m.name.endswith("__main__")]
    assert len(names) > 200
    for name in sorted(set(names) - optional):
        importlib.import_module(name)
    for name in dir(addenda):
        value = getattr(addenda, name)
        where = addenda._WHERE.get(name)
        if where is not None:
            assert value is getattr(importlib.import_module(f"addenda.{where}"), name), name
            assert callable(value), name
"""


def test_public_names_are_what_they_were_after_every_file_was_imported():
    """A package that is called as a function is would take the function's place."""
    subprocess.run([sys.executable, "-c", textwrap.dedent(NAMES_AFTER_ALL)], check=True)


def test_what_the_commands_do_has_a_name_in_python():
    assert {"adopt", "attach", "compare", "compress", "evaluate", "generate", "plan", "quantize", "tune"} <= {
        name for name in dir(addenda) if callable(getattr(addenda, name))
    }
    assert "lora+" in addenda.optim.known()


def test_the_catalogue_is_asked_by_name(tiny):
    entry = addenda.catalogue()["svft"]
    assert entry.cls is addenda.SVFT and "svft" in addenda.catalogue() and "sfvt" not in addenda.catalogue()
    assert addenda.catalogue()[0] in addenda.catalogue() and len(addenda.catalogue()[:3]) == 3
    with pytest.raises(addenda.AddendaError, match="Did you mean 'svft'"):
        addenda.catalogue()["sfvt"]
    with pytest.raises(addenda.AddendaError, match="There is no method 'lora'"):
        addenda.catalogue("shira")["lora"]
    adapter = addenda.attach(tiny, entry)
    assert set(adapter.methods.values()) == {entry.build()}


def test_help_does_not_wait_for_torch():
    code = "import sys, addenda.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_method_imports_another_and_the_core_names_none():
    import ast
    from pathlib import Path

    root = Path(addenda.__file__).parent
    names = {i.cls.__module__.rpartition(".")[2] for i in addenda.catalogue()}
    for file in (root / "methods").rglob("*.py"):
        imported = {n.module for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)}
        assert not {f"addenda.methods.{name}" for name in names} & imported, file
    core = list((root / "core").rglob("*.py"))
    assert len(core) > 60
    for file in core:
        tree = ast.parse(file.read_text())
        used = {n.id.lower() for n in ast.walk(tree) if isinstance(n, ast.Name)}
        used |= {n.value.lower() for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not (names - {"full", "tokens", "sparse"}) & used, file  # words of English too, and the name of a hook


def test_one_version():
    assert metadata.version("addenda") == addenda.__version__


def test_types_are_for_users_too():
    assert files("addenda").joinpath("py.typed").is_file()
