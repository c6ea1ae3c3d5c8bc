"""The rows of the table of PEFT's folders: configurations whose forward differs, by type of PEFT."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One configuration. peft: PEFT's config; ours: what is attached, with the arguments `attach`; None: not that way.

    again: whether what is read can be written as the same type. std: of what trained tensors are moved by.
    """

    name: str
    peft: dict[str, Any] | None = None
    ours: Any = None
    base: str = "llama"
    attach: dict[str, Any] = field(default_factory=dict)
    again: bool = True
    std: float = 0.05


_LLAMA = ["q_proj", "k_proj", "up_proj", "down_proj"]
_OURS = {"targets": ["*.q_proj", "*.k_proj", "*.up_proj", "*.down_proj"]}
_GPT2, _OURS_GPT2 = ["c_attn", "c_fc"], {"targets": ["*.c_attn", "*.c_fc"]}
_BERT, _OURS_BERT = ["query", "intermediate.dense"], {"targets": ["*.query", "*.intermediate.dense"]}
_CONV = ["wide", "point", "grouped", "line", "out"]
_FLAT = ["wide", "point", "out"]


def _llama(kind: str, name: str, ours: Any, std: float = 0.05, **options: Any) -> Row:
    given = {} if isinstance(ours, dict) else _OURS
    return Row(name, {"peft_type": kind, "target_modules": _LLAMA, **options}, ours, attach=given, std=std)


def _on(base: str, targets: list[str], kind: str, name: str, ours: Any, std: float = 0.05, **options: Any) -> Row:
    given = targets if base == "convolutions" else [f"*.{t}" for t in targets]
    config = {"peft_type": kind, "target_modules": targets, **options}
    return Row(name, config, ours, base, {} if isinstance(ours, dict) else {"targets": given}, std=std)


