"""The header of an adapter file: what is read is what was written, to the byte, and nobody changes it on the way."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import DiskError
from addenda.core.file.header import Header, MethodEntry, SiteEntry, read, write
from shared import attach, read_raw, stir, write_raw

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("*/[0-9]*.safetensors"))


def text_of(file: Path) -> str:
    with safe_open(file, framework="pt") as f:
        return f.metadata()["addenda"]


@pytest.fixture
def file(tiny, tmp_path):
    """Of a LoRA in few bits, with a head."""
    adapter = stir(attach(tiny, ad.LoRA(rank=2, bits=3), targets="q_proj", also_train=["score"]))
    return adapter.save(tmp_path / "a.safetensors")


@pytest.mark.filterwarnings("ignore:.*is of schema 1:UserWarning")
def test_golden_files_come_back_to_the_byte():
    assert len(GOLDEN) > 100
    for file in GOLDEN:
        stored = json.loads(text_of(file))
        if "sha256" in stored:
            stored["sha256"] = "0" * 64
        assert json.dumps(read(file)[0].to_json()) == json.dumps(stored), file.name


@pytest.mark.parametrize("basis", [False, True])
def test_a_round_trip(basis, tiny, tmp_path):
    adapter = stir(attach(tiny, ad.SVFT(), targets="q_proj", also_train=["score"]))
    first = adapter.save(tmp_path / "first.safetensors", basis=basis)
    header, tensors = read(first)
    assert header.basis is basis
    assert header.sites[0].checks
    header = dataclasses.replace(header, labels=("a", "b"))
    second = write(tmp_path / "second.safetensors", header, tensors)
    again, same = read(second)
    assert again == header
    assert same.keys() == tensors.keys()
    assert all(torch.equal(same[k], t) for k, t in tensors.items())
    digest = json.loads(text_of(second))["sha256"]
    assert text_of(second) == json.dumps(json.loads(text_of(first)) | {"labels": ["a", "b"], "sha256": digest})


def test_entries_say_what_they_are(file):
    header, tensors = read(file)
    head = header.heads[0]
    assert [s.path for s in header.heads] == ["score.weight", "score.bias"]
    assert head.is_head
    assert head.hash is None
    assert head.sample is None
    assert header.bits(head) is None
    assert not head.packed
    site = header.sites[0]
    assert not site.is_head
    assert header.has_codes
    assert header.methods[site.method] == MethodEntry("lora", ad.LoRA(rank=2, bits=3).options(defaults=True))
    assert header.bits(site) == 3
    assert site.count("A", tensors) == 2 * site.shape[1] > tensors[f"{site.path}/A"].numel()
    assert head.count("value", tensors) == tensors["score.weight/value"].numel()
    assert len(site.sample) == 16


def test_nothing_of_it_is_changed(file):
    header, _ = read(file)
    for entry in (header, header.sites[0], header.methods[0]):
        for field in dataclasses.fields(entry):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(entry, field.name, None)
        assert not hasattr(entry, "__dict__")
    raw = header.to_json()
    raw["sites"][0]["shape"].append(3)
    raw["sites"][0]["packed"].clear()
    raw["methods"][0]["options"].clear()
    raw["sites"].pop()
    assert header == read(file)[0]


@pytest.mark.parametrize(
    "change",
    [{"hash": 3, "sample": [0.0]}, {"hash": "x"}, {"hash": "x", "sample": None}, {"hash": "x", "sample": ["0"]}],
    ids=str,
)
def test_a_head_with_half_a_base_is_damaged(change, file, tmp_path):
    header, tensors = read_raw(file)
    next(s for s in header["sites"] if s["method"] == -1).update(change)
    bad = write_raw(tmp_path / "bad.safetensors", header, tensors)
    with pytest.raises(AddendaError, match="hash and sample must be there"):
        read(bad)


def test_older_files_lack_what_is_new(file, tmp_path):
    header, tensors = read_raw(file)
    del header["head"], header["pools"]
    older, _ = read(write_raw(tmp_path / "old.safetensors", header, tensors))
    assert older.head == {}
    assert older.pools == ()
    assert older.labels == ()
    assert all(isinstance(s, SiteEntry) for s in older.sites)
    assert older == dataclasses.replace(read(file)[0], head={})
    assert isinstance(older, Header)


def test_adapters_of_other_programs_are_sent_to_import(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(60))
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    for name in ("a.gguf", "a.safetensors"):
        with pytest.raises(AddendaError, match="addenda import"):
            read(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file whose reading the system refuses")
def test_a_disk_that_fails_is_not_a_damaged_file(tmp_path):
    (tmp_path / "a.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(DiskError, match=r"a\.safetensors cannot be read \(Input/output error"):
        read(tmp_path / "a.safetensors")
