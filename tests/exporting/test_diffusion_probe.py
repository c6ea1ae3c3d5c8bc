"""The batch that an export is tried on runs through diffusion models, and is always the same."""

import pytest
import torch
from torch import nn

from addenda.core.merge.outputs import run
from addenda.exporting.diffusion_probe import diffusion_batch
from addenda.exporting.probe import probe_of
from diffusion import make_dit, make_unet


@pytest.mark.parametrize(
    "make", [make_unet, lambda: make_unet(addition_embed_type=None), lambda: make_unet(linear=False), make_dit]
)
def test_it_runs_and_is_always_the_same(make):
    model = make()
    batch, again = probe_of(model), probe_of(model)
    assert all(torch.equal(a, b) for a, b in zip(flat(batch), flat(again), strict=True))
    out = run(model, batch).main
    assert out.shape[0] == 2 and bool(torch.isfinite(out).all())
    assert (out[0] - out[1]).abs().max() > 0


def flat(batch):
    return [t for v in batch.values() for t in (v.values() if isinstance(v, dict) else [v])]


def test_it_is_in_the_models_dtype():
    batch = probe_of(make_unet().to(torch.bfloat16))
    assert {t.dtype for t in flat(batch) if t.is_floating_point()} == {torch.bfloat16}


def test_models_that_want_more_are_not_guessed_at():
    assert diffusion_batch(nn.Linear(2, 2)) is None
    classes = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 32}
    assert diffusion_batch(make_unet(**classes)) is None
