"""LoRA in GGUF as it is read: our own files come back, and others' are taken or refused whole."""

import gguf
import numpy as np
import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.exporting.gguf.read import read
from addenda.exporting.gguf.write import write, write_adapter
from addenda.exporting.install import install
from addenda.exporting.pairs import low_rank
from addenda.methods.lora import LoRA
from gguf_base import KINDS, apart, logits, make, permute, write_base


def file(path, tensors: dict, *, architecture: str = "llama", alpha: float | None = None, kind="adapter", **fields):
    """A GGUF file as another program may have written it."""
    w = gguf.GGUFWriter(path, architecture)
    w.add_string("general.type", kind)
    w.add_string("adapter.type", fields.pop("adapter", "lora"))
    if alpha is not None:
        w.add_float32("adapter.lora.alpha", alpha)
    for key, value in fields.items():
        w.add_array(key.replace("_", "."), value)
    for name, array in tensors.items():
        w.add_tensor(name, np.ascontiguousarray(array, dtype=getattr(array, "dtype", np.float32)))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def two(tensor: str, m: int, n: int, rank: int = 3) -> dict:
    rng = np.random.default_rng(0)
    return {f"{tensor}.lora_a": rng.normal(size=(rank, n)).astype(np.float32),
            f"{tensor}.lora_b": rng.normal(size=(m, rank)).astype(np.float32)}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_comes_back(kind, tmp_path):
    model = make(kind)
    wanted = logits(model)
    free = [] if model.config.tie_word_embeddings else ["lm_head", "*embed_tokens", "*wte"]
    targets = ["attention", "mlp", *(t for t in free if any(t.strip("*") in p for p, _ in model.named_modules()))]
    adapter = ad.attach(model, ad.LoRA(rank=4, alpha=10.0), targets=targets)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.05)
    live, pairs = logits(model), low_rank(adapter)
    forms = read(write_adapter(adapter, tmp_path / "a.gguf", pairs), model)
    assert forms.sites.keys() == pairs.keys() and not forms.heads and not forms.pools
    for path, (method, p) in forms.sites.items():
        assert method == LoRA(rank=4)
        product = pairs[path].B.double() @ pairs[path].A.double()
        assert (p["B"].double() @ p["A"].double() - product).norm() <= 1e-7 * product.norm()
    ad.detach(model)
    install(model, forms.sites, name="back", activate=True)
    assert apart(live, wanted) > 0.01
    assert apart(logits(model), live) < 1e-6


def test_ranks_of_their_own_come_back(tmp_path):
    model = make("qwen2")
    adapter = ad.attach(model, {"*.q_proj": ad.LoRA(rank=1), "*.up_proj": ad.LoRA(rank=7)})
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    forms = read(write_adapter(adapter, tmp_path / "a.gguf", low_rank(adapter)), model)
    assert {path.rsplit(".", 1)[1]: m.rank for path, (m, _) in forms.sites.items()} == {"q_proj": 1, "up_proj": 7}


def test_a_lora_that_starts_at_zero_keeps_its_rank(tmp_path):
    model = make("qwen2")
    adapter = ad.attach(model, ad.LoRA(rank=6), targets="*.q_proj")
    forms = read(write_adapter(adapter, tmp_path / "a.gguf", low_rank(adapter)), model)
    assert {m.rank for m, _ in forms.sites.values()} == {6}


