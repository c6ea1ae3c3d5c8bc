"""diffusers' models as its users have them: a UNet in a denoising loop, a DiT, their files, switching and merging."""

import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.modules.ours import is_ours
from diffusion import dit_batch, make_dit, make_unet, unet_batch
from shared import stir

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed here")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # diffusers' own
MODELS = {"unet": (make_unet, unet_batch), "dit": (make_dit, dit_batch)}


def out(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


@pytest.fixture(params=MODELS)
def model_and_batch(request):
    make, batch = MODELS[request.param]
    return make(), batch()


@pytest.mark.parametrize("spec", ["lora:rank=2", "dora:rank=2", "lokr:rank=1"])
def test_attach_switch_merge_detach(model_and_batch, spec):
    model, batch = model_and_batch
    base, keys = out(model, batch), list(model.state_dict())
    first = stir(ad.attach(model, spec, targets=["linear", "conv"], name="first"), 0.2)
    assert {type(model.get_submodule(p)).__name__ for p in first.methods} == {"AdaptedLinear", "AdaptedConv2d"}
    one = out(model, batch)
    stir(ad.attach(model, spec, targets="linear", name="second"), 0.2, seed=2)
    two = out(model, batch)
    assert min((one - base).abs().max(), (two - base).abs().max(), (one - two).abs().max()) > 1e-3
    ad.switch(model, None)
    assert torch.equal(out(model, batch), base)
    ad.switch(model, "first")
    assert torch.equal(out(model, batch), one)
    ad.merge(model, verify=batch)
    torch.testing.assert_close(out(model, batch), one, rtol=0, atol=1e-5)
    ad.unmerge(model)
    ad.detach(model)
    assert torch.equal(out(model, batch), base) and list(model.state_dict()) == keys


def test_it_learns(model_and_batch):
    model, batch = model_and_batch
    adapter = ad.attach(model, "lora:rank=4", targets=["linear", "conv"])
    wanted = torch.randn_like(out(model, batch))
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        loss = (model(**batch)[0] - wanted).square().mean()
        loss.backward()
        optimizer.step()
        adapter.step(dead="warn" if "encoder_hidden_states" not in batch else "raise")
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]


def test_its_files_hold_what_acts(model_and_batch, tmp_path):
    model, batch = model_and_batch
    stir(ad.attach(model, "lora:rank=2", targets=["linear", "conv"]), 0.2)
    live = out(model, batch)
    with pytest.raises(AddendaError, match="come back as the base"):
        model.save_pretrained(tmp_path / "no")
    assert not [*tmp_path.iterdir()]
    ad.merge(model, verify=batch)
    model.save_pretrained(tmp_path / "merged")
    back = type(model).from_pretrained(tmp_path / "merged").eval()
    assert not any(map(is_ours, back.state_dict()))
    torch.testing.assert_close(out(back, batch), live, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_denoising_loop(scheduler):
    """Some steps of a sampler: with the adapter what the merged model gives, and without it what the base gave."""
    model, batch = make_unet(), unet_batch()

    def denoised():
        sampler = getattr(diffusers, scheduler)()
        sampler.set_timesteps(4)
        sample = batch["sample"] * sampler.init_noise_sigma
        with torch.no_grad():
            for t in sampler.timesteps:
                scaled = sampler.scale_model_input(sample, t)
                noise = model(**{**batch, "sample": scaled, "timestep": t}).sample
                sample = sampler.step(noise, t, sample).prev_sample
        return sample

    base = denoised()
    stir(ad.attach(model, "lora:rank=2", targets=["linear", "conv"]), 0.2)
    live = denoised()
    with ad.disabled(model):
        assert torch.equal(denoised(), base)
    ad.merge(model, verify=batch)
    torch.testing.assert_close(denoised(), live, rtol=1e-4, atol=1e-4)
    assert (live - base).abs().max() > 1e-2


def test_a_pipeline_that_holds_an_adapted_model(tmp_path):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DModel(**sizes, **blocks, layers_per_block=1, attention_head_dim=4).eval()
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def image(pipe):
        made = pipe(generator=torch.Generator().manual_seed(3), num_inference_steps=3, output_type="np").images
        return torch.from_numpy(made)

    base = image(pipe)
    stir(ad.attach(unet, "lora:rank=2", targets=["linear", "conv"]), 0.3)
    live = image(pipe)
    assert (live - base).abs().max() > 1e-3
    with pytest.raises(AddendaError, match="acts"):
        pipe.save_pretrained(tmp_path / "no")
    ad.merge(unet, verify=(torch.randn(2, 3, 8, 8), torch.tensor([5, 5])))
    pipe.save_pretrained(tmp_path / "merged")
    again = diffusers.DDIMPipeline.from_pretrained(tmp_path / "merged")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(image(again), live, rtol=0, atol=1e-4)