LOHA = (
    _llama("LOHA", "", "loha:rank=4,alpha=8", r=4, alpha=8),
    _llama("LOHA", "patterns", None, r=4, alpha=8, rank_pattern={"k_proj": 2, r"layers.1.*up_proj": 6},
           alpha_pattern={"k_proj": 3}),
    Row("of two ranks", None, {"*.q_proj": "loha:rank=3", "*.up_proj": "loha:rank=5,alpha=7"}),
    _on("bert", _BERT, "LOHA", "with biases", "loha:rank=4", std=0.1, r=4, alpha=4),
    _on("convolutions", _CONV, "LOHA", "convolutions", "loha:rank=3", r=3, alpha=3),
    _on("convolutions", _CONV, "LOHA", "Tucker", None, r=3, alpha=3, use_effective_conv2d=True),
)  # fmt: skip
LOKR = (
    _llama("LOKR", "", "lokr:rank=2,alpha=4", r=2, alpha=4),
    _llama("LOKR", "full", "krona", r=64, alpha=64),
    _llama("LOKR", "decompose_both", None, r=1, alpha=2, decompose_both=True, decompose_factor=4),
    _llama("LOKR", "factor 4", "lokr:rank=3,factor=4", r=3, alpha=3, decompose_factor=4),
    _llama("LOKR", "lycoris", None, r=2, alpha=2, init_weights="lycoris"),
    _llama("LOKR", "patterns", None, r=2, alpha=2, rank_pattern={"k_proj": 1}, alpha_pattern={"up_proj": 5}),
    Row("factor above the root", {"peft_type": "LOKR", "target_modules": _LLAMA, "r": 1, "alpha": 1,
                                  "decompose_factor": 8}, again=True),
    _on("bert", _BERT, "LOKR", "with biases", "lokr:rank=2", r=2, alpha=2),
    _on("convolutions", ["wide", "point", "grouped"], "LOKR", "convolutions", "lokr:rank=1,factor=4", r=1,
        alpha=1, decompose_factor=4),
    _on("convolutions", ["wide", "point"], "LOKR", "convolutions, whole", "krona:factor=4", r=8, alpha=8,
        decompose_factor=4),
    _on("convolutions", ["wide"], "LOKR", "Tucker", None, r=2, alpha=2, use_effective_conv2d=True),
    _on("convolutions", ["line"], "LOKR", "Conv1d", None, std=0.2, r=1, alpha=1, decompose_factor=2),
    Row("of two ranks", None, {"*.q_proj": "lokr:rank=1", "*.up_proj": "krona"}),
)  # fmt: skip
IA3 = (
    Row("", {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"],
             "feedforward_modules": ["down_proj"]},
        {"*.k_proj": "ia3", "*.v_proj": "ia3", "*.down_proj": "ia3:side=in"}),
    _llama("IA3", "outputs only", "ia3", feedforward_modules=[]),
    _llama("IA3", "an expression", "ia3:side=in", feedforward_modules=".*_proj"),
    _on("gpt2", _GPT2, "IA3", "Conv1D, inputs", "ia3:side=in", feedforward_modules=_GPT2, fan_in_fan_out=True),
    _on("convolutions", ["point"], "IA3", "convolutions", "ia3", std=0.1, feedforward_modules=[]),
    Row("convolutions, inputs", {"peft_type": "IA3", "target_modules": ["wide"], "feedforward_modules": ["wide"]},
        base="convolutions", again=False, std=0.1),
    Row("pointwise, inputs", {"peft_type": "IA3", "target_modules": ["point"], "feedforward_modules": ["point"]},
        {"point": "ia3:side=in"}, base="convolutions"),
    _on("bert", _BERT, "IA3", "outputs with biases", "ia3-output", std=0.1, feedforward_modules=[]),
    _on("gpt2", _GPT2, "IA3", "Conv1D, outputs", "ia3-output", feedforward_modules=[], fan_in_fan_out=True),
)  # fmt: skip
MISS = (
    _llama("MISS", "", "miss:rank=8", r=8),
    _llama("MISS", "n % r", "miss:rank=7", r=7),
    _llama("MISS", "mini", "miss:rank=8,mini=4", r=8, init_weights="mini", mini_r=4),
    _llama("MISS", "random start", None, r=6, init_weights=False),
    _llama("MISS", "bat", "bat:rank=8", r=8, init_weights="bat"),
    _on("bert", _BERT, "MISS", "with biases", "miss:rank=8", r=8),
    Row(
        "classifier",
        {"peft_type": "MISS", "task_type": "SEQ_CLS", "target_modules": ["query"], "r": 8},
        "miss:rank=8",
        "bert",
        {"targets": ["*.query"], "also_train": ["classifier"]},
    ),
    Row(
        "modules_to_save",
        {"peft_type": "MISS", "target_modules": ["q_proj"], "r": 8, "modules_to_save": ["lm_head"]},
        "miss:rank=8",
        attach={"targets": ["*.q_proj"], "also_train": ["lm_head"]},
    ),
    _on("bert", _BERT, "MISS", "bat with biases", "bat:rank=8", r=8, init_weights="bat"),
)
OFT = (
    _llama("OFT", "Neumann", "oft:block=8,terms=5", oft_block_size=8),
    _llama("OFT", "exact", "oft:block=8", oft_block_size=8, use_cayley_neumann=False),
    _llama("OFT", "3 terms", "oft:block=8,terms=4", oft_block_size=8, num_cayley_neumann_terms=3),
    _llama("OFT", "4 terms", None, oft_block_size=8, num_cayley_neumann_terms=4),
    _llama("OFT", "7 terms", "oft:block=8,terms=7", oft_block_size=8, num_cayley_neumann_terms=7),
    _llama("OFT", "block_share", "oft:block=8,block_share=true,terms=5", oft_block_size=8, block_share=True),
    _llama("OFT", "coft", None, oft_block_size=8, coft=True, eps=0.4, use_cayley_neumann=False),
    _llama("OFT", "coft, Neumann", None, oft_block_size=8, coft=True, eps=0.4),
    _llama("OFT", "blocks by number", {"*.q_proj": "oft:block=8", "*.down_proj": "oft:block=12"},
           r=4, oft_block_size=0),
    Row("block adjusted", {"peft_type": "OFT", "target_modules": _LLAMA, "oft_block_size": 20}, again=False),
    _on("bert", _BERT, "OFT", "with biases", "oft:block=8", oft_block_size=8, use_cayley_neumann=False),
    _on("convolutions", ["point", "out"], "OFT", "pointwise", "oft:block=4,terms=5", oft_block_size=4),
    _on("bert", ["position_embeddings", "query"], "OFT", "embeddings", "oft:block=8,terms=5", oft_block_size=8),
    Row("token embedding", {"peft_type": "OFT", "target_modules": ["embed_tokens"], "oft_block_size": 8},
        "oft:block=8,terms=5", attach={"targets": ["model.embed_tokens"]}),
    _on("bert", ["position_embeddings"], "OFT", "embeddings, exact", "oft:block=8", oft_block_size=8,
        use_cayley_neumann=False),
)  # fmt: skip
BOFT = (
    _llama("BOFT", "", "boft:block=4,levels=1,scale=true", boft_block_size=4),
    _llama("BOFT", "levels of the config", None, boft_block_size=4, boft_n_butterfly_factor=2),
    _llama("BOFT", "blocks by number", "boft:block=8,levels=1", boft_block_size=0, boft_block_num=4),
    _on("bert", _BERT, "BOFT", "with biases", "boft:block=4,levels=1,scale=true", boft_block_size=4),
    _on("convolutions", _FLAT, "BOFT", "convolutions", "boft:block=4,levels=1,scale=true", boft_block_size=4),
)
HRA = (
    _llama("HRA", "", "hra:rank=4", r=4),
    _llama("HRA", "random start", None, r=6, init_weights=False),
    _on("bert", _BERT, "HRA", "with biases", "hra:rank=4", r=4),
    _on("convolutions", _FLAT, "HRA", "convolutions", "hra:rank=4", r=4),
)
C3A = (
    _llama("C3A", "", "c3a:block=16", block_size=16),
    _llama("C3A", "patterns", {"*.q_proj": "c3a:block=8", "*.k_proj": "c3a:block=16"}, block_size=16,
           block_size_pattern={"q_proj": 8}),
    _on("bert", _BERT, "C3A", "with biases", "c3a:block=16", std=0.2, block_size=16),
)  # fmt: skip
VBLORA = (
    _llama("VBLORA", "", "vb-lora:rank=4,vectors=16,length=16", r=4, num_vectors=16, vector_length=16),
    _llama("VBLORA", "3 of 8 vectors", "vb-lora:rank=2,vectors=8,length=8,topk=3", r=2, num_vectors=8,
           vector_length=8, topk=3),
    _on("gpt2", _GPT2, "VBLORA", "Conv1D", "vb-lora:rank=4,vectors=16,length=16", r=4, num_vectors=16,
        vector_length=16, fan_in_fan_out=True),
)  # fmt: skip
ROAD = (
    *(_llama("ROAD", v, f"road:variant={v},group=16", variant=v, group_size=16)
      for v in ("road_1", "road_2", "road_4")),
    _llama("ROAD", "random start", None, variant="road_1", group_size=8, init_weights=False),
    _llama("ROAD", "neighbours", "road", variant="road_1", group_size=2),
)  # fmt: skip
LORA = (
    _llama("LORA", "", "lora:rank=4,alpha=8", r=4, lora_alpha=8),
    _llama("LORA", "rsLoRA", "lora:rank=4,alpha=8,scaling=rs", r=4, lora_alpha=8, use_rslora=True),
    _llama("LORA", "patterns", {"*.q_proj": "lora:rank=3,alpha=5", "*.k_proj": "lora:rank=2,alpha=7"}, r=4,
           lora_alpha=8, rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 6, "layers.1.mlp.up_proj": 3}),
    _llama("LORA", "DoRA", "dora:rank=4", r=4, lora_alpha=8, use_dora=True),
    _llama("LORA", "PiSSA", "pissa:rank=4", r=4, lora_alpha=4, init_lora_weights="pissa"),
    _llama("LORA", "OLoRA", "olora:rank=4", r=4, lora_alpha=4, init_lora_weights="olora"),
    _on("gpt2", _GPT2, "LORA", "Conv1D", "lora:rank=4", r=4, lora_alpha=4, fan_in_fan_out=True),
    _on("bert", _BERT, "LORA", "with biases", "lora:rank=4", r=4, lora_alpha=8),
    _on("convolutions", ["wide", "point", "line", "out"], "LORA", "convolutions", "lora:rank=3", std=0.1, r=3,
        lora_alpha=6),
    Row("embedding and head", {"peft_type": "LORA", "target_modules": ["embed_tokens", "lm_head"], "r": 4},
        "lora:rank=4", attach={"targets": ["model.embed_tokens", "lm_head"]}),
    Row("modules_to_save", {"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "lora:rank=4", attach={"targets": ["*.q_proj"], "also_train": ["lm_head"]}),
    Row("classifier", {"peft_type": "LORA", "task_type": "SEQ_CLS", "target_modules": ["query"]}, "lora:rank=4",
        "bert", {"targets": ["*.query"], "also_train": ["classifier"]}),
    Row("tokens", {"peft_type": "LORA", "target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 7, 11, 13]},
        {"*.q_proj": "lora:rank=4", "model.embed_tokens": "trainable-tokens:tokens=3+5+7+11+13"}),
    Row("a raw parameter", {"peft_type": "LORA", "target_modules": [], "r": 4,
                            "target_parameters": ["self_attn.q_proj.weight"]}),
)  # fmt: skip
OTHERS: dict[str, tuple[Row, ...]] = {
    "ADALORA": (_llama("ADALORA", "", "adalora:rank=6,target_rank=4", std=0.2, init_r=6, target_r=4, total_step=100),),
    "VERA": (_llama("VERA", "", "vera:rank=8", std=0.2, r=8, d_initial=1.0),),
    "DELORA": (_llama("DELORA", "", "delora:rank=4", r=4, delora_lambda=4),),
    "SHIRA": (_llama("SHIRA", "", "shira:density=0.1", r=2),),
    "LN_TUNING": (
        Row("", {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm", "norm"]}, "ln-tuning"),
    ),
    "TRAINABLE_TOKENS": (
        Row("", {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 5, 7, 11, 13]},
            "trainable-tokens:tokens=3+5+7+11+13"),
    ),
}  # fmt: skip
ROWS: dict[str, tuple[Row, ...]] = {
    "LORA": LORA, **OTHERS, "LOHA": LOHA, "LOKR": LOKR, "IA3": IA3, "MISS": MISS, "OFT": OFT, "BOFT": BOFT,
    "HRA": HRA, "C3A": C3A, "VBLORA": VBLORA, "ROAD": ROAD,
}  # fmt: skip
