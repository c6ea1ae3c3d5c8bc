"""Every test can fail: it asserts something, itself or through a function that does."""

import ast
from pathlib import Path

FAILING = {"raises", "warns", "fail", "assert_close", "assert_allclose", "assert_array_equal"}


def can_fail(function: ast.FunctionDef) -> bool:
    """Whether there is an assertion, a raise, one of pytest's or torch's checks, or a process that is checked."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert | ast.Raise) or (isinstance(node, ast.Attribute) and node.attr in FAILING):
            return True
        if isinstance(node, ast.keyword) and node.arg == "check":
            return isinstance(node.value, ast.Constant) and node.value.value is True
    return False


def called(function: ast.FunctionDef) -> set[str]:
    """The names of the functions and methods that are called in it."""
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {f.id for f in calls if isinstance(f, ast.Name)} | {f.attr for f in calls if isinstance(f, ast.Attribute)}


def without_assertion(files: list[Path]) -> list[str]:
    defined = [
        (path, node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    able = {node.name for _, node in defined if can_fail(node)}
    while more := {n.name for _, n in defined if n.name not in able and called(n) & able}:
        able |= more
    return [f"{p.name}::{n.name}" for p, n in defined if n.name.startswith("test_") and n.name not in able]


def test_no_test_is_without_an_assertion():
    files = list(Path(__file__).parent.rglob("*.py"))
    assert len(files) > 150
    assert without_assertion(files) == []


def test_one_without_is_seen(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "def helper():\n    assert 1\ndef test_good():\n    helper()\ndef test_bad():\n    print(1)\n"
    )
    assert without_assertion([tmp_path / "test_x.py"]) == ["test_x.py::test_bad"]
