"""What llama.cpp computes with an adapter is what the live one does: every architecture that is written, both engines.

Skipped where ADDENDA_LLAMA_PYTHON names no Python with llama.cpp (see gguf_base).
"""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import addenda as ad
from addenda.exporting.gguf.architectures import ARCHITECTURES, architecture_of
from addenda.exporting.gguf.write import tensors_of, write, write_adapter
from addenda.exporting.pairs import low_rank
from gguf_base import KINDS, apart, engine, far, logits, make, pythons, run, write_base

pytestmark = pytest.mark.skipif(not pythons(), reason="ADDENDA_LLAMA_PYTHON names no Python with llama.cpp")

# ik_llama.cpp stops with gemma2, gemma3, gpt2 and starcoder2, does not know olmo2, and computes another granite
IK = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "stablelm")
EMBEDDINGS = ("token_embd.weight", "output.weight")


@pytest.fixture(scope="module", params=pythons() or [""], ids=lambda p: engine(p) if p else "none")
def python(request) -> str:
    return request.param


def names(model, python: str) -> list[str]:
    """Every module that has a name in GGUF: without the embedding with ik_llama.cpp, which takes no LoRA of it."""
    a, found = architecture_of(model.config), []
    for path, _ in model.named_modules():
        tensor = a.tensor(path)
        if tensor is None or (tensor in EMBEDDINGS and model.config.tie_word_embeddings):
            continue
        if tensor != "token_embd.weight" or engine(python) == "mainline":
            found.append(path)
    return found


def moved(model, method, targets, name: str) -> ad.Adapter:
    """An adapter whose trained tensors are drawn at random, so that it changes the logits by some ten percent."""
    adapter = ad.attach(model, method, name=name, targets=targets)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    return adapter


def exported(model, adapter: ad.Adapter, path: Path) -> tuple[Path, np.ndarray]:
    """The adapter's file, and the logits with it; it is taken off."""
    with_it = logits(model)
    write_adapter(adapter, path, low_rank(adapter))
    ad.detach(model, adapter.name)
    return path, with_it


