"""Tiny models of many architectures of transformers, randomly initialised, with an input for each."""

import torch
import transformers
from torch import Tensor, nn

from toys import VOCAB

_IDS = torch.arange(12).reshape(2, 6) * 5 % VOCAB
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = _SMALL | {"vocab_size": VOCAB, "max_position_embeddings": 16}
_LLAMA = _SMALL | _TOKENS | {"num_key_value_heads": 1, "head_dim": 8}
_MOE = _LLAMA | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_PAIR = _TOKENS | {"d_model": 16, "decoder_start_token_id": 1}
_PAIR |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
          (("ffn_dim", 32), ("layers", 1), ("attention_heads", 2))}  # fmt: skip
_IMAGE = _SMALL | {"image_size": 16, "patch_size": 4}
_SOUND = _SMALL | {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
_SOUND |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_buckets": 16}
_STATES = {"vocab_size": VOCAB, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
_CLIP_TEXT = _TEXT | _TOKENS | {"projection_size": 16}
_LAYOUT = {"max_2d_position_embeddings": 64, "coordinate_size": 3, "shape_size": 2, "input_size": 16, "patch_size": 4}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

_OPTIONS = {  # by class of the model: its configuration
    "LlamaForCausalLM": _LLAMA,
    "GPT2LMHeadModel": _TOKENS | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "BertForSequenceClassification": _TEXT,
    "T5ForConditionalGeneration": _TOKENS | {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2},
    "BartForConditionalGeneration": _PAIR | {"max_position_embeddings": 16},
    "ViTForImageClassification": _IMAGE,
    "BeitForImageClassification": _IMAGE | {"use_relative_position_bias": True},
    "LayoutLMv3ForTokenClassification": _TEXT | _LAYOUT | {"max_position_embeddings": 20},
    "WavLMModel": _SOUND,
    "Wav2Vec2ForCTC": _SOUND | {"vocab_size": VOCAB},
    "MambaForCausalLM": _STATES | {"time_step_rank": 2},
    "Mamba2ForCausalLM": _STATES | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "RecurrentGemmaForCausalLM": _LLAMA | {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8},
    "DebertaV2ForSequenceClassification": _TEXT | _DEBERTA,
    "Swinv2ForImageClassification": {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1],
                                     "num_heads": [2, 2], "window_size": 4},
    "MixtralForCausalLM": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": _MOE | {"num_experts": 4},
    "Qwen3MoeForCausalLM": _MOE | {"num_experts": 4},
    "GptOssForCausalLM": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "CLIPModel": {"text_config": _CLIP_TEXT, "vision_config": _IMAGE, "projection_dim": 16},
    "SiglipModel": {"text_config": _CLIP_TEXT, "vision_config": _IMAGE},
    "WhisperForConditionalGeneration": _PAIR | {"num_mel_bins": 8, "max_source_positions": 10,
                                                "max_target_positions": 16},
    "Dinov2ForImageClassification": _IMAGE | {"mlp_ratio": 2},
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                     "layer_type": "basic"},
    "FalconForCausalLM": _SMALL | _TOKENS,
    "BloomForCausalLM": _TOKENS | {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "OPTForCausalLM": _TEXT | _TOKENS | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "JambaForCausalLM": _LLAMA | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
                                  "mamba_dt_rank": 2, "use_mamba_kernels": False},
    "Lfm2ForCausalLM": _LLAMA | {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip
ARCHITECTURES = tuple(_OPTIONS)


def make(name: str) -> nn.Module:
    """A model in evaluation mode, with weights of such a size that every part of it counts."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**_OPTIONS[name])).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=p.shape[-1] ** -0.5 if p.dim() == 2 else 0.2)
    return model


def batch_for(model: nn.Module) -> dict[str, Tensor]:
    """What this model takes."""
    cls, made = type(model).__name__, {}
    g = torch.Generator().manual_seed(0)
    main = model.main_input_name
    if main == "input_ids":
        made["input_ids"] = _IDS
    if main == "pixel_values" or cls.startswith(("CLIP", "Siglip", "LayoutLM")):
        made["pixel_values"] = torch.randn(2, 3, 16, 16, generator=g)
    if main == "input_values":
        made["input_values"] = torch.randn(2, 400, generator=g)
    if main == "input_features":
        made["input_features"] = torch.randn(2, 8, 20, generator=g)
    if cls.startswith("LayoutLM"):
        made["bbox"] = torch.zeros(2, 6, 4, dtype=torch.long)
    if model.config.is_encoder_decoder:
        made["decoder_input_ids"] = _IDS
    return made
