"""Files made to harm: always AddendaError, quickly, without a large allocation, and the model untouched."""

import dataclasses
import functools
import itertools
import json
import pickle
import resource
import struct
import time

import pytest
import torch
from safetensors.torch import save_file
from tests.core.adapter.test_build import choices, layer, put_on

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.file.inspect import inspect
from addenda.core.forward.slots import slots_of
from addenda.models.load import wanted_by
from shared import EVERY, METHODS, NAMES, attach, bits, read_raw, same_bits, stir, write_raw


@pytest.fixture
def good(tiny, ids, tmp_path):
    """A file of a LoRA with a head, and its parts."""
    adapter = stir(attach(tiny, ad.LoRA(rank=2), targets="q_proj", also_train=["score"]))
    file = adapter.save(tmp_path / "good.safetensors")
    ad.detach(tiny)
    return file


def refused(model, file, pattern=None):
    before, classes = bits(model), [type(m) for m in model.modules()]
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(AddendaError, match=pattern) as error:
        ad.load(model, file)
    assert time.perf_counter() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 << 10, "more than 100 MiB"
    assert len(str(error.value)) < 5000
    assert same_bits(bits(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert not any(slots_of(m) for m in model.modules())
    assert "_addenda" not in model.__dict__
    assert all(p.requires_grad for p in model.parameters())


BYTES = {
    "empty": b"",
    "short": b"\x08\0\0",
    "giant header": struct.pack("<Q", 2**63) + b"{}",
    "header of 90 MB in 20 bytes": struct.pack("<Q", 90 << 20) + b"{}" * 6,
    "no JSON": struct.pack("<Q", 8) + b"notjson!",
    "a pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x02os\x94.",
    "tensor outside the file": struct.pack("<Q", 70)
    + b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'[:70],
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes(kind, tiny, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(BYTES[kind])
    refused(tiny, file, "damaged|claims a header")
    with pytest.raises(AddendaError):
        inspect(file)


def test_truncated_anywhere(good, tiny, tmp_path):
    data = good.read_bytes()
    for cut in {1, 8, 9, 100, len(data) // 2, len(data) - 1}:
        file = tmp_path / "cut.safetensors"
        file.write_bytes(data[:cut])
        refused(tiny, file)


def test_missing_and_foreign_files(good, tiny, tmp_path):
    refused(tiny, tmp_path / "goood.safetensors", r"no file .*Did you mean 'good\.safetensors'")
    refused(tiny, tmp_path, "is a folder, and an adapter is a file")
    save_file({"a": torch.ones(1)}, str(tmp_path / "other.safetensors"))
    refused(tiny, tmp_path / "other.safetensors", "not an adapter of addenda")
    (tmp_path / "none").mkdir()
    refused(tiny, tmp_path / "none", r"No \.safetensors file is in it")
    torch.save({"a": torch.ones(1)}, tmp_path / "packed.safetensors")
    for name, content, told in (
        ("empty", b"", "it is empty. Fetch or save it again"),
        ("five", b"abcde", "5 bytes, and the length of a header alone takes 8"),
        ("pickled", pickle.dumps({"a": 1}), "a pickle does .torch.save., which can run code and is never opened"),
        ("packed", None, "a pickle does .torch.save."),
        ("text", b"hello, this is no adapter", "no adapter file: it claims a header"),
    ):
        if content is not None:
            (tmp_path / f"{name}.safetensors").write_bytes(content)
        refused(tiny, tmp_path / f"{name}.safetensors", told)


NONSENSE = [
    "", "null", "3", "[]", "{}", '"x"', "[" * 100_000, '{"a":' * 50_000, "NaN", "1" * 10_000,
    '{"schema": 1, "seed": 0, "step": 0, "methods": [], "basis": false, "sites": []}',
    '{"schema": 1, "seed": 0, "step": 0, "methods": {}, "basis": false, "sites": {}}',
    '{"schema": 99, "seed": 0, "step": 0, "methods": [], "basis": false, "sites": []}',
    '{"schema": true, "seed": "x", "step": -1, "methods": 3, "basis": [], "sites": 4}',
]  # fmt: skip


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_for_a_header(text, tiny, tmp_path):
    refused(tiny, write_raw(tmp_path / "x.safetensors", text, {"a": torch.ones(1)}), "damaged")


VALUES = [None, True, -7, 10**30, 1.5, float("nan"), "x", "", [], [[]], {}, {"a": [1]}, ["x"], [None], "__class__"]


def test_every_field_with_every_wrong_type(good, tiny, tmp_path):
    header, tensors = read_raw(good)
    base = bits(tiny)
    file = tmp_path / "x.safetensors"

    def walk(node, trail):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield (*trail, key)
            if isinstance(node[key], (dict, list)) and key not in ("sample", "shape"):
                yield from walk(node[key], (*trail, key))

    for trail in walk(header, ()):
        if trail[0] == "sites" and len(trail) > 1 and trail[1] > 1:
            continue
        for value in VALUES:
            broken = json.loads(json.dumps(header))
            node = broken
            for key in trail[:-1]:
                node = node[key]
            if node[trail[-1]] == value and type(node[trail[-1]]) is type(value):
                continue
            node[trail[-1]] = value
            write_raw(file, broken, tensors)
            for base_mode in ("exact", "compatible"):
                try:
                    ad.load(tiny, file, base=base_mode)
                except AddendaError:
                    assert not any(slots_of(m) for m in tiny.modules())
                else:  # harmless: a field that does not matter here
                    ad.detach(tiny)
    assert same_bits(bits(tiny), base)


def test_every_tensor_of_another_kind(good, tiny, tmp_path):
    header, tensors = read_raw(good)
    key = next(k for k in tensors if k.endswith("/A"))
    A = tensors[key]
    others = {
        "NaN": torch.full_like(A, torch.nan), "inf": torch.full_like(A, torch.inf), "empty": A[:0], "scalar": A[0, 0],
        "transposed": A.t().contiguous(), "int": A.int(), "bool": A.bool(), "wide": A.repeat(1, 2),
        "float8": A.to(torch.float8_e4m3fn),
    }  # fmt: skip
    for value in others.values():
        refused(tiny, write_raw(tmp_path / "x.safetensors", header, tensors | {key: value}))
    refused(
        tiny, write_raw(tmp_path / "x.safetensors", header, {k: v for k, v in tensors.items() if k != key}), "missing"
    )
    refused(tiny, write_raw(tmp_path / "x.safetensors", header, tensors | {"more": A.clone()}), "unexpected")


@pytest.mark.parametrize("name", EVERY)
def test_giant_options_with_tiny_tensors(name, tiny, ids, tmp_path):
    adapter = attach(tiny, name, ids, targets="up_proj" if name in NAMES else None)
    file = adapter.save(tmp_path / "a.safetensors")
    ad.detach(tiny)
    header, tensors = read_raw(file)
    hints = {f.name: type(getattr(METHODS[name], f.name)) for f in dataclasses.fields(METHODS[name])}
    for option, kind in hints.items():
        if kind not in (int, float) and option not in ("rank", "alpha", "mini"):
            continue
        for value in (10**9, -(10**9), 0):
            broken = json.loads(json.dumps(header))
            broken["methods"][0]["options"][option] = value
            write_raw(tmp_path / "x.safetensors", broken, tensors)
            memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            try:
                ad.load(tiny, tmp_path / "x.safetensors")
            except AddendaError:
                assert not any(slots_of(m) for m in tiny.modules())
            else:
                ad.detach(tiny)
            assert time.perf_counter() - started < 10, (option, value)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 << 10, (option, value)


@pytest.mark.parametrize("name", EVERY)
def test_giant_numbers_in_every_choice_of_a_method(name, tmp_path):
    """At default options and with each value of the others: at most a second and 100 MiB for loading and a forward."""
    for method in choices(name):
        torch.manual_seed(0)
        if name in NAMES:
            model, x, path = layer("embedding" if name == "trainable-tokens" else "64 × 64")
            run = functools.partial(model["layer"], x)
        else:
            model, ids, path = toys.make_llama(hidden_size=64), torch.arange(40).reshape(2, 20) % toys.VOCAB, None
            run = functools.partial(model, ids)
        try:
            file = put_on(model, method, x if name in NAMES else ids, path).save(tmp_path / "a.safetensors")
        except AddendaError:  # bits, where only vectors are trained
            continue
        ad.detach(model)
        header, tensors = read_raw(file)
        numbers = [k for k, v in method.options(defaults=True).items() if type(v) in (int, float) or k == "alpha"]
        for option, value in itertools.product(numbers, (10**9, 10**5, 1e300, 10**400)):
            broken = json.loads(json.dumps(header))
            broken["methods"][0]["options"][option] = value
            write_raw(tmp_path / "x.safetensors", broken, tensors)
            memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            try:
                ad.load(model, tmp_path / "x.safetensors")
            except AddendaError:
                assert not any(slots_of(m) for m in model.modules())
            else:
                run()
                ad.detach(model)
            assert time.process_time() - started < 1, (method, option, value)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 << 10, (method, option, value)


CLAIMS = [[10**8, 32], [10**8, 4], [4, 8, 10**6], [2**39, 2**39], [4], [], [4.0, 8], [-4, -8], [True, 32]]


@pytest.mark.parametrize("shape", CLAIMS, ids=str)
def test_a_head_that_claims_more_than_the_file_holds(shape, good, tiny, tmp_path):
    """Nobody who reads a file may be told of a size that its bytes do not bear out."""
    header, tensors = read_raw(good)
    next(s for s in header["sites"] if s["path"] == "score.weight")["shape"] = shape
    file = write_raw(tmp_path / "x.safetensors", header, tensors)
    refused(tiny, file, "damaged")
    with pytest.raises(AddendaError, match="damaged"):
        wanted_by(file)
    with pytest.raises(AddendaError, match="damaged"):
        inspect(file)


PATHS = [
    "__class__", "..", "../x", "/etc/passwd", "layers.0.__class__", "layers..0", "layers.0.self_attn", "", ".",
    "x" * 9999, "layers.0.self_attn.q_proj.bias", "layers.0.norm.weight", "forward",
    "layers.0.self_attn.q_proj.weight",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_paths(path, good, tiny, tmp_path):
    header, tensors = read_raw(good)
    old = header["sites"][0]["path"]
    header["sites"][0]["path"] = path
    renamed = {(f"{path}/{k.rpartition('/')[2]}" if k.startswith(f"{old}/") else k): v for k, v in tensors.items()}
    refused(tiny, write_raw(tmp_path / "x.safetensors", header, renamed), "does not fit|no module of a")


def test_a_vector_dressed_as_a_matrix(good, tiny, tmp_path):
    header, tensors = read_raw(good)
    site = header["sites"][0]
    old, site["path"], site["kind"], site["shape"] = site["path"], "layers.0.norm.weight", "parameter", [8]
    header["methods"][0]["options"]["rank"] = 1
    tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{old}/")}
    tensors |= {"layers.0.norm.weight/A": torch.ones(1, 1), "layers.0.norm.weight/B": torch.ones(8, 1)}
    refused(tiny, write_raw(tmp_path / "x.safetensors", header, tensors), "a vector of 8 is no matrix")


def test_a_site_twice(good, tiny, tmp_path):
    header, tensors = read_raw(good)
    header["sites"].append(header["sites"][0])
    refused(tiny, write_raw(tmp_path / "x.safetensors", header, tensors), "each once")


def test_onto_another_adapters_tensors(good, tiny, tmp_path):
    header, tensors = read_raw(good)
    ad.load(tiny, good, name="first")
    old = header["sites"][0]["path"]
    path = f"{old}.addenda.first.weight.A"
    header["sites"][0] |= {"path": path, "kind": "parameter", "shape": [2, 8]}
    renamed = {(f"{path}/{k.rpartition('/')[2]}" if k.startswith(f"{old}/") else k): v for k, v in tensors.items()}
    with pytest.raises(AddendaError, match="does not fit"):
        ad.load(tiny, write_raw(tmp_path / "x.safetensors", header, renamed), name="second")
    assert list(ad.adapters(tiny)) == ["first"]


@pytest.mark.parametrize("basis", [False, True])
def test_positions_outside_the_weight(basis, tiny, ids, tmp_path):
    method = ad.SHiRA(density=0.1, mask="magnitude" if basis else "snip")
    adapter = attach(tiny, method, ids, targets="up_proj")
    file = adapter.save(tmp_path / "a.safetensors", basis=basis)
    ad.detach(tiny)
    header, tensors = read_raw(file)
    key = next(k for k in tensors if k.endswith("/index"))
    for value in (10**6, -1):
        bad = tensors | {key: torch.full_like(tensors[key], value)}
        if basis:  # with a checksum to match
            from addenda.core.file.fingerprint import checksum

            header["sites"][0]["checks"]["index"] = checksum("index", bad[key])
        refused(tiny, write_raw(tmp_path / "x.safetensors", header, bad), "positions outside the weight")
