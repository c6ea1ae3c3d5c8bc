"""Every form that a file has of a change comes to the ΔW that its format says, in dense float64 algebra."""

import pytest
import torch
from torch import Tensor, nn

from addenda.core.site.site import site_at
from addenda.exporting.deltas import changed_sites, delta
from addenda.exporting.install import install
from addenda.exporting.kohya.forms import UNREAD, MisfitError, form_of
from diffusion import spread

M, N, K = 12, 8, 3


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.point = nn.Linear(N, M), nn.Conv2d(N, M, 1)
        self.conv, self.line = nn.Conv2d(N, M, K), nn.Conv1d(N, M, K)
        spread(self)


def kernel(layer: str) -> tuple[int, ...]:
    return {"linear": (), "point": (1, 1), "conv": (K, K), "line": (K,)}[layer]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.5


def lora(layer, r=2, alpha=None):
    k = kernel(layer)
    down, up = normal(r, N, *k), normal(M, r, *[1] * len(k))
    given = {"lora_down.weight": down, "lora_up.weight": up}
    change = torch.einsum("mr,rn...->mn...", up.double().reshape(M, r), down.double())
    return given | alphas(alpha), change * (1 if alpha is None else alpha / r)


def alphas(alpha):
    return {} if alpha is None else {"alpha": torch.tensor(float(alpha))}


def tucker(core, left, right):
    """Σ left[m, i] core[i, j, …] right[j, n]."""
    return torch.einsum("mi,ij...,jn->mn...", left.double(), core.double(), right.double())


def locon_tucker(layer, r=2, alpha=1.0):
    k = kernel(layer)
    ones = [1] * len(k)
    down, mid, up = normal(r, N, *ones), normal(r, r, *k), normal(M, r, *ones)
    given = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, **alphas(alpha)}
    return given, tucker(mid, up.reshape(M, r), down.reshape(r, N)) * (alpha / r)


def loha(layer, r=2, alpha=3.0):
    k = kernel(layer)
    wide = N * torch.Size(k).numel()
    w = [normal(M, r), normal(r, wide), normal(M, r), normal(r, wide)]
    given = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), w, strict=True)) | alphas(alpha)
    d = [t.double() for t in w]
    return given, ((d[0] @ d[1]) * (d[2] @ d[3]) * (alpha / r)).reshape(M, N, *k)


def loha_tucker(layer, r=2, alpha=1.0):
    k = kernel(layer)
    given, change = alphas(alpha), torch.ones(M, N, *k, dtype=torch.float64) * (alpha / r)
    for i in "12":
        a, b, t = normal(r, M), normal(r, N), normal(r, r, *k)
        given |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b, f"hada_t{i}": t}
        change = change * tucker(t, a.T, b)
    return given, change


