"""Which of transformers' models vLLM 0.32 serves with LoRA, and whether their embeddings and heads may carry one.

Taken from the classes of vLLM's registry of models (`supports_lora` and `embedding_modules` of each) that transformers
5.23 has too, models of language alone. A model of images or sound may be served as well; its paths are
renamed on the way, which nobody has tried here. Where a model is not listed, nothing is said of it.
"""

_LAYERS = """
AfmoeForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM Ernie4_5_MoeForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
Gemma4ForCausalLM GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GptOssForCausalLM
HYV3ForCausalLM LagunaForCausalLM LongcatFlashForCausalLM MiniMaxM2ForCausalLM Ministral3ForCausalLM MistralForCausalLM
OPTForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3NextForCausalLM
RobertaForSequenceClassification XLMRobertaForSequenceClassification
"""
_EMBEDDINGS = """
ArceeForCausalLM Cohere2ForCausalLM CohereForCausalLM CwmForCausalLM FlexOlmoForCausalLM GPTBigCodeForCausalLM
GPTNeoXForCausalLM GlmForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM Jais2ForCausalLM MellumForCausalLM
Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM PhiForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM
Starcoder2ForCausalLM VaultGemmaForCausalLM
"""
_HEADS = """
ApertusForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM ExaoneMoeForCausalLM FalconH1ForCausalLM GraniteForCausalLM
GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM
GraniteSWAForCausalLM HyperCLOVAXForCausalLM JambaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Llama4ForCausalLM
LlamaForCausalLM MiniCPM3ForCausalLM MixtralForCausalLM NemotronForCausalLM NemotronHForCausalLM Phi3ForCausalLM
Qwen3ForCausalLM Qwen3MoeForCausalLM
"""
EMBEDDING, HEAD = "embed_tokens", "lm_head"
CLASSIFIERS = ("score", "classifier")
_KNOWN: dict[str, frozenset[str]] = {
    **dict.fromkeys(_LAYERS.split(), frozenset()),
    **dict.fromkeys(_EMBEDDINGS.split(), frozenset({EMBEDDING})),
    **dict.fromkeys(_HEADS.split(), frozenset({EMBEDDING, HEAD})),
}
_CLASSIFIER = "ForSequenceClassification"


def is_classifier(architecture: str) -> bool:
    """Return whether a model classifies whole texts, so that its head `score` or `classifier` may be served too."""
    return architecture.endswith(_CLASSIFIER)


def outer_modules(architecture: str) -> frozenset[str] | None:
    """Return the names of the embedding and the head that take a LoRA in this model; None where none is known to.

    A sequence classifier is served as its language model with another head.
    """
    if architecture in _KNOWN:
        return _KNOWN[architecture]
    causal = architecture.removesuffix(_CLASSIFIER) + "ForCausalLM"
    if not is_classifier(architecture) or causal not in _KNOWN:
        return None
    return _KNOWN[causal] - {HEAD}
