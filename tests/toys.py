"""Tiny models, of torch and of transformers, without a network."""

import pytest
import torch
from torch import Tensor, nn

import addenda as ad

VOCAB, WIDTH, INNER = 32, 8, 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x) @ self.k_proj(x).transpose(-1, -2) / WIDTH**0.5
        return self.o_proj(scores.softmax(-1) @ self.v_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.up_proj, self.down_proj = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x))
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Tiny(nn.Module):
    """Embedding, two blocks in a ModuleList, a head: (batch, time) of ids to (batch, time, 4)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.score = nn.Linear(WIDTH, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


class TinyConv(nn.Module):
    """Convolutions with groups, strides and padding modes: (batch, 4, 8) to (batch, 3)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(4, 8, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", stride=2)
        self.score = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(x))
        x = torch.tanh(self.conv2(torch.stack([x, -x, x * x, x + 1], -1)))
        return self.score(x.flatten(2).mean(-1))


def _small(config: str, model: str, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def make_llama(**options) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    tokens = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    return _small("LlamaConfig", "LlamaForCausalLM", **(sizes | heads | tokens | options))


def make_gpt2() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return _small("GPT2Config", "GPT2LMHeadModel", **sizes, bos_token_id=1, eos_token_id=2)


def make_bert() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 3}
    return _small("BertConfig", "BertForSequenceClassification", **sizes, **more)


def make_mixtral() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return _small("MixtralConfig", "MixtralForCausalLM", **sizes, **more, pad_token_id=None)


def make_t5() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "d_model": 8, "d_ff": 16, "d_kv": 4, "num_layers": 2, "num_heads": 2}
    return _small("T5Config", "T5ForConditionalGeneration", **sizes, decoder_start_token_id=0)


def make_bart() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "d_model": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1}
    sizes |= {"decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return _small("BartConfig", "BartForConditionalGeneration", **sizes, max_position_embeddings=16)


def make_vit() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return _small("ViTConfig", "ViTForImageClassification", **sizes, image_size=8, patch_size=4, num_labels=3)


def make_dinov2() -> nn.Module:
    sizes = {"hidden_size": 8, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 2}
    return _small("Dinov2Config", "Dinov2ForImageClassification", **sizes, image_size=8, patch_size=4, num_labels=3)


def make_clip() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": VOCAB, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    return _small("CLIPConfig", "CLIPModel", text_config=text, vision_config=vision, projection_dim=8)


def two_dyloras() -> tuple[nn.Module, ad.Adapter, Tensor]:
    """Two layers with a DyLoRA of rank 4 each that changes something, and an input."""
    torch.manual_seed(1)
    model = nn.Sequential()
    model.one, model.two = nn.Linear(12, 9), nn.Linear(9, 12)
    adapter = ad.attach(model, ad.DyLoRA(rank=4), targets=["one", "two"])
    with torch.no_grad():
        for _, t in adapter.sites():
            t.B.normal_()
    return model, adapter, torch.randn(3, 12)
