"""How factors lie in a folder, against the dense change that PEFT itself computes from them."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.site.site import owners_of, site_at
from addenda.exporting.peft import layout
from addenda.exporting.peft.conversion import Saved
from peft_folders import WEIGHTS, by_peft, given, in_addenda, in_peft, outputs, same, take


class Experts(nn.Module):
    """Three matrices stored as (experts, inputs, outputs), as GPT-OSS has them, or as (experts, outputs, inputs)."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        self.stack = nn.Parameter(torch.randn(3, 6, 4))
        self.matrix = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        a = x[..., : self.stack.shape[1]] @ self.stack.sum(0)
        return a + x @ self.matrix.T


class Holder(nn.Module):
    def __init__(self, transposed: bool):
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts(transposed)

    def forward(self, x):
        return self.experts(x)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_lie_as_peft_has_them_and_raw_matrices_too(transposed, tmp_path):
    def make() -> nn.Module:
        return Holder(transposed)

    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.stack", "experts.matrix"])
    base, wanted = outputs(make(), X), by_peft(make, config, tmp_path / "peft", X)
    adapter, found = in_addenda(make, tmp_path / "peft", X)
    same(found, wanted, base)
    assert dict(adapter.sites())["experts.stack"].B.shape == (3, 6, 2)
    same(in_peft(make, given(adapter, tmp_path / "back"), X), wanted, base)


@pytest.mark.parametrize("transposed", [False, True])
def test_factors_and_what_is_laid_out_are_each_others_inverse(transposed):
    model = Holder(transposed)
    owners = owners_of(model)
    for name, shape in (("stack", (3, 6, 4)), ("matrix", (4, 6))):
        site = site_at(model, f"experts.{name}", owners)
        B, A = torch.randn(*shape[:-1], 2), torch.randn(*shape[:-2], 2, shape[-1])
        (place,) = layout.places(site, owners)
        tensors, rank = layout.laid_out(place, site, B, A)
        saved = Saved(site, tensors, raw=place.raw)
        assert place.raw and rank == 2
        assert {k: tuple(t.shape) for k, t in tensors.items()} == {
            k: tuple(s) for k, s in layout.shapes(saved, 2).items()
        }
        back = layout.factors(saved, 2)
        assert torch.equal(back[0], B) and torch.equal(back[1], A)


def make_grouped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 5))


IMAGE = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_grouped_convolution_is_read_where_each_group_keeps_to_its_inputs(tmp_path):
    base = outputs(make_grouped(), IMAGE)

    def keep_to_itself(model) -> None:
        weight = model.base_model.model[0].lora_A.default.weight
        with torch.no_grad():
            weight[:2, 2:] = 0
            weight[2:, :2] = 0

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    by_peft(make_grouped, config, tmp_path / "across", IMAGE, size=0.3)
    with pytest.raises(AddendaError, match="reads the inputs of all groups"):
        take(make_grouped(), tmp_path / "across")
    # get_peft_model, moved, then each group's rows cut to its own inputs
    wanted = by_peft(make_grouped, config, tmp_path / "within", IMAGE, size=0.3, change=keep_to_itself)
    adapter, found = in_addenda(make_grouped, tmp_path / "within", IMAGE)
    same(found, wanted, base)
    assert dict(adapter.sites())["0"].method.rank == 4
    again = given(adapter, tmp_path / "back")
    same(in_peft(make_grouped, again, IMAGE), wanted, base)


def test_obstacles_name_what_peft_computes_otherwise():
    def of(layer: nn.Module, kind: str = "conv") -> str:
        site = site_at(nn.Sequential(layer), "0")
        return layout.obstacle(site) or ""

    assert "dilation" in of(nn.Conv1d(4, 4, 3, dilation=2))
    assert "padding_mode='reflect'" in of(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    assert of(nn.Conv2d(4, 4, 1, dilation=2)) == of(nn.Conv2d(4, 4, 3, padding_mode="reflect")) == ""
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    assert "as a whole" in (layout.obstacle(site_at(attention, "0.out_proj")) or "")
    norm = nn.Sequential(nn.LayerNorm(4))
    assert "no product of two matrices" in (layout.obstacle(site_at(norm, "0.weight")) or "")


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_a_torch_attention_is_refused_as_peft_adds_one_of_its_changes_twice(tmp_path):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    wanted = by_peft(Attends, peft.LoraConfig(r=2, target_modules=["attention"]), tmp_path / "peft", x, size=0.4)
    with pytest.raises(AddendaError, match=r"adds the change of out_proj twice"):
        take(Attends(), tmp_path / "peft")
    stored = load_file(tmp_path / "peft" / WEIGHTS)

    def delta(name: str) -> torch.Tensor:
        key = f"base_model.model.attention.{name}lora_"
        return 4 * stored[f"{key}B.weight"] @ stored[f"{key}A.weight"]

    model = Attends()
    with torch.no_grad():
        model.attention.in_proj_weight += delta("")
        model.attention.out_proj.weight += 2 * delta("base_layer.out_proj.")  # the claim: when it fails, read it
    assert (outputs(model, x) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_scaled_embedding_keeps_its_scale(tmp_path):
    class Scaled(nn.Embedding):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Scaled(11, 8), nn.Linear(8, 5))

    ids = torch.arange(11)
    base = outputs(make(), ids)
    wanted = by_peft(make, peft.LoraConfig(r=2, target_modules=["0", "1"]), tmp_path / "peft", ids)
    adapter, found = in_addenda(make, tmp_path / "peft", ids)
    same(found, wanted, base)
    assert "0.weight" in adapter.methods  # its forward is its own, so the parameter is the site
    same(in_peft(make, given(adapter, tmp_path / "back"), ids), wanted, base)
