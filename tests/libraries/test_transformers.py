"""transformers' own tools around an adapted model: pipelines, generation, a Trainer's folders."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessorPil

import addenda as ad
import tiny_models
from addenda.core.base.errors import AddendaError
from shared import stir

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:transformers")
PROMPT = torch.arange(12).reshape(2, 6) + 4


def adapted(model, spec="lora:rank=4", **options):
    adapter = ad.attach(model, spec, **options)
    return stir(adapter, size=0.3)


def merged(model, batch):
    """What the same model answers with the change merged, in a copy."""
    import copy

    twin = copy.deepcopy(model)
    ad.merge(twin, verify=batch)
    ad.detach(twin, keep_merged=True)
    return twin


WAYS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 5},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_equals_that_of_the_merged_model(way):
    model = tiny_models.make_llama()
    base = answer(model, way)
    adapted(model)
    twin = merged(model, {"input_ids": PROMPT})
    live, theirs = answer(model, way), answer(twin, way)
    assert torch.equal(live, theirs)
    assert live.shape[1] == PROMPT.shape[1] + 8 and not torch.equal(live, base)


def answer(model, way):
    torch.manual_seed(0)
    made = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, min_new_tokens=8,
        **{"do_sample": False, **WAYS[way]},
    )  # fmt: skip
    return made if isinstance(made, torch.Tensor) else made.sequences


@pytest.mark.parametrize("spec", ["dora:rank=4", "oft:block=4", "houlsby:rank=4", "loreft", "ia3"])
def test_generate_with_a_cache_equals_that_without(spec):
    model = tiny_models.make_llama()
    base = answer(model, "greedy")
    adapted(model, spec)
    live = answer(model, "greedy")
    assert torch.equal(live, answer(model, "without a cache"))
    assert not torch.equal(live, base)


def test_text_generation():
    model, tokenizer = tiny_models.make_llama(), tiny_models.make_tokenizer()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    base = pipe("ab", **options)[0]["generated_text"]
    adapted(model)
    live = pipe("ab", **options)[0]["generated_text"]
    other = transformers.pipeline("text-generation", model=merged(model, PROMPT), tokenizer=tokenizer)
    assert live == other("ab", **options)[0]["generated_text"] != base
    with ad.disabled(model):
        assert pipe("ab", **options)[0]["generated_text"] == base


def test_text_classification():
    model, tokenizer = tiny_models.make_bert(3), tiny_models.make_tokenizer()
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    base = pipe(["a+b", "c"], batch_size=2)
    adapted(model, also_train=["classifier"])
    live = pipe(["a+b", "c"], batch_size=2)
    other = transformers.pipeline("text-classification", model=merged(model, PROMPT), tokenizer=tokenizer, top_k=None)
    for mine, theirs, before in zip(live, other(["a+b", "c"]), base, strict=True):
        scores = [{s["label"]: s["score"] for s in each} for each in (mine, theirs, before)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        assert scores[0] != pytest.approx(scores[2], abs=1e-2)


def test_image_classification():
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = ViTForImageClassification(transformers.ViTConfig(**config, image_size=8, patch_size=4, num_labels=3)).eval()
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    pipe = transformers.pipeline("image-classification", model=model, image_processor=processor)
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)) for i in (0, 1)]

    def scores(pipe):
        return [{s["label"]: s["score"] for s in each} for each in pipe(pictures, top_k=3)]

    base = scores(pipe)
    adapted(model, also_train=["classifier"])
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    twin = transformers.pipeline(
        "image-classification", model=merged(model, {"pixel_values": pixels}), image_processor=processor
    )
    for mine, theirs, before in zip(scores(pipe), scores(twin), base, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5) and mine != pytest.approx(before, abs=1e-2)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"input_ids": PROMPT[0], "labels": PROMPT[0]}


def test_a_trainers_checkpoints_are_written_and_its_last_model_is_not_lost(tmp_path):
    model = tiny_models.make_llama()
    adapter = ad.attach(model, "lora:rank=2")
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False, logging_strategy="no", learning_rate=0.1,
    )  # fmt: skip
    callbacks = [ad.TrainerCallback(adapter)]
    trainer = transformers.Trainer(model, args, train_dataset=Rows(), callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert {"model.safetensors", "adapter.safetensors"} <= {p.name for p in (tmp_path / "run/checkpoint-2").iterdir()}
    with pytest.raises(AddendaError, match=r"adapter\.save"):
        trainer.save_model(tmp_path / "last")
    model.eval()
    live = model(PROMPT).logits
    ad.merge(model, verify=PROMPT)
    trainer.save_model(tmp_path / "last")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "last").eval()
    torch.testing.assert_close(back(PROMPT).logits, live, rtol=0, atol=1e-5)
