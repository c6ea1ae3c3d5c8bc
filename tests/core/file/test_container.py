"""Strict files of safetensors: what that library writes is read alike, and whatever was not written is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from addenda.core.base.errors import AddendaError
from addenda.core.file.container import opened, write
from addenda.core.file.header import Header, MethodEntry, SiteEntry, read
from addenda.core.file.header import write as write_adapter

BEFORE = b'{"__metadata__":{"mark":"'
TENSORS = {
    "a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "b": torch.arange(7).bfloat16(),
    "c": torch.tensor(2.5, dtype=torch.float64),
    "d": torch.tensor([True, False]),
    "e": torch.arange(11, dtype=torch.uint8),
    "f": torch.ones(2, 3).to(torch.float8_e4m3fn),
}


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    write(tmp_path / "ours", {"x": "é"}, TENSORS)
    save_file(TENSORS, tmp_path / "theirs", {"x": "é"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with opened(tmp_path / "theirs") as file:
        assert file.metadata == {"x": "é"}
        found = file.tensors()
    theirs = load_file(tmp_path / "ours")
    for key, tensor in TENSORS.items():
        for made in (found[key], theirs[key]):
            assert made.dtype == tensor.dtype and made.shape == tensor.shape
            assert torch.equal(made.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def raw(header: str | bytes, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


A = '"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
WRONG = {
    "a key twice": (raw(f"{{{A},{A}}}", b"xx"), "stands twice"),
    "a field twice": (raw('{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}', b"xx"), "stands twice"),
    "an unknown field": (raw('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"x":1}}', b"xx"), "nothing else"),
    "bytes of nobody at the end": (raw(f"{{{A}}}", b"xxx"), "3 are there"),
    "bytes of nobody first": (raw('{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', b"xxx"), "begins at byte 1"),
    "bytes of two": (raw(f'{{{A},"b":{A[4:]}}}', b"xx"), "begins at byte 0"),
    "fewer bytes": (raw(f"{{{A}}}", b"x"), "1 are there"),
    "another size": (raw('{"a":{"dtype":"U16","shape":[2],"data_offsets":[0,2]}}', b"xx"), "other bytes"),
    "an unknown dtype": (raw('{"a":{"dtype":"O8","shape":[2],"data_offsets":[0,2]}}', b"xx"), "unknown dtype"),
    "true for one": (raw('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', b"x"), "whole numbers"),
    "a shape of none": (raw(f'{{"a":{{"dtype":"U8","shape":[0,{2**40},{2**40}],"data_offsets":[0,0]}}}}'), "no tensor"),
    "neither true nor false": (raw('{"a":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}}', b"\2"), "neither true"),
    "NaN": (raw('{"__metadata__":NaN}'), "NaN"),
    "a list": (raw("[]"), "no JSON object"),
    "numbers as texts": (raw('{"__metadata__":{"x":1}}'), "texts by name"),
    "no text": (raw(b"\xff{}"), "decode"),
    "two values": (raw("{}{}"), "Extra data"),
    "no header": (b"\2\0", "2 bytes, and"),
    "too much": ((2**40).to_bytes(8, "little") + b"{}", "claims a header"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_strict_is_refused(what, tmp_path):
    data, reason = WRONG[what]
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=reason), opened(tmp_path / "x") as file:
        file.tensors()


def test_a_header_may_be_read_alone(tmp_path):
    write(tmp_path / "x", {"mark": "0" * 64}, TENSORS, BEFORE)
    with opened(tmp_path / "x") as file:
        assert file.forms["a"] == (torch.float32, (3, 5))
    with opened(tmp_path / "x") as file:
        tensors, digest = file.proven(BEFORE)
    assert len(digest) == 64 and torch.equal(tensors["a"], TENSORS["a"])


def test_no_single_bit_of_an_adapter_file_can_turn(tmp_path):
    site = SiteEntry("a", "linear", (2, 2), "float32", 0, ("A", "B"), (), None, "é", (1.0, 2.5), {}, {})
    header = Header(2, 0, 0, (MethodEntry("lora", {"rank": 1}),), False, (site,), (), {}, ())
    file = write_adapter(tmp_path / "x", header, {"a/A": torch.ones(1, 2), "a/B": torch.ones(2, 1)})
    data = file.read_bytes()
    assert read(file)[0] == header
    with open(file, "r+b", buffering=0) as turned:  # in place: a new file costs more than all the rest
        for place in range(len(data) * 8):
            os.pwrite(turned.fileno(), bytes([data[place // 8] ^ 1 << place % 8]), place // 8)
            with pytest.raises(AddendaError):
                read(file)
            os.pwrite(turned.fileno(), data[place // 8 : place // 8 + 1], place // 8)
    assert read(file)[0] == header


def test_a_digest_of_schema_1_and_keys_that_nobody_knows(tmp_path):
    file = tmp_path / "x"
    site = SiteEntry("a", "linear", (2, 2), "float32", 0, ("A",), (), None, "é", (1.0,), {}, {})
    header = Header(2, 0, 0, (MethodEntry("lora", {}),), False, (site,), (), {}, (), note={"any": ["thing"]})
    tensors = {"a/A": torch.ones(1, 2)}
    found, _ = read(write_adapter(file, header, tensors))
    assert found.note == {"any": ["thing"]} and len(found.sha256) == 64

    def refused(change, reason, before=None):
        raw = header.to_json()
        change(raw)
        write(file, {"addenda": json.dumps(raw)}, tensors, before)
        with pytest.raises(AddendaError, match=reason):
            read(file)

    from addenda.core.file.header import BEFORE_DIGEST

    refused(lambda raw: raw.update(schema=1), "unknown keys: note, sha256")
    refused(lambda raw: raw.update(sha256="0" * 64), "has changed since")
    refused(lambda raw: raw.update(sha256="x", schema=2), "has changed since")
    refused(lambda raw: raw.update(more=1), "unknown keys: more", BEFORE_DIGEST)
    refused(lambda raw: raw["sites"][0].update(more=1), "site 'a' has unknown keys: more", BEFORE_DIGEST)
    refused(lambda raw: raw["methods"][0].update(more=1), "a method has unknown keys: more", BEFORE_DIGEST)
    refused(lambda raw: raw.update(schema=3), "schema 3, this version of addenda reads up to 2")
    refused(lambda raw: raw.pop("sha256"), "begins with its schema and its sha256")


def test_a_default_device_takes_nothing_of_what_is_read(tmp_path):
    """Tensors that were made there stayed unread, under a digest that was right."""
    with torch.device("meta"):
        write(tmp_path / "x", {"mark": "0" * 64}, TENSORS, BEFORE)
        with opened(tmp_path / "x") as file:
            tensors, digest = file.proven(BEFORE)
    assert digest is not None and all(t.device.type == "cpu" for t in tensors.values())
    assert torch.equal(tensors["a"], TENSORS["a"])
