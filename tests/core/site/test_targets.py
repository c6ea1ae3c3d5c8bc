"""Roles on real architectures, globs, expressions, predicates, and what the errors tell."""

import pytest
from torch import nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.site import targets
from addenda.core.site.targets import grouped, listed, matching, resolve

ROLES = {
    "llama": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}, 14),
    "gpt2": ({"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}, 8),
    "bert": (
        {"self.query", "self.key", "self.value", "attention.output.dense"},
        {"intermediate.dense", "output.dense"},
        12,
    ),
    "t5": (
        {f"{a}.{p}" for a in ("SelfAttention", "EncDecAttention") for p in "qkvo"},
        {"DenseReluDense.wi", "DenseReluDense.wo"},
        32,
    ),
    "vit": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"mlp.fc1", "mlp.fc2"}, 12),
    "dinov2": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"mlp.fc1", "mlp.fc2"}, 12),
    "mixtral": ({"q_proj", "k_proj", "v_proj", "o_proj"}, set(), 8),
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(name, request):
    model = request.getfixturevalue(name)
    attention, mlp, count = ROLES[name]
    found = {role: matching(model, role) for role in ("attention", "mlp", "linear")}
    for role, ends in (("attention", attention), ("mlp", mlp)):
        assert all(any(p.endswith(e) for e in ends) for p in found[role]), found[role]
        assert all(any(p.endswith(e) for p in found[role]) for e in ends)
    assert sorted(found["attention"] + found["mlp"]) == sorted(found["linear"])
    assert not set(found["attention"]) & set(found["mlp"])
    assert len(found["linear"]) == count
    heads = ("lm_head", "score", "classifier", "pooler", "gate", "router")
    assert not [p for p in found["linear"] if p.split(".")[-1] in heads]


def test_embeddings_and_convolutions(vit, llama, gpt2):
    assert matching(vit, "conv") == ["vit.embeddings.patch_embeddings.projection"]
    assert matching(llama, "embedding") == ["model.embed_tokens"]
    assert matching(gpt2, "embedding") == ["transformer.wte", "transformer.wpe"]


def test_norms_are_parameters_of_modules_whose_class_is_called_so(llama, gpt2, bert, t5, vit, tiny):
    layer = ["input_layernorm", "post_attention_layernorm"]
    assert matching(llama, "norm") == [
        *(f"model.layers.{i}.{n}.weight" for i in range(2) for n in layer), "model.norm.weight",
    ]  # fmt: skip
    blocks = [f"transformer.h.{i}.ln_{k}" for i in range(2) for k in (1, 2)]
    both = [f"{n}.{p}" for n in [*blocks, "transformer.ln_f"] for p in ("weight", "bias")]
    assert matching(gpt2, "norm") == both
    assert len(matching(bert, "norm")) == 2 * (1 + 2 * 2)
    assert all(".LayerNorm." in p for p in matching(bert, "norm"))
    assert len(matching(t5, "norm")) == 2 * 2 + 2 * 3 + 2
    assert len(matching(vit, "norm")) == 2 * (2 * 2 + 1)
    assert matching(tiny, "norm") == [f"layers.{i}.norm.{p}" for i in range(2) for p in ("weight", "bias")]
    shared = nn.LayerNorm(2)
    model = nn.Sequential(shared, nn.Linear(2, 2), shared, nn.LayerNorm(2, elementwise_affine=False))
    assert matching(model, "norm") == ["0.weight", "0.bias"]
    with pytest.raises(AddendaError, match="'norm' matches nothing"):
        resolve(nn.Sequential(nn.Linear(2, 2)), "norm")


def test_experts_and_routers_are_parameters(mixtral):
    found = grouped(matching(mixtral, "parameters"))
    assert len(found["model.layers.*.mlp.experts.gate_up_proj"]) == 2
    assert len(found["model.layers.*.mlp.gate.weight"]) == 2


class CrossAttentionDecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross_attn, self.mlp = nn.ModuleDict({"q": nn.Linear(2, 2)}), nn.ModuleDict({"up": nn.Linear(2, 2)})


def test_a_layer_named_after_attention_still_has_an_mlp():
    model = nn.Module()
    model.layers = nn.ModuleList([CrossAttentionDecoderLayer()])
    assert matching(model, "attention") == ["layers.0.cross_attn.q"]
    assert matching(model, "mlp") == ["layers.0.mlp.up"]


