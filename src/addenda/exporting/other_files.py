"""What else lies in a model's folder: tokenizer, templates, settings; and what is left behind, by name."""

from collections.abc import Iterable
from pathlib import Path

from addenda.core.disk.access import reading, writing
from addenda.core.file.header import PEFT
from addenda.models.checkpoint_files import INDEX

_PIECE = 16 << 20  # bytes that are copied at once
_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".ot", ".onnx", ".gguf",
    ".npz", ".tflite", ".mlmodel",
}  # fmt: skip
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_OF_WEIGHTS = {"pytorch_model.bin.index.json", INDEX, PEFT}  # what belongs to weights that are not copied


def copy_others(folder: Path, target: Path, done: Iterable[str]) -> list[str]:
    """Copy the files of a model's folder beside its weights, those in folders below too; return what was left behind.

    done: files that are written by other means. Left behind are weights in any format (they are those of the base),
    pickles, adapters, and folders that are links; and hidden files and a Trainer's checkpoints, which are not named.
    """
    left, skipped = [], set(done)
    with reading(folder):
        paths = sorted(folder.rglob("*"))
    for path in paths:
        place = path.relative_to(folder)
        if str(place) in skipped or (path.is_dir() and not path.is_symlink()):
            continue
        hidden = any(part.startswith((".", "checkpoint-")) for part in place.parts)
        if hidden or path.name in _OF_WEIGHTS or path.suffix.lower() in _WEIGHTS or not path.is_file():
            if not hidden:
                left.append(str(place))
            continue
        _copy(path, target / place)
    return left


def _copy(path: Path, place: Path) -> None:
    """Copy one file; an error says whether it is the reading or the writing that failed."""
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        out = place.open("wb")
    try:
        with reading(path), path.open("rb") as file:
            while piece := file.read(_PIECE):
                with writing(place):
                    out.write(piece)
    finally:
        with writing(place):
            out.close()
