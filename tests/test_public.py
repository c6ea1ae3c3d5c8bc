"""What `import addenda` offers, and what it costs."""

import subprocess
import sys

import pytest

import addenda


def test_every_public_name_is_there():
    for name in dir(addenda):
        assert getattr(addenda, name) is not None
    assert addenda.SVFT(pattern="banded", band=2).band == 2
    with pytest.raises(AttributeError, match="SFVT"):
        addenda.SFVT  # noqa: B018


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
        assert not (names - {"full"}) & used, file