def check(found: np.ndarray, base: np.ndarray, lives: list[np.ndarray]) -> None:
    """That each adapter acts in llama.cpp, and is as near to ours as twice what the base alone is."""
    alone = far(found[0], base)
    assert alone < 1e-3
    for theirs, live in zip(found[1:], lives, strict=True):
        assert far(live, base) > 0.01
        assert far(theirs, live) < 2 * max(alone, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_module_of_an_architecture(kind, python, tmp_path):
    if engine(python) == "ik" and kind not in IK:
        pytest.skip("ik_llama.cpp does not run this architecture as transformers does")
    model = make(kind)
    base, wanted = write_base(model, tmp_path / "base.gguf"), logits(model)
    file, live = exported(
        model, moved(model, ad.LoRA(rank=8, alpha=16.0), names(model, python), "a"), tmp_path / "a.gguf"
    )
    check(run(python, base, [file]), wanted, [live])


def test_every_architecture_is_tried():
    assert set(KINDS) == set(ARCHITECTURES)


def test_methods_and_ranks(python, tmp_path):
    model = make("llama")
    base, wanted = write_base(model, tmp_path / "base.gguf"), logits(model)
    linear = [path for path in names(model, python) if "layers" in path]
    methods = {
        "rslora": "rslora:rank=6",
        "rank-4": "lora:rank=4",
        "rank-1": "lora:rank=1,alpha=3",
        "pissa": "pissa:rank=3",
        "vera": "vera:rank=8",
        "adalora": "adalora:rank=5,target_rank=5",
    }
    mixed = {"*.q_proj": ad.LoRA(rank=2, alpha=8.0), "*.up_proj": ad.LoRA(rank=11), "*.down_proj": ad.LoRA(rank=4)}
    files, lives = [], []
    for name, method in methods.items():
        file, live = exported(model, moved(model, method, linear, name), tmp_path / f"{name}.gguf")
        files, lives = [*files, file], [*lives, live]
    file, live = exported(model, moved(model, mixed, None, "mixed"), tmp_path / "mixed.gguf")
    check(run(python, base, [*files, file]), wanted, [*lives, live])


def test_a_change_that_is_no_lora_acts_as_its_product_does(python, tmp_path):
    model = make("llama")
    base, wanted = write_base(model, tmp_path / "base.gguf"), logits(model)
    adapter = moved(model, "oft:block=8", [p for p in names(model, python) if "layers" in p], "a")
    pairs = low_rank(adapter, rank=12)
    write_adapter(adapter, tmp_path / "a.gguf", pairs)
    ad.detach(model, "a")
    with torch.no_grad():
        for pair in pairs.values():
            pair.site.module.weight += pair.B @ pair.A
    assert max(p.error for p in pairs.values()) > 0.01
    check(run(python, base, [tmp_path / "a.gguf"]), wanted, [logits(model)])


def test_half_precision(python, tmp_path):
    model = make("qwen2")
    base, wanted = write_base(model, tmp_path / "base.gguf"), logits(model)
    adapter = moved(model, ad.LoRA(rank=8), "linear", "a")
    live = logits(model)
    write_adapter(adapter, tmp_path / "a.gguf", low_rank(adapter), dtype="f16")
    found = run(python, base, [tmp_path / "a.gguf"])
    assert apart(live, wanted) > 0.01
    assert apart(found[1], live) < 2e-3  # numbers of 11 bits


def test_without_the_permutation_it_is_another_model(python, tmp_path):
    """The check above can fail: with rows as transformers has them the difference is far beyond the base's."""
    model = make("llama")
    base, wanted = write_base(model, tmp_path / "base.gguf"), logits(model)
    adapter = moved(model, ad.LoRA(rank=8), ["*.q_proj", "*.k_proj"], "a")
    pairs, live = low_rank(adapter), logits(model)
    plain = gguf.GGUFWriter(tmp_path / "plain.gguf", "llama")
    plain.add_type(gguf.GGUFType.ADAPTER)
    plain.add_string(gguf.Keys.Adapter.TYPE, "lora")
    for path, pair in pairs.items():
        tensor = architecture_of(model.config).tensor(path)
        plain.add_tensor(f"{tensor}.lora_a", pair.A.numpy())
        plain.add_tensor(f"{tensor}.lora_b", pair.B.contiguous().numpy())
    plain.write_header_to_file()
    plain.write_kv_data_to_file()
    plain.write_tensors_to_file()
    plain.close()
    write(pairs, model.config, tmp_path / "a.gguf")
    found = run(python, base, [tmp_path / "a.gguf", tmp_path / "plain.gguf"])
    check(found[:2], wanted, [live])
    assert far(found[2], live) > 20 * far(found[0], wanted)


def test_a_scale_by_alpha_is_alpha_over_rank(python, tmp_path):
    """llama.cpp's rule, by which a scale of alpha 0 is 1: the same numbers with alpha 12 at rank 8 act 1.5 times."""
    model = make("qwen2")
    base = write_base(model, tmp_path / "base.gguf")
    adapter = moved(model, ad.LoRA(rank=8), "linear", "a")
    pairs = low_rank(adapter)
    tensors = tensors_of(pairs, model.config)
    scaled = gguf.GGUFWriter(tmp_path / "b.gguf", "qwen2")
    scaled.add_type(gguf.GGUFType.ADAPTER)
    scaled.add_string(gguf.Keys.Adapter.TYPE, "lora")
    scaled.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 12.0)
    for key, tensor in tensors.items():
        scaled.add_tensor(key, (tensor / 1.5 if key.endswith("b") else tensor).numpy())
    scaled.write_header_to_file()
    scaled.write_kv_data_to_file()
    scaled.write_tensors_to_file()
    scaled.close()
    write(pairs, model.config, tmp_path / "a.gguf")
    found = run(python, base, [tmp_path / "a.gguf", tmp_path / "b.gguf"])
    assert apart(found[1], found[0]) > 0.01
    assert apart(found[2], found[1]) < 1e-4


def test_what_ik_leaves_out(python, tmp_path):
    """Why fused_up_gate must be off there: with it gate and up are the base's. Mainline has no such product."""
    model = make("llama")
    base = write_base(model, tmp_path / "base.gguf")
    adapter = moved(model, ad.LoRA(rank=8), ["*.gate_proj", "*.up_proj"], "a")
    write_adapter(adapter, tmp_path / "a.gguf", low_rank(adapter))
    found = run(python, base, [tmp_path / "a.gguf"], FUSED="1")
    acts = apart(found[1], found[0])
    assert acts == 0 if engine(python) == "ik" else acts > 0.01


def test_an_embedding_is_taken_by_mainline_alone(python, tmp_path):
    model = make("llama")
    base, wanted = write_base(model, tmp_path / "base.gguf"), logits(model)
    file, live = exported(model, moved(model, ad.LoRA(rank=8), "model.embed_tokens", "a"), tmp_path / "a.gguf")
    if engine(python) == "ik":
        with pytest.raises(RuntimeError, match="gguf was not taken"):
            run(python, base, [file])
    else:
        check(run(python, base, [file]), wanted, [live])


def test_a_norm_is_passed_over_without_a_word(python, tmp_path):
    """Why a change of a norm is refused: mainline takes the file, and the logits are the base's."""
    model = make("qwen2")
    base = write_base(model, tmp_path / "base.gguf")
    w = gguf.GGUFWriter(tmp_path / "norm.gguf", "qwen2")
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    w.add_tensor("blk.0.attn_norm.weight", np.full(64, 5.0, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    if engine(python) == "ik":
        with pytest.raises(RuntimeError, match="gguf was not taken"):
            run(python, base, [tmp_path / "norm.gguf"])
    else:
        found = run(python, base, [tmp_path / "norm.gguf"])
        assert np.array_equal(found[0], found[1])
