"""Tiny models that go on a numbered list of sums, trained here in a second, and a tokenizer of another vocabulary."""

import functools
import shutil
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import addenda as ad
from tiny_models import CHARACTERS, SUMS, TEMPLATE, config, make_tokenizer

SEEDS = ["1+2=?", "3+4=?", "5+0=?", "7+7=?", "2+9=?"]
DATA = [row for row in SUMS if row["question"] not in SEEDS] + [{"question": s, "answer": "0"} for s in SEEDS]


def make_other_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Another vocabulary: other numbers for the characters, and one token for the end of a sum."""
    special = ["<|pad|>", "<|unk|>", "<|end|>", "<|start|>"]
    vocabulary = {t: i for i, t in enumerate([*special, *reversed(CHARACTERS), "=?"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"=\?|[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unk|>",
        additional_special_tokens=["<|start|>"], model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = template
    return made


def make_lister(other: bool = False) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model that writes lists of sums, about half of its lines well formed, with its tokenizer."""
    model, tokenizer = _fresh(other)
    model.load_state_dict(_trained(other))
    return model.eval(), tokenizer


def _fresh(other: bool) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = make_other_tokenizer() if other else make_tokenizer()
    settings = config(hidden_size=48 if other else 32)
    settings.vocab_size = len(tokenizer)
    return LlamaForCausalLM(settings), tokenizer


@functools.lru_cache
def _trained(other: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, tokenizer = _fresh(other)
    optimizer, draws = torch.optim.AdamW(model.parameters(), 1e-2), torch.Generator().manual_seed(1)
    for _ in range(80):
        pairs = torch.randint(0, 10, (8, 10, 2), generator=draws).tolist()
        lists = ["\n".join(f"{i}. {a}+{b}=?" for i, (a, b) in enumerate(row, 1)) for row in pairs]
        ids = torch.tensor(tokenizer([f"Here are 10 examples:\n{text}" for text in lists])["input_ids"])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.state_dict()


def write_transfer(folder: Path) -> Path:
    """Write a source, a target of another vocabulary, an adapter of the source that answers, and its bundle."""
    for name, other in (("source", False), ("target", True)):
        model, tokenizer = make_lister(other)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model, tokenizer = make_lister()
    options = {"steps": 40, "rate": 1e-2, "batch": 16, "progress": False, "out": folder / "run"}
    made = ad.tune(model, DATA, "lora:rank=8", tokenizer=tokenizer, **options)
    ad.detach(model)
    assert made.path is not None
    file = Path(shutil.copy(made.path, folder / "adapter.safetensors"))
    ad.make_bundle(
        model, tokenizer, file, DATA, folder / "sums.bundle", seeds=SEEDS, name="sums", answers=("y", "n"), steps=24,
        batch=12, rate=1e-2, negatives=[f"{c}{d} is {c}" for c in "abcde" for d in "fghij"],
    )  # fmt: skip
    return folder
