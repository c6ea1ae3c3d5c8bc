"""How images are prepared, against transformers' own image processors (their Pillow backend)."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Dinov2Config

from addenda.core.base.errors import AddendaError
from addenda.data.prepare import DEVIATION, MEAN, Preparation
from addenda.models.preparation import preparation_of

SIZES = [(40, 30), (30, 40), (17, 61), (64, 64), (9, 11)]  # height, width
CROPPED = {"size": {"shortest_edge": 24}, "do_center_crop": True, "crop_size": {"height": 20, "width": 20}}
SQUEEZED = {"size": {"height": 18, "width": 22}}


def drawn(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def folder(path, kind, **said):
    (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **said}))
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("ViTImageProcessor", SQUEEZED),
        ("ViTImageProcessor", SQUEEZED | {"do_normalize": False, "resample": 0}),
        ("ViTImageProcessor", SQUEEZED | {"do_rescale": False, "image_mean": [1, 2, 3], "image_std": [4, 5, 6]}),
        ("BitImageProcessor", CROPPED),
        ("BitImageProcessor", CROPPED | {"size": {"shortest_edge": 10}}),  # smaller than what is cut out of it
        ("CLIPImageProcessor", CROPPED | {"crop_size": {"height": 21, "width": 15}, "resample": 2}),
        ("CLIPImageProcessor", {"size": 24, "crop_size": 20}),  # as files were written before sizes had names
        ("DeiTImageProcessor", {"size": 24, "crop_size": 20}),  # the same, and here a square
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 21}, "crop_pct": 0.875}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "crop_pct": 0.875}),
    ],
)
def test_it_equals_transformers(tmp_path, kind, said):
    folder(tmp_path, kind, **said)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    ours = preparation_of(tmp_path)
    for height, width in SIZES:
        image = drawn(height, width)
        made = ours.tensor(torch.from_numpy(np.array(ours.pixels(image)))[None])
        wanted = theirs(image, return_tensors="pt")["pixel_values"]
        assert made.shape == wanted.shape and made.is_contiguous()
        torch.testing.assert_close(made, wanted.float(), rtol=1e-5, atol=1e-5)
        assert ours.size == made.shape[2:]


def test_defaults_come_from_the_model(tmp_path):
    how = preparation_of(tmp_path, Dinov2Config(image_size=28))
    assert (how.resize, how.crop, how.mean, how.deviation) == ((28, 28), None, MEAN, DEVIATION)
    assert "no preprocessor_config.json" in how.source
    grey = preparation_of(tmp_path, Dinov2Config(image_size=[28, 14], num_channels=1))
    assert grey.size == (28, 14) and grey.mean == (pytest.approx(sum(MEAN) / 3),)
    assert grey.tensor(torch.from_numpy(np.array(grey.pixels(drawn(5, 5))))[None]).shape == (1, 1, 28, 14)
    assert preparation_of(tmp_path, Dinov2Config(image_size=28), image_size=14).size == (14, 14)


def test_another_size_keeps_the_proportions(tmp_path):
    how = preparation_of(folder(tmp_path, "BitImageProcessor", **CROPPED))
    assert (how.resize, how.crop) == (24, (20, 20))
    assert (how.sized(10).resize, how.sized(10).crop) == (12, (10, 10))
    assert str(how.sized(10)) == "resized to shorter side 12, cropped to 10 × 10"
    assert str(how.sized(10).whole()) == "resized to 10 × 10"
    with pytest.raises(AddendaError, match="at least 1, got 0"):
        how.sized(0)


PLAIN = Preparation(None, mean=None, deviation=None)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_three_channels(mode):
    image = drawn(6, 5).convert(mode)
    assert np.array_equal(PLAIN.pixels(image), np.asarray(image.convert("RGB")))


def test_a_palette_with_transparency_keeps_its_colours(tmp_path):
    image = drawn(6, 5).convert("P")
    image.info["transparency"] = bytes(range(256))
    image.save(tmp_path / "p.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = PLAIN.pixels(Image.open(tmp_path / "p.png"))
    assert np.array_equal(made, np.asarray(drawn(6, 5).convert("P").convert("RGB")))


def test_sixteen_bits_are_not_cut_at_white(tmp_path):
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    made = PLAIN.pixels(Image.open(tmp_path / "deep.png"))
    assert made[..., 0].tolist() == [[0, 0, 1], [128, 255, 255]]
    with pytest.raises(ValueError, match="what is white"):
        PLAIN.pixels(Image.fromarray(values.astype(np.float32)))


def test_photos_are_turned_upright(tmp_path):
    image = drawn(4, 6)
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(PLAIN.pixels(Image.open(tmp_path / "turned.png")), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"do_pad": True}, "asks for do_pad"),
        ({"do_flip_channel_order": True}, "asks for do_flip_channel_order"),
        ({"rescale_offset": True}, "asks for rescale_offset"),
        ({"size": {"shortest_edge": 10, "longest_edge": 20}}, "asks for size="),
    ],
)
def test_what_is_not_done_is_refused(tmp_path, said, says):
    with pytest.raises(AddendaError, match=says):
        preparation_of(folder(tmp_path, "ViTImageProcessor", **said))


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{oops")
    with pytest.raises(AddendaError, match=r"preprocessor_config.json does not say how images are prepared"):
        preparation_of(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(AddendaError, match="reads 4 channels"):
        preparation_of(tmp_path, Dinov2Config(num_channels=4))
