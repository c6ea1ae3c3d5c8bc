"""The two frozen encoders: an image's patches and a sentence's tokens, as states at their own widths.

    towers = load_towers(image="dinov2-small", text="e5")       # any image encoder beside any text encoder
    towers = load_towers("models/clip-vit-base-patch32")        # both of one folder: CLIPModel, SiglipModel
    patches = towers.patches(pixels)                            # N × P × D_i, no class token, at most grid × grid
    tokens, mask = towers.tokens("many red shoes")              # T × D_t, and which are no padding

Nothing of them is trained: parameters are frozen, and both stay in evaluation mode. What one of them gives depends on
its image or sentence alone, so it can be kept (`features`): on the CPU, where the adapter, which is small, learns and
scores, wherever the encoders are. Images are squeezed into a square as a whole, as the paper
does it: the crop that most folders ask for, made to see the one thing in the middle, leaves half of a photo of 3 : 2
unseen, and what is counted there with it.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.core.file.identity import base_of, digest
from addenda.core.file.tokenizer import mark
from addenda.data.labels import writable
from addenda.data.prepare import Preparation
from addenda.models.encoders import encoder_folder
from addenda.models.load import config_of
from addenda.models.machine import device_of, pick_device
from addenda.models.preparation import preparation_of
from addenda.models.pretrained import encoder_in, tokenizer_in
from addenda.models.vision import DINOV2

BOTH = ("clip", "siglip", "siglip2")  # model types whose folder holds an encoder of images and one of texts
FILLED = ("siglip", "siglip2")  # trained on texts that are filled up to one length, without a mask


@dataclass
class Towers:
    """Two encoders with what reads their inputs. grid: patches are pooled to at most grid × grid.

    image, text: modules that return a last_hidden_state. filled: texts are given filled up, without a mask.
    """

    image: nn.Module
    text: nn.Module
    preparation: Preparation
    tokenizer: Any
    image_width: int
    text_width: int
    grid: int = 10
    filled: bool = False
    sources: tuple[str, str] = ("", "")
    _digests: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for tower in (self.image, self.text):
            tower.eval().requires_grad_(False)

    def check_frozen(self) -> None:
        """Raise AddendaError where one of them could learn, or drops something."""
        for name, tower in (("image", self.image), ("text", self.text)):
            learning = [n for n, p in tower.named_parameters() if p.requires_grad]
            if learning or any(m.training for m in tower.modules()):
                what = f"{learning[0]} may train" if learning else "it is in training mode"
                raise AddendaError(
                    f"The {name} encoder is frozen and in evaluation mode while images are ordered, and now {what}. "
                    "Call eval() and requires_grad_(False) on it."
                )

    @torch.no_grad()
    def patches(self, pixels: Tensor) -> Tensor:
        """Return the states of the patches of N images, N × P × D_i float32 on the CPU, row by row.

        pixels: N × C × H × W.
        """
        self.check_frozen()
        given = {"interpolate_pos_encoding": True} if _stretches(self.image, pixels) else {}
        states = self.image(pixel_values=pixels.to(device_of(self.image)), **given).last_hidden_state.float()
        if states.dim() == 3:  # a row of tokens: first those that stand for no patch
            height, width = self._grid_of(pixels, states.shape[1])
            states = states[:, states.shape[1] - height * width :].unflatten(1, (height, width)).permute(0, 3, 1, 2)
        size = min(states.shape[-2], self.grid), min(states.shape[-1], self.grid)
        return F.adaptive_avg_pool2d(states, size).flatten(2).transpose(1, 2).contiguous().cpu()

    @torch.no_grad()
    def tokens(self, sentence: str) -> tuple[Tensor, Tensor]:
        """Return the states of a sentence's tokens, T × D_t float32 on the CPU, and which are no padding, T.

        Raises AddendaError as `check_sentence` does, and for a sentence in which the tokenizer finds nothing. One that
        is longer than the encoder reads is cut, at its end.
        """
        check_sentence(sentence)
        self.check_frozen()
        limit = self.longest
        how: dict[str, Any] = {"truncation": True, "max_length": limit} if limit else {}
        made = self.tokenizer([sentence], return_tensors="pt", padding="max_length" if self.filled else False, **how)
        made = made.to(device_of(self.text))
        mask = made["attention_mask"][0].bool() if "attention_mask" in made else torch.ones_like(made["input_ids"][0])
        if self.filled:
            mask = made["input_ids"][0] != self.tokenizer.pad_token_id
            made.pop("attention_mask", None)
        if not mask.any():
            raise AddendaError(
                f"The text encoder's tokenizer finds no word in {sentence[:80]!r}. Say it in other words."
            )
        return self.text(**made).last_hidden_state[0].float().cpu(), mask.bool().cpu()

    @property
    def longest(self) -> int | None:
        """How many tokens the text encoder reads; None where nothing says so."""
        own = getattr(self.text.config, "max_position_embeddings", None)
        said = getattr(self.tokenizer, "model_max_length", None)
        known = [n for n in (own, said) if isinstance(n, int) and 0 < n < 10**6]
        return min(known) if known else None

    def cut(self, sentence: str) -> bool:
        """Return whether a sentence is longer than the text encoder reads."""
        check_sentence(sentence)
        return self.longest is not None and len(self.tokenizer(sentence, verbose=False)["input_ids"]) > self.longest

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its numbers: both encoders by their weights, the tokenizer, and how images are prepared."""
        if not self._digests:
            for name, tower in (("image", self.image), ("text", self.text)):
                self._digests[name] = digest(base_of(tower))
            self._digests["tokenizer"] = mark(self.tokenizer).sha256
        how = {k: v for k, v in vars(self.preparation).items() if k != "source"}
        return {**self._digests, "preparation": {k: list(v) if isinstance(v, tuple) else v for k, v in how.items()},
                "grid": self.grid, "filled": self.filled}  # fmt: skip

    def _grid_of(self, pixels: Tensor, tokens: int) -> tuple[int, int]:
        """Return the rows and columns of patches among so many tokens. Raises AddendaError where that is not known."""
        config = self.image.config
        patch = getattr(config, "patch_size", None)
        if isinstance(patch, int):
            height, width = (n // patch for n in pixels.shape[-2:])
            if 0 <= tokens - height * width <= 1 + max(getattr(config, "num_register_tokens", 0) or 0, 1):
                return height, width
        side = round(tokens**0.5)
        if side * side == tokens:  # a pyramid, whose last map is a square
            return side, side
        raise AddendaError(
            f"The image encoder {type(self.image).__name__} gave {tokens} states for images of {pixels.shape[-2]} × "
            f"{pixels.shape[-1]} pixels, and which of them stand for patches is not known. Take one with patch_size, "
            "such as ViT, DINOv2, CLIP or SigLIP, or one that gives a map, such as ConvNeXt."
        )


def check_sentence(sentence: str) -> None:
    """Raise AddendaError for a sentence that is empty, or no text: half a character, as of bytes that are not UTF-8."""
    if not isinstance(sentence, str) or not sentence.strip():
        raise AddendaError("The sentence to order by is empty. Say what is to come first, e.g. 'many red shoes'.")
    if not writable(sentence):
        raise AddendaError(f"The sentence to order by is no text that can be read (not UTF-8): {sentence[:80]!a}.")


def load_towers(
    model: str | Path | None = None,
    *,
    image: str | Path | None = None,
    text: str | Path | None = None,
    image_size: int | None = None,
    grid: int = 10,
    device: str | None = None,
) -> Towers:
    """Load both encoders, in float32. model: the folder of both; or image and text: a folder each, or an embedded one.

    Without any: dinov2-small beside e5, which have never seen each other. image_size: the side of images in pixels.
    Raises AddendaError where a folder is missing, lacks weights, is no encoder of its kind, or says no size of images.
    """
    if model is not None and (image is not None or text is not None):
        raise AddendaError("Give one folder of both encoders (model=), or image= and text= with one each.")
    where = pick_device(device)
    if model is not None:
        folder = path_of(model, "model")
        kind = getattr(config_of(folder), "model_type", "")
        if kind not in BOTH:
            raise AddendaError(
                f"{folder} holds a {kind or 'model'}, and one folder of both encoders is wanted: {', '.join(BOTH)}. "
                "Give an image encoder and a text encoder apart: image=, text=."
            )
        both = _encoder(folder)
        first, second, config = both.vision_model, both.text_model, both.config
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        preparation = preparation_of(folder, config.vision_config, image_size)
        tokenizer, filled, sources = tokenizer_in(folder), kind in FILLED, (str(folder), str(folder))
    else:
        images, texts = _folder(image or DINOV2.name), _folder(text or "e5")
        config = config_of(images)
        first, second = _encoder(images), _encoder(texts)
        first, second = getattr(first, "vision_model", first), getattr(second, "text_model", second)
        _check_reads(first, "pixel_values", "images", images)
        _check_reads(second, "input_ids", "texts", texts)
        widths = _width(first, images), _width(second, texts)
        preparation = preparation_of(images, getattr(config, "vision_config", config), image_size)
        tokenizer, sources = tokenizer_in(texts), (str(images), str(texts))
        filled = getattr(config_of(texts), "model_type", "") in FILLED
    if preparation.size is None:
        raise AddendaError(
            f"{sources[0]} has images {preparation}, so that they differ in size and cannot be read together. Give "
            "image_size (--image-size), in pixels."
        )
    towers = first.to(where), second.to(where)
    return Towers(*towers, preparation.whole(), tokenizer, *widths, grid, filled, sources)


def _folder(named: str | Path) -> Path:
    path = encoder_folder(named)
    return DINOV2.model_folder() if str(named) == DINOV2.name and not path.exists() else path


def _encoder(folder: Path) -> Any:
    config_of(folder)  # says what is wrong with the folder, where something is
    return encoder_in(folder)


def _check_reads(tower: nn.Module, wanted: str, what: str, folder: Path) -> None:
    if wanted not in inspect.signature(type(tower).forward).parameters:
        other = "image=" if what == "images" else "text="
        raise AddendaError(
            f"The folder {folder} holds a {type(tower).__name__}, which reads no {what}. Give an encoder of {what} as "
            f"{other} ({'--image-encoder' if what == 'images' else '--text-encoder'})."
        )


def _width(tower: nn.Module, folder: Path) -> int:
    config: Any = tower.config
    sizes: Sequence[int] = getattr(config, "hidden_sizes", None) or ()
    width = sizes[-1] if sizes else getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise AddendaError(f"{folder} does not say how wide its states are (hidden_size). Take another encoder.")
    return width


def _stretches(tower: nn.Module, pixels: Tensor) -> bool:
    """Return whether an encoder must be asked to fit its positions to images of another size than it was trained on."""
    own = getattr(tower.config, "image_size", None)
    other = isinstance(own, int) and tuple(pixels.shape[-2:]) != (own, own)
    return other and "interpolate_pos_encoding" in inspect.signature(type(tower).forward).parameters