def test_linear_router_beside_experts_is_left_out():
    block = nn.ModuleDict({"gate": nn.Linear(2, 2), "experts": nn.ModuleList([nn.Linear(2, 2)])})
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    assert matching(model, "linear") == ["layers.0.experts.0"]


def test_ways_to_name(tiny):
    q = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
    assert matching(tiny, "q_proj") == q
    assert matching(tiny, "*.q_proj") == q
    assert matching(tiny, "layers.1.*q_proj") == q[1:]
    assert matching(tiny, r"re:layers\.\d+\..*\.q_proj") == q
    assert matching(tiny, lambda path, m: isinstance(m, nn.Linear) and m.out_features == 16) == [
        "layers.0.up_proj", "layers.1.up_proj",
    ]  # fmt: skip
    assert [s.path for s in resolve(tiny, ["k_proj", "q_proj", "*.q_proj"])] == [
        "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj",
        "layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj",
    ]  # fmt: skip
    assert [s.path for s in resolve(tiny, "q_proj", exclude="layers.0.*")] == q[1:]
    assert matching(tiny, "norm.weight") == ["layers.0.norm.weight", "layers.1.norm.weight"]


def test_adapters_do_not_add_targets(tiny):
    before = {r: matching(tiny, r) for r in ("linear", "parameters", "embedding", "norm")}
    ad.attach(tiny, "lora:rank=2", targets="linear", also_train=["norm"])
    assert {r: matching(tiny, r) for r in before} == before


@pytest.mark.parametrize("target", ["q_prj", "decoder.*", "re:nothing", lambda path, module: False, "conv"])
def test_no_match_says_what_there_is(tiny, target):
    with pytest.raises(AddendaError) as error:
        resolve(tiny, ["linear", target])
    text = str(error.value)
    assert "matches nothing in this Tiny" in text
    assert "Roles: attention, mlp, linear" in text
    assert "layers.*.self_attn.q_proj (2)" in text
    if target == "q_prj":
        assert "Did you mean 'q_proj'" in text


def test_exclude_must_match_and_must_leave_something(tiny):
    with pytest.raises(AddendaError, match="exclude: The target 'nope' matches nothing"):
        resolve(tiny, "linear", exclude=["nope"])
    with pytest.raises(AddendaError, match="Nothing is left"):
        resolve(tiny, "q_proj", exclude="q_proj")


def test_a_bad_expression(tiny):
    with pytest.raises(AddendaError, match=r"'re:\[' is no regular expression"):
        resolve(tiny, "re:[")


def test_a_model_without_anything():
    with pytest.raises(AddendaError, match="can be adapted: nothing"):
        resolve(nn.ReLU(), "linear")


def test_grouped():
    assert grouped(["a.0.b", "a.1.b", "c1.d", "0"]) == {"a.*.b": ["a.0.b", "a.1.b"], "c1.d": ["c1.d"], "0": ["0"]}


@pytest.mark.parametrize("role", targets.ROLES)
def test_a_target_that_matches_nothing_is_not_suggested_again(role):
    model = nn.Sequential(nn.Flatten())
    with pytest.raises(AddendaError, match=f"The target '{role}' matches nothing") as refused:
        resolve(model, role)
    assert f"mean '{role}'" not in str(refused.value) and f"or '{role}'" not in str(refused.value)
    if role in ("norm", "bias", "parameters"):
        assert "It names parameters, not modules, and this model has no" in str(refused.value)


def test_a_name_of_a_module_is_not_suggested_again(llama):
    for name in ("q_prj", "norms", "bias", "biass"):
        with pytest.raises(AddendaError, match="matches nothing") as refused:
            resolve(llama, name)
        assert f"Did you mean '{name}'" not in str(refused.value)


def test_one_target_is_a_list_of_one():
    def chosen(path, module):
        return path == "score"

    assert listed("linear") == ["linear"]
    assert listed(chosen) == [chosen]
    assert listed(("mlp", chosen)) == ["mlp", chosen]
    assert listed(()) == []


@pytest.mark.parametrize("target", ["*_proj.bias", r"re:.*proj\.bias", "q_proj.bias"])
def test_a_layer_without_a_bias_is_no_place_for_one(target):
    model = nn.Sequential(
        nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4, bias=False)}),
        nn.LayerNorm(4, elementwise_affine=False),
    )
    assert matching(model, target) == ["0.q_proj.bias"]
    assert list(ad.attach(model, "bitfit", targets=target).methods) == ["0.q_proj.bias"]
    with pytest.raises(AddendaError, match="matches nothing"):
        resolve(model, "1.weight")
