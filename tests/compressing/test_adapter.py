"""An adapter file put into few bits afterwards."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.compressing.adapter import compress_adapter
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.core.file.methods import described
from addenda.core.packed.few_bits import codebook


def model_with(method, **options):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.one, model.two = nn.Linear(40, 30), nn.Linear(30, 5)
    adapter = ad.attach(model, method, targets="one", **options)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    return model, adapter


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_every_matrix_is_rounded_once(bits, tmp_path):
    model, adapter = model_with(ad.LoRA(rank=4), also_train=["two"])
    file = adapter.save(tmp_path / "a.safetensors")
    _, before = read(file)
    report = compress_adapter(file, bits, judge=lambda path: path.name)
    assert report.path.name == f"a-{bits}bit.safetensors"
    assert report.quality == {"before": "a.safetensors", "after": report.path.name}
    header, after = read(report.path)
    assert set(report.errors) == {"one/A", "one/B"}
    assert header.methods == described([ad.LoRA(rank=4, bits=bits)])
    assert torch.equal(after["two.weight/value"], before["two.weight/value"]), "a head stays as it is"
    assert report.after == sum(t.numel() * t.element_size() for t in after.values())
    ad.detach(model)
    loaded = ad.load(model, report.path)
    ((_, t), *_) = loaded.sites()
    for key in ("A", "B"):
        W = before[f"one/{key}"].double()
        v = torch.tensor(codebook(bits), dtype=torch.float64)
        want = v[((W - W.mean()) / W.std())[..., None].sub(v).abs().argmin(-1)] * W.std() + W.mean()
        torch.testing.assert_close(t.tensors()[key].double(), want, rtol=1e-4, atol=1e-6)
        assert report.errors[f"one/{key}"] == pytest.approx(float((want - W).norm() / W.norm()), rel=1e-3)
    assert (max(report.errors.values()) < 0.03) == (bits == 8)
    whole = compress_adapter(file, bits, tmp_path / "new" / "b.safetensors", head_bits=2)
    assert set(whole.errors) == {"one/A", "one/B", "two.weight/value"}
    ad.detach(model)
    ad.load(model, whole.path)


def test_what_was_trained_in_few_bits_is_what_its_own_codes_say(tmp_path):
    _, adapter = model_with(ad.LoRA(rank=4, bits=2))
    own = adapter.save(tmp_path / "own.safetensors")
    latent = adapter.save(tmp_path / "latent.safetensors", latent=True)
    assert compress_adapter(latent, 2).path.read_bytes() == own.read_bytes()
    with pytest.raises(AddendaError, match="was trained in 2 bits"):
        compress_adapter(latent, 1)
    with pytest.raises(AddendaError, match="holds codes of 2 bits already"):
        compress_adapter(own, 2)


def test_refusals_write_nothing(tmp_path):
    _, adapter = model_with("vera:rank=8")
    file = adapter.save(tmp_path / "a.safetensors")
    for bits, why in ((1, "no trained matrix"), (0, "from 1 to 8"), (9, "from 1 to 8")):
        with pytest.raises(AddendaError, match=why):
            compress_adapter(file, bits)
    _, adapter = model_with("lora")
    file = adapter.save(tmp_path / "a.safetensors")
    with pytest.raises(AddendaError, match="the file itself"):
        compress_adapter(file, 1, file)
    with pytest.raises(AddendaError, match="no file"):
        compress_adapter(tmp_path / "b.safetensors", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
