"""The other programs themselves: what LyCORIS trains acts here as there, and what is written here acts in them.

LyCORIS' own `merge_to` is no reference for LoHa and LoKr: version 4.1.3 multiplies by alpha / rank twice there. What it
trains is what its modules' forwards compute, and that is what is compared.
"""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import addenda as ad
from diffusion import dit_batch, make_dit, make_text_encoder, make_unet, unet_batch, weights
from shared import stir

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture
def lycoris():
    module = pytest.importorskip("lycoris", reason="LyCORIS (lycoris-lora) is not installed here")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    return module


def loader():
    """The class of diffusers that reads LoRA files of SDXL's parts."""
    return pytest.importorskip(
        "diffusers.loaders", reason="diffusers is not installed"
    ).StableDiffusionXLLoraLoaderMixin


def output(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


TRAINED = {
    "lora": {"linear_alpha": 2.0},
    "lora of rsLoRA's scale": {"rs_lora": True, "linear_alpha": 2.0},
    "locon tucker": {"algo": "locon", "conv_dim": 2, "use_tucker": True},
    "dora": {"algo": "locon", "dora_wd": True, "linear_alpha": 2.0},
    "loha": {"algo": "loha", "linear_alpha": 2.0},
    "loha tucker": {"algo": "loha", "linear_alpha": 2.0, "use_tucker": True},
    "lokr": {"algo": "lokr", "linear_alpha": 2.0},
    "lokr in parts": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 2.0, "decompose_both": True},
    "lokr, factor 4": {"algo": "lokr", "factor": 4, "linear_dim": 2},
    "lokr, whole": {"algo": "lokr", "full_matrix": True},
    "lokr, tucker": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 0.5, "use_tucker": True},
    "lokr, unbalanced": {"algo": "lokr", "unbalanced_factorization": True, "linear_alpha": 2.0},
}


@pytest.mark.parametrize("case", TRAINED)
def test_what_lycoris_trains_acts_here_as_there(case, lycoris, tmp_path):
    theirs, ours, batch = make_unet(), make_unet(), unet_batch()
    base = output(theirs, batch)
    network = lycoris.create_lycoris(theirs, 1.0, **{"linear_dim": 4, **TRAINED[case]})
    network.apply_to()
    torch.manual_seed(3)
    for name, p in network.named_parameters():
        p.data = p.data * (1 + 0.2 * torch.rand_like(p)) if "dora" in name else torch.randn_like(p) * 0.2
    network.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {"format": "pt"})
    live = output(theirs, batch)
    adapter = ad.import_adapter(ours, tmp_path / "x.safetensors")
    assert len(adapter.methods) == len(network.loras) > 80
    assert (live - base).abs().max() > 0.01 * live.abs().max()
    torch.testing.assert_close(output(ours, batch), live, rtol=0, atol=2e-5 * float(live.abs().max()))


@pytest.mark.parametrize("algo", ["glora", "diag-oft", "boft", "ia3"])
def test_what_lycoris_trains_without_a_counterpart_is_refused(algo, lycoris, tmp_path):
    network = lycoris.create_lycoris(make_unet(), 1.0, linear_dim=4, algo=algo)
    network.apply_to()
    network.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {"format": "pt"})
    with pytest.raises(ad.AddendaError, match=r"this is not read"):
        ad.import_adapter(make_unet(), tmp_path / "x.safetensors")


@pytest.mark.parametrize(("make", "batch"), [(make_unet, unet_batch), (make_dit, dit_batch)])
def test_lycoris_reads_what_is_written_here(make, batch, lycoris, tmp_path):
    ours, theirs, arguments = make(), make(), batch()
    adapter = ad.attach(ours, "lora:rank=2,alpha=6", targets=["linear", "conv"])
    stir(adapter)
    ad.export(adapter, "kohya", tmp_path / "x.safetensors", part="lycoris")
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "x.safetensors"), theirs)
    assert len(network.loras) == len(adapter.methods)
    base = output(theirs, arguments)
    network.apply_to()
    live = output(ours, arguments)
    assert (live - base).abs().max() > 0.01 * live.abs().max()
    torch.testing.assert_close(output(theirs, arguments), live, rtol=0, atol=1e-5 * float(live.abs().max()))


