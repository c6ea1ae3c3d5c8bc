"""The work of a merge on disk: weights that are changed at the same time."""

import time

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import addenda as ad
from addenda.exporting import disk_merge
from addenda.exporting.merged import merge_on_disk
from shared import stir
from toys import make_llama

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_tied_weight_that_the_files_hold_twice_is_the_same_twice(tmp_path, monkeypatch):
    """Each of the two was put at both names while it was changed, so that one thread could take the other's away."""
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HEAD: tensors[TABLE].clone()}, file, {"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    stir(ad.attach(model, "lora:rank=2", targets=TABLE)).save(tmp_path / "a.safetensors")
    real, count = disk_merge.effective_weight, [0]

    def slow(*args):
        count[0] += 1
        time.sleep(0.05 if count[0] == 1 else 0.2)
        return real(*args)

    monkeypatch.setattr(disk_merge, "effective_weight", slow)
    monkeypatch.setattr(disk_merge, "_AT_WORK", 0)  # as where a shard is large, so that two threads would be used
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge_on_disk(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", check=False)
    finally:
        torch.set_num_threads(threads)
    ad.merge(model)
    made = load_file(tmp_path / "out" / "model.safetensors")
    wanted = model.get_parameter(TABLE).detach()
    assert count[0] == 2 and not torch.equal(wanted, tensors[TABLE])
    assert torch.equal(made[TABLE], wanted) and torch.equal(made[HEAD], wanted)
