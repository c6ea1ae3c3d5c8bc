"""The places of hidden methods in models of every make, found without a table; what is not recognised says so."""

import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.site.structure import blocks
from shared import bits, relative, same_bits, stir

IDS, IMAGE = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB, torch.randn(2, 3, 8, 8)
MAKE = {
    "bert": (toys.make_bert, {"input_ids": IDS}),
    "gpt2": (toys.make_gpt2, {"input_ids": IDS}),
    "llama": (toys.make_llama, {"input_ids": IDS}),
    "mixtral": (toys.make_mixtral, {"input_ids": IDS}),
    "t5": (toys.make_t5, {"input_ids": IDS, "decoder_input_ids": IDS}),
    "vit": (toys.make_vit, {"pixel_values": IMAGE}),
    "dinov2": (toys.make_dinov2, {"pixel_values": IMAGE}),
    "clip": (toys.make_clip, {"input_ids": IDS, "pixel_values": IMAGE}),
}
# of the first block: after attention; after the MLP; what the MLP reads; the norm before it; where the sum is changed
B, G, L, X = "bert.encoder.layer.0", "transformer.h.0", "model.layers.0", "model.layers.0"
V, D, E, F = "vit.layers.0", "dinov2.encoder.layer.0", "encoder.block.0", "decoder.block.0"
C, P = "text_model.encoder.layers.0", "vision_model.encoder.layers.0"
PLACES = {
    "bert": [(f"{B}.attention.output.dense", f"{B}.output.dense", f"{B}.intermediate.dense", None,
              f"{B}.output.LayerNorm@again")],
    "gpt2": [(f"{G}.attn.c_proj", f"{G}.mlp.c_proj", f"{G}.mlp.c_fc", f"{G}.ln_2", f"{G}@output")],
    "llama": [(f"{L}.self_attn.o_proj", f"{L}.mlp.down_proj", f"{L}.mlp.gate_proj", f"{L}.post_attention_layernorm",
               f"{L}@output")],
    "mixtral": [(f"{X}.self_attn.o_proj", f"{X}.mlp", None, f"{X}.post_attention_layernorm", f"{X}@output")],
    "t5": [(f"{E}.layer.0.SelfAttention.o", f"{E}.layer.1.DenseReluDense.wo", f"{E}.layer.1.DenseReluDense.wi",
            f"{E}.layer.1.layer_norm", f"{E}@output"),
           (f"{F}.layer.0.SelfAttention.o", f"{F}.layer.2.DenseReluDense.wo", f"{F}.layer.2.DenseReluDense.wi",
            f"{F}.layer.2.layer_norm", f"{F}@output")],
    "vit": [(f"{V}.attention.o_proj", f"{V}.mlp.fc2", f"{V}.mlp.fc1", f"{V}.layernorm_after", f"{V}@output")],
    "dinov2": [(f"{D}.attention.o_proj", f"{D}.mlp.fc2", f"{D}.mlp.fc1", f"{D}.norm2", f"{D}@output")],
    "clip": [(f"{T}.self_attn.out_proj", f"{T}.mlp.fc2", f"{T}.mlp.fc1", f"{T}.layer_norm2", f"{T}@output")
             for T in (C, P)],
}  # fmt: skip


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    y = model(**batch)
    return y.logits_per_image if hasattr(y, "logits_per_image") else y.logits


def paths(model: nn.Module, method: str, **options) -> list[str]:
    return [row.path for row in ad.plan(model, method, **options).rows]


@pytest.mark.parametrize("make", MAKE)
def test_places_in_every_make(make):
    model, clean = MAKE[make][0](), None
    clean = bits(model)
    for attention, mlp, first, norm, after in PLACES[make]:
        parallel = f"{mlp}@{first or 'input'}"
        assert {f"{attention}@output", f"{mlp}@output"} <= set(paths(model, "houlsby:rank=2"))
        assert parallel in paths(model, "parallel:rank=2")
        assert (f"{mlp}@{norm}" if norm else parallel) in paths(model, "adaptformer:rank=2")
        assert after in paths(model, "pfeiffer:rank=2")
    count = len(blocks(model))
    assert count == {"t5": 4, "clip": 2}.get(make, 2)
    assert len(paths(model, "houlsby:rank=2")) == 2 * count
    assert len(paths(model, "pfeiffer:rank=2")) == count
    assert same_bits(bits(model), clean)
    assert not model.training
    assert "_addenda" not in model.__dict__
    assert not any(m._forward_hooks for m in model.modules()), "the trial takes its hooks away"


