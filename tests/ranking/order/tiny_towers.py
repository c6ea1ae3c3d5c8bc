"""Small images on disk, and tiny encoders of images and texts, drawn at random."""

import json

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

WORDS = ["how", "many", "red", "blue", "squares", "are", "there", "sharp", "photos", "of", "the"]


def image(path, shade=0, side=24):
    """A grey image with a brighter square in it, another one for every shade."""
    pixels = np.full((side, side, 3), 40, np.uint8)
    pixels[: 4 + shade % 16, : 4 + shade // 16] = 100 + shade % 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def noise(path, seed):
    """A coloured image that looks like no other."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize((60, 60), Image.Resampling.BICUBIC).save(path)
    return path


def tokenizer(folder):
    vocabulary = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16)
    fast.save_pretrained(folder)


def prepared(folder, side=16):
    about = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))


def both(folder, kind):
    """A folder of a tiny CLIPModel or SiglipModel."""
    text = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 32, "max_position_embeddings": 16}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    config, model = (CLIPConfig, CLIPModel) if kind == "clip" else (SiglipConfig, SiglipModel)
    model(config(text_config=text, vision_config=vision)).save_pretrained(folder)
    tokenizer(folder)
    prepared(folder)
    return folder


def apart(folder):
    """Folders of a tiny ViT and a tiny BERT."""
    vision = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                       patch_size=4)  # fmt: skip
    text = BertConfig(hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
                      max_position_embeddings=16)  # fmt: skip
    ViTModel(vision).save_pretrained(folder / "vit")
    prepared(folder / "vit")
    BertModel(text).save_pretrained(folder / "bert")
    tokenizer(folder / "bert")
    return folder / "vit", folder / "bert"
