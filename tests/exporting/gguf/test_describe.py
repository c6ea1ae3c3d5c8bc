"""What an adapter in GGUF holds, in a few lines."""

import numpy as np
import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.exporting.gguf.describe import describe
from addenda.exporting.gguf.write import write_adapter
from addenda.exporting.pairs import low_rank
from gguf_base import make, write_base


def test_what_it_says(tmp_path):
    model = make("mistral")
    adapter = ad.attach(model, {"*.q_proj": ad.LoRA(rank=2), "*.up_proj": ad.LoRA(rank=3)})
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    path = write_adapter(adapter, tmp_path / "a.gguf", low_rank(adapter))
    assert describe(path) == (
        f"{path}: GGUF adapter (LoRA) for llama (of transformers: llama, mistral)\n"
        "  rank 2, 3; alpha 0, so the scale is 1\n"
        "  blk.*.attn_q.weight × 2, blk.*.ffn_up.weight × 2\n"
        f"  {2 * (2 * 128 + 3 * 160):,} numbers in 8 tensors (float32), {path.stat().st_size:,} bytes"
    )


def test_what_is_not_read_is_told(tmp_path):
    import gguf

    w = gguf.GGUFWriter(tmp_path / "a.gguf", "zebra")
    w.add_string("general.type", "adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", 16.0)
    w.add_tensor("blk.0.x\x1b.weight.lora_a", np.ones((2, 4), np.float32))
    w.add_tensor("blk.0.y_norm.weight", np.ones(4, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    text = describe(tmp_path / "a.gguf")
    assert "for zebra (of transformers: none that is read here)" in text
    assert "alpha 16, so the scale is 16 / rank" in text
    assert "not read: blk.0.x\\x1b.weight has no .lora_b" in text and "\x1b" not in text
    assert "norm" in text


def test_a_base_is_no_adapter(tmp_path):
    with pytest.raises(AddendaError, match="base model"):
        describe(write_base(make("llama"), tmp_path / "base.gguf"))
