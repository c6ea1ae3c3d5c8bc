"""Layers in which adapters do not act, against adapters that change nothing in these layers."""

import pytest
import torch

import addenda as ad
import toys
from addenda.compose.layers import numbers_of
from addenda.core.base.errors import AddendaError

IDS = torch.arange(24).reshape(4, 6) * 7 % toys.VOCAB
METHODS = ("pfeiffer:rank=2", "houlsby:rank=2", "lora:rank=2", "shira:density=0.2")


def make(method: str) -> torch.nn.Module:
    model = toys.make_bert().double().eval()
    for i, name in enumerate(("language", "task")):
        options = {"also_train": ["classifier"]} if name == "task" else {}
        g = torch.Generator().manual_seed(i)
        for p in ad.attach(model, method, name=name, **options).parameters():
            p.data = p.data.double() + torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.2
    ad.switch(model, None)
    return model


def together(model, composition=None, **options) -> torch.Tensor:
    with ad.composed(model, composition or ad.Stack("language", "task"), **options):
        return model(IDS).logits


def without(model, name: str, layer: int) -> None:
    """Make an adapter change nothing in a layer."""
    for path, t in ad.adapters(model)[name].sites():
        if f"layer.{layer}." in path:
            for key in ("up", "up_bias", "B", "values"):
                if key in t._parameters:
                    t._parameters[key].data.zero_()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "layers", [[0], (1,), [-1], "first:1", "last:1", {"language": [0]}, {"task": "last:2"}], ids=str
)
def test_adapters_act_everywhere_else(method, layers):
    model = make(method)
    everywhere, y = together(model), together(model, leave_out=layers)
    split = together(model, ad.Split("language", "task", sizes=(2, None)), leave_out=layers)
    assert torch.equal(together(model, ad.Stack("language", "task").without(layers)), y)
    assert torch.equal(together(model), everywhere) and (y - everywhere).abs().max() > 1e-4
    for name, some in (layers if isinstance(layers, dict) else dict.fromkeys(("language", "task"), layers)).items():
        for layer in numbers_of(some, 2):
            without(model, name, layer)
    torch.testing.assert_close(together(model), y)
    torch.testing.assert_close(together(model, ad.Split("language", "task", sizes=(2, None))), split)


def test_heads_stay_where_every_layer_is_left_out():
    model = make("pfeiffer:rank=2")
    y = together(model, leave_out="first:2")
    head = next(t for p, t in ad.adapters(model)["task"].sites() if p == "classifier.weight").tensors()["value"]
    bias = next(t for p, t in ad.adapters(model)["task"].sites() if p == "classifier.bias").tensors()["value"]
    torch.testing.assert_close(y, model.bert(IDS).pooler_output @ head.T + bias)


BAD = {
    "too far": ([2], r"leave_out names layer 2, and this BertForSequenceClassification has 2 \(transformer blocks\)"),
    "too far back": ([-3], "−2 to −1"),
    "too many": ("last:3", "leave_out names layer -3"),
    "a half": ([0.5], "layer 0.5"),
    "a word": ("middle:1", "'first:3' or 'last:3'; got 'middle:1'"),
    "no number": ("last:", "'first:3' or 'last:3'"),
    "who": ({"tsk": [0]}, "leave_out names 'tsk', which takes no part.*Did you mean 'task'"),
}


@pytest.mark.parametrize("case", BAD)
def test_layers_that_are_not_there(case):
    layers, said = BAD[case]
    model = make("pfeiffer:rank=2")
    plain = model(IDS).logits
    with pytest.raises(AddendaError, match=said):
        together(model, leave_out=layers)
    assert torch.equal(model(IDS).logits, plain)


def test_a_model_without_blocks_has_no_layers_to_leave_out():
    model = toys.TinyConv()
    ad.attach(model, "lora:rank=2", targets="score", name="a")
    said = "no transformer block is recognised in this"
    with pytest.raises(AddendaError, match=said), ad.composed(model, ad.Stack("a"), leave_out=[0]):
        model(torch.zeros(1, 4, 8))
