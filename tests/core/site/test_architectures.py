"""What the roles name in models of many makes: transformers' own, and the forms of diffusers and timm written out here.

Expected are the names of layers, as a reader of each model would sort them.
"""

import pytest
import torch
import transformers as T
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.site.structure import blocks
from addenda.core.site.targets import called, matching

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
         "patch_size": 4}  # fmt: skip
SOUND = TEXT | {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2,
                "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
BOTH = {"vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
SSM = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4, "pad_token_id": 0,
       "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
KV, MOE = {"num_key_value_heads": 1}, {"num_local_experts": 2, "num_experts_per_tok": 1}
QKVO, GATED = "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"
# model, configuration: layers of attention; of the MLP; others that are "linear"; those that are not (heads, routers)
MAKES = {
    ("LlamaForCausalLM", "LlamaConfig"): (TEXT | KV, QKVO, GATED, "", "lm_head"),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig"): (
        TEXT, "query_key_value dense", "dense_h_to_4h dense_4h_to_h", "", "lm_head"),
    ("OPTForCausalLM", "OPTConfig"): (
        TEXT | {"ffn_dim": 32, "word_embed_proj_dim": 16}, "k_proj v_proj q_proj out_proj", "fc1 fc2", "", "lm_head"),
    ("FalconForCausalLM", "FalconConfig"): (
        TEXT, "query_key_value dense", "dense_h_to_4h dense_4h_to_h", "", "lm_head"),
    ("MixtralForCausalLM", "MixtralConfig"): (TEXT | KV | MOE, QKVO, "", "", "lm_head"),
    ("Qwen2MoeForCausalLM", "Qwen2MoeConfig"): (
        TEXT | KV | {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        QKVO, GATED, "", "shared_expert_gate lm_head"),
    ("MambaForCausalLM", "MambaConfig"): (SSM, "", "in_proj x_proj out_proj", "", "dt_proj lm_head"),
    ("FalconMambaForCausalLM", "FalconMambaConfig"): (SSM, "", "in_proj x_proj out_proj", "", "dt_proj lm_head"),
    ("Mamba2ForCausalLM", "Mamba2Config"): (
        SSM | {"num_heads": 4, "head_dim": 8, "n_groups": 1}, "", "in_proj out_proj", "", "lm_head"),
    ("JambaForCausalLM", "JambaConfig"): (
        TEXT | KV | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
        QKVO, "in_proj x_proj out_proj gate_proj up_proj down_proj", "", "dt_proj lm_head"),
    ("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig"): (
        TEXT | KV | {"num_hidden_layers": 3, "lru_width": 16}, QKVO,
        "linear_y linear_x linear_out gate_proj up_proj down_proj", "", "lm_head"),
    ("BertForSequenceClassification", "BertConfig"): (TEXT, "query key value dense", "dense", "", "dense classifier"),
    ("DebertaV2ForSequenceClassification", "DebertaV2Config"): (
        TEXT, "query_proj key_proj value_proj dense", "dense", "", "dense classifier"),
    ("DistilBertForSequenceClassification", "DistilBertConfig"): (
        {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        "q_lin k_lin v_lin out_lin", "lin1 lin2", "pre_classifier", "classifier"),
    ("AlbertForSequenceClassification", "AlbertConfig"): (
        TEXT | {"embedding_size": 8}, "query key value dense", "ffn ffn_output", "embedding_hidden_mapping_in",
        "pooler classifier"),
    ("ModernBertForSequenceClassification", "ModernBertConfig"): (TEXT, "Wqkv Wo", "Wi Wo", "", "dense classifier"),
    ("XLNetForSequenceClassification", "XLNetConfig"): (
        {"vocab_size": 50, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}, "", "layer_1 layer_2", "summary",
        "logits_proj"),
    ("EsmForSequenceClassification", "EsmConfig"): (
        TEXT, "query key value dense", "dense", "", "regression dense out_proj"),
    ("T5ForConditionalGeneration", "T5Config"): (
        {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        "q k v o", "wi wo", "", "lm_head"),
    ("BartForConditionalGeneration", "BartConfig"): (BOTH, "k_proj v_proj q_proj out_proj", "fc1 fc2", "", "lm_head"),
    ("WhisperForConditionalGeneration", "WhisperConfig"): (
        BOTH, "k_proj v_proj q_proj out_proj", "fc1 fc2", "", "proj_out"),
    ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config"): (
        SOUND, "k_proj v_proj q_proj out_proj", "intermediate_dense output_dense", "projection projector",
        "classifier"),
    ("ViTForImageClassification", "ViTConfig"): (IMAGE, QKVO, "fc1 fc2", "", "classifier"),
    ("Swinv2ForImageClassification", "Swinv2Config"): (
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        "continuous_position_bias_mlp query key value dense", "dense reduction", "", "classifier"),
    ("ConvNextForImageClassification", "ConvNextConfig"): (
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "", "pwconv1 pwconv2", "", "classifier"),
    ("ResNetForImageClassification", "ResNetConfig"): (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, "", "", "", "classifier"),
}  # fmt: skip


def make(model: str, config: str, options: dict) -> nn.Module:
    return getattr(T, model)(getattr(T, config)(**options))


def names(paths) -> str:
    """The names of layers, each once; of their list, where they have a number only."""
    leaves = (next(n for n in reversed(path.split(".")) if not n.isdigit()) for path in paths)
    return " ".join(dict.fromkeys(leaves))


def sorted_out(model: nn.Module) -> tuple[str, str, str, str]:
    attention, mlp, linear = (matching(model, role) for role in ("attention", "mlp", "linear"))
    assert not set(attention) & set(mlp)
    assert set(attention) | set(mlp) <= set(linear)
    every = [p for p, m in called(model) if m.weight.dim() == 2 and not isinstance(m, nn.Embedding)]
    rest = [p for p in linear if p not in attention and p not in mlp]
    return names(attention), names(mlp), names(rest), names(p for p in every if p not in linear)


@pytest.mark.parametrize("kind", MAKES, ids=lambda kind: kind[0])
def test_roles_in_transformers(kind):
    options, *expected = MAKES[kind]
    assert sorted_out(make(*kind, options)) == tuple(expected)


@pytest.mark.parametrize("kind", MAKES, ids=lambda kind: kind[0])
def test_norms_in_transformers(kind):
    """All vectors called weight, and no others: in these models norms alone have such."""
    model = make(*kind, MAKES[kind][0])
    norms = matching(model, "norm") if any(m for m in model.modules() if "norm" in type(m).__name__.lower()) else []
    vectors = [n for n, p in model.named_parameters() if p.dim() == 1 and n.endswith(".weight")]
    assert {p for p in norms if p.endswith("weight")} == set(vectors)


# ---- the forms of diffusers ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """diffusers': the way back is a list of a layer and a dropout."""

    def __init__(self, d: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(d, d), nn.Dropout(0.0)])

    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        y = torch.softmax(q @ k.mT, -1) @ v
        for layer in self.to_out:
            y = layer(y)
        return y


class GEGLU(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.proj = nn.Linear(d, 4 * d)

    def forward(self, x):
        a, b = self.proj(x).chunk(2, -1)
        return a * torch.nn.functional.gelu(b)


class FeedForward(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(d), nn.Dropout(0.0), nn.Linear(2 * d, d)])

    def forward(self, x):
        for layer in self.net:
            x = layer(x)
        return x


class AdaLayerNormZero(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(d, 2 * d), nn.LayerNorm(d, elementwise_affine=False)

    def forward(self, x):
        scale, shift = self.linear(x).chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class BasicTransformerBlock(nn.Module):
    def __init__(self, d: int, modulated: bool = False):
        super().__init__()
        self.norm1 = AdaLayerNormZero(d) if modulated else nn.LayerNorm(d)
        self.attn1, self.norm2, self.attn2 = Attention(d), nn.LayerNorm(d), Attention(d)
        self.norm3, self.ff = nn.LayerNorm(d), FeedForward(d)

    def forward(self, x):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x))
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    def __init__(self, d: int, modulated: bool = False):
        super().__init__()
        self.norm, self.proj_in, self.proj_out = nn.GroupNorm(1, d), nn.Linear(d, d), nn.Linear(d, d)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(d, modulated) for _ in range(2)])

    def forward(self, x):
        y = self.proj_in(self.norm(x.mT).mT)
        for block in self.transformer_blocks:
            y = block(y)
        return x + self.proj_out(y)


