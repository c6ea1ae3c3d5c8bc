"""A tiny random Llama with a tokenizer of characters, and sums to learn, as a folder and a file: nothing is fetched."""

import json
from pathlib import Path

CHARACTERS = list("0123456789+=? ")
SPECIAL = ["<pad>", "<end>", "<unk>"]


def write(folder: Path) -> None:
    """Write `model/` and `sums.jsonl` into a folder; the same bytes every time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=len(SPECIAL + CHARACTERS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, max_position_embeddings=64, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = {t: i for i, t in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(folder / "model")
    rows = [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a in range(9) for b in range(9)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
