"""LoRA in GGUF as it is written: read by gguf's own reader, and compared with dense products."""

import gguf
import numpy as np
import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.site.site import site_at
from addenda.exporting.gguf.architectures import architecture_of
from addenda.exporting.gguf.write import route, tensors_of, write, write_adapter
from addenda.exporting.pairs import Pair, balanced, low_rank
from gguf_base import make, permute


@pytest.fixture(scope="module")
def model():
    return make("llama")


def pair(model, path: str, rank: int = 3) -> Pair:
    site = site_at(model, path)
    m, n = site.shape
    return Pair(site, torch.randn(m, rank), torch.randn(rank, n))


def pairs(model, *paths: str, rank: int = 3) -> dict[str, Pair]:
    return {p: pair(model, p, rank) for p in paths}


LAYERS = [
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.0.self_attn.v_proj",
    "model.layers.1.mlp.down_proj", "lm_head", "model.embed_tokens",
]  # fmt: skip


@pytest.mark.parametrize("rank", [1, 3, 4, 7])
def test_every_tensor_is_the_product_with_its_rows_as_llama_cpp_has_them(model, rank, tmp_path):
    given = pairs(model, *LAYERS, rank=rank)
    path = write(given, model.config, tmp_path / "a.gguf", name="mine")
    reader = gguf.GGUFReader(path)
    texts = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert texts == {
        "general.architecture": "llama", "general.type": "adapter", "general.name": "mine", "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }  # fmt: skip
    found = {t.name: torch.tensor(np.array(t.data)).double() for t in reader.tensors}
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in reader.tensors)
    assert len(found) == 2 * len(LAYERS)
    for where, p in given.items():
        name = architecture_of(model.config).tensor(where)
        A, B = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        expected = p.B.double() @ p.A.double()
        if name == "token_embd.weight":
            theirs = A @ B.T  # llama.cpp takes rows of A, and multiplies them by B
        else:
            theirs = B @ A
            heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
            expected = permute(expected, heads) if heads else expected
        assert (theirs - expected).norm() <= 1e-7 * expected.norm()
        assert B.shape[1] == (5 if rank == 4 else rank)


def test_tensors_stand_in_pairs_as_gguf_expects_them(model, tmp_path):
    path = write(pairs(model, *LAYERS), model.config, tmp_path / "a.gguf")
    names = [t.name for t in gguf.GGUFReader(path).tensors]
    assert [n[-7:] for n in names] == [".lora_a", ".lora_b"] * len(LAYERS)
    assert [n[:-1] for n in names[::2]] == [n[:-1] for n in names[1::2]]


def test_gpt2_is_written_as_its_matrices_multiply(tmp_path):
    model = make("gpt2")
    given = pairs(model, "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj")
    tensors = tensors_of(given, model.config)
    assert tensors["blk.0.attn_qkv.weight.lora_b"].shape == (192, 3)
    assert tensors["blk.1.ffn_down.weight.lora_a"].shape == (3, 256)


def test_half_precision_is_half_the_bytes(model, tmp_path):
    given = pairs(model, *LAYERS)
    full, half = (write(given, model.config, tmp_path / f"{d}.gguf", dtype=d) for d in ("f32", "f16"))
    reader = gguf.GGUFReader(half)
    assert {t.tensor_type for t in reader.tensors} == {gguf.GGMLQuantizationType.F16}
    assert half.stat().st_size < 0.62 * full.stat().st_size
    A = next(torch.tensor(np.array(t.data)) for t in reader.tensors if t.name == "output.weight.lora_a")
    assert torch.equal(A, balanced(given["lm_head"]).A.half())


