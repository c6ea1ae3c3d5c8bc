"""A small collection in two made-up languages, a tokenizer of its words, and a tiny BERT: no file is read.

A word of one language is a number behind a letter (a17), and its translation the same number behind the other (b17).
A query asks in the first language for a document that holds its words, in either language.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from addenda.core.base.random import Stream
from addenda.ranking.collection import Collection, Document

WORDS = 60
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", "passage", ":"]
VOCABULARY = SPECIAL + [f"{letter}{n}" for letter in "ab" for n in range(WORDS)]


def toy(language: str = "a", documents: int = 48, words: int = 8, asked: int = 3, seed: int = 0) -> Collection:
    """Document i answers query i, of which every fourth is for dev and every fourth for test; the last two are near."""
    rng = Stream(seed, "toy")
    drawn = [rng.choice(WORDS, words).tolist() for _ in range(documents)]
    drawn[-1] = [*drawn[-2][:-1], drawn[-1][-1]]
    texts = {f"d{i}": Document(" ".join(f"{language}{n}" for n in own)) for i, own in enumerate(drawn)}
    queries = {f"q{i}": " ".join(f"a{n}" for n in own[:asked]) for i, own in enumerate(drawn)}
    qrels: dict[str, dict[str, dict[str, int]]] = {"train": {}, "dev": {}, "test": {}}
    for i in range(documents):
        qrels[("train", "dev", "train", "test")[i % 4]][f"q{i}"] = {f"d{i}": 1}
    last = (f"d{documents - 2}", f"d{documents - 1}")
    near = {last[0]: frozenset({last[1]}), last[1]: frozenset({last[0]})}
    return Collection(f"toy-{language}", queries, texts, qrels, language, "a", near)


def toy_tokenizer(max_length: int = 32) -> PreTrainedTokenizerFast:
    """A token for a word, and BERT's separators around them."""
    made = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    cls, sep = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=max_length, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def toy_config(labels: int = 1, length: int = 32, dropout: float = 0.0) -> BertConfig:
    return BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=length, num_labels=labels, pad_token_id=0, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, initializer_range=0.3,
    )  # fmt: skip


def toy_model(labels: int = 1, seed: int = 0, length: int = 32, dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(toy_config(labels, length, dropout)).eval()


class ToyTexts:
    """Corpora for the recipe of rerankers: the toy's two languages, of which a is English, and an encoder's folder."""

    def __init__(self, folder):
        self.path = folder

    def folder(self, model):
        return self.path

    def collection(self, query, documents, split, limit):
        return toy({"en": "a", "de": "b"}[documents], documents=min(limit, 24))

    def texts(self, language):
        return [d.whole for d in self.collection(language, language, "train", 24).documents.values()]
