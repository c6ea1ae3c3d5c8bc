"""What is written for kohya is a LoRA with alpha = rank, under names that its readers know."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.exporting.doors import door_called
from addenda.exporting.inspect import inspect
from addenda.exporting.kohya.write import LABELS
from addenda.exporting.pairs import low_rank
from addenda.quantizing.quantize import quantize
from diffusion import make_text_encoder, make_unet
from shared import stir


class Net(nn.Module):
    """Layers of every kind that may be adapted: (rows, 4, 6, 6) to (rows, 5)."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.apart = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1, groups=2)
        self.to_out, self.table, self.norm = nn.Linear(8, 5), nn.Embedding(6, 8), nn.LayerNorm(8)

    def forward(self, x):
        y = self.apart(torch.tanh(self.conv_in(x))).flatten(2).mean(-1)
        return self.to_out(self.norm(y + self.table(torch.arange(len(x)))))


X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def adapted(spec="lora:rank=2,alpha=6", targets=("conv_in", "to_out"), **options):
    model = Net().eval()
    adapter = ad.attach(model, spec, targets=list(targets), **options)
    stir(adapter)
    return adapter


def exported(adapter, path, **options):
    return ad.export(adapter, "kohya", path, probe=X, **{"part": "lora_unet", **options})


def test_all_scales_are_in_the_factors(tmp_path):
    adapter = adapted()
    report = exported(adapter, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    shapes = {k: list(t.shape) for k, t in tensors.items()}
    assert shapes == {
        "lora_unet_conv_in.lora_down.weight": [2, 4, 3, 3],
        "lora_unet_conv_in.lora_up.weight": [8, 2, 1, 1],
        "lora_unet_conv_in.alpha": [],
        "lora_unet_to_out.lora_down.weight": [2, 8],
        "lora_unet_to_out.lora_up.weight": [5, 2],
        "lora_unet_to_out.alpha": [],
    }
    assert report.exact and set(report.errors.values()) == {0.0}
    for path, tensors_here in adapter.sites():
        name, own = f"lora_unet_{path}", tensors_here.stored()
        up, down = (tensors[f"{name}.lora_{way}.weight"].flatten(1) for way in ("up", "down"))
        assert tensors[f"{name}.alpha"] == 2
        torch.testing.assert_close(up @ down, 3 * own["B"] @ own["A"])  # alpha / rank


def test_equal_adapters_are_equal_files(tmp_path):
    for name in "ab":
        torch.manual_seed(0)
        exported(adapted(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_the_error_is_told(dtype, tmp_path):
    adapter = adapted()
    for path, t in adapter.sites():
        if path == "conv_in":  # in float16 these alone would not be told from zero
            t.B.data *= 1e-7
            t.A.data *= 1e7
    report = exported(adapter, tmp_path / "x", dtype=dtype)
    step = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    assert not report.exact and all(0 < e < 2 * step for e in report.errors.values())
    stored = load_file(tmp_path / "x")
    assert {t.dtype for k, t in stored.items() if k.endswith("weight")} == {getattr(torch, dtype)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_alpha_is_the_rank_whatever_the_dtype(dtype, tmp_path):
    """257 is no number of bfloat16, and 4,097 none of float16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(260, 260))
    adapter = stir(ad.attach(model, ad.LoRA(rank=257), targets="0"))
    ad.export(adapter, "kohya", tmp_path / "x", dtype=dtype, part="lycoris", probe=torch.randn(2, 260))
    alpha = load_file(tmp_path / "x")["lycoris_0.alpha"]
    assert (alpha.dtype, float(alpha)) == (torch.float32, 257)


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    adapter = adapted()
    for _, t in adapter.sites():
        t.B.data *= 1e8
        t.A.data *= 1e8
    with pytest.raises(AddendaError, match=r"do not fit into float16.*float32"):
        exported(adapter, tmp_path / "x", dtype="float16")
    assert not [*tmp_path.iterdir()]


def test_other_methods_go_as_lora_with_their_error(tmp_path):
    adapter = adapted("loha:rank=3")
    with pytest.raises(AddendaError, match="rank= or energy="):
        exported(adapter, tmp_path / "x")
    report = exported(adapter, tmp_path / "x", rank=2)
    assert max(report.errors.values()) > 1e-3 and "approximation" in str(report)
    assert load_file(tmp_path / "x")["lora_unet_conv_in.alpha"] == 2
    assert exported(adapter, tmp_path / "y", energy=1.0).effect.relative < 1e-4


def test_routes_say_what_passes():
    door, adapter = door_called("kohya"), adapted(targets=["conv_in", "apart", "to_out", "table"])
    pairs = low_rank(adapter)
    found = {path: door.route(adapter.methods[path], pair.site) for path, pair in pairs.items()}
    assert {path: r.kind for path, r in found.items()} == {
        "conv_in": "exact",
        "to_out": "exact",
        "apart": "refused",
        "table": "refused",
    }
    assert "groups" in found["apart"].why and found["conv_in"].why.startswith("LoCon")
    others = [adapted(spec).methods["to_out"] for spec in ("dora:rank=2", "lokr:rank=2")]
    assert {door.route(m, pairs["to_out"].site).kind for m in others} == {"approximate"}


@pytest.mark.parametrize(
    ("targets", "options", "reason"),
    [
        (["conv_in", "apart"], {}, r"apart \(lora\): readers differ about convolutions with groups"),
        (["to_out", "table"], {}, r"table \(lora\): embedding layers have no place"),
        (["to_out"], {"also_train": ["norm"]}, "trained whole"),
    ],
)
def test_what_has_no_place_is_refused(targets, options, reason, tmp_path):
    with pytest.raises(AddendaError, match=reason):
        exported(adapted(targets=targets, **options), tmp_path / "x")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"part": "unet"}, "one of lora_unet, .*got 'unet'"),
        ({"layout": "original"}, "2 of 2 sites have no name in the original layout"),
        ({"layout": "sgm"}, "layout must be"),
        ({"dtype": "float8"}, "dtype must be one of float32, float16, bfloat16"),
        ({"uniform": True}, "no option 'uniform'"),
    ],
)
def test_options_are_checked(options, reason, tmp_path):
    with pytest.raises(AddendaError, match=reason):
        exported(adapted(), tmp_path / "x", **options)
    assert not [*tmp_path.iterdir()]


def test_modules_with_one_flat_name_are_refused(tmp_path):
    adapter = adapted()
    adapter.model.conv = nn.Sequential()
    adapter.model.conv.add_module("in", nn.Linear(2, 2))
    with pytest.raises(AddendaError, match=r"names of these modules are the same: conv_in and conv\.in"):
        exported(adapter, tmp_path / "x")


def test_a_quantised_base_is_read_back_too(tmp_path):
    model = nn.Sequential()
    model.one, model.two = nn.Linear(64, 64), nn.Linear(64, 64)
    quantize(model, "nf4")
    adapter = ad.attach(model, "lora:rank=2")
    stir(adapter)
    report = ad.export(adapter, "kohya", tmp_path / "x", probe=torch.randn(3, 64), part="lycoris")
    assert report.exact and report.effect.moved > 0.01


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_unet_in_both_layouts(layout, tmp_path):
    unet = make_unet()
    adapter = ad.attach(unet, "lora:rank=2", targets=["linear", "conv"])
    stir(adapter)
    report = ad.export(adapter, "kohya", tmp_path / "x.safetensors", layout=layout)
    names = {k.split(".")[0] for k in load_file(tmp_path / "x.safetensors")}
    assert len(names) == len(adapter.methods) > 80 and report.exact
    assert ("lora_unet_input_blocks_0_0" in names) == (layout == "original")
    assert {f"lora_unet_{n.replace('.', '_')}" for n in LABELS.values()} < names
    text = inspect(tmp_path / "x.safetensors")
    assert (
        ("names of the original layout" in text)
        and f"lora_unet × {len(names)}" in text
        and "LoCon, rank 2, alpha 2" in text
    )


def test_a_text_encoder_goes_under_the_names_that_it_had(tmp_path):
    encoder = make_text_encoder()
    adapter = ad.attach(encoder, "lora:rank=2")
    stir(adapter)
    ad.export(adapter, "kohya", tmp_path / "x", part="lora_te1")
    assert {k.split(".")[0] for k in load_file(tmp_path / "x")} >= {
        "lora_te1_text_model_encoder_layers_1_self_attn_out_proj",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    }