class ResnetBlock2D(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.time_emb_proj = nn.Linear(d, d)

    def forward(self, x):
        return x + self.time_emb_proj(x)


class CrossAttnDownBlock2D(nn.Module):
    """A level of a UNet: called attention, and much more than that."""

    def __init__(self, d: int, plain: bool):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(d) if plain else Transformer2DModel(d)])
        self.resnets = nn.ModuleList([ResnetBlock2D(d)])

    def forward(self, x):
        return self.attentions[0](self.resnets[0](x))


class UNet(nn.Module):
    def __init__(self, d: int = 16, plain: bool = False):
        super().__init__()
        self.time_embedding = nn.Linear(d, d)
        self.down_blocks = nn.ModuleList([CrossAttnDownBlock2D(d, plain) for _ in range(2)])

    def forward(self, x):
        x = self.time_embedding(x)
        for block in self.down_blocks:
            x = block(x)
        return x


def test_a_list_inside_attention_belongs_to_it():
    model = UNet()
    attention, mlp = matching(model, "attention"), matching(model, "mlp")
    assert names(attention) == "to_q to_k to_v to_out"
    assert len(attention) == 2 * 2 * 2 * 4
    assert names(mlp) == "proj_in proj_out proj net time_emb_proj"
    assert names(p for p in matching(model, "linear") if p not in attention + mlp) == "time_embedding"
    assert len(matching(model, "norm")) == 2 * (2 + 2 * 3 * 2)


