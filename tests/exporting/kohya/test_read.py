"""A file is read whole: every key of the part that the model is finds its module, or nothing is attached."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.exporting.formats import format_of
from addenda.exporting.kohya.file import read_file
from addenda.exporting.kohya.read import read
from diffusion import make_dit, make_text_encoder, make_unet
from shared import stir


class Net(nn.Module):
    """A linear layer, a convolution, an embedding and a norm: (rows) of ids to (rows, 3)."""

    def __init__(self):
        super().__init__()
        self.to_ids, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
        self.down_blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.conv_out = nn.Conv1d(8, 3, 1)

    def forward(self, ids):
        x = self.norm(self.to_ids(ids))
        for layer in self.down_blocks:
            x = torch.tanh(layer(x))
        return self.conv_out(x[..., None])[..., 0]


IDS = torch.arange(9)


def lora(name, m=8, n=8, part="lora_unet", r=2, tail=()):
    key = f"{part}_{name}"
    return {
        f"{key}.lora_up.weight": torch.randn(m, r, *tail),
        f"{key}.lora_down.weight": torch.randn(r, n, *tail),
        f"{key}.alpha": torch.tensor(1.0),
    }


def saved(tmp_path, tensors, name="x.safetensors", **metadata):
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / name, metadata or None)
    return tmp_path / name


def test_a_file_acts_as_it_says(tmp_path):
    tensors = lora("down_blocks_0") | lora("conv_out", 3, tail=(1,))
    model = Net().eval()
    twin = Net().eval()
    twin.load_state_dict(model.state_dict())
    before = model(IDS)
    for name, layer in (("down_blocks_0", twin.down_blocks[0]), ("conv_out", twin.conv_out)):
        up, down = (tensors[f"lora_unet_{name}.lora_{way}.weight"] for way in ("up", "down"))
        layer.weight.data += ((up.flatten(1) @ down.flatten(1)) * 0.5).reshape(layer.weight.shape)
    path = saved(tmp_path, tensors)
    assert format_of(path) == "kohya"
    adapter = ad.import_adapter(model, path)
    assert sorted(adapter.methods) == ["conv_out", "down_blocks.0"]
    torch.testing.assert_close(model(IDS), twin(IDS), rtol=0, atol=1e-5)
    assert (model(IDS) - before).abs().max() > 0.01
    ad.detach(model)
    assert torch.equal(model(IDS), before)


def test_our_own_file_of_it_loads(tmp_path):
    model = Net().eval()
    adapter = ad.import_adapter(model, saved(tmp_path, lora("down_blocks_1")), name="read")
    live = model(IDS)
    adapter.save(tmp_path / "ours.safetensors")
    ad.detach(model)
    ad.load(model, tmp_path / "ours.safetensors")
    assert torch.equal(model(IDS), live)


def refused(model, path, match, **options):
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(AddendaError, match=match):
        ad.import_adapter(model, path, **options)
    assert "_addenda" not in vars(model) and list(model.state_dict()) == list(before)


BAD = {
    "1 names have no module.*lora_unet_down_blocks_7.*Did you mean 'down_blocks_.'": lora("down_blocks_7"),
    "2 problems: .*lora_unet_down_blocks_0: lora_up.weight missing.*no module": {
        k: t for k, t in {**lora("down_blocks_0"), **lora("nowhere")}.items() if "down_blocks_0.lora_up" not in k
    },
    "lora_unet_norm": {"lora_unet_norm.w_norm": torch.ones(8)},
    "to_ids: embedding layers are not changed by these files": lora("to_ids", 9),
    "down_blocks_0: alpha without factors": {"lora_unet_down_blocks_0.alpha": torch.tensor(1.0)},
    r"conv_out: lora_up is \[8, 2\], expected \[3, 2\]": lora("conv_out"),
    "original names of a transformer": lora("double_blocks_0_img_attn_qkv"),
    "names of the original layout, which is known for UNets of": lora("input_blocks_1_1_proj_in"),
    "is no key of this format": {**lora("down_blocks_0"), "te.x": torch.ones(2)},
    "holds values that are not finite": {**lora("down_blocks_0"), "lora_unet_conv_out.alpha": torch.tensor(torch.inf)},
    "is int64, and numbers are expected": {**lora("down_blocks_0"), "lora_unet_conv_out.alpha": torch.tensor(3)},
}


@pytest.mark.parametrize("reason", BAD)
def test_what_does_not_fit_is_named_and_nothing_is_attached(reason, tmp_path):
    refused(Net(), saved(tmp_path, BAD[reason]), reason)


def test_names_that_two_modules_share_are_refused(tmp_path):
    model = Net()
    model.down = nn.Sequential()
    model.down.blocks_0 = nn.Linear(8, 8)
    refused(model, saved(tmp_path, lora("down_blocks_0")), "down_blocks.0 or down.blocks_0: flattened")


def test_two_names_of_one_module_are_refused(tmp_path):
    both = lora("conv_in", 8, 4, tail=(1, 1)) | lora("input_blocks_0_0", 8, 4, tail=(1, 1))
    both = {k: t.expand(*t.shape[:2], 3, 3) if "lora_down" in k else t for k, t in both.items()}
    refused(make_unet(), saved(tmp_path, both), "are both conv_in")


def test_of_several_models_the_part_is_said(tmp_path):
    path = saved(tmp_path, lora("conv_out", 3, tail=(1,)) | lora("down_blocks_0", part="lora_te1"))
    refused(Net(), path, r"2 models: lora_te1 \(1 modules\), lora_unet \(1 modules\)\. Say which")
    refused(Net(), path, "no part 'lora_te'; .* Did you mean 'lora_te1'", part="lora_te")
    model = Net()
    assert list(ad.import_adapter(model, path, part="lora_te1").methods) == ["down_blocks.0"]
    assert list(ad.import_adapter(model, path, part="lora_unet", name="two").methods) == ["conv_out"]
    assert any("lora_te1 (1 modules) is of another model" in note for note in read(path, Net(), "lora_unet").notes)


def test_a_part_is_for_these_files(tmp_path):
    model = Net()
    adapter = ad.attach(model, "lora:rank=2")
    stir(adapter)
    ad.export(adapter, "peft", tmp_path / "peft", probe=IDS)
    ad.detach(model)
    refused(model, tmp_path / "peft", "part= is for files of kohya", part="lora_te1")


def test_files_that_cannot_be_read(tmp_path):
    def why(name, content=None):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(AddendaError) as caught:
            read_file(tmp_path / name)
        return str(caught.value)

    assert "There is no file" in why("gone.safetensors")
    assert "pickle" in why("x.ckpt", pickle.dumps({}))
    whole = saved(tmp_path, lora("a")).read_bytes()
    assert "more than there can be" in why("cut.safetensors", whole[:90])
    assert "no sound safetensors file" in why("short.safetensors", whole[:-9])
    assert "more than there can be" in why("big.safetensors", (1 << 40).to_bytes(8, "little") + b"{}")
    assert "no sound safetensors file" in why("empty.safetensors", b"")
    assert "no file of kohya or LyCORIS" in why(
        "other.safetensors", saved(tmp_path, {"a.b": torch.ones(1)}).read_bytes()
    )


@pytest.mark.parametrize("make", [make_unet, make_dit, make_text_encoder])
def test_each_kind_of_model_is_read_by_its_names(make, tmp_path):
    model = make()
    adapter = ad.attach(model, "lora:rank=2", name="first")
    stir(adapter)
    report = ad.export(adapter, "kohya", tmp_path / "x.safetensors")
    assert len(report.errors) == len(adapter.methods) > 5 and report.exact
    tensors = adapter.state_dict()
    read_back = ad.import_adapter(model, tmp_path / "x.safetensors", name="second").state_dict()
    assert {k: t.shape for k, t in read_back.items()} == {k: t.shape for k, t in tensors.items()}
    assert all(torch.equal(read_back[k], t) for k, t in tensors.items())
