"""Heads of GGUF files that anybody may have written."""

import struct

import gguf
import numpy as np
import pytest

from addenda.core.base.errors import AddendaError
from addenda.exporting.gguf.head import read_head


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file(*parts: bytes, tensors: int = 0, fields: int = 0, version: int = 3, data: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)
    return head + bytes(-len(head) % 32) + bytes(data)


def test_it_reads_what_gguf_has_written(tmp_path):
    path, rng = tmp_path / "a.gguf", np.random.default_rng(0)
    w = gguf.GGUFWriter(path, "llama")
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_float32("adapter.lora.alpha", 1.5)
    w.add_array("words", ["one", "two", "three"])
    w.add_array("numbers", [1, 2])
    w.add_uint64("large", 2**63)
    w.add_bool("flag", True)
    arrays = {"a": rng.normal(size=(3, 5)), "b": rng.normal(size=(7,)), "c": rng.normal(size=(2, 3, 4))}
    for name, array in arrays.items():
        w.add_tensor(name, array.astype(np.float16 if name == "b" else np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    head, theirs = read_head(path), gguf.GGUFReader(path)
    assert head.text("general.architecture") == "llama" and head.text("flag") == ""
    assert head.fields | {} == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.lora.alpha": 1.5, "words": (3,),
        "numbers": (2,), "large": 2**63, "flag": True,
    }  # fmt: skip
    assert [(t.name, t.shape, t.dtype) for t in head.tensors] == [
        ("a", (3, 5), "float32"), ("b", (7,), "float16"), ("c", (2, 3, 4), "float32"),
    ]  # fmt: skip
    assert [head.start + t.offset for t in head.tensors] == [t.data_offset for t in theirs.tensors]
    assert [t.numbers for t in head.tensors] == [15, 7, 24]
    assert head.size == path.stat().st_size


HOSTILE = {
    "empty": (b"", "does not begin with GGUF"),
    "other": (b"PK\3\4" + bytes(60), "does not begin with GGUF"),
    "short": (b"GGUF\3\0\0\0", "ends before"),
    "version 1": (file(version=1), "version 1"),
    "turned": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many fields": (file(fields=2**40), "fields are told of"),
    "many tensors": (file(tensors=2**63), "tensors and"),
    "long key": (file(struct.pack("<Q", 2**62), fields=1), "a text of"),
    "long text": (file(field("a", 8, struct.pack("<Q", 2**19)), fields=1), "ends before"),
    "no UTF-8": (file(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1), fields=1), "utf-8"),
    "field twice": (file(field("a", 0, b"\1"), field("a", 0, b"\1"), fields=2), "there twice"),
    "unknown type": (file(field("a", 13, b""), fields=1), "unknown type 13"),
    "array in array": (file(field("a", 9, struct.pack("<IQ", 9, 1) * 900), fields=1), "of the type 9"),
    "long array": (file(field("a", 9, struct.pack("<IQ", 10, 2**61)), fields=1), "ends before"),
    "many texts": (file(field("a", 9, struct.pack("<IQ", 8, 2**60)), fields=1), "of the type 8"),
    "alignment 0": (file(field("general.alignment", 4, struct.pack("<I", 0)), fields=1), "alignment of 0"),
    "alignment 24": (file(field("general.alignment", 4, struct.pack("<I", 24)), fields=1), "alignment of 24"),
    "alignment text": (file(field("general.alignment", 8, text("a")), fields=1), "alignment of 'a'"),
    "no dimension": (file(tensor("a", ()), tensors=1, data=64), "has 0 dimensions"),
    "dimensions": (file(tensor("a", (1,) * 5), tensors=1, data=64), "has 5 dimensions"),
    "size 0": (file(tensor("a", (4, 0)), tensors=1, data=64), "is of shape"),
    "size": (file(tensor("a", (2**63, 2**63)), tensors=1, data=64), "is of shape"),
    "product": (file(tensor("a", (2**39, 2**39)), tensors=1, data=64), "ends behind the end"),
    "beyond": (file(tensor("a"), tensors=1, data=16), "ends behind the end"),
    "offset": (file(tensor("a", offset=32), tensors=1, data=128), "32, and 0 was expected"),
    "same bytes": (file(tensor("a"), tensor("b"), tensors=2, data=128), "0, and 32 was expected"),
    "name twice": (file(tensor("a"), tensor("a", offset=32), tensors=2, data=128), "there twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_head_is_an_error(case, tmp_path):
    content, reason = HOSTILE[case]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(AddendaError, match=reason):
        read_head(tmp_path / "a.gguf")


def test_every_beginning_and_every_changed_byte_is_a_head_or_an_error(tmp_path):
    """No other exception, whatever the bytes; a whole file of each is a head."""
    whole = file(
        field("general.type", 8, text("adapter")), field("n", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yz")),
        tensor("blk.0.attn_q.weight.lora_a"), tensor("b", (3,), 1, 32), tensors=2, fields=2, data=64,
    )  # fmt: skip
    path, errors, heads = tmp_path / "a.gguf", 0, 0
    changed = [bytes([*whole[:i], whole[i] ^ flip, *whole[i + 1 :]]) for i in range(200) for flip in (1, 0x80, 0xFF)]
    for content in [whole, *(whole[:n] for n in range(len(whole))), *changed]:
        path.write_bytes(content)
        try:
            read_head(path)
            heads += 1
        except AddendaError:
            errors += 1
    path.write_bytes(whole)
    assert len(read_head(path).tensors) == 2
    assert errors > len(whole) * 0.8 and heads > 20


def test_missing_and_folders(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(AddendaError, match="no file"):
            read_head(path)
