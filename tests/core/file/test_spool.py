"""What is written a tensor at a time is what is written at once, byte for byte; and nothing else is left."""

import pytest
import torch

from addenda.core.file.header import SCHEMA, Header, MethodEntry, SiteEntry, read, write
from addenda.core.file.spool import Spool

TENSORS = {
    "b/B": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    "b/A": torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double(),
    'ä "/values': torch.arange(7).bfloat16(),
    'ä "/index': torch.arange(7, dtype=torch.int32),
    "c/codes": torch.arange(11, dtype=torch.uint8),
    "c/far": torch.arange(3),
    "c/half": torch.ones(1, 1, dtype=torch.float16),
}


def header() -> Header:
    def site(path, *keys):
        return SiteEntry(path, "linear", (3, 5), "float32", 0, keys, (), None, "é", (1.0, 2.5), {}, {})

    sites = (site("b", "A", "B"), site('ä "', "values", "index"), site("c", "codes", "far", "half"))
    return Header(SCHEMA, 0, 0, (MethodEntry("lora", {"rank": 2}),), False, sites, (), {}, ("gut", "böse"))


def test_the_file_is_the_one_that_is_written_at_once(tmp_path):
    with Spool(tmp_path / "spool") as spool:
        for key, t in TENSORS.items():
            if t.dim() > 1:
                spool.put(key, t)
        for at in range(0, 12, 4):  # pieces of several tensors by turns
            for key, t in TENSORS.items():
                if t.dim() == 1:
                    spool.append(key, t[at : at + 4])
        spool.write(tmp_path / "x.safetensors", header())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    write(tmp_path / "y.safetensors", header(), TENSORS)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_tensors_lie_as_they_are_seen(tmp_path):
    t = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    own = SiteEntry("a", "linear", (6, 4), "float32", 0, ("A",), (), None, "h", (1.0,), {}, {})
    one = Header(SCHEMA, 0, 0, (MethodEntry("lora", {}),), False, (own,), (), {}, ())
    with Spool(tmp_path / "spool") as spool:
        spool.put("a/A", torch.nn.Parameter(t).t())
        spool.append("left out", t[0])
        spool.drop("left out")
        spool.drop("never there")
        spool.write(tmp_path / "x.safetensors", one)
    found, tensors = read(tmp_path / "x.safetensors")
    assert found == one and list(tensors) == ["a/A"] and torch.equal(tensors["a/A"], t.t())


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupted():
        with Spool(tmp_path / "spool") as spool:
            spool.put("a", torch.ones(3))
            assert (tmp_path / "spool").stat().st_size == 12
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
