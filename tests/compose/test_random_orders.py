"""Language, task and head on, off, swapped, merged and unmerged in random orders: the base keeps its bits each time."""

import random

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import addenda as ad
import tiny_models
from shared import bits as bits_of
from shared import same_bits, stir

METHODS = {  # of the languages and of the task
    "weights": ("shira:density=0.1", "lora:rank=2", "ln-tuning"),
    "bottlenecks": ("pfeiffer:rank=4", "pfeiffer:rank=4", "pfeiffer:rank=4"),
}
IDS = torch.arange(24).reshape(3, 8) % 60 + 4


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    config = tiny_models.config(BertConfig, num_labels=1, num_hidden_layers=1)
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("kind", ["weights", pytest.param("bottlenecks", marks=pytest.mark.slow)])
def test_the_base_keeps_its_bits_in_200_random_orders(tmp_path, kind):
    model, base = make(), make()
    plain, want = bits_of(model), base(IDS).logits
    for i, name in enumerate(("en", "de")):
        stir(ad.attach(model, METHODS[kind][i], name=name), seed=i)
    task = stir(ad.attach(model, METHODS[kind][2], also_train=["classifier"], name="task"), seed=5)
    ad.switch(model, None)
    file, answers = task.save(tmp_path / "task.safetensors"), {}
    rng, merged, active, done = random.Random(0), False, False, {}
    ways = {
        "on": lambda: ad.switch(model, [rng.choice(("en", "de")), "task"]),
        "off": lambda: ad.switch(model, None),
        "swapped": lambda: ad.switch(model, ["de", "task"]),
        "head alone": lambda: ad.switch(model, "task"),
        "merged": lambda: ad.merge(model, allow_loss=1.0),
        "unmerged": lambda: ad.unmerge(model),
        "taken off and loaded": lambda: (ad.detach(model, "task"), ad.load(model, file, name="task")),
        "split": lambda: composed(ad.Stack(ad.Split("en", "de", sizes=(3, None), pooled=0), "task")),
        "left out": lambda: composed(ad.Stack("en", "task").without("last:1")),
    }

    def composed(composition: ad.Composition) -> None:
        with torch.no_grad(), ad.composed(model, composition):
            answers.setdefault(repr(composition), model(IDS).logits)
            assert torch.equal(model(IDS).logits, answers[repr(composition)])

    for i in range(200):
        possible = ["unmerged"] if merged else [w for w in ways if w not in ("merged", "unmerged")]
        if active and not merged and kind != "bottlenecks":
            possible.append("merged")
        way = rng.choice(possible)
        ways[way]()
        done[way] = done.get(way, 0) + 1
        if way in ("on", "swapped", "head alone", "off", "taken off and loaded"):
            active = way != "off"
        merged = way == "merged"
        if not merged:
            assert same_bits(plain, bits_of(model)), way
        if not merged and i % 5 == 0:
            with ad.disabled(model), torch.no_grad():
                assert torch.equal(model(IDS).logits, want), way
    assert sum(done.values()) == 200 and len(done) == (7 if kind == "bottlenecks" else 9)
    if merged:
        ad.unmerge(model)
    ad.detach(model)
    assert same_bits(plain, bits_of(model)) and type(model) is type(base)