def test_a_level_of_lists_is_no_attention_and_no_block():
    model = UNet(plain=True)  # as UNet2DModel: attentions stand in a list themselves, beside one of resnets
    assert names(matching(model, "attention")) == "to_q to_k to_v to_out"
    assert names(matching(model, "mlp")) == "time_emb_proj"
    assert not blocks(model)


@pytest.mark.parametrize("modulated", [False, True])
def test_a_bottleneck_sits_behind_the_way_back_of_a_list(modulated):
    model = Transformer2DModel(16, modulated)
    assert ("linear" in names(matching(model, "linear")).split()) == modulated
    assert "linear" not in names(matching(model, "mlp")).split()  # what makes a norm's scales
    for place, parts in blocks(model).items():
        assert parts["attention"].first == f"{place}.attn1.to_q"
        assert parts["attention"].last == f"{place}.attn1.to_out.0"
        assert parts["mlp"].last == f"{place}.ff"
        assert parts["key"].last == f"{place}.attn1.to_k"
    x = torch.randn(2, 5, 16)
    before = model(x)
    adapter = ad.attach(model, "houlsby:rank=2")
    assert [p.partition("@")[0] for p in adapter.methods] == [
        f"transformer_blocks.{i}.{part}" for i in range(2) for part in ("attn1.to_out.0", "ff")
    ]
    torch.testing.assert_close(model(x), before)  # a product of another layout, which some processors round otherwise
    model(x).sum().backward()
    ad.detach(model)
    assert torch.equal(model(x), before)


class Joint(nn.Module):
    """diffusers' FluxAttention and SD3's: a second stream, of the text, goes through the same block."""

    def __init__(self, d: int):
        super().__init__()
        self.attn = Attention(d)
        self.attn.add_k_proj, self.attn.to_add_out = nn.Linear(d, d), nn.Linear(d, d)
        self.ff, self.ff_context = FeedForward(d), FeedForward(d)


def test_of_two_streams_the_models_own_is_meant():
    model = nn.Module()
    model.transformer_blocks = nn.ModuleList([Joint(16)])
    parts = blocks(model)["transformer_blocks.0"]
    assert parts["attention"].last == "transformer_blocks.0.attn.to_out.0"
    assert parts["mlp"].last == "transformer_blocks.0.ff.net.2"


# ---- the forms of timm -----------------------------------------------------------------------------------------------


class LayerNorm2d(nn.LayerNorm):
    pass