@pytest.mark.parametrize("alpha", [None, 0.0, 6.0])
def test_scale_and_order_of_rows_of_others(alpha, tmp_path):
    """ΔW = (alpha / rank) B A, or B A where alpha is 0 or lacks, its rows in the model's order."""
    model, tensors = make("llama"), two("blk.1.attn_q.weight", 64, 64) | two("blk.0.ffn_up.weight", 96, 64)
    forms = read(file(tmp_path / "a.gguf", tensors, alpha=alpha), model)
    scale = (alpha or 3.0) / 3.0
    for path, name in {"model.layers.1.self_attn.q_proj": "attn_q", "model.layers.0.mlp.up_proj": "ffn_up"}.items():
        m, p = forms.sites[path]
        B, A = m.factors(p, (1, 1)).pair()
        key = next(k for k in tensors if name in k)[:-1]
        theirs = scale * torch.tensor(tensors[key + "b"]) @ torch.tensor(tensors[key + "a"])
        ours = B @ A
        assert torch.allclose(permute(ours, 4) if name == "attn_q" else ours, theirs, atol=1e-6)


def test_half_and_brain_precision(tmp_path):
    model, tensors = make("llama"), two("blk.0.ffn_down.weight", 64, 96)
    half = {k: t.astype(np.float16) for k, t in tensors.items()}
    forms = read(file(tmp_path / "a.gguf", half), model)
    _, p = forms.sites["model.layers.0.mlp.down_proj"]
    assert torch.equal(p["A"], torch.tensor(half["blk.0.ffn_down.weight.lora_a"]).float())
    path = tmp_path / "b.gguf"
    w = gguf.GGUFWriter(path, "llama")
    w.add_string("general.type", "adapter")
    w.add_string("adapter.type", "lora")
    brain = {k: torch.tensor(t).bfloat16() for k, t in tensors.items()}
    for name, t in brain.items():
        data = t.contiguous().view(torch.uint8).numpy()
        w.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    _, p = read(path, model).sites["model.layers.0.mlp.down_proj"]
    assert torch.equal(p["B"], brain["blk.0.ffn_down.weight.lora_b"].float())


def test_a_bare_body_takes_the_adapter_of_the_model_around_it(tmp_path):
    model = make("llama")
    path = file(tmp_path / "a.gguf", two("blk.1.attn_v.weight", 32, 64))
    assert [*read(path, model.model).sites] == ["layers.1.self_attn.v_proj"]


