"""A bank of files: who is in memory, who goes, what is read ahead, and what cannot be."""

import threading
from pathlib import Path

import pytest
import torch

import addenda as ad
import toys
from addenda.combining import bank as bank_file
from addenda.combining.bank import AdapterBank
from addenda.core.forward.slots import slots_of
from shared import bits, same_bits, stir

IDS = torch.arange(12).reshape(2, 6)
ONE = 2 * 2 * (8 + 8) * 4  # bytes of a LoRA of rank 2 at a q_proj of each of two blocks


def made(tmp_path: Path, names: str = "abcd") -> tuple[toys.Tiny, dict[str, Path], dict[str, torch.Tensor]]:
    """A bare model, files of adapters for it, and what each makes of IDS."""
    model, files, outputs = toys.Tiny().eval(), {}, {}
    for n in names:
        stir(ad.attach(model, "lora:rank=2", targets="*q_proj", name=n), 1.0, ord(n))
        files[n], outputs[n] = ad.adapters(model)[n].save(tmp_path / f"{n}.safetensors"), model(IDS).detach()
        ad.detach(model)
    return model, files, outputs


def test_the_least_recently_used_goes_and_each_acts_as_in_its_file(tmp_path):
    model, files, outputs = made(tmp_path)
    base, before = model(IDS).detach(), bits(model)
    bank = AdapterBank(model, files, size=2)
    assert bank.names == tuple("abcd") and len(bank) == 4 and "a" in bank and bank.held == ()
    for name, held in (("a", "a"), ("b", "ab"), ("a", "ba"), ("c", "ac"), ("d", "cd"), ("c", "dc"), ("a", "ca")):
        assert bank.use(name).name == name
        assert torch.equal(model(IDS), outputs[name]) and not torch.equal(outputs[name], base)
        assert (bank.held == tuple(held) == tuple(sorted(held, key=held.index)) and bank.used == 2 * ONE) or held == "a"
    assert bank.use(None) is None and torch.equal(model(IDS), base) and bank.held == ("c", "a")
    bank.close()
    assert bank.held == () and not any(slots_of(m) for m in model.modules()) and same_bits(bits(model), before)
    bank.use("b")
    assert torch.equal(model(IDS), outputs["b"])


def test_bytes_are_those_of_the_tensors(tmp_path):
    model, files, _ = made(tmp_path)
    bank = AdapterBank(model, tmp_path, bytes=3 * ONE + 1)
    for name in files:
        bank.use(name)
        assert bank.used <= 3 * ONE
    assert bank.held == ("b", "c", "d") and "3 held" in repr(bank)


def test_what_is_computed_from_the_weights_counts_too(tmp_path):
    model = toys.Tiny()
    stir(ad.attach(model, "pissa:rank=2", targets="*q_proj", name="p"), 0.3).save(tmp_path / "p.safetensors")
    ad.detach(model)
    with pytest.raises(ad.AddendaError, match="with what it computes"):
        AdapterBank(model, tmp_path, bytes=2 * ONE - 1).use("p")
    assert not any(slots_of(m) for m in model.modules())
    AdapterBank(model, tmp_path, bytes=2 * ONE).use("p")


def test_reading_ahead_is_in_a_thread_and_attaching_is_not(tmp_path, monkeypatch):
    model, files, outputs = made(tmp_path)
    readers, placers = [], []
    read, place = bank_file.read, bank_file.place
    monkeypatch.setattr(bank_file, "read", lambda path: readers.append(threading.current_thread()) or read(path))
    monkeypatch.setattr(
        bank_file, "place", lambda *a, **k: placers.append(threading.current_thread()) or place(*a, **k)
    )  # fmt: skip
    bank = AdapterBank(model, files, size=2)
    bank.use("a")
    assert bank.prefetch("b") and bank.prefetch("b") and bank.used == 2 * ONE
    bank.use("b")
    assert torch.equal(model(IDS), outputs["b"]) and len(readers) == 2
    assert readers[0] is threading.main_thread() and readers[1].name.startswith("addenda-bank")
    assert set(placers) == {threading.main_thread()}
    assert bank.prefetch("c") and bank.held == ("b",), "what is idle goes, what acts stays"
    assert AdapterBank(model, {"x": files["d"]}, size=1).prefetch("x")
    assert not _full(bank), "nothing fits beside what acts and nothing idle is left"
    bank.close()