@pytest.mark.parametrize("options", [{}, {"layout": "original"}, {"dtype": "float16"}], ids=str)
@pytest.mark.parametrize("linear", [True, False], ids=["sdxl", "sd"])
def test_diffusers_reads_what_is_written_here(options, linear, tmp_path):
    ours, theirs, batch = (*(make_unet(linear) for _ in "ab"), unet_batch())
    reader = loader()
    adapter = ad.attach(ours, "lora:rank=2,alpha=6", targets=["linear", "conv"])
    stir(adapter)
    base = output(theirs, batch)
    ad.export(adapter, "kohya", tmp_path / "x.safetensors", **options)
    converted, alphas = reader.lora_state_dict(str(tmp_path / "x.safetensors"), unet_config=theirs.config)[:2]
    reader.load_lora_into_unet(converted, network_alphas=alphas, unet=theirs)
    assert sum("lora_A" in n for n in theirs.state_dict()) == len(adapter.methods) > 80
    live = output(ours, batch)
    tolerance = 1e-3 if "dtype" in options else 1e-5
    assert (live - base).abs().max() > 0.01 * live.abs().max()
    torch.testing.assert_close(output(theirs, batch), live, rtol=0, atol=tolerance * float(live.abs().max()))


@pytest.mark.parametrize("projection", [False, True])
def test_diffusers_reads_text_encoders(projection, tmp_path):
    ours, theirs, ids = (*(make_text_encoder(projection) for _ in "ab"), torch.arange(10).reshape(2, 5))
    reader = loader()
    adapter = ad.attach(ours, "lora:rank=2,alpha=6")
    stir(adapter)
    base = theirs(ids)[0]
    part, name = ("lora_te2", "text_encoder_2") if projection else ("lora_te1", "text_encoder")
    ad.export(adapter, "kohya", tmp_path / "x.safetensors", part=part)
    converted, alphas = reader.lora_state_dict(str(tmp_path / "x.safetensors"))[:2]
    reader.load_lora_into_text_encoder(converted, network_alphas=alphas, text_encoder=theirs, prefix=name)
    assert sum("lora_A" in n for n in theirs.state_dict()) == len(adapter.methods)
    assert (ours(ids)[0] - base).abs().max() > 0.01
    torch.testing.assert_close(theirs(ids)[0], ours(ids)[0], rtol=0, atol=1e-5)


def test_the_original_layout_is_read_as_diffusers_reads_it(tmp_path):
    """A file as sd-scripts writes SDXL's, of one model by both readers: no name of ours is in between."""
    ours, theirs, batch = make_unet(), make_unet(), unet_batch()
    reader = loader()
    shapes = {path: w.shape for path, w in weights(ours).items()}
    names = {
        "input_blocks_3_0_in_layers_2": "down_blocks.1.resnets.0.conv1",
        "input_blocks_3_1_transformer_blocks_0_attn2_to_k": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
        ),
        "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_1_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_3_0_skip_connection": "up_blocks.1.resnets.1.conv_shortcut",
        "output_blocks_1_1_transformer_blocks_0_ff_net_0_proj": (
            "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj"
        ),
    }
    tensors = {}
    for name, path in names.items():
        m, n, *kernel = shapes[path]
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, n, *kernel)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(m, 2, *[1] * len(kernel)) * 0.1
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = ad.import_adapter(ours, tmp_path / "x.safetensors")
    assert sorted(adapter.methods) == sorted(names.values())
    assert load_file(tmp_path / "x.safetensors").keys() == tensors.keys()
    converted, alphas = reader.lora_state_dict(str(tmp_path / "x.safetensors"), unet_config=theirs.config)[:2]
    base = output(theirs, batch)
    reader.load_lora_into_unet(converted, network_alphas=alphas, unet=theirs)
    live = output(theirs, batch)
    assert (live - base).abs().max() > 0.001
    torch.testing.assert_close(output(ours, batch), live, rtol=0, atol=1e-5)