GOOD = two("blk.0.attn_q.weight", 64, 64)
BAD = {
    "another architecture": ({"tensors": GOOD, "architecture": "qwen2"}, "is for qwen2 models in GGUF, and this Llama"),
    "an unknown architecture": ({"tensors": GOOD, "architecture": "zebra\x1b"}, r"for zebra\\x1b models"),
    "a model": ({"tensors": GOOD, "kind": "model"}, "base model"),
    "a control vector": ({"tensors": GOOD, "adapter": "control"}, "'adapter control'"),
    "an aLoRA": ({"tensors": GOOD, "adapter_alora_invocation_tokens": [1, 2]}, "alora.* otherwise than a LoRA"),
    "alpha": ({"tensors": GOOD, "alpha": float("nan")}, "alpha is nan"),
    "negative alpha": ({"tensors": GOOD, "alpha": -1.0}, "alpha is -1.0"),
    "no tensor": ({"tensors": {}}, "it has no tensor"),
    "one factor": ({"tensors": {k: GOOD[k] for k in [*GOOD][:1]}}, r"attn_q\.weight has no \.lora_b"),
    "the other factor": ({"tensors": {k: GOOD[k] for k in [*GOOD][1:]}}, r"attn_q\.weight has no \.lora_a"),
    "a norm": ({"tensors": GOOD | {"blk.0.attn_norm.weight": np.ones(64, np.float32)}}, "norm, which llama.cpp"),
    "a bias": ({"tensors": GOOD | {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "is no factor of a LoRA"),
    "an unknown tensor": ({"tensors": two("blk.0.attn_qkv.weight", 64, 64)}, "the model has no blk.0.attn_qkv.weight"),
    "a block too many": ({"tensors": two("blk.2.attn_q.weight", 64, 64)}, "the model has no blk.2.attn_q.weight"),
    "a norm's factors": ({"tensors": two("blk.0.attn_norm.weight", 64, 1)}, "the model has no blk.0.attn_norm"),
    "shapes": ({"tensors": two("blk.0.attn_q.weight", 64, 32)}, r"factors of \[3, 32\] and \[64, 3\] are none of 64"),
    "turned": ({"tensors": {"blk.0.attn_k.weight.lora_a": np.ones((64, 3), np.float32),
                            "blk.0.attn_k.weight.lora_b": np.ones((3, 32), np.float32)}}, "are none of 32 × 64"),
    "ranks": ({"tensors": {"blk.0.attn_q.weight.lora_a": np.ones((2, 64), np.float32),
                           "blk.0.attn_q.weight.lora_b": np.ones((64, 3), np.float32)}}, "are none of 64 × 64"),
    "types": ({"tensors": {k: np.ones(t.shape, np.int32) for k, t in GOOD.items()}}, "--outtype f32"),
    "not finite": ({"tensors": GOOD | {"blk.0.attn_q.weight.lora_b": np.full((64, 3), np.inf, np.float32)}},
                   "lora_b has numbers that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_with_the_reason(case, tmp_path):
    given, reason = BAD[case]
    path = file(tmp_path / "a.gguf", **given)
    with pytest.raises(AddendaError, match=reason):
        read(path, make("llama"))


@pytest.mark.parametrize("alpha", [None, 20.0])
@pytest.mark.parametrize(("tensor", "m", "n"), [("attn_v", 32, 64), ("ffn_down", 64, 96), ("ffn_up", 96, 64)])
def test_a_rank_above_the_smaller_side_is_read_as_the_product(tensor, m, n, alpha, tmp_path):
    tensors = two(f"blk.0.{tensor}.weight", m, n, rank=100)
    model, (A, B) = make("llama"), (torch.tensor(t).double() for t in tensors.values())
    forms = read(file(tmp_path / "a.gguf", tensors, alpha=alpha), model)
    ((method, p),) = forms.sites.values()
    expected = (alpha or 100.0) / 100.0 * B @ A
    assert method == LoRA(rank=min(m, n))
    assert (p["B"].double() @ p["A"].double() - expected).norm() <= 1e-6 * expected.norm()
    adapter = install(model, forms.sites, name="back")
    (pair,) = low_rank(adapter).values()
    assert (pair.B.double() @ pair.A.double() - expected).norm() <= 1e-6 * expected.norm()


def test_tied_models_and_models_that_were_not_tried(tmp_path):
    path = file(tmp_path / "a.gguf", two("output.weight", 64, 64))
    assert [*read(path, make("llama")).sites] == ["lm_head"]
    with pytest.raises(AddendaError, match="embedding and output head of this model are one weight"):
        read(path, make("llama", tie_word_embeddings=True))
    with pytest.raises(AddendaError, match="no transformers config"):
        read(path, torch.nn.Linear(2, 2))


def test_a_base_is_no_adapter(tmp_path):
    model = make("llama")
    with pytest.raises(AddendaError, match="base model: give it to llama"):
        read(write_base(model, tmp_path / "base.gguf"), model)


def test_a_rank_of_zeros_that_is_not_the_last_stays(tmp_path):
    tensors = two("blk.0.attn_v.weight", 32, 64)
    tensors["blk.0.attn_v.weight.lora_a"][1] = 0
    tensors["blk.0.attn_v.weight.lora_b"][:, 1] = 0
    ((method, p),) = read(file(tmp_path / "a.gguf", tensors), make("llama")).sites.values()
    assert method.rank == 3 and torch.equal(p["A"], torch.tensor(tensors["blk.0.attn_v.weight.lora_a"]))


def test_a_file_that_is_cut_is_damaged(tmp_path):
    model = make("qwen2")
    adapter = ad.attach(model, ad.LoRA(rank=2), targets="*.q_proj")
    path = write(low_rank(adapter), model.config, tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(AddendaError, match="ends behind the end of the file"):
        read(path, model)
