"""IA3 of PEFT, and ia3 and ia3-output: the same logits, both ways."""

import json
import re

import pytest
import torch
from bench.peft_parity import base_of
from bench.peft_rows import Row
from torch import nn

import addenda as ad
from addenda.exporting.peft.ia3 import _named
from addenda.exporting.peft.read import read
from addenda.exporting.peft.write import write
from addenda.methods.ia3_output import IA3Output
from peft_checks import CONFIG, attached, holds, passes, refused, rows, saved, spoil


@rows("IA3")
def test_a_row_gives_the_same_logits(row, tmp_path):
    holds(row, tmp_path)


def test_where_a_layer_has_a_bias_peft_scales_it_too_and_only_ia3_output_does(tmp_path):
    folder = saved(tmp_path / "a", "IA3", "bert", target_modules=["query"], feedforward_modules=[])
    forms = read(folder, base_of(Row("", base="bert")))
    assert {m for m, _ in forms.sites.values()} == {IA3Output()}
    assert all(path.endswith("query@output") for path in forms.sites)
    route = passes("ia3", "bert.encoder.layer.0.attention.self.query", "bert")
    assert route.kind == "approximate" and "scales the bias too" in route.why
    output = "bert.encoder.layer.0.attention.self.query@output"
    assert passes("ia3-output", output, "bert").why == "IA3"
    assert passes("ia3-output", "bert.encoder.layer.0.attention@output", "bert").kind == "refused"
    assert passes("ia3:side=in", "bert.encoder.layer.0.attention.self.query", "bert").kind == "exact"
    assert passes("ia3", "model.layers.0.self_attn.q_proj").kind == "exact"


def test_a_convolution_with_a_bias_and_inputs_of_groups_have_no_form_here(tmp_path):
    folder = saved(tmp_path / "a", "IA3", "convolutions", target_modules=["wide"], feedforward_modules=[])
    refused(folder, "PEFT scales the bias too.*Merge it in PEFT", "convolutions")
    folder = saved(tmp_path / "b", "IA3", "convolutions", target_modules=["grouped"], feedforward_modules=["grouped"])
    refused(folder, "groups share a kernel's columns", "convolutions")
    assert passes("ia3:side=in", "wide", "convolutions").kind == "approximate"  # each tap has a factor of its own here
    assert passes("ia3:side=in", "point", "convolutions").kind == "exact"
    assert passes("ia3", "point", "convolutions").kind == "exact"
    assert passes("ia3", "wide", "convolutions").kind == "approximate"


class Twice(nn.Module):
    """A module whose path ends another's."""

    def __init__(self):
        super().__init__()
        self.proj, self.o_proj = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(torch.tanh(self.proj(x)))


def test_a_path_that_ends_another_is_named_by_an_expression(tmp_path):
    """PEFT compares the ends of paths without a dot in front: "proj" would name "o_proj" too."""
    from peft import PeftModel

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 6)
    adapter = ad.attach(model, {"proj": "ia3:side=in", "o_proj": "ia3"})
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.3 * torch.randn(p.shape)
    write(adapter, tmp_path)
    live = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(PeftModel.from_pretrained(Twice(), str(tmp_path))(x), live)
    assert json.loads((tmp_path / CONFIG).read_text())["feedforward_modules"] == "proj"
    assert _named(["a.proj"], ["b.o_proj"]) == ["a.proj"]
    assert re.fullmatch(str(_named(["a.x"], ["b.a.x", "aax"])), "a.x")


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ("(a+)+", "could take for ever"),
        (".?" * 40 + "X", "could take for ever"),
        ("(a", "which is no expression"),
        (7, "is a list of names or an expression"),
        (["up_proj"], r"ia3_l is \[32, 1\], and the config and the model say \[1, 32\]"),
    ],
)
def test_feedforward_modules_must_make_sense(tmp_path, named, match):
    folder = saved(tmp_path / "a", "IA3", target_modules=["q_proj", "up_proj"], feedforward_modules=[])
    if isinstance(named, list):
        named = ["q_proj"]
    refused(spoil(folder, feedforward_modules=named), match)


def test_one_adapter_may_scale_inputs_and_outputs(tmp_path):
    write(attached({"*.q_proj": "ia3", "*.down_proj": "ia3:side=in"}), tmp_path)
    given = json.loads((tmp_path / CONFIG).read_text())
    assert given["feedforward_modules"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_what_changes_activations_as_peft_does_passes_the_door_and_what_does_not_is_refused(tmp_path):
    adapter = attached({"*.query": "ia3-output"}, "bert")
    report = ad.export(adapter, "peft", tmp_path / "out")
    assert report.exact and report.forms == ("IA3",)
    with pytest.raises(ad.AddendaError, match=r"\(ia3-output\): it changes activations"):
        ad.export(adapter, "gguf", tmp_path / "file.gguf")
    with pytest.raises(ad.AddendaError, match="activations"):
        ad.export(adapter, "peft", tmp_path / "lora", rank=2)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