def lokr(layer, u=2, v=2, r=1, alpha=2.0, *, split=False, full=False, core=False):
    """C ⊗ (second factor), C u × v; each in parts, or whole."""
    k, rows, columns = kernel(layer), M // u, N // v
    given: dict[str, Tensor] = alphas(alpha)
    scale = alpha / r
    if split:
        a, b = normal(u, r), normal(r, v)
        given |= {"lokr_w1_a": a, "lokr_w1_b": b}
        C = a.double() @ b.double()
    else:
        given["lokr_w1"] = C = normal(u, v)
    if full:
        given["lokr_w2"] = second = normal(rows, columns, *k)
        scale = scale if split else 1.0
    elif core:
        a, b, t = normal(r, rows), normal(r, columns), normal(r, r, *k)
        given |= {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
        second = tucker(t, a.T, b)
    else:
        a, b = normal(rows, r), normal(r, columns * torch.Size(k).numel())
        given |= {"lokr_w2_a": a, "lokr_w2_b": b}
        second = (a.double() @ b.double()).reshape(rows, columns, *k)
    wide = C.double().reshape(u, v, *[1] * len(k))
    return given, torch.kron(wide, second.double().contiguous()) * scale


CASES = {
    "lora": (lora, ("linear", "point", "conv", "line"), {}),
    "lora with alpha": (lora, ("linear", "conv"), {"alpha": 0.5}),
    "lora above the rank": (lora, ("linear", "conv"), {"r": 9, "alpha": 4.0}),
    "lora far above": (lora, ("linear", "conv", "point"), {"r": 20}),
    "locon tucker": (locon_tucker, ("conv", "line"), {}),
    "loha": (loha, ("linear", "point", "conv", "line"), {}),
    "loha tucker": (loha_tucker, ("conv", "line"), {}),
    "lokr": (lokr, ("linear", "point", "conv", "line"), {}),
    "lokr whole": (lokr, ("linear", "point", "conv"), {"full": True}),
    "lokr in parts": (lokr, ("linear", "conv"), {"split": True}),
    "lokr in parts and whole": (lokr, ("linear", "conv"), {"split": True, "full": True}),
    "lokr tucker": (lokr, ("conv", "line"), {"core": True, "r": 2}),
    "lokr that is no LoKr": (lokr, ("linear", "conv"), {"u": 6, "v": 4}),
    "lokr that is wide": (lokr, ("linear", "conv"), {"u": 2, "v": 8}),
    "lokr that is tall": (lokr, ("linear", "conv"), {"u": 12, "v": 1}),
    "lokr that is no LoKr, whole": (lokr, ("linear", "conv"), {"u": 6, "v": 4, "full": True}),
    "lokr of a high rank": (lokr, ("linear", "conv"), {"r": 5}),
}
EACH = [(name, layer) for name, (_, layers, _) in CASES.items() for layer in layers]


@pytest.mark.parametrize(("name", "layer"), EACH, ids=[f"{n}-{layer}" for n, layer in EACH])
def test_the_change_is_the_formats(name, layer):
    make, _, options = CASES[name]
    given, expected = make(layer, **options)
    model = Layers()
    form = form_of(site_at(model, layer), given)
    adapter = install(model, {layer: (form.method, form.tensors)}, name="read", activate=True)
    ((site, tensors),) = changed_sites(adapter)
    change = site.kind.from_matrix(delta(site, tensors), site.weight)
    assert expected.norm() > 0.1
    torch.testing.assert_close(change, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(half):
    given, _ = lora("linear")
    site = site_at(Layers(), "linear")
    form = form_of(site, {k: t.to(half) for k, t in given.items()})
    assert torch.equal(form.tensors["A"], given["lora_down.weight"].to(half).float())


def test_what_keeps_its_form_keeps_it():
    site = site_at(Layers(), "linear")
    methods = {name: form_of(site, CASES[name][0]("linear", **CASES[name][2])[0]) for name, layer in EACH
               if layer == "linear"}  # fmt: skip
    kinds = {name: f.method.name for name, f in methods.items()}
    assert kinds["lora"] == "lora" and kinds["loha"] == "loha" and kinds["lokr"] == "lokr"
    assert kinds["lokr that is no LoKr"] == "lora"
    noted = {name for name, f in methods.items() if f.note}
    assert noted == {n for n in methods if "no LoKr" in n or "above" in n or "wide" in n or "tall" in n}


def test_dora_turns_the_rows_to_the_lengths_that_are_stored():
    model = Layers()
    for layer in ("linear", "conv"):
        given, change = lora(layer, alpha=1.0)
        site = site_at(model, layer)
        W = site.weight.detach().double()
        lengths = W.flatten(1).norm(dim=1) * torch.linspace(0.5, 2, M)
        V = W + change
        expected = V * (lengths / V.flatten(1).norm(dim=1)).reshape(M, *[1] * (W.dim() - 1))
        stored = lengths.float().reshape(M, *[1] * (W.dim() - 1))
        form = form_of(site, {**given, "dora_scale": stored})
        assert form.method.name == "dora"
        adapter = install(model, {layer: (form.method, form.tensors)}, name=layer)
        ((_, tensors),) = changed_sites(adapter)
        change = site.kind.from_matrix(delta(site, tensors), site.weight)
        torch.testing.assert_close(W + change, expected, rtol=1e-5, atol=1e-6)


def changed(given, drop=(), **more):
    return {k: t for k, t in given.items() if k not in drop} | more


LORA, LOHA, LOKR = lora("linear", alpha=1.0)[0], loha("linear")[0], lokr("linear")[0]
BAD = {
    "lora_up.weight missing": changed(LORA, ["lora_up.weight"]),
    "lora_down.weight missing": changed(LORA, ["lora_down.weight"]),
    "hada_w2_a missing": changed(LOHA, ["hada_w2_a"]),
    "lokr_w2_b missing": changed(LOKR, ["lokr_w2_b"]),
    "alpha without factors": alphas(1.0),
    "alpha is 0": LORA | alphas(0.0),
    "alpha is -2": LORA | alphas(-2.0),
    r"alpha is \[2\]": LORA | {"alpha": torch.ones(2)},
    r"lora_up is \[12, 3\], expected \[12, 2\]": LORA | {"lora_up.weight": normal(M, 3)},
    r"lora_down is \[2, 9\], expected \[2, 8\]": LORA | {"lora_down.weight": normal(2, 9)},
    r"lora_down is \[2, 8, 3, 3\], expected \[2, 8\]": LORA | {"lora_down.weight": normal(2, N, 3, 3)},
    r"lora_mid is \[2, 2\]": LORA | {"lora_mid.weight": normal(2, 2)},
    r"hada_w1_b is \[3, 8\]|hada_w1_a is \[12, 2\]": LOHA | {"hada_w1_b": normal(3, 8)},
    "hada_t1 alone": LOHA | {"hada_t1": normal(2, 2, 3, 3)},
    "does not divide 12 × 8": LOKR | {"lokr_w1": normal(5, 2)},
    r"lokr_w2_a is \[6, 2\]": LOKR | {"lokr_w2_a": normal(6, 2)},
    "have no product": changed(LOKR, ["lokr_w1"], lokr_w1_a=normal(2, 3), lokr_w1_b=normal(2, 2)),
    "whole factor and the parts": LOKR | {"lokr_w2": normal(6, 4)},
    "lora_up.weight beside hada|hada_w1_a, .* beside lora": LORA | LOHA,
    r"one number for each of 12 outputs .* one for each input": LORA | {"dora_scale": torch.ones(1, N)},
    "dora_scale with a change that is no LoRA": LOHA | {"dora_scale": torch.ones(M, 1)},
    "lora_down.weight is a single number": LORA | {"lora_down.weight": torch.ones(())},
    "hada_w1_b is a single number": LOHA | {"hada_w1_b": torch.ones(())},
    "lokr_w2_a is a single number": LOKR | {"lokr_w2_a": torch.ones(())},
    r"lora_down.weight is \[0, 8\], which holds no number": (
        LORA | {"lora_down.weight": normal(0, N), "lora_up.weight": normal(M, 0)}
    ),
    r"lora_mid.weight is \[0, 0, 3, 3\], which holds no number": LORA | {"lora_mid.weight": normal(0, 0, 3, 3)},
    r"hada_w1_a is \[12, 0\], which holds no number": LOHA | {"hada_w1_a": normal(M, 0), "hada_w1_b": normal(0, N)},
    r"lokr_w2_a is \[6, 0\], which holds no number": LOKR | {"lokr_w2_a": normal(6, 0), "lokr_w2_b": normal(0, 4)},
    "unknown tensors weight": {"weight": torch.ones(M, N)},
}


@pytest.mark.parametrize("reason", BAD)
def test_what_does_not_fit_is_named(reason):
    with pytest.raises(MisfitError, match=reason):
        form_of(site_at(Layers(), "linear"), BAD[reason])


@pytest.mark.parametrize("suffix", UNREAD)
def test_methods_without_a_counterpart_are_named(suffix):
    with pytest.raises(MisfitError, match="this is not read"):
        form_of(site_at(Layers(), "linear"), {suffix: torch.ones(2, 2), "alpha": torch.tensor(1.0)})


def test_nothing_is_multiplied_before_shapes_are_looked_at():
    site = site_at(Layers(), "linear")
    huge = torch.zeros(1, 1).expand(100_000, 100_000)  # no memory until somebody writes
    with pytest.raises(MisfitError, match="does not divide"):
        form_of(site, {"lokr_w1_a": huge[:, :1], "lokr_w1_b": huge[:1], "lokr_w2": torch.zeros(2, 2)})
