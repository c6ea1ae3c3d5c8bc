"""What is said of a file of kohya, whatever its tensors are."""

import pytest
import torch
from safetensors.torch import save_file

from addenda.exporting.inspect import inspect

FILES = {
    "LoRA, lora_down.weight no matrix": {"lora_down.weight": torch.ones(()), "lora_up.weight": torch.ones(2, 2)},
    "LoHa, hada_w1_b no matrix": {"hada_w1_a": torch.ones(2, 2), "hada_w1_b": torch.ones(())},
    "LoKr, lokr_w2_b no matrix": {"lokr_w1": torch.ones(2, 2), "lokr_w2_b": torch.ones(())},
    "LoRA, rank 0, alpha 4": {"lora_down.weight": torch.ones(0, 2), "alpha": torch.tensor(4.0)},
}


@pytest.mark.parametrize("said", FILES)
def test_factors_that_are_none_are_named(said, tmp_path):
    save_file({f"lora_unet_x.{k}": t for k, t in FILES[said].items()}, tmp_path / "x.safetensors")
    assert said in inspect(tmp_path / "x.safetensors")