class GroupNormAct(nn.GroupNorm):
    """timm's: an activation is part of the norm."""

    def __init__(self, channels: int):
        super().__init__(1, channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()


class Mlp(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)


class TimmAttention(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.qkv, self.attn_drop, self.proj = nn.Linear(d, 3 * d), nn.Dropout(0.0), nn.Linear(d, d)


class Block(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(d), TimmAttention(d), nn.LayerNorm(d), Mlp(d)


class PartitionAttentionCl(Block):
    """MaxViT's: called attention, and holds an MLP beside it."""


class VisionTransformer(nn.Module):
    def __init__(self, d: int = 16, block: type[nn.Module] = Block):
        super().__init__()
        self.patch_embed, self.blocks = nn.Conv2d(3, d, 4, 4), nn.Sequential(*[block(d) for _ in range(2)])
        self.norm, self.head, self.head_dist = nn.LayerNorm(d), nn.Linear(d, 3), nn.Linear(d, 3)


@pytest.mark.parametrize("block", [Block, PartitionAttentionCl])
def test_blocks_may_stand_in_a_sequential(block):
    model = VisionTransformer(block=block)
    assert sorted_out(model) == ("qkv proj", "fc1 fc2", "", "head head_dist")
    parts = blocks(model)["blocks.1"]
    assert (parts["attention"].last, parts["mlp"].last) == ("blocks.1.attn.proj", "blocks.1.mlp.fc2")


def test_a_sequential_of_layers_is_no_list_of_blocks():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    outer = nn.Module()
    outer.body, outer.head = nn.Linear(4, 4), model
    assert matching(outer, "linear") == ["body"]
    outer.head = nn.Sequential(Mlp(4), Mlp(4))  # a head of several parts is a head
    assert matching(outer, "linear") == ["body"]


def test_norms_of_every_name():
    model = nn.ModuleDict({
        "batch": nn.BatchNorm2d(4), "layer": LayerNorm2d(4), "act": GroupNormAct(4),
        "instance": nn.InstanceNorm1d(4, affine=True), "sync": nn.SyncBatchNorm(4), "image": nn.LayerNorm([4, 2, 2]),
        "rms": nn.RMSNorm(4), "bare": nn.BatchNorm1d(4, affine=False), "modulated": AdaLayerNormZero(4),
        "linear": nn.Linear(4, 4),
    })  # fmt: skip
    found = {path.partition(".")[0] for path in matching(model, "norm")}
    assert found == {"batch", "layer", "act", "instance", "sync", "image", "rms"}


# ---- several towers, and other libraries' adapters -------------------------------------------------------------------


def llava() -> nn.Module:
    vision = T.CLIPVisionConfig(**IMAGE)
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(vision_config=vision, text_config=T.LlamaConfig(**TEXT, **KV), image_token_index=5)
    )


class Flat(nn.Module):
    """A vision tower inside of the text model's own level, as older releases of Qwen-VL have it."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(11, 16), nn.ModuleList([Named(16), Named(16)])
        self.visual = nn.Module()
        self.visual.layers = nn.ModuleList([Named(16)])

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Named(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Linear(d, d)
        self.attn.k_proj, self.attn.v_proj, self.attn.o_proj = (nn.Linear(d, d) for _ in range(3))

    def forward(self, x):
        return self.mlp(self.attn.o_proj(self.attn.k_proj(x) + self.attn.v_proj(x)))


@pytest.mark.parametrize(
    ("model", "tower", "layers"),
    [(llava, "model.language_model.", 2), (Flat, "layers.", 2), (toys.make_clip, "text_model.", 1)],
)
def test_a_prefix_stays_in_the_tower_that_reads_ids(model, tower, layers):
    rows = [row.path for row in ad.plan(model(), "prefix:places=2").rows]
    assert len(rows) == 2 * layers
    assert all(path.startswith(tower) for path in rows)


def test_parts_by_role_are_of_all_towers():
    rows = [row.path for row in ad.plan(llava(), "lora:rank=2", targets="attention").rows]
    assert sum("vision_tower" in path for path in rows) == sum("language_model" in path for path in rows) == 2 * 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
def test_a_model_with_an_adapter_of_peft_is_refused(llama, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = ad.attach(llama, "lora:rank=2")
    adapter.save(tmp_path / "a.safetensors")
    ad.detach(llama)
    theirs = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (theirs, theirs.base_model.model):
        for call in (
            lambda m: ad.attach(m, "lora"),
            lambda m: ad.plan(m, "lora"),
            lambda m: ad.load(m, tmp_path / "a.safetensors"),
        ):
            with pytest.raises(AddendaError, match=r"adapter of PEFT.*merge_and_unload"):
                call(model)
    bare = theirs.unload()
    assert ad.attach(bare, "lora:rank=2").trainable == adapter.trainable
