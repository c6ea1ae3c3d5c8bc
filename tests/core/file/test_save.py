"""Adapter files: what is in them, what a load checks, and that nothing half-way is ever left."""

import copy
import json
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.file import fingerprint as files
from addenda.core.file.header import read, write
from addenda.core.file.inspect import inspect
from addenda.core.forward.slots import slots_of
from addenda.core.site.site import site_at
from addenda.core.state.state import record_of
from shared import attach, bits, read_raw, relative, same_bits, stir, train, write_raw

LORA = ad.LoRA(rank=2)


@pytest.fixture
def saved(tiny, ids, tmp_path):
    adapter = stir(ad.attach(tiny, LORA, targets="linear", also_train=["score"], name="first", seed=3))
    file = adapter.save(tmp_path / "a.safetensors")
    y = tiny(ids).detach()
    ad.detach(tiny)
    return file, y


def test_no_key_holds_the_adapters_name_and_equal_adapters_are_equal_files(tiny, ids, tmp_path):
    one = stir(ad.attach(tiny, LORA, name="secret"))
    a = one.save(tmp_path / "a.safetensors").read_bytes()
    two = ad.load(tiny, tmp_path / "a.safetensors", name="other")
    assert a == two.save(tmp_path / "b.safetensors").read_bytes()
    assert b"secret" not in a


def test_load_is_not_trainable_unless_asked_and_keeps_the_step(tiny, ids, tmp_path):
    adapter = ad.attach(tiny, LORA)
    train(tiny, adapter, ids, torch.optim.SGD(adapter.parameters(), lr=0.1), 4)
    file = adapter.save(tmp_path / "a.safetensors")
    ad.detach(tiny)
    again = ad.load(tiny, file)
    assert again.step_count == 4
    assert not any(p.requires_grad for p in again.parameters())
    assert all(p.requires_grad for p in ad.load(tiny, file, name="t", trainable=True).parameters())
    quiet = ad.load(tiny, file, name="idle", activate=False)
    assert "idle: idle" in ad.status(tiny)
    assert quiet.name == "idle"


def test_saved_while_merged_is_the_same_file(tiny, ids, tmp_path):
    adapter = stir(ad.attach(tiny, "svft:pattern=banded,band=1"))
    plain = adapter.save(tmp_path / "a.safetensors").read_bytes()
    ad.merge(tiny)
    assert adapter.save(tmp_path / "b.safetensors").read_bytes() == plain
    ad.detach(tiny)
    ad.load(tiny, tmp_path / "b.safetensors")


def test_a_changed_base_is_seen_even_after_a_save(tiny, ids, tmp_path):
    adapter = stir(ad.attach(tiny, LORA))
    file = adapter.save(tmp_path / "a.safetensors")
    with torch.no_grad():
        tiny.layers[0].up_proj.weight.mul_(1.001)
    with pytest.raises(AddendaError, match=r"layers\.0\.up_proj"):
        ad.load(tiny, file, name="again")


def test_structure_that_differs_is_listed_whole(saved, tiny):
    file, _ = saved
    tiny.layers[0].up_proj = nn.Linear(8, 12)
    tiny.layers[1].self_attn.query = tiny.layers[1].self_attn.q_proj
    del tiny.layers[1].self_attn.q_proj
    tiny.score = nn.Conv1d(4, 4, 1)
    before = bits(tiny)
    with pytest.raises(AddendaError) as error:
        ad.load(tiny, file)
    text = str(error.value)
    assert "nothing was loaded" in text
    assert "layers.0.up_proj: the file has linear [16, 8], the model linear [12, 8]" in text
    assert "the model has no layers.*.self_attn.q_proj (1 sites)." in text
    assert "score.weight: the file has parameter [4, 8], the model parameter [4, 4, 1]" in text
    assert same_bits(bits(tiny), before)
    assert not any(slots_of(m) for m in tiny.modules())


def test_onto_a_model_where_the_weight_is_tied(llama, tmp_path):
    adapter = stir(ad.attach(llama, LORA, targets="embed_tokens.weight"))
    file = adapter.save(tmp_path / "a.safetensors")
    ad.detach(llama)
    llama.model.embed_tokens.weight = nn.Parameter(llama.model.embed_tokens.weight.detach().clone())
    stir(ad.attach(llama, LORA, targets="lm_head"))  # untied now
    other = ad.adapters(llama)["default"].save(tmp_path / "b.safetensors")
    ad.detach(llama)
    llama.lm_head.weight = llama.model.embed_tokens.weight
    with pytest.raises(AddendaError, match="tied"):
        ad.load(llama, other)
    ad.load(llama, file)


def test_a_taken_name_and_bad_arguments(saved, tiny):
    file, _ = saved
    ad.load(tiny, file, name="x")
    with pytest.raises(AddendaError, match="'x' is attached already"):
        ad.load(tiny, file, name="x")
    with pytest.raises(AddendaError, match="base must be 'exact' or 'compatible'"):
        ad.load(tiny, file, name="y", base="any")


