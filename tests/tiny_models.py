"""Tiny random models and a tokenizer made here: no file of the network is read."""

import gc

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

gc.collect()
gc.freeze()  # every run collects garbage before it measures memory; the libraries' objects need not be looked at

CHARACTERS = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-=?.,:' \n")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token for every character, so that ids can be read."""
    special = ["<|pad|>", "<|start|>", "<|end|>", "<|unk|>"]
    vocabulary = {t: i for i, t in enumerate(special + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|start|>"],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


def make_pair_tokenizer() -> PreTrainedTokenizerFast:
    """The same for pairs, as BERT has them: start, first text, end, second text, end; with types."""
    made = make_tokenizer(template=None)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>",
        pair="<|start|> $A <|end|> $B:1 <|end|>:1",
        special_tokens=[("<|start|>", 1), ("<|end|>", 2)],
    )
    made.cls_token, made.sep_token = "<|start|>", "<|end|>"
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    made.init_kwargs["model_input_names"] = made.model_input_names  # which is what is saved
    return made


def config(kind=LlamaConfig, **options):
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    size = len(CHARACTERS) + 4
    if kind is LlamaConfig:
        common |= {"num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 2}
    return kind(vocab_size=size, max_position_embeddings=256, pad_token_id=0, **(common | options))


def make_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config()).eval()


def make_bert(labels: int = 2, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(config(BertConfig, num_labels=labels)).eval()


def make_llama_classifier(seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(num_labels=3)).eval()


SUMS = [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a in range(8) for b in range(8)]