@pytest.mark.parametrize("method", ["houlsby:rank=2", "pfeiffer:rank=2", "parallel:rank=2", "adaptformer:rank=2"])
@pytest.mark.parametrize("make", MAKE)
def test_exact_start_training_files_and_detaching_in_every_make(make, method, tmp_path):
    model, batch = MAKE[make][0]().requires_grad_(False), MAKE[make][1]  # frozen attention takes other kernels
    before, clean = logits(model, batch), bits(model)
    adapter = ad.attach(model, method)
    assert torch.equal(logits(model, batch), before)
    logits(model, batch).square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    stir(adapter, 0.3)
    y = logits(model, batch)
    assert relative(y, before) > 1e-4
    file = adapter.save(tmp_path / "a.safetensors")
    with ad.disabled(model):
        assert torch.equal(logits(model, batch), before)
    ad.detach(model)
    assert same_bits(bits(model), clean)
    assert torch.equal(logits(model, batch), before)
    ad.load(model, file)
    assert torch.equal(logits(model, batch), y)


def test_another_model_is_refused_with_the_places(tmp_path):
    bert, gpt2 = toys.make_bert(), toys.make_gpt2()
    file = ad.attach(bert, "houlsby:rank=2").save(tmp_path / "a.safetensors")
    with pytest.raises(AddendaError, match=r"does not fit this GPT2.*bert\.encoder\.layer\.\*\.output\.dense@output"):
        ad.load(gpt2, file)
    assert "_addenda" not in gpt2.__dict__


def test_other_places_of_the_same_model_are_refused():
    model = toys.make_bert()
    one = ad.attach(model, "houlsby:rank=2", targets="mlp", name="one")
    two = ad.attach(model, "parallel:rank=2", name="two")
    with pytest.raises(AddendaError, match=r"missing bert\.encoder.*@bert.*intermediate.*unexpected bert.*@output"):
        two.load_state_dict(one.state_dict())


def test_parts_may_be_left_out(llama):
    found = paths(llama, "houlsby:rank=2", exclude="attention")
    assert found == ["model.layers.0.mlp.down_proj@output", "model.layers.1.mlp.down_proj@output"]
    assert paths(llama, "houlsby:rank=2", exclude=[r"re:.*layers\.0\..*", "*.mlp.*"]) == [
        "model.layers.1.self_attn.o_proj@output"
    ]
    with pytest.raises(AddendaError, match=r"Nothing is left"):
        paths(llama, "pfeiffer:rank=2", exclude="block")


def test_modules_may_be_named(llama, bert):
    assert paths(llama, "parallel:rank=2", targets="*.mlp") == ["model.layers.0.mlp@input", "model.layers.1.mlp@input"]
    assert paths(llama, "houlsby:rank=2", targets="re:model.norm") == ["model.norm@output"]
    assert paths(llama, "adaptformer:rank=2", targets="*.mlp")[0] == "model.layers.0.mlp@model.layers.0.post_attention_layernorm"  # fmt: skip  # noqa: E501
    assert paths(llama, "houlsby:rank=2", targets="embedding") == ["model.embed_tokens@output"]
    assert paths(bert, "pfeiffer:rank=2", targets="*.attention.output.LayerNorm")[0] == (
        "bert.encoder.layer.0.attention.output.LayerNorm@again"
    )
    assert paths(bert, "pfeiffer:rank=2", targets="attention") == paths(
        bert, "pfeiffer:rank=2", targets="*.attention.output.LayerNorm"
    )
    assert paths(llama, "houlsby:rank=2", targets=lambda path, m: path == "model.layers.1") == ["model.layers.1@output"]


@pytest.mark.parametrize(
    ("make", "encoder", "decoder"),
    [(toys.make_t5, "encoder", "decoder"), (toys.make_bart, "model.encoder", "model.decoder")],
)
def test_of_several_modules_with_one_weight_those_that_are_called(make, encoder, decoder):
    """transformers names a module `shared`, and calls the encoder's and the decoder's, which have its weight."""
    model = make()
    assert model.get_input_embeddings() is model.get_submodule(f"{encoder.removesuffix('encoder')}shared")
    both = [f"{side}.embed_tokens@output" for side in (encoder, decoder)]
    assert paths(model, "houlsby:rank=2", targets="embedding") == both
    assert paths(model, "houlsby:rank=2", targets="embeddings", exclude=decoder + ".embed_tokens") == both[:1]
    assert paths(model, "prompt:places=2") == both[:1]
    assert paths(model, "prompt:places=2", targets=decoder + ".embed_tokens") == both[1:], "if it is named"
    assert paths(model, "invertible") == [both[0], f"{both[1]}~lm_head"]
    assert all(p.startswith(f"{encoder}.") for p in paths(model, "prefix:places=2"))
    shared = encoder.removesuffix("encoder") + "shared"
    with pytest.raises(AddendaError, match=rf"1 of 3 places.*{shared}: it did not run in a trial forward"):
        paths(model, "houlsby:rank=2", targets=["embedding", f"re:{shared}"])