def test_unknown_methods_and_options_must_be_understood(saved, tiny, tmp_path):
    header, tensors = read_raw(saved[0])
    for change, pattern in (
        ({"name": "lorra"}, "no method 'lorra'"),
        (
            {"options": {"rank": 2, "shiny": 1}, "ignorable": []},
            "options of lora that this version does not know: shiny.*upgrade",
        ),
        ({"options": {"rank": "2"}, "ignorable": ["rank"]}, "rank must be int"),
    ):
        other = json.loads(json.dumps(header))
        other["methods"][0] |= change
        write_raw(tmp_path / "x.safetensors", other, tensors)
        with pytest.raises(AddendaError, match=pattern):
            ad.load(tiny, tmp_path / "x.safetensors")


def test_an_unknown_option_that_changes_nothing_is_left_out(saved, tiny, ids, tmp_path):
    """A newer version says of each option whether a file without it would mean the same; an older one relies on it."""
    file, y = saved
    header, tensors = read_raw(file)
    assert header["methods"][0]["ignorable"] == [k for k in ad.LoRA().options(defaults=True) if k != "rank"]
    header["methods"][0]["options"]["shiny"] = 0.5
    header["methods"][0]["ignorable"].append("shiny")
    newer = write_raw(tmp_path / "x.safetensors", header, tensors)
    adapter = ad.load(tiny, newer)
    assert torch.equal(tiny(ids), y)
    assert adapter.save(tmp_path / "y.safetensors").read_bytes() == file.read_bytes()
    for wrong in (["dull"], ["alpha", "alpha"], "alpha", [3]):
        header["methods"][0]["ignorable"] = wrong
        with pytest.raises(AddendaError, match="what may be ignored"):
            read(write_raw(tmp_path / "z.safetensors", header, tensors))


def test_what_a_missing_option_meant_is_what_may_be_ignored(saved, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ad.LoRA, "formerly", {"alpha": 7.0})
    for alpha, ignorable in ((None, False), (7.0, True)):
        adapter = ad.attach(tiny, ad.LoRA(rank=2, alpha=alpha), targets="q_proj")
        entry = read(adapter.save(tmp_path / "a.safetensors"))[0].methods[0]
        assert ("alpha" in entry.ignorable) == ignorable
        ad.detach(tiny)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_unsound_tensors_are_not_saved(value, tiny, tmp_path):
    adapter = ad.attach(tiny, LORA, targets="q_proj")
    file = adapter.save(tmp_path / "a.safetensors")
    good = file.read_bytes()
    adapter.parameters()[0].data[0, 0] = value
    with pytest.raises(AddendaError, match=r"'default' was not saved.*q_proj/A holds values that are not finite"):
        adapter.save(file)
    assert file.read_bytes() == good
    adapter.parameters()[0].data = torch.zeros(0, 8)
    with pytest.raises(AddendaError, match=r"is empty \(shape \(0, 8\)\)"):
        adapter.save(file)


def test_a_save_that_is_killed_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    adapter = ad.attach(tiny, LORA, targets="q_proj")
    file = adapter.save(tmp_path / "a.safetensors")
    good = file.read_bytes()
    stir(adapter)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        adapter.save(file)
    assert file.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_basis_that_comes_out_differently_is_noticed(tiny, ids, tmp_path, monkeypatch):
    adapter = stir(ad.attach(tiny, "pissa:rank=2", targets="q_proj"))
    plain, basis = adapter.save(tmp_path / "p.safetensors"), adapter.save(tmp_path / "b.safetensors", basis=True)
    y = tiny(ids)
    ad.detach(tiny)
    from addenda.methods import lora

    real = lora.singular_triplets

    def other(W, rank):
        U, S, Vt = real(W, rank)
        return -U, S, -Vt

    monkeypatch.setattr(lora, "singular_triplets", other)
    with pytest.raises(AddendaError, match=r"come out differently.*basis=True"):
        ad.load(tiny, plain)
    assert not any(slots_of(m) for m in tiny.modules())
    ad.load(tiny, basis)
    assert torch.equal(tiny(ids), y)


def test_half_precision_copies_are_compatible(saved, tiny, ids):
    file, y = saved
    half = copy.deepcopy(tiny).half().float()
    ad.load(half, file, base="compatible")
    assert relative(half(ids), y) < 0.01
    ad.adapters(half)["default"]


def test_inspect_needs_no_model(saved):
    text = inspect(saved[0])
    assert "schema 2, seed 3, 0 steps" in text
    assert "lora (rank=2): layers.*.self_attn.q_proj × 2" in text
    assert "whole copies: score.weight, score.bias" in text
    assert f"{os.path.getsize(saved[0]):,} bytes" in text


