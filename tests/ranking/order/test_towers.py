"""The frozen encoders: patches without class tokens, tokens without padding, and nothing that could learn."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.ranking.order.tiny_towers import apart, both, noise, tokenizer
from tokenizers import normalizers

import pretended
from addenda import AddendaError
from addenda.ranking.order.features import Features, all_of
from addenda.ranking.order.rank import ImageOrder, images_in
from addenda.ranking.order.ratings import Ratings
from addenda.ranking.order.ridge import RidgeOrder
from addenda.ranking.order.settings import OrderSettings
from addenda.ranking.order.towers import load_towers
from addenda.ranking.order.train import train_order


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("towers")
    vit, bert = apart(place)
    return {"clip": both(place / "clip", "clip"), "siglip": both(place / "siglip", "siglip"), "vit": vit, "bert": bert}


def pixels(n=3, side=16):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "extra"), [("clip", 1), ("siglip", 0)])
def test_both_of_one_folder_give_what_their_models_give(folders, kind, extra):
    towers = load_towers(folders[kind])
    assert (towers.image_width, towers.text_width) == (16, 12)
    with torch.no_grad():
        states = towers.image(pixel_values=pixels()).last_hidden_state
    torch.testing.assert_close(towers.patches(pixels()), states[:, extra:])
    tokens, mask = towers.tokens("how many red squares")
    assert tokens.shape == (16 if kind == "siglip" else 4, 12)
    assert int(mask.sum()) == 4


def test_an_image_encoder_beside_a_text_encoder(folders):
    towers = load_towers(image=folders["vit"], text=folders["bert"])
    assert towers.patches(pixels()).shape == (3, 16, 16)
    assert towers.tokens("red")[0].shape == (1, 12)
    assert not any(p.requires_grad for t in (towers.image, towers.text) for p in t.parameters())


def test_a_pooler_that_a_folder_lacks_makes_no_other_encoder_at_every_load(folders, tmp_path):
    image, text = (shutil.copytree(folders[name], tmp_path / name) for name in ("vit", "bert"))
    for folder in (image, text):
        state = load_file(folder / "model.safetensors")
        assert any("pooler" in name for name in state)
        save_file({k: v for k, v in state.items() if "pooler" not in k}, folder / "model.safetensors", {"format": "pt"})
    first, second = (load_towers(image=image, text=text) for _ in range(2))
    assert first.identity == second.identity
    whole = load_towers(image=folders["vit"], text=folders["bert"])
    assert torch.equal(first.patches(pixels()), whole.patches(pixels()))  # nothing asks for it


def test_patches_are_pooled_to_the_grid_by_averages(folders):
    fine, coarse = (load_towers(image=folders["vit"], text=folders["bert"], grid=g) for g in (10, 2))
    whole = fine.patches(pixels()).view(3, 4, 4, 16)
    expected = torch.stack([whole[:, a : a + 2, b : b + 2].mean((1, 2)) for a in (0, 2) for b in (0, 2)], 1)
    torch.testing.assert_close(coarse.patches(pixels()), expected)


def test_other_sizes_of_images_are_taken_where_positions_can_be_stretched(folders):
    towers = load_towers(image=folders["vit"], text=folders["bert"], image_size=24)
    assert towers.preparation.size == (24, 24)
    assert towers.patches(pixels(side=24)).shape == (3, 36, 16)


def test_a_sentence_that_is_too_long_is_cut_and_an_empty_one_refused(folders):
    towers = load_towers(image=folders["vit"], text=folders["bert"])
    assert towers.tokens("red " * 200)[0].shape == (16, 12)
    assert towers.cut("red " * 200) and not towers.cut("red")
    with pytest.raises(AddendaError, match="empty"):
        towers.tokens("  ")
    for asked in (towers.tokens, towers.cut):
        with pytest.raises(AddendaError, match="not UTF-8"):
            asked("red \udcff")


def test_a_sentence_without_a_word_for_the_tokenizer_is_refused(folders):
    towers = load_towers(image=folders["vit"], text=folders["bert"])
    towers.tokenizer = towers.tokenizer.__class__.from_pretrained(folders["bert"])
    towers.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("…", "")
    assert len(towers.tokens("red …")[0]) == 1
    with pytest.raises(AddendaError, match="finds no word"):
        towers.tokens("…")


def test_towers_that_could_learn_are_refused(folders):
    towers = load_towers(image=folders["vit"], text=folders["bert"])
    towers.text.train()
    with pytest.raises(AddendaError, match="evaluation mode"):
        towers.tokens("red")
    towers.text.eval()
    next(towers.image.parameters()).requires_grad_()
    with pytest.raises(AddendaError, match="may train"):
        towers.patches(pixels())


def test_identity_is_of_weights_tokenizer_and_preparation(folders, tmp_path):
    first = load_towers(image=folders["vit"], text=folders["bert"]).identity
    assert first == load_towers(image=folders["vit"], text=folders["bert"]).identity
    others = [
        load_towers(image=folders["vit"], text=folders["bert"], image_size=24),
        load_towers(image=folders["vit"], text=folders["bert"], grid=3),
        load_towers(image=folders["clip"], text=folders["bert"]),
    ]
    assert all(o.identity != first for o in others)


def test_folders_that_are_no_towers_are_refused(folders, tmp_path):
    with pytest.raises(AddendaError, match="image=, text="):
        load_towers(folders["bert"])
    with pytest.raises(AddendaError, match="one folder of both"):
        load_towers(folders["clip"], image=folders["vit"])
    tokenizer(tmp_path / "empty")
    with pytest.raises(AddendaError, match=r"config\.json"):
        load_towers(image=tmp_path / "empty", text=folders["bert"])
    with pytest.raises(AddendaError, match="reads no texts"):
        load_towers(image=folders["vit"], text=folders["vit"])
    with pytest.raises(AddendaError, match="reads no images"):
        load_towers(image=folders["bert"], text=folders["bert"])
    bare = shutil.copytree(folders["bert"], tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "special*"))
    with pytest.raises(AddendaError, match="no tokenizer"):
        load_towers(image=folders["vit"], text=bare)
    (bare / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(AddendaError, match="is damaged"):
        load_towers(image=folders["vit"], text=bare)


def test_nothing_of_an_image_is_cropped_and_images_without_a_size_are_refused(folders, tmp_path):
    place = shutil.copytree(folders["vit"], tmp_path / "cropping")
    about = {"image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 20},
             "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}  # fmt: skip
    (place / "preprocessor_config.json").write_text(json.dumps(about))
    photo = Image.new("RGB", (96, 64))
    photo.paste("white", (90, 0, 96, 6))
    for size in (None, 24):
        how = load_towers(image=place, text=folders["bert"], image_size=size).preparation
        side = size or 16
        seen = how.pixels(photo)
        assert seen.shape == (side, side, 3) and seen[0, -1].max() > 100 and not seen[side // 2 :].any()
    (place / "preprocessor_config.json").write_text(json.dumps(about | {"do_center_crop": False}))
    with pytest.raises(AddendaError, match=r"shorter side 20, so that they differ in size.*--image-size"):
        load_towers(image=place, text=folders["bert"])
    assert load_towers(image=place, text=folders["bert"], image_size=16).preparation.size == (16, 16)


def test_encoders_on_a_gpu_give_states_on_the_cpu(tmp_path):
    """Where they are kept, and where the adapter learns and scores."""
    vit, bert = apart(tmp_path)
    towers = load_towers(image=vit, text=bert, device="cpu")
    for i in range(6):
        noise(tmp_path / "photos" / f"{i}.png", i)
    pictures = images_in(tmp_path / "photos")
    ratings = Ratings(tuple(pictures), {"how many red squares": {i: float(i) for i in range(6)}})
    want = [r.picture.name for r in _ordered(towers, ratings)]
    pretended.moved(towers.image)
    pretended.moved(towers.text)
    with pretended.Pretended():
        assert [r.picture.name for r in _ordered(towers, ratings)] == want


def _ordered(towers, ratings):
    patches, _ = all_of(Features(towers, cache=False), ratings.pictures)
    small = OrderSettings(width=16, heads=2, layers=1, after=1, prompts=2, tokens=2, ratio=2)
    made = train_order(towers, ratings, patches, settings=small, steps=2, batch=4)
    RidgeOrder(Features(towers, cache=False), ratings, patches).scores(ratings.pictures, "how many red squares")
    return ImageOrder(towers, made.adapter, made.made, cache=False).rank(ratings.pictures, "red squares")
