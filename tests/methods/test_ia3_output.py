"""(IA)³ on activations against the paper's product, against PEFT, and against the form on weights."""

import pytest
import torch

import addenda as ad
import toys
from published import changed, same

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def test_keys_and_values_of_bert_are_scaled_with_their_bias():
    model, (key, value, *_) = changed(toys.make_bert(), ad.IA3Output())
    block = model.bert.encoder.layer[0]
    own = block.attention.self

    def reference(h):
        heads = (2, 5, 2, 4)
        q = own.query(h).view(heads).transpose(1, 2)
        k = ((1 + key["d"]) * own.key(h)).view(heads).transpose(1, 2)
        v = ((1 + value["d"]) * own.value(h)).view(heads).transpose(1, 2)
        seen = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        h = block.attention.output(seen.transpose(1, 2).reshape(2, 5, 8), h)
        return block.output(block.intermediate(h), h)

    same(model, block, reference, (key, value))


def test_without_a_bias_it_is_the_form_on_weights():
    model = toys.make_llama().double()
    one = ad.attach(model, "ia3-output", name="one")
    two = ad.attach(model, "ia3", targets=["k_proj", "v_proj"], name="two")
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        a.data = torch.randn_like(a, dtype=torch.float64)
        b.data = a.data.clone()
    two = model(IDS).logits
    ad.switch(model, "one")
    torch.testing.assert_close(model(IDS).logits, two)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's own
def test_the_same_as_peft():
    peft = pytest.importorskip("peft")
    model = toys.make_bert().double()
    adapter = ad.attach(model, {"key": "ia3-output", "value": "ia3-output", "*.output.dense": "ia3:side=in"},
                        exclude="*.attention.output.dense")  # fmt: skip
    for p in adapter.parameters():
        p.data = torch.randn_like(p, dtype=torch.float64) * 0.5
    got = model(IDS).logits
    scales = {n.partition("@")[0].partition("/")[0]: p.detach() + 1 for n, p in adapter.named_parameters()}
    ad.detach(model)
    every, mlp = r".*layer\.\d\.(attention\.self\.(key|value)|output\.dense)", r".*layer\.\d\.output\.dense"
    config = peft.IA3Config(target_modules=every, feedforward_modules=mlp)
    theirs = peft.get_peft_model(model, config)
    for name, p in theirs.named_parameters():
        if "ia3_l" in name:
            (path,) = (path for path in scales if f".{path}." in name)
            p.data = scales[path].view(p.shape)
    torch.testing.assert_close(theirs.eval()(IDS).logits, got)
