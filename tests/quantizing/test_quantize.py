"""Models in few bits: what is replaced, what a step takes, merging onto either base, and QLoRA over low-rank layers."""

import copy
import math

import pytest
import torch
from torch import nn

import addenda as ad
import shared
import toys
from addenda.compressing.layers import LowRankLinear
from addenda.core.base.errors import AddendaError
from addenda.core.packed.tensor import Packed, parts_of, values_of
from addenda.quantizing.quantize import FORMS, bits_of, dequantize, quantize

SITE = "model.layers.0.mlp.up_proj"


def make():
    return toys.make_llama(hidden_size=64, intermediate_size=128)


def text(rows=4, length=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, toys.VOCAB, (rows, length), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def packed(model):
    return {p: m.weight for p, m in model.named_modules() if isinstance(m._parameters.get("weight"), Packed)}


@pytest.mark.parametrize(("how", "least", "most"), [("nf4", 0.05, 0.12), ("int8", 0.003, 0.01), ("spqr", 0.08, 0.15)])
def test_quantize_takes_the_linears_and_reports_their_errors(ids, how, least, most):
    model = make()
    before = model(ids).logits.detach()
    errors = quantize(model, how, targets="mlp")
    assert len(errors) == 6 and all(least < e < most for e in errors.values())
    assert all(type(w.data) is FORMS[how] or isinstance(w, FORMS[how]) for w in packed(model).values())
    assert type(model.model.layers[0].self_attn.q_proj.weight) is nn.Parameter
    after = model(ids).logits.detach()
    assert 0 < float((after - before).norm() / before.norm()) < 0.5
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = math.inf
    with pytest.raises(AddendaError, match=r"layers\.0\.self_attn\.q_proj.*not finite"):
        quantize(model, how, targets="attention")
    assert type(model.model.layers[1].self_attn.q_proj.weight) is nn.Parameter
    held = sum(t.numel() * t.element_size() for w in packed(model).values() for t in parts_of(w))
    assert bits_of(model) == pytest.approx(8 * held / sum(w.numel() for w in packed(model).values()))


def test_what_cannot_be_quantised_is_refused(ids):
    model = make()
    for how, why in [("nf3", "no form 'nf3'.*nf4"), ("nf4:bits=3", "no option 'bits'"), ("spqr:bits=x", "no number")]:
        with pytest.raises(AddendaError, match=why):
            quantize(model, how)
    with pytest.raises(AddendaError, match="looks at weights only"):
        quantize(model, calibration=[text()])
    with pytest.raises(AddendaError, match="is packed"):
        bits_of(model)
    ad.attach(model, ad.LoRA(rank=2))
    with pytest.raises(AddendaError, match="Quantise first"):
        quantize(model)


def test_a_step_is_predicted_with_the_codes_as_weights():
    plain = make()
    dense = ad.plan(plain, ad.LoRA(rank=2), targets="linear", batch=2, length=8).step
    for how in ("nf4", "spqr"):
        model = copy.deepcopy(plain)
        quantize(model, how)
        step = ad.plan(model, ad.LoRA(rank=2), targets="linear", batch=2, length=8).step
        weights = packed(model).values()
        saved = sum(w.numel() * (4 - w.bits / 8) for w in weights)
        assert len(weights) == 14
        assert dense.weights - step.weights == pytest.approx(saved)
        largest = max(
            4 * w.numel() for w in weights
        )  # the values of one layer in the making, a few times; none is kept
        assert step.activations <= dense.activations + (2.1 if how != "spqr" else 8) * largest


@pytest.mark.parametrize("how", ["int8", "spqr"])
@pytest.mark.parametrize("name", ["lora", "dora", "shira", "oft", "svft", "houlsby"])
def test_methods_train_as_on_the_plain_weight(how, name, ids):
    held, outputs, gradients = toys.Tiny(), [], []
    quantize(held, how)
    twin = copy.deepcopy(held)
    dequantize(twin)
    for model in (held, twin):
        adapter = shared.attach(model, name, ids, targets="linear" if name != "houlsby" else None)
        shared.stir(adapter)
        y = model(ids)
        y.square().mean().backward()
        outputs.append(y.detach())
        gradients.append([p.grad for p in adapter.parameters()])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_every_method_acts_on_packed_weights_in_inference_mode(how, ids):
    seen = []
    for name in shared.NAMES:
        model = toys.Tiny().eval()
        quantize(model, how)
        try:
            shared.stir(shared.attach(model, name, ids, targets="linear"))
        except AddendaError:  # a patch, which puts numbers in the place of the base's
            continue
        with torch.no_grad():
            expected = model(ids)
        with torch.inference_mode():
            assert torch.equal(model(ids), expected), name
        seen.append(name)
    assert len(seen) > 40


@pytest.mark.parametrize("how", FORMS)
def test_views_of_packed_weights_are_those_of_their_values_in_inference_mode(how):
    W = FORMS[how].of(torch.randn(8, 64))
    views = [lambda W: W.t(), lambda W: W[1:3], lambda W: W.view(-1), lambda W: W.detach(), lambda W: W.float()]
    with torch.inference_mode():
        for view in views:
            assert torch.equal(values_of(view(W)), view(W.dense()))
        assert isinstance(W.detach(), Packed)
        with pytest.raises(AddendaError, match="would write into"):
            W.add_(1)


def test_statistics_make_spqr_closer_and_a_failure_gives_the_old_weights_back():
    plain, batches = make(), [text(8, 16, seed) for seed in range(4)]
    wanted = plain(**text(8, 16, 9)).logits.detach()

    def away(**options):
        model = copy.deepcopy(plain)
        quantize(model, "spqr:bits=2", **options)
        return float((model(**text(8, 16, 9)).logits.detach() - wanted).norm())

    assert away(calibration=batches) < 0.9 * away()
    broken = copy.deepcopy(plain)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    layers = [m for m in broken.modules() if isinstance(m, nn.Linear)]
    before = [m.weight for m in layers]
    with pytest.raises(AddendaError, match="not finite"):
        quantize(broken, "spqr", calibration=batches)
    assert all(m.weight is b for m, b in zip(layers, before, strict=True))


def test_a_calibration_without_a_mask_is_all_tokens():
    made = []
    for batch in (text(), {"input_ids": text()["input_ids"]}):
        model = make()
        quantize(model, "spqr", calibration=iter([batch]))
        made.append(packed(model)[SITE].dense())
    assert torch.equal(*made)


NONE = {
    "empty": ([], "holds no batch"),
    "one batch": (text(), "list of batches for the model, or a loader; got a dict"),
    "one tensor": (text()["input_ids"], "got a Tensor"),
    "a number": (5, "got a int"),
    "tensors": ([text()["input_ids"]], "Batch 0 of calibration= is a Tensor, and a dict of input_ids"),
    "other names": ([text(), {"x": torch.ones(2, 3)}], "Batch 1 of calibration= is a dict of x, and"),
    "lists": ([{"input_ids": [[1, 2]]}], "Batch 0 of calibration= is a dict of input_ids"),
    "padding alone": ([text() | {"attention_mask": torch.zeros(4, 12)}], "1 where a token is"),
}


@pytest.mark.parametrize("row", NONE)
def test_what_is_no_calibration_is_said_before_anything_is_packed(row):
    given, said = NONE[row]
    model = make()
    with pytest.raises(AddendaError, match=said):
        quantize(model, "spqr", calibration=given)
    assert not packed(model)


@pytest.mark.parametrize("how", FORMS)
def test_merging_onto_either_base_plain_or_packed_again(how, ids):
    plain = make()
    held = copy.deepcopy(plain)
    lost = quantize(held, how)
    adapter = ad.attach(held, ad.LoRA(rank=2), targets="mlp")
    shared.stir(adapter)
    bytes_before = [t.clone() for w in packed(held).values() for t in parts_of(w)]
    trained, batch = held(ids).logits.detach(), {"input_ids": ids}
    t = dict(adapter.sites())[SITE]
    change, W, mine = (t.B @ t.A).detach(), plain.get_submodule(SITE).weight.detach(), held.get_submodule(SITE)
    quantised = mine.weight.dense()

    report = ad.merge(held, verify=batch, base="full-precision", full=plain, requantize=True)
    kept = [w for w in packed(held).values()]
    assert len(kept) == 14 and isinstance(mine.weight, FORMS[how])
    again = FORMS[how].of(W + change)
    torch.testing.assert_close(mine.weight.dense(), again.dense())
    assert report.sites[SITE] == pytest.approx(float((again.dense() - W - change).norm() / change.norm()), rel=1e-3)
    ways = report.ways
    assert set(ways) == {f"{b}{a}" for b in ("as-trained", "full-precision") for a in ("", ", packed again")}
    assert ways["as-trained"].weights < 1e-6 and ways["as-trained"].output < 1e-5
    assert ways["full-precision"].weights == pytest.approx(sum(lost.values()) / len(lost), rel=0.25)
    assert "packed again" in str(report) and ways["full-precision"].kl >= 0
    after = held(ids).logits.detach()
    away = float((after - trained).norm() / trained.norm())
    assert away == pytest.approx(report.output, rel=1e-3) == pytest.approx(ways["full-precision, packed again"].output)
    ad.unmerge(held)
    assert all(map(torch.equal, bytes_before, [t for w in packed(held).values() for t in parts_of(w)]))
    torch.testing.assert_close(held(ids).logits, trained, rtol=1e-4, atol=1e-5)

    ad.merge(held, base="full-precision", full=plain)
    assert not packed(held)  # where no adapter acts the plain weights are back too
    torch.testing.assert_close(mine.weight, W + change, rtol=1e-5, atol=1e-6)
    q = "model.layers.1.self_attn.q_proj"
    assert torch.equal(held.get_submodule(q).weight, plain.get_submodule(q).weight)
    ad.unmerge(held)
    assert len(packed(held)) == 14
    ad.merge(held, requantize=True)
    torch.testing.assert_close(mine.weight.dense(), mine.weight.again(quantised + change).dense())
    ad.unmerge(held)
    with pytest.raises(AddendaError, match="loses more than allow_loss"):
        ad.merge(held, requantize=True, allow_loss=1e-4)
    assert all(map(torch.equal, bytes_before, [t for w in packed(held).values() for t in parts_of(w)]))
    ad.merge(held, base="full-precision", full=plain)
    ad.detach(held, keep_merged=True)
    torch.testing.assert_close(mine.weight, W + change, rtol=1e-5, atol=1e-6)


def test_a_merge_that_makes_no_sense_is_refused(ids):
    plain = make()
    ad.attach(plain, ad.LoRA(rank=2))
    for options, why in [
        ({"base": "both"}, "must be 'as-trained'"), ({"base": "full-precision"}, "full=the plain model"),
        ({"requantize": True}, "one way to merge"), ({"full": make()}, "one way to merge"),
    ]:  # fmt: skip
        with pytest.raises(AddendaError, match=why):
            ad.merge(plain, **options)
    held = make()
    quantize(held)
    adapter = ad.attach(held, ad.LoRA(rank=2))
    shared.stir(adapter)
    before = held(ids).logits.detach()
    with pytest.raises(AddendaError, match="has no plain weight"):
        ad.merge(held, base="full-precision", full=toys.make_llama())
    torch.testing.assert_close(held(ids).logits, before)
    assert len(packed(held)) == 14


def test_dequantize_gives_either_values_back(ids):
    plain = make()
    held = copy.deepcopy(plain)
    lost = quantize(held)
    assert dequantize(held, plain) == pytest.approx(lost, rel=1e-4)
    assert torch.equal(held(ids).logits, plain(ids).logits)
    assert len(quantize(held)) == 14
    assert set(dequantize(held).values()) == {0.0}
    with pytest.raises(AddendaError, match="nothing to unpack"):
        dequantize(held)
    quantize(held)
    with pytest.raises(AddendaError, match="has no plain weight"):
        dequantize(held, toys.make_llama())


@pytest.mark.parametrize("how", FORMS)
def test_qlora_over_low_rank_layers(how):
    """Compressed, quantised, adapted: only the adapter learns, the bytes are counted, the outputs are the values'."""
    model = make()
    for path in [p for p, m in model.named_modules() if p.endswith(("up_proj", "down_proj"))]:
        W, (parent, leaf) = model.get_submodule(path).weight.detach().double(), path.rsplit(".", 1)
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        layer = LowRankLinear.of(U[:, :32] * S[:32], V[:32], None, torch.float32)
        setattr(model.get_submodule(parent), leaf, layer)
    factors = quantize(model, how, targets=["first", "second"])
    assert len(factors) == 8
    stored = sum(t.numel() * t.element_size() for w in packed(model).values() for t in parts_of(w))
    m, n, r = 128, 64, 32
    each = {
        "nf4": lambda m, n: m * n / 2 + m * n / 64 + 4 * -(-m * n // (64 * 256)),
        "int8": lambda m, n: m * n + 4 * m,
        "spqr": lambda m, n: m * n * (3 + 6 / 16 + 64 / 256) / 8 + 4 * round(0.01 * m * n) + 4 * (m + 1) + 4,
    }[how]
    assert stored == 2 * (each(r, n) + each(m, r) + each(r, m) + each(n, r))
    twin = copy.deepcopy(model)
    dequantize(twin)
    adapter = ad.attach(model, ad.LoRA(rank=4), targets=["first", "second"])
    optimizer = torch.optim.Adam(adapter.parameters(), 5e-2)
    batch, losses = text(4, 12), []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        own = {id(p) for p in adapter.parameters()}
        assert {id(p) for p in model.parameters() if p.grad is not None} == own and len(own) == 16
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    other = ad.attach(twin, ad.LoRA(rank=4), targets=["first", "second"])
    other.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, rtol=1e-4, atol=1e-5)


def test_a_conversion_of_packed_weights_is_undone_with_the_merge(ids):
    held = make()
    quantize(held, "int8")
    shared.stir(ad.attach(held, ad.LoRA(rank=2), targets="mlp"), 1e-4)
    codes = {p: [t.clone() for t in parts_of(w)] for p, w in packed(held).items()}
    y = held(ids).logits.detach()

    def as_before():
        found = packed(held)
        same = all(w.dtype == torch.float32 and all(map(torch.equal, parts_of(w), codes[p])) for p, w in found.items())
        return same and found.keys() == codes.keys() and torch.equal(held(ids).logits.detach(), y)

    with pytest.raises(AddendaError, match="The merge was undone"):
        ad.merge(held, dtype=torch.bfloat16)
    assert as_before()
    ad.merge(held, dtype=torch.bfloat16, allow_loss=1.0, full=make(), verify={"input_ids": ids})
    assert held(ids).logits.dtype == torch.bfloat16 and len(packed(held)) == 8
    ad.unmerge(held)
    assert as_before()


def test_stacked_experts_stay_plain_and_a_warning_says_so(mixtral):
    stacks = {p: w for p, w in mixtral.named_parameters() if "expert" in p and w.dim() == 3}
    assert len(stacks) == 4
    with pytest.warns(UserWarning, match=r"model\.layers\.\*\.mlp\.experts\.gate_up_proj, model") as caught:
        errors = quantize(mixtral, "int8")
    assert len(caught) == 1 and caught[0].filename == __file__ and "\n" not in str(caught[0].message)
    numbers = sum(w.numel() for p, w in mixtral.named_parameters() if ".mlp." in p)
    assert str(caught[0].message).startswith(f"{numbers:,} numbers of this MixtralForCausalLM stay plain")
    assert {p.rpartition(".")[2] for p in errors} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for options in ({"targets": "attention"}, {"exclude": ["*.experts.*", "*.gate.weight"]}):
        quantize(toys.make_mixtral(), "int8", **options)  # warnings are errors
    quantize(toys.make_vit(), "int8")  # its position embeddings weigh little


def test_saving_packed_weights_says_what_to_do_instead(tmp_path, ids):
    from safetensors.torch import save_file

    model = make()
    quantize(model)
    for save in (lambda: model.save_pretrained(tmp_path), lambda: save_file(model.state_dict(), tmp_path / "x")):
        with pytest.raises(AddendaError, match=r"kept as NF4Tensor has no storage.*dequantize\(model\)"):
            save()
    y = model(ids).logits
    dequantize(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(ids).logits, y)