def _full(bank: AdapterBank) -> bool:
    bank.size = 1
    return bank.prefetch("d")


def test_a_file_written_anew_since_it_was_read_ahead_is_read_again(tmp_path):
    model, files, outputs = made(tmp_path)
    bank = AdapterBank(model, files, size=3)
    bank.prefetch("a")
    bank._ahead["a"].result()
    files["a"].write_bytes(files["b"].read_bytes())
    bank.use("a")
    assert torch.equal(model(IDS), outputs["b"])
    bank.close()


def test_a_file_that_fails_leaves_what_acted(tmp_path):
    model, files, outputs = made(tmp_path)
    torch.manual_seed(5)
    other = toys.Tiny()
    stir(ad.attach(other, "lora:rank=2", targets="*q_proj"), 1.0).save(tmp_path / "foreign.safetensors")
    for size in (1, 3):
        bank = AdapterBank(model, {**files, "foreign": tmp_path / "foreign.safetensors"}, size=size)
        bank.use("a")
        for _ in range(2):
            bank.prefetch("foreign")
            with pytest.raises(ad.AddendaError, match="other base weights"):
                bank.use("foreign")
            assert torch.equal(model(IDS), outputs["a"]) and bank.held == ("a",)
        bank.close()
    bank = AdapterBank(model, files, size=2)
    bank.use("a")
    files["b"].write_bytes(b"not a file of tensors, and longer than eight bytes")
    with pytest.raises(ad.AddendaError, match="more than there can be"):
        bank.use("b")
    assert torch.equal(model(IDS), outputs["a"])


def test_adapters_of_others_are_neither_counted_nor_touched(tmp_path):
    model, files, outputs = made(tmp_path)
    stir(ad.attach(model, "lora:rank=4", targets="*v_proj", name="mine"), 1.0)
    bank = AdapterBank(model, files, size=1)
    bank.use("a")
    bank.use("b")
    assert set(ad.adapters(model)) == {"mine", "b"} and torch.equal(model(IDS), outputs["b"])
    ad.detach(model, "b")
    assert bank.held == ()
    bank.use("a")
    bank.close()
    assert set(ad.adapters(model)) == {"mine"}


