"""Every type of PEFT 0.21.2 is read, or refused by its name with a reason and a way out."""

import json

import pytest
import torch
from bench.peft_parity import base_of, quiet
from bench.peft_rows import Row
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from addenda import AddendaError, attach
from addenda.core.adapter.assign import unfit
from addenda.core.method.catalogue import build
from addenda.core.site.site import site_at
from addenda.core.state.state import find_state
from addenda.exporting.install import install
from addenda.exporting.peft.read import read
from addenda.exporting.peft.table import CONVERSIONS, conversion_for, why_not
from addenda.exporting.peft.write import write
from peft_checks import CONFIG, WEIGHTS, refused, saved


def types() -> list[str]:
    from peft.utils.peft_types import PeftType

    return [t.value for t in PeftType]


def test_a_conversion_stands_under_its_own_type():
    assert all(kind == c.type for kind, c in CONVERSIONS.items())
    assert not any(set(c.reads) & set(c.ignores) for c in CONVERSIONS.values())
    assert set(CONVERSIONS) <= set(types())


def test_the_others_are_refused_by_name_with_a_way_out(tmp_path):
    model, others = base_of(Row("")), [t for t in types() if t not in CONVERSIONS]
    save_file({"base_model.model.x.w": torch.ones(2)}, tmp_path / WEIGHTS)
    assert {"RANDLORA", "FOURIERFT", "PSOFT", "PROMPT_TUNING", "HIRA", "LILY", "XLORA"} <= set(others)
    for kind in others:
        (tmp_path / CONFIG).write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(AddendaError, match=f"is a {kind} adapter of PEFT") as error:
            read(tmp_path, model)
        assert any(way in str(error.value) for way in ("addenda extract", "Train addenda's", "Keep it in PEFT")), kind
    assert find_state(model) is None


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("RANDLORA", {"r": 8}, "by a generator of its own.*addenda extract"),
        ("FOURIERFT", {"n_frequency": 20}, "positions .* are in no tensor.*addenda extract"),
        ("PSOFT", {"r": 8}, "singular vectors.*addenda extract"),
    ],
)
def test_folders_that_say_too_little_are_refused_with_the_way_out(kind, options, reason, tmp_path):
    refused(saved(tmp_path / "a", kind, target_modules=["q_proj"], **options), reason)


def test_prompts_are_refused_with_what_to_train_instead():
    for kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"):
        assert "prompt or prefix method" in why_not(kind)


class One(nn.Module):
    """One layer, and what it is called with."""

    def __init__(self, layer: nn.Module, x: Tensor):
        super().__init__()
        self.layer, self.x = layer, x

    def forward(self) -> Tensor:
        return self.layer(self.x)


def one(kind: str) -> One:
    """A model of one layer of a kind, the same every time."""
    torch.manual_seed(0)
    grid, line = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 7)
    made = {
        "linear": (nn.Linear(16, 8, bias=False), torch.randn(3, 16)),
        "linear with a bias": (nn.Linear(16, 8), torch.randn(3, 16)),
        "Conv1D": (Conv1D(8, 16), torch.randn(3, 16)),
        "embedding": (nn.Embedding(16, 8), torch.arange(10)),
        "over a line": (nn.Conv1d(8, 8, 3, padding=1), line),
        "over a line, circular": (nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"), line),
        "of one tap": (nn.Conv2d(8, 8, 1), grid),
        "of one tap without a bias": (nn.Conv2d(8, 8, 1, bias=False), grid),
        "of one tap, in groups": (nn.Conv2d(8, 8, 1, groups=2, bias=False), grid),
        "of nine taps": (nn.Conv2d(8, 8, 3, padding=1, stride=2, bias=False), grid),
        "of nine taps, in groups": (nn.Conv2d(8, 8, 3, groups=2, bias=False), grid),
        "of nine taps, dilated": (nn.Conv2d(8, 8, 3, dilation=2, bias=False), grid),
        "of nine taps, uneven": (nn.Conv2d(8, 8, 3, padding=(1, 0), bias=False), grid),
        "of nine taps, the same size": (nn.Conv2d(8, 8, 3, padding="same", bias=False), grid),
        "of nine taps, circular": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", bias=False), grid),
        "of two taps": (nn.Conv2d(8, 8, (1, 2), bias=False), grid),
        "over a body": (nn.Conv3d(8, 8, 1, bias=False), torch.randn(2, 8, 2, 3, 3)),
    }
    return One(*made[kind]).eval()


KINDS = (
    "linear", "linear with a bias", "Conv1D", "embedding", "over a line", "over a line, circular", "of one tap",
    "of one tap without a bias", "of one tap, in groups", "of nine taps", "of nine taps, in groups",
    "of nine taps, dilated", "of nine taps, uneven", "of nine taps, the same size", "of nine taps, circular",
    "of two taps", "over a body",
)  # fmt: skip
METHODS = {
    "loha:rank=2": 12, "lokr:rank=1,factor=2": 12, "krona:factor=4": 5, "ia3": 11, "ia3:side=in": 6, "miss:rank=3": 2,
    "miss:rank=4,mini=2": 2, "bat:rank=4": 2, "oft:block=4": 5, "oft:block=4,terms=5": 5,
    "oft:block=4,block_share=true": 5, "boft:block=4,levels=1": 5, "boft:block=4,levels=1,scale=true": 5,
    "hra:rank=2": 5, "c3a:block=4": 2, "vb-lora:rank=2,vectors=8,length=4": 3, "road:group=4": 1,
}  # fmt: skip


@pytest.mark.parametrize("spec", METHODS)
def test_where_a_route_is_exact_peft_computes_the_same(spec, tmp_path, monkeypatch):
    """Over every kind of layer: the promise of the page of doors. The numbers are how many layers of these pass."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    kept = []
    for kind in KINDS:
        model, method = one(kind), build(spec)
        site = site_at(model, "layer")
        if unfit(site, method):
            continue
        conversion, route = conversion_for(method, site)
        assert route.why
        if conversion is None or conversion.type == "LORA":
            continue
        base = model()
        adapter = attach(model, method, targets=["layer"])
        with torch.no_grad():
            for p in adapter.parameters():
                p += 0.3 * torch.randn(p.shape)
        folder = tmp_path / str(len(kept))
        folder.mkdir()
        write(adapter, folder)
        with quiet(), torch.no_grad():
            theirs, ours = PeftModel.from_pretrained(one(kind), str(folder))(), model()
        assert (ours - base).abs().max() >= 0.01 * ours.abs().max(), kind
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()), msg=kind)
        back = one(kind)
        forms = read(folder, back)
        install(back, forms.sites, name="x", pools=forms.pools, activate=True)
        torch.testing.assert_close(back(), ours, rtol=0, atol=1e-5 * float(ours.abs().max()), msg=kind)
        kept.append(kind)
    assert len(kept) == METHODS[spec], kept