@pytest.mark.parametrize("basis", [False, True])
def test_equal_adapters_are_equal_files_in_every_process(basis, tiny, tmp_path):
    """A set of names has another order in each: the entries of what is computed again follow the tensors' own."""
    adapter = stir(attach(tiny, ad.SSVD(rank=4), targets="q_proj"))
    _, held = next(adapter.sites())
    names = [k for k in held._buffers if k in held._non_persistent_buffers_set]
    assert len(names) > 1
    site = read(adapter.save(tmp_path / "a.safetensors", basis=basis))[0].sites[0]
    assert [*site.checks] == [k for k in names if not k.endswith(" in training")]


def test_the_fingerprint_is_remembered_until_the_tensor_changes(tiny, monkeypatch):
    adapter = ad.attach(tiny, LORA, targets="q_proj")
    state = tiny.__dict__["_addenda"]
    site = site_at(tiny, "layers.0.self_attn.q_proj")
    one = files.fingerprint(state, site)
    calls = []
    real = files.hashlib.sha256
    monkeypatch.setattr(files.hashlib, "sha256", lambda *a: calls.append(1) or real(*a))
    assert files.fingerprint(state, site) == one
    assert not calls
    with torch.no_grad():
        site.weight.add_(1)
    assert files.fingerprint(state, site) != one
    assert adapter.name == "default"


def test_save_with_data_started_methods(tiny, ids, tmp_path):
    adapter = stir(attach(tiny, ad.SHiRA(density=0.1, mask="gradient"), ids, targets="up_proj"))
    y = tiny(ids)
    file = adapter.save(tmp_path / "a.safetensors")
    ad.detach(tiny)
    ad.load(tiny, file)
    assert torch.equal(tiny(ids), y)


def test_a_base_changed_behind_autograds_back_is_noticed(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8)})
    adapter = ad.attach(model, "lora:rank=2")
    adapter.save(tmp_path / "x.safetensors")
    model["a"].weight.data[0, 0] += 1.0
    with pytest.raises(AddendaError, match="other base weights"):
        ad.load(model, tmp_path / "x.safetensors", name="again")


def test_hashes_that_several_threads_take_are_those_of_one(tiny):
    """And what was written behind autograd's back is seen by either."""
    attach(tiny, ad.LoRA(rank=2))
    root, state, record = record_of(tiny, "default")
    sites = [site_at(root, path) for path in record.methods]
    alone = {s.path: files.fingerprint(state, s) for s in sites}
    state.fingerprints.clear()
    torch.set_num_threads(2)
    try:
        together = files.fingerprints(state, sites)
    finally:
        torch.set_num_threads(1)
    assert dict(zip(alone, together, strict=True)) == alone
    sites[0].weight.data.view(-1)[0] += 1
    assert files.fingerprint(state, sites[0]) != alone[sites[0].path]
    assert files.fingerprint(state, sites[1]) == alone[sites[1].path]


def test_what_could_not_be_read_again_is_not_saved(tiny, ids, tmp_path):
    """A header with a NaN, half a character or names that no reader takes was written, and then refused by load."""
    adapter = stir(attach(tiny, "lora", ids))
    for labels, told in ((("\ud800",), "surrogates not allowed"), (("x" * 5000,), "of up to 5,000 characters")):
        adapter.labels = labels
        with pytest.raises(AddendaError, match=f"The adapter was not saved: .*{told}"):
            adapter.save(tmp_path / "a.safetensors")
    adapter.labels = ()
    with torch.no_grad():
        tiny.get_parameter("layers.0.up_proj.weight").fill_(float("inf"))
    with pytest.raises(AddendaError, match=r"the base at layers\.0\.up_proj holds values that are not finite"):
        adapter.save(tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_file_of_thousands_of_methods_is_described_in_some_lines(tiny, ids, tmp_path):
    header, tensors = read(stir(attach(tiny, "lora", ids, targets="layers.0.up_proj")).save(tmp_path / "a.safetensors"))
    [site], [method] = header.sites, header.methods
    paths = [f"layers.{i}.up_proj" for i in range(150)]
    many = replace(
        header,
        methods=tuple(replace(method, options={**method.options, "alpha": 1.0 + i}) for i in range(150)),
        sites=tuple(replace(site, path=path, method=i) for i, path in enumerate(paths)),
    )
    names = [key.rpartition("/")[2] for key in tensors]
    write(tmp_path / "b.safetensors", many, {f"{p}/{n}": tensors[f"{site.path}/{n}"] for p in paths for n in names})
    told = inspect(tmp_path / "b.safetensors")
    assert "… and 50 more methods" in told and len(told.splitlines()) < 110


def test_what_is_no_adapter_is_not_saved(tiny, tmp_path):
    adapter = attach(tiny, "lora")
    for given in (tiny, toys.make_llama(), "default", None):
        with pytest.raises(AddendaError, match=f"What is saved is an adapter.*got a {type(given).__name__}"):
            ad.save(given, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir()) and ad.save(adapter=adapter, path=tmp_path / "a.safetensors").is_file()
