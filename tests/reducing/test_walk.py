"""Statistics block by block against one plain pass with a hook on every layer."""

import gc
import weakref

import pytest
import torch
from torch import nn

import toys
from addenda.compressing.gradients import fisher, weights_of
from addenda.core.base.errors import AddendaError
from addenda.reducing.choose import choose
from addenda.reducing.walk import Walk

MODELS = {"llama": toys.make_llama, "gpt2": toys.make_gpt2, "bert": toys.make_bert, "mixtral": toys.make_mixtral}


def batches(padding: bool = False):
    g = torch.Generator().manual_seed(3)
    made = []
    for _ in range(3):
        ids = torch.randint(3, toys.VOCAB, (2, 9), generator=g)
        mask = torch.ones_like(ids)
        if padding:
            ids, mask = nn.functional.pad(ids, (0, 4), value=5), nn.functional.pad(mask, (0, 4))
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def plainly(model, paths, given):
    """Every layer's own second moment, from one forward pass of the whole model over the tokens alone."""
    rows = {p: [] for p in paths}
    hooks = [
        model.get_submodule(p).register_forward_pre_hook(
            lambda m, args, p=p: rows[p].append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for p in paths
    ]
    with torch.no_grad():
        for batch in given:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {p: torch.cat(r) for p, r in rows.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [False, True])
def test_moments_are_those_of_the_tokens_alone(name, padding):
    model = MODELS[name]().float()
    chosen, _ = choose(model)
    walk = Walk(model, batches(padding), list(chosen))
    wanted = plainly(model, chosen, batches())  # without padding
    assert len(walk.pieces) == 2  # two blocks
    found = {}
    for piece in walk.pieces:
        moments, uses = walk.moments(piece)
        found |= moments
        assert all(u == 1.0 for u in uses.values())
    assert set(found) == set(chosen)
    for path, rows in wanted.items():
        assert found[path].count == len(rows) == 54
        torch.testing.assert_close(found[path].second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[path].mean, rows.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[path].size, rows.abs().mean(0), rtol=1e-5, atol=1e-6)
    assert "forward" not in "".join(k for m in model.modules() for k in m.__dict__ if k == "forward")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_layers_with_one_input_share_one_sum(llama):
    chosen, _ = choose(llama)
    walk = Walk(llama, batches(), list(chosen))
    moments, _ = walk.moments(walk.pieces[0])
    at = "model.layers.0."
    q, k, v = (moments[f"{at}self_attn.{x}_proj"] for x in "qkv")
    assert q is k and k is v
    assert moments[f"{at}mlp.gate_proj"] is moments[f"{at}mlp.up_proj"]
    assert len({id(m) for m in moments.values()}) == 4


def test_a_changed_block_changes_what_the_next_one_gets(llama):
    chosen, _ = choose(llama)
    plain = plainly(llama, chosen, batches())
    walk = Walk(llama, batches(), list(chosen))
    first, second = walk.pieces
    walk.moments(first, go_on=False)
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    walk.pass_by(first)
    moments, _ = walk.moments(second)
    changed = plainly(llama, chosen, batches())
    path = "model.layers.1.mlp.up_proj"
    rows = changed[path]
    torch.testing.assert_close(moments[path].second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(rows, plain[path])


class Shared(nn.Module):
    """One block, called twice: nothing that could be run one after the other."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(toys.VOCAB, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, input_ids, attention_mask=None):
        return self.layers[0](self.layers[0](self.embed(input_ids)))


def test_models_that_are_no_row_of_blocks_are_run_whole():
    model = Shared()
    walk = Walk(model, batches(), ["layers.0"])
    assert [p.block for p in walk.pieces] == [None]
    moments, uses = walk.moments(walk.pieces[0])
    assert uses == {"layers.0": 2.0}
    assert moments["layers.0"].count == 108


def test_layers_outside_of_the_blocks_come_last():
    class Outer(toys.Tiny):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)

    model = Outer()
    paths = [*choose(model)[0], "score"]
    walk = Walk(model, batches(), paths)
    assert [p.paths[-1] for p in walk.pieces][-1] == "score"
    wanted = plainly(model, paths, [{"input_ids": b["input_ids"]} for b in batches()])
    for piece in walk.pieces:
        for path, m in walk.moments(piece)[0].items():
            rows = wanted[path]
            torch.testing.assert_close(m.second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-7)


def test_inputs_that_are_not_finite_name_the_layer(llama):
    chosen, _ = choose(llama)
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    walk = Walk(llama, batches(), list(chosen))
    with pytest.raises(AddendaError, match=r"layers\.0\.mlp\.down_proj gets inputs that are not finite.*batch 0"):
        walk.moments(walk.pieces[0])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in llama.modules())


def test_fisher_is_the_squared_gradient_of_each_sequence(llama):
    path = "model.layers.1.mlp.up_proj"
    weight = llama.get_submodule(path).weight
    found = fisher(llama, batches(True), {path: weight})[path]
    wanted = torch.zeros_like(found)
    for batch in batches():
        for ids in batch["input_ids"]:
            llama.zero_grad()
            llama(input_ids=ids[None], labels=ids[None]).loss.backward()
            wanted += weight.grad.double().square().sum(1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-12)


def test_weights_are_what_an_error_in_every_direction_costs(llama):
    path = "model.layers.0.mlp.down_proj"
    layer, rows = llama.get_submodule(path), [ids[None] for b in batches() for ids in b["input_ids"]]
    wanted, count = 0.0, 0
    for ids in rows:
        held = []
        handle = layer.register_forward_hook(lambda m, a, y, held=held: held.append(y) or y.retain_grad())
        logits = llama(input_ids=ids).logits
        handle.remove()
        nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        y, g = held[0].detach(), held[0].grad
        for t in range(y.shape[1]):  # the mean over axes e of ½ (g·e ‖y‖)², token by token
            wanted += 0.5 * float((g[0, t] * y[0, t].norm()).square().mean())
        count += y.shape[1]
    flags = [p.requires_grad for p in llama.parameters()]
    found = weights_of(llama, batches(True), [path, "model.layers.1.mlp.up_proj"])
    assert found[path] == pytest.approx(wanted / count, rel=1e-4)
    assert found["model.layers.1.mlp.up_proj"] > 0
    assert [p.requires_grad for p in llama.parameters()] == flags
    assert not any(m._forward_hooks for m in llama.modules())


def test_what_is_chosen_and_why_not(llama, bert):
    chosen, dense = choose(llama)
    assert len(chosen) == 14
    assert dense["lm_head"] == "the output head, tied to the embedding"
    assert "embedding" in dense["model.embed_tokens"]
    chosen, dense = choose(llama, "mlp", ["*.1.*"])
    assert set(chosen) == {f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert dense["model.layers.1.mlp.up_proj"] == "excluded"
    assert dense["model.layers.0.self_attn.q_proj"].startswith("not among the targets")
    llama.model.layers[1].mlp.up_proj.weight = llama.model.layers[0].mlp.up_proj.weight
    assert "tied to" in choose(llama)[1]["model.layers.0.mlp.up_proj"]
    assert "classifier" in choose(bert)[1]
    with pytest.raises(AddendaError, match="matches nothing"):
        choose(llama, "nothing")
    with pytest.raises(AddendaError, match="can be compressed: it has none"):
        choose(nn.Sequential(nn.LayerNorm(4)))


def test_weighing_lets_go_of_each_sequence(llama):
    """A hook that held its own tensor would keep every sequence's graph until the collector comes by."""
    seen, path = [], "model.layers.0.mlp.up_proj"
    hook = llama.get_submodule(path).register_forward_hook(lambda m, args, y: seen.append(weakref.ref(y)))
    gc.disable()
    try:
        weights_of(llama, batches(True), [path])
        assert seen and all(y() is None for y in seen)
    finally:
        gc.enable()
        hook.remove()
