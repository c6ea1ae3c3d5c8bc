"""The cache is where the environment says, and else where the platform keeps caches."""

import os
import sys
from pathlib import Path

import pytest

from addenda.core.disk.cache import cache_folder, trim


def test_the_environment_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("ADDENDA_CACHE", "~/kept")
    assert cache_folder() == Path("~/kept").expanduser()


@pytest.mark.skipif(sys.platform != "linux", reason="the folders of Linux")
def test_on_linux_it_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.delenv("ADDENDA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "addenda"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == tmp_path / ".cache" / "addenda"
    assert not (tmp_path / ".cache").exists()


def test_the_longest_unused_go_until_the_rest_fits(tmp_path):
    for i in range(5):
        file = tmp_path / ("a" if i % 2 else "b") / f"{i}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x" * 100)
        os.utime(file, (100 - i, 100 - i))
    (tmp_path / "a" / "other.txt").write_bytes(b"x" * 1000)
    trim(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["0.safetensors", "1.safetensors", "other.txt"]
    trim(tmp_path, 250)
    trim(tmp_path / "none", 0)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