def test_a_classifier_that_looks_for_the_end_of_a_text_is_tried_with_one():
    from transformers import BartForSequenceClassification

    model = BartForSequenceClassification(toys.make_bart().config)
    assert paths(model, "prompt:places=2") == ["model.encoder.embed_tokens@output"]


def test_two_stacks_whose_decoder_alone_embeds_ids():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"vocab_size": toys.VOCAB, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 1, "bos_token_id": 1}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, eos_token_id=2, decoder_start_token_id=1))
    assert paths(model, "prompt:places=2") == ["model.decoder.embed_tokens@output"]
    layer = "model.decoder.layers.0.self_attn"
    assert paths(model, "prefix:places=2") == [f"{layer}.k_proj@output", f"{layer}.v_proj@output"]


@pytest.mark.parametrize("method", ["prompt", "invertible"])
def test_a_model_that_does_not_implement_input_embeddings_says_so(method):
    with pytest.raises(AddendaError, match=r"This CLIPModel does not say what its embeddings are.*targets="):
        ad.attach(toys.make_clip(), method)


class Alien(nn.Module):
    """A model without attention or blocks, and two inputs, which no trial guesses."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, a, b):
        return self.down(self.up(a) * self.up(b))


def test_what_is_not_recognised_says_what_was_looked_for_and_how_to_name_it():
    model, x = Alien(), torch.randn(3, 8)
    said = r"No transformer block.*ModuleList.*attention: none.*targets='\*\.mlp'.*down"
    with pytest.raises(AddendaError, match=said):
        ad.attach(model, "houlsby:rank=2")
    adapter = ad.attach(model, "houlsby:rank=2", targets="down")
    assert list(adapter.methods) == ["down@output"]
    before = model(x, x)
    stir(adapter, 0.3)
    assert not torch.equal(model(x, x), before)


class Two(toys.Tiny):
    """Recognised, but not to be run on anything that is likely."""

    def forward(self, ids, scale):
        return super().forward(ids) * scale.item()


def test_a_model_that_cannot_be_tried_names_the_ways_out():
    model = Two()
    with pytest.raises(AddendaError, match=r"could not be run \(on ids: TypeError.*reads='input'"):
        ad.attach(model, "adaptformer:rank=2")
    assert not any(m._forward_hooks for m in model.modules())
    assert ad.attach(model, "adaptformer:rank=2,reads=input").trainable == 2 * (2 * 2 * 8 + 2 + 8)


BAD = {
    ("houlsby", "nope"): "'nope' names no module of this Tiny.*targets=",
    ("houlsby", "re:("): "no regular expression",
    ("houlsby", "layers"): "a ModuleList is never called itself",
    ("houlsby:rank=9", "attention"): "9 is wider than the activations \\(8\\)",
    ("parallel:rank=2", "*.up_proj"): "would read 8 numbers and change 16",
    ("houlsby:rank=2,scale=0", None): "scale must not be 0",
    ("houlsby:rank=0", None): "rank must be at least 1",
    ("pfeiffer:rank=2", "attention"): "is no module's output",
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case, tiny):
    method, targets = case
    with pytest.raises(AddendaError, match=BAD[case]):
        ad.attach(tiny, method, targets=targets)
    assert "_addenda" not in tiny.__dict__


def test_two_changes_of_one_adapter_at_one_module_are_refused(tiny):
    with pytest.raises(AddendaError, match="named by two targets"):
        ad.attach(tiny, {"mlp": "houlsby:rank=2", "*.down_proj": "houlsby:rank=4"})


def test_a_multihead_attention_is_adapted_as_a_whole():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.ModuleDict({"layer": layer}).eval().requires_grad_(False), torch.randn(2, 5, 8)
    with pytest.raises(AddendaError, match="reads its weights without calling it; name the parent"):
        ad.attach(model, "houlsby:rank=2", targets="*.out_proj")
    before = layer(x)
    adapter = ad.attach(model, "houlsby:rank=2", targets="layer")
    assert torch.equal(layer(x), before)
    stir(adapter, 0.3)
    with torch.no_grad():
        assert not torch.equal(layer(x), before), "torch's fast path too"
