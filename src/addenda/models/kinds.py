"""Which models can be trained and judged here, told by the name of their architecture before anything is read.

    task_in(config)          what a folder's architecture is for
    check_module(model)      the same of a loaded model

Supported are causal language models (the next token is predicted from those before), sequence classifiers and image
classifiers; a bare encoder, or one with another head, becomes a classifier where the data has labels. An encoder of
texts learns to fill in masked words where it is asked to (task="masked"), never unasked. Models that label each token,
answer with a span, or read with an encoder what a decoder answers, are trained by other losses, and to train them as
causal models would be wrong without a word.
"""

import inspect
from typing import Any

from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.data.examples import TaskKind

AUTO = {
    "causal": "AutoModelForCausalLM",
    "label": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
    "masked": "AutoModelForMaskedLM",
}
KINDS = {"causal": "causal LM", "label": "sequence classifier", "image": "image classifier", "masked": "masked LM"}
_WRITES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "BertGenerationDecoder", "ModelWithLMHead")
_OTHER = {
    "ForMaskedLM": "fills in masked words",
    "ForTokenClassification": "labels each token",
    "ForQuestionAnswering": "answers with a span of the text",
    "ForMultipleChoice": "chooses among several texts",
    "ForNextSentencePrediction": "judges whether two texts follow each other",
    "ForPreTraining": "has heads for pretraining",
    "ForMaskedImageModeling": "fills in masked patches",
    "ForSemanticSegmentation": "labels each pixel",
    "ForObjectDetection": "finds objects",
    "ForCTC": "writes down speech",
    "ForSpeechSeq2Seq": "writes down speech",
    "ForAudioClassification": "classifies sounds",
}


def task_in(config: Any) -> TaskKind:
    """Return what an architecture is for; a bare encoder, of texts or images, gets a classifier.

    Raises AddendaError for an encoder-decoder that writes text, which is none of these.
    """
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as VISION
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as ANSWERS

    names = " ".join(config.architectures or ())
    answers = "ForConditionalGeneration" in names or names == ANSWERS.get(config.model_type)
    if answers and _encodes(config):
        raise AddendaError(_said(names, "reads with an encoder what a decoder answers"))
    if "ForCausalLM" in names or "LMHeadModel" in names:
        return "causal"
    return "image" if type(config) in VISION and "ForSequenceClassification" not in names else "label"


def check_folder(config: Any, task: TaskKind) -> None:
    """Raise AddendaError where the model of a configuration cannot be loaded for a task, by name."""
    import transformers

    names = " ".join(config.architectures or ())
    if task == "causal" and (why := _not_causal(names, config)):
        raise AddendaError(_said(names or type(config).__name__, why))
    if task == "masked" and (why := _not_masked(config)):
        raise AddendaError(_said(names or type(config).__name__, why))
    mapping = getattr(transformers, AUTO[task])._model_mapping
    remote_classes = getattr(config, "auto_map", None) or {}
    if type(config) not in mapping and AUTO[task] not in remote_classes:
        raise AddendaError(_said(names or type(config).__name__, _does(names) or f"is no {KINDS[task]}"))


def check_module(model: nn.Module, task: TaskKind | None = None) -> None:
    """Raise AddendaError for a model of transformers that is trained by another loss than those known here.

    task: "masked" where it is to fill in masked words, which needs to be said. Modules of other makes are taken for
    what they are used as.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if task == "masked":
        if "ForMaskedLM" not in name or (why := _not_masked(config)):
            why = why if "ForMaskedLM" in name else "has no head that fills in masked words"
            raise AddendaError(f"A {name} {why}. Load it with transformers' AutoModelForMaskedLM, or give its folder.")
        return
    if config is None or not any(c.__module__.startswith("transformers.") for c in type(model).__mro__):
        return
    if "ForSequenceClassification" in name or "ForImageClassification" in name:
        return
    if why := _not_causal(name, config):
        raise AddendaError(_said(name, why))


def check_reads(model: nn.Module) -> None:
    """Raise AddendaError for a module of another make that takes none of the names that texts and images come by."""
    taken = inspect.signature(inspect.unwrap(model.forward)).parameters
    if not {"input_ids", "pixel_values"} & taken.keys() and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise AddendaError(
            f"{type(model).__name__}.forward takes {', '.join(taken) or 'nothing'}; texts are given as input_ids and "
            "attention_mask, images as pixel_values. Wrap it in a module whose forward takes these names, or train the "
            "adapter that attach returns in a loop of your own."
        )


def _not_masked(config: Any) -> str | None:
    """Return why a model of this configuration cannot fill in masked words, or None."""
    if _encodes(config):
        return "reads with an encoder what a decoder answers"
    return "sees no later tokens" if getattr(config, "is_decoder", False) else None


def _not_causal(names: str, config: Any) -> str | None:
    """Return why a model of these names does not predict each token from those before it, or None."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers import MODEL_FOR_MASKED_LM_MAPPING as MASKED

    if "ForSequenceClassification" in names or "ForImageClassification" in names:
        return "is a classifier"
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if _encodes(config) and not (decodes and "ForCausalLM" in names):
        return "reads with an encoder what a decoder answers"
    if (use := _does(names)) is not None:
        return use
    if "XLNet" in names:
        return "is trained on permuted texts, and sees later tokens"
    if type(config) in MASKED and not decodes:
        return "sees later tokens as well (its is_decoder is false)"
    if not any(kind in names for kind in _WRITES) and (names or type(config) not in CAUSAL):
        remote_classes = getattr(config, "auto_map", None) or {}
        return None if AUTO["causal"] in remote_classes else "has no head that predicts tokens"
    return None


def _encodes(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _does(names: str) -> str | None:
    return next((use for kind, use in _OTHER.items() if kind in names), None)


def _said(names: str, why: str) -> str:
    return (
        f"A {names} {why}, and what is trained, judged and compressed here are causal LMs, sequence classifiers and "
        "image classifiers. Take a model of one of these kinds; an encoder of texts becomes a classifier where the "
        "data has labels, and learns plain texts with task='masked'."
    )


def task_of(model: nn.Module) -> TaskKind:
    """Return "label" for a sequence classifier, "image" for an image classifier, "masked" for a masked LM.

    Else "causal".
    """
    name = type(model).__name__
    if "ForMaskedLM" in name:
        return "masked"
    return "label" if "ForSequenceClassification" in name else "image" if "ForImageClassification" in name else "causal"