ONES = torch.ones(1, 64)
REFUSED = {
    "norm": ("model.norm.weight", torch.ones(64, 1), torch.ones(1, 1), "passes over changes of norms"),
    "not finite": ("lm_head", torch.full((64, 1), torch.nan), ONES, "lm_head: its numbers are not finite"),
    "shapes": ("lm_head", torch.ones(64, 2), ONES, "the weight is 64 × 64"),
    "no rank": ("lm_head", torch.ones(64, 0), ONES[:0], "the weight is 64 × 64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_and_nothing_is_there(case, model, tmp_path):
    path, B, A, reason = REFUSED[case]
    given = pairs(model, LAYERS[0]) | {path: Pair(site_at(model, path), B, A)}
    with pytest.raises(AddendaError, match=reason):
        write(given, model.config, tmp_path / "a.gguf")
    with pytest.raises(AddendaError, match="there is no change"):
        write({}, model.config, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_numbers_beyond_half_precision_are_refused(model, tmp_path):
    large = {"lm_head": Pair(site_at(model, "lm_head"), torch.full((64, 1), 7e9), torch.ones(1, 64))}
    with pytest.raises(AddendaError, match=r"6\.55e\+04, beyond float16; write it with dtype='f32'"):
        write(large, model.config, tmp_path / "a.gguf", dtype="f16")
    write(large, model.config, tmp_path / "a.gguf")
    with pytest.raises(AddendaError, match="'f32' or 'f16', got 'q8_0'"):
        write(large, model.config, tmp_path / "b.gguf", dtype="q8_0")


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
def test_tied_embeddings_and_heads_are_refused(path, tmp_path):
    model = make("llama", tie_word_embeddings=True)
    with pytest.raises(AddendaError, match=f"{path}: embedding and output head of this model are one weight"):
        write(pairs(model, path, LAYERS[0]), model.config, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_modules_without_a_name_and_stacks_are_refused(tmp_path):
    model = make("gpt2")
    with pytest.raises(AddendaError, match=r"transformer\.wpe has no name in a GGUF file of gpt2"):
        write(pairs(model, "transformer.wpe"), model.config, tmp_path / "a.gguf")
    import toys

    mixtral = toys.make_mixtral()
    path = next(p for p, _ in mixtral.named_parameters() if p.endswith("gate_up_proj"))
    site = site_at(mixtral, path)
    stack = Pair(site, torch.ones(site.copies, site.shape[0], 1), torch.ones(site.copies, 1, site.shape[1]))
    with pytest.raises(AddendaError, match="stack of matrices"):
        write({path: stack}, model.config, tmp_path / "a.gguf")
    with pytest.raises(AddendaError, match="'mixtral' models were not tried"):
        write({path: stack}, mixtral.config, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(model, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"mine")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "none")
    for name, reason in {"a.gguf": "is there already", "link.gguf": "is there already", ".": "is a folder"}.items():
        with pytest.raises(AddendaError, match=reason):
            write(pairs(model, LAYERS[0]), model.config, tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "link.gguf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_write_that_stops(error, model, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr(gguf.GGUFWriter, "write_ti_data_to_file", stop)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else AddendaError):
        write(pairs(model, LAYERS[0]), model.config, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package_it_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(AddendaError, match=r"pip install 'addenda\[gguf\]'"):
        write(pairs(model, LAYERS[0]), model.config, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_an_adapter_with_a_trained_copy_is_refused(tmp_path):
    model = make("llama")
    adapter = ad.attach(model, ad.LoRA(rank=2), targets="*.q_proj", also_train="lm_head")
    with pytest.raises(AddendaError, match=r"has trained lm_head.* as whole copies"):
        write_adapter(adapter, tmp_path / "a.gguf", low_rank(adapter))
    assert not list(tmp_path.iterdir())


def test_routes():
    model = make("llama")
    site, norm = site_at(model, LAYERS[0]), site_at(model, "model.norm.weight")
    assert route(ad.LoRA(), site).kind == "exact"
    assert route(ad.LoRA(), site, model.config).kind == "exact"
    assert route(ad.OFT(block=8), site).kind == "approximate"
    assert route(ad.DoRA(), site).kind == "approximate"
    assert "changes activations" in route(ad.Houlsby(), site).why
    assert "llama.cpp adds a LoRA to linear layers" in route(ad.LoRA(), norm).why
    tied = make("llama", tie_word_embeddings=True)
    assert route(ad.LoRA(), site_at(tied, "lm_head"), tied.config).kind == "refused"
    assert route(ad.LoRA(), site_at(make("gpt2"), "transformer.wpe"), make("gpt2").config).kind == "refused"