def test_bad_banks_are_refused_before_anything_is_read(tmp_path):
    model, files, _ = made(tmp_path)
    (tmp_path / "sub").mkdir()
    bad = {
        "a bank holds at least one adapter": {"size": 0},
        "size must be": {"size": 1.5},
        "A bank has a bound": {},
        "less than 4 of these": {"bytes": ONE - 1},
        "base must be": {"size": 1, "base": "any"},
    }
    for message, options in bad.items():
        with pytest.raises(ad.AddendaError, match=message):
            AdapterBank(model, files, **options)
    (tmp_path / "sub" / "x.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ad.AddendaError, match="no sound safetensors file"):
        AdapterBank(model, tmp_path / "sub", size=1)
    with pytest.raises(ad.AddendaError, match="There is no adapter file"):
        AdapterBank(model, tmp_path / "none", size=1)
    with pytest.raises(ad.AddendaError, match="letters, digits"):
        AdapterBank(model, {"a b": files["a"]}, size=1)
    ad.attach(model, "lora:rank=2", targets="*q_proj", name="a")
    with pytest.raises(ad.AddendaError, match="attached already"):
        AdapterBank(model, files, size=1)
    ad.detach(model)
    bank = AdapterBank(model, files, size=1)
    with pytest.raises(ad.AddendaError, match="no adapter 'e'"):
        bank.use("e")
    with pytest.raises(ad.AddendaError, match="no adapter 'e'"):
        bank.prefetch("e")


def test_a_file_that_fails_leaves_an_adapter_of_others_acting(tmp_path):
    model, files, _ = made(tmp_path)
    stir(ad.attach(model, "lora:rank=4", targets="*v_proj", name="mine"), 1.0)
    acting = model(IDS).detach()
    files["b"].write_bytes(b"not a file of tensors, and longer than eight bytes")
    bank = AdapterBank(model, {n: f for n, f in files.items() if n != "b"}, size=1)
    bank.use("a")
    ad.switch(model, ("mine", "a"))
    both = model(IDS).detach()
    files["c"].write_bytes(files["c"].read_bytes()[:-8])
    for before in (both, acting):
        ad.switch(model, ("mine", "a") if before is both else "mine")
        with pytest.raises(ad.AddendaError):
            bank.use("c")
        assert torch.equal(model(IDS), before) and not torch.equal(both, acting)


def test_an_adapter_that_has_taken_the_name_of_one_that_is_gone_is_not_the_banks(tmp_path):
    model, files, _ = made(tmp_path)
    bank = AdapterBank(model, files, size=1)
    bank.use("a")
    ad.detach(model, "a")
    stir(ad.load(model, files["a"], name="a"), 1.0)
    assert bank.held == ()
    bank.use("b")
    bank.close()
    assert set(ad.adapters(model)) == {"a"}


@pytest.mark.parametrize("bound", [{"size": 2}, {"bytes": 5000}, {"size": 1, "bytes": 5000}])
def test_a_bank_says_how_large_it_may_be(tmp_path, bound):
    model, files, _ = made(tmp_path, "ab")
    assert repr(AdapterBank(model, files, **bound)).endswith(
        ", ".join(f"{n:,} {'adapters' if of == 'size' else of}" for of, n in bound.items()) + ")"
    )


def test_a_list_and_a_folder_of_peft_are_no_files_of_a_bank(tmp_path):
    model, files, _ = made(tmp_path, "a")
    with pytest.raises(ad.AddendaError, match="a dict of files by the names"):
        AdapterBank(model, [*files.values()], size=1)
    ad.export(ad.load(toys.make_llama(), _saved(tmp_path)), "peft", tmp_path / "theirs")
    with pytest.raises(ad.AddendaError, match="an adapter of PEFT, which is imported"):
        AdapterBank(model, {"a": tmp_path / "theirs"}, size=1)


def _saved(tmp_path: Path) -> Path:
    return stir(ad.attach(toys.make_llama(), "lora:rank=2"), 0.3).save(tmp_path / "llama.st")


def test_files_of_a_model_whose_modules_had_other_names(tmp_path):
    model, files, outputs = made(tmp_path, "ab")
    other = torch.nn.Sequential(model)
    with pytest.raises(ad.AddendaError, match=r'rename=\{"\*": "0\.\*"\}'):
        AdapterBank(other, files, size=1).use("a")
    bank = AdapterBank(other, files, size=2, rename={"*": "0.*"})
    assert bank.prefetch("b")
    for name in "ab":
        bank.use(name)
        assert torch.equal(other(IDS), outputs[name])
    with pytest.raises(ad.AddendaError, match="each \\* of a path"):
        AdapterBank(other, files, size=2, rename={"*": "0"})


@pytest.mark.parametrize("size", [1, 2, 3])
def test_nobody_goes_for_another_while_a_change_is_merged(tmp_path, size):
    model, files, outputs = made(tmp_path, "abc")
    bank = AdapterBank(model, files, size=size)
    bank.use("a")
    bank.use("b")
    held = bank.held
    ad.merge(model)
    merged = model(IDS).detach()
    for name in "ca":
        with pytest.raises(ad.AddendaError, match="merged"):
            bank.use(name)
        assert bank.held == held and torch.equal(model(IDS), merged)
    assert bank.prefetch("c") == (size > 1)
    assert torch.equal(model(IDS), merged)
    ad.unmerge(model)
    bank.use("c")
    assert torch.equal(model(IDS), outputs["c"])
