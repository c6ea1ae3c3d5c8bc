"""The cache is where the environment says, and else where the platform keeps caches."""

import sys
from pathlib import Path

import pytest

from addenda.core.disk.cache import cache_folder


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
