"""The layers against the dense product, and folders that transformers reads by itself."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import addenda as ad
import toys
from addenda.compressing.dense import to_dense
from addenda.compressing.folder import LowRankConfig, put, put_layers
from addenda.compressing.layers import LowRankLinear, PivotLinear
from addenda.core.base.errors import AddendaError
from tiny_models import make_tokenizer

FORMS = [LowRankLinear, PivotLinear]


def factors(m=10, n=7, r=4):
    return torch.randn(m, r, dtype=torch.float64), torch.randn(r, n, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_they_are_the_dense_product(form, bias):
    B, A = factors()
    b = torch.randn(10, dtype=torch.float64) if bias else None
    layer = form.of(B, A, b, torch.float64)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, B @ A, b), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.weight, B @ A, rtol=0, atol=1e-10)
    stored = sum(p.numel() for p in layer.parameters()) - (10 if bias else 0)
    assert stored == 4 * (10 + 7) - (16 if form is PivotLinear else 0)
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.of(B, A, b, torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_they_share_nothing_with_what_they_are_made_of(form):
    given = [torch.randn(10, 4), torch.randn(4, 7), torch.randn(10)]
    kept = [t.clone() for t in given]
    layer = form.of(*given, torch.float32)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1)
    assert all(map(torch.equal, given, kept))


def compressed(model, form="factors", rank=3):
    """The model with low-rank layers in place of its MLPs', and what says so."""
    entries = {}
    for path, module in list(model.named_modules()):
        if path.endswith(("up_proj", "down_proj")):
            B, _, A = torch.linalg.svd(module.weight.detach().double(), full_matrices=False)
            made = {"factors": LowRankLinear, "pivot": PivotLinear}[form]
            put(model, path, made.of(B[:, :rank], A[:rank], module.bias, torch.float32))
            entries[path] = {"rank": rank, "bias": module.bias is not None, "form": form}
    model.config.quantization_config = LowRankConfig(entries)
    return model


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_transformers_loads_a_folder_in_a_fresh_process(tmp_path, form, ids):
    model = compressed(toys.make_llama(), form)
    model.save_pretrained(tmp_path / "low")
    torch.save((ids, model(ids).logits.detach()), tmp_path / "wanted.pt")
    code = """
import sys, torch
{first}
{second}
ids, wanted = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
assert type(model).__name__ == "LlamaForCausalLM"
torch.testing.assert_close(model(ids).logits, wanted)
model.save_pretrained(sys.argv[1] + "-again")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "-again", dtype=torch.bfloat16)
assert model.model.layers[0].mlp.up_proj.rank == 3
assert {{p.dtype for p in model.parameters()}} == {{torch.bfloat16}}
model.train().requires_grad_(True)(ids, labels=ids).loss.backward()
assert model.model.layers[0].mlp.up_proj.first.weight.grad is not None
"""
    lines = ["import addenda", "from transformers import AutoModelForCausalLM"]
    for order in (lines, lines[::-1]) if form == "factors" else (lines,):
        script = code.format(first=order[0], second=order[1])
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "low"), str(tmp_path / "wanted.pt")],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_a_dense_checkpoint_needs_no_addenda(tmp_path, ids):
    model = compressed(toys.make_llama())
    model.save_pretrained(tmp_path / "low")
    make_tokenizer().save_pretrained(tmp_path / "low")
    to_dense(tmp_path / "low", tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    torch.save((ids, model(ids).logits.detach()), tmp_path / "wanted.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
ids, wanted = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
assert not any(name.split(".")[0] == "addenda" for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "dense"), str(tmp_path / "wanted.pt")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with pytest.raises(AddendaError, match="no low-rank layers"):
        to_dense(tmp_path / "dense", tmp_path / "more")
    with pytest.raises(AddendaError, match="is there already"):
        to_dense(tmp_path / "low", tmp_path / "dense")
    to_dense(tmp_path / "low", tmp_path / "half", dtype="bf16")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["int8", "nn", "float33", ""])
def test_a_dtype_that_is_none_is_said_before_anything_is_read(dtype, tmp_path):
    with pytest.raises(AddendaError, match=r"dtype must be 'auto', 'float32'"):
        to_dense(tmp_path / "nothing here", tmp_path / "dense", dtype=dtype)


def test_the_bare_model_and_one_with_a_head_read_each_others_folders(tmp_path, ids):
    model = compressed(toys.make_llama())
    model.save_pretrained(tmp_path / "low")
    bare, info = AutoModel.from_pretrained(tmp_path / "low", output_loading_info=True)
    assert type(bare.layers[0].mlp.up_proj) is LowRankLinear and not info["missing_keys"]
    wanted = model.model(ids).last_hidden_state
    torch.testing.assert_close(bare(ids).last_hidden_state, wanted)
    bare.save_pretrained(tmp_path / "again")  # its configuration names the paths with the head still
    for kind in (AutoModel, AutoModelForCausalLM):
        again = kind.from_pretrained(tmp_path / "again")
        torch.testing.assert_close(getattr(again, "model", again)(ids).last_hidden_state, wanted)
    entries = model.config.quantization_config.layers
    bare.config.quantization_config = LowRankConfig({p.removeprefix("model."): e for p, e in entries.items()})
    bare.save_pretrained(tmp_path / "bare")
    headed = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    torch.testing.assert_close(headed.model(ids).last_hidden_state, wanted)


def test_a_heads_own_layers_are_not_the_bare_models(bert):
    layers = {"bert.pooler.dense": {"rank": 2, "bias": True}, "classifier": {"rank": 1, "bias": True}}
    put_layers(bert.bert, layers)
    assert type(bert.bert.pooler.dense) is LowRankLinear and type(bert.classifier) is nn.Linear
    with pytest.raises(AddendaError, match="classifier: the model has no such layer"):
        put_layers(bert.bert, {"classifier": {"rank": 1}})
    put_layers(bert, {"classifier": {"rank": 1, "bias": True}})
    assert type(bert.classifier) is LowRankLinear


def test_adapters_attach_to_the_factors(ids):
    model = compressed(toys.make_llama())
    before = model(ids).logits.detach()
    adapter = ad.attach(model, ad.LoRA(rank=1), targets="mlp")
    assert "model.layers.0.mlp.up_proj.first" in adapter.methods
    assert torch.equal(model(ids).logits.detach(), before)
    model(ids).logits.square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    ad.detach(model)


def test_entries_that_do_not_fit_change_nothing():
    model = toys.make_llama()
    good = {"model.layers.0.mlp.up_proj": {"rank": 2, "bias": False}}
    for wrong, says in (
        ({"model.layers.9.mlp.up_proj": {"rank": 2}}, "has no such layer"),
        ({"model.embed_tokens": {"rank": 2}}, "is no linear layer"),
        ({"model.layers.0.mlp.down_proj": {"rank": 10**9}}, "cannot have the rank"),
        ({"model.layers.0.mlp.down_proj": {"rank": 2, "form": "magic"}}, "form 'magic'"),
    ):
        with pytest.raises(AddendaError, match=says):
            put_layers(model, good | wrong)
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
