"""CLOVER against the paper's own form: weights replaced by orthogonal vectors, a trained matrix between them."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda import AddendaError
from addenda.core.base.random import Stream
from addenda.core.forward.slots import slots_of
from addenda.methods.clover import CLOVER

DIM, HEAD = 12, 4


class Attention(nn.Module):
    """Causal attention in float64, without position embeddings, with shared values and keys where asked for."""

    def __init__(self, heads: int = 2, shared: int = 2, bias: bool = False):
        super().__init__()
        self.heads, self.shared = heads, shared
        self.q_proj = nn.Linear(DIM, heads * HEAD, bias=bias)
        self.k_proj = nn.Linear(DIM, shared * HEAD, bias=bias)
        self.v_proj = nn.Linear(DIM, shared * HEAD, bias=bias)
        self.o_proj = nn.Linear(heads * HEAD, DIM, bias=bias)
        self.double()

    def forward(self, x):
        q = self.q_proj(x).unflatten(-1, (self.heads, HEAD)).transpose(1, 2)
        k, v = (
            p(x).unflatten(-1, (self.shared, HEAD)).transpose(1, 2).repeat_interleave(self.heads // self.shared, 1)
            for p in (self.k_proj, self.v_proj)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def decomposed(P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S, V of rank d by LAPACK on the whole product; the largest entry of every v is positive."""
    U, S, Vt = torch.linalg.svd(P)
    U, S, V = U[:, :HEAD], S[:HEAD], Vt[:HEAD].T
    signs = torch.stack([V[V[:, i].abs().argmax(), i].sign() for i in range(HEAD)])
    return U * signs, S, V * signs


@pytest.mark.parametrize("bias", [False, True])
def test_value_and_output_are_the_papers_model(bias):
    """The paper's layers: v_proj is Vᵀ, then S + D for each head, o_proj is U. Same output, same gradient of S."""
    torch.manual_seed(0)
    model = Attention(bias=bias)
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    v, o = model.v_proj.weight.detach().clone(), model.o_proj.weight.detach().clone()
    y0 = model(x)
    adapter = ad.attach(model, CLOVER(block=HEAD), targets="v_proj")
    assert torch.equal(model(x), y0)
    (D,) = adapter.parameters()
    D.data = 0.1 * torch.randn(D.shape, dtype=torch.float64)

    parts = [decomposed(o[:, h * HEAD : (h + 1) * HEAD] @ v[h * HEAD : (h + 1) * HEAD]) for h in range(2)]
    S = torch.stack([torch.diag(s) + D.detach()[h] for h, (_, s, _) in enumerate(parts)]).requires_grad_()
    paper = Attention(bias=bias)
    paper.load_state_dict({k: t for k, t in model.state_dict().items() if "addenda" not in k})
    with torch.no_grad():
        paper.v_proj.weight.copy_(torch.cat([V.T for _, _, V in parts]))
        paper.o_proj.weight.copy_(torch.cat([U for U, _, _ in parts], 1))
        if bias:  # which stands beside the change: here it is brought to where the paper's o_proj wants it
            paper.v_proj.bias.zero_()
            kept = o @ model.v_proj.bias.detach()
    original = paper.v_proj.forward
    paper.v_proj.forward = lambda x: torch.einsum("bshd,hed->bshe", original(x).unflatten(-1, (2, HEAD)), S).flatten(2)
    y, want = model(x), paper(x) + (kept if bias else 0)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    G = torch.randn(y.shape, dtype=torch.float64)
    (y * G).sum().backward()
    (want * G).sum().backward()
    torch.testing.assert_close(D.grad, S.grad, rtol=1e-8, atol=1e-9)


def test_query_and_key_are_the_papers_model():
    """Scores x U (S + D) Vᵀ x' for every head, where nothing stands between query and key."""
    torch.manual_seed(0)
    model = Attention(heads=4, shared=2)
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    q, k = model.q_proj.weight.detach().clone(), model.k_proj.weight.detach().clone()
    adapter = ad.attach(model, CLOVER(block=HEAD, pairs="vo+qk"), targets="q_proj")
    (D,) = adapter.parameters()
    D.data = 0.1 * torch.randn(D.shape, dtype=torch.float64)
    with torch.no_grad():
        found = torch.einsum("bqhd,bkhd->bhqk", model.q_proj(x).unflatten(-1, (4, HEAD)),
                             model.k_proj(x).unflatten(-1, (2, HEAD)).repeat_interleave(2, 2))  # fmt: skip
    for h in range(4):
        K = k[(h // 2) * HEAD : (h // 2 + 1) * HEAD]
        V, S, U = decomposed(K.T @ q[h * HEAD : (h + 1) * HEAD])  # the key's side first, so that signs hang on U
        want = x @ U @ (torch.diag(S) + D.detach()[h].T) @ V.T @ x.mT
        torch.testing.assert_close(found[:, h], want, rtol=1e-9, atol=1e-9)
    assert "k_proj" in adapter.methods["q_proj"].beside("layers.0.q_proj")
    assert not CLOVER().beside("layers.0.q_proj")


def test_shared_values_are_paired_with_all_their_outputs():
    torch.manual_seed(0)
    model = Attention(heads=4, shared=2)
    v, o = model.v_proj.weight.detach().clone(), model.o_proj.weight.detach().clone()
    adapter = ad.attach(model, CLOVER(block=HEAD), targets="v_proj")
    (D,) = adapter.parameters()
    D.data = torch.randn(D.shape, dtype=torch.float64)
    ((_, tensors),) = adapter.sites()
    change = tensors.method.delta(v, tensors.tensors()).detach()
    for g in range(2):
        rows = slice(g * HEAD, (g + 1) * HEAD)
        outputs = torch.cat([o[:, h * HEAD : (h + 1) * HEAD] for h in (2 * g, 2 * g + 1)])
        U, S, V = decomposed(outputs @ v[rows])
        torch.testing.assert_close(U @ torch.diag(S) @ V.T, outputs @ v[rows])
        torch.testing.assert_close(outputs @ change[rows], U @ D.detach()[g] @ V.T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(12, 12), (8, 16), (16, 8)])
def test_one_layer_by_gram_and_schmidt(check, shape):
    """W_h = L Qᵀ with rows made orthogonal one after the other; ΔW_h = D Qᵀ."""
    at = check.make(CLOVER(block=4, pairs="none"), *shape)
    D, want = at.p["D"].detach(), torch.zeros(shape, dtype=torch.float64)
    for h in range(shape[0] // 4):
        rows = []
        for row in at.W[4 * h : 4 * h + 4]:
            for q in rows:
                row = row - (row @ q) * q
            rows.append(row / row.norm())
        want[4 * h : 4 * h + 4] = D[h] @ torch.stack(rows)
    torch.testing.assert_close(at.delta.detach(), want, rtol=1e-8, atol=1e-8)
    check.forms_agree(at)
    G = check.upstream(at)[1]
    for through in ("delta", "apply"):
        got = check.gradients(at, through)["D"]
        for h in range(shape[0] // 4):
            rows = slice(4 * h, 4 * h + 4)
            Q = torch.linalg.lstsq(D[h], want[rows]).solution
            torch.testing.assert_close(got[h], G[rows] @ Q.T, rtol=1e-6, atol=1e-7)


def test_a_large_bias_does_no_harm():
    torch.manual_seed(0)
    model = nn.ModuleDict({"k_proj": nn.Linear(16, 8)})
    model["k_proj"].bias.data += 300.0
    model.bfloat16()
    adapter = ad.attach(model, CLOVER(block=4), targets="k_proj")
    with torch.no_grad():
        adapter.parameters()[0].normal_(std=30.0)
    x = torch.randn(64, 16).bfloat16()
    ((_, t),) = adapter.sites()
    W = model["k_proj"].weight.float()
    change = t.method.delta(W, {k: p.float() for k, p in t.tensors().items()})
    found = model["k_proj"](x).float() - model["k_proj"].bias.float()
    want = x.float() @ (W + change).T
    assert (found - want).norm() / want.norm() < 0.05


def test_starts_and_counts(check):
    for method in (CLOVER(block=16), CLOVER(block=16, pairs="none"), CLOVER()):
        check.starts_exactly(method)
    check.counts(CLOVER(block=2), [(64, 64), (96, 64), (50, 70)])
    layer = CLOVER(block=128).trainable(4096, 4096), CLOVER().trainable(11008, 4096)
    assert 2 * layer[0] + layer[1] == 1_753_088  # the paper's appendix A.2, a layer of LLaMA-2-7B


def test_rows_without_rank_are_left_out(check):
    W = torch.randn(8, 12, dtype=torch.float64)
    W[1] = W[0]
    W[4:] = 0
    at = check.make(CLOVER(block=4, pairs="none"), 8, 12, W=W)
    delta = at.delta.detach()
    assert bool(delta.isfinite().all()) and float(delta.abs().max()) < 1e3
    assert not delta[4:].any() and delta[:4].any()


def test_neighbours_are_found_or_asked_for(llama):
    adapter = ad.attach(llama, CLOVER(block=4))  # all linear layers; heads of 4, one value for two
    for path, tensors in adapter.sites():
        assert ("out" in tensors.tensors()) == path.endswith("v_proj"), path
    ad.detach(llama)
    alone = nn.ModuleDict({"v_proj": nn.Linear(8, 8), "mix": nn.Linear(8, 8)})
    with pytest.raises(AddendaError, match=r"v_proj: with these options clover looks at the weight of o_proj or out_p"):
        ad.attach(alone, CLOVER(block=4), targets="*")
    with pytest.raises(AddendaError, match=r"v_proj: with these options clover looks"):
        ad.plan(alone, CLOVER(block=4), targets="*")
    assert not any(slots_of(m) for m in alone.modules())
    ad.attach(alone, CLOVER(block=4, pairs="none"), targets="*")
    odd = nn.ModuleDict({"v_proj": nn.Linear(8, 8), "o_proj": nn.Linear(12, 8)})
    with pytest.raises(AddendaError, match=r"v_proj: clover: 8 rows, 4 to a head, cannot be paired with o_proj"):
        ad.attach(odd, CLOVER(block=4), targets="v_proj")
    assert not any(slots_of(m) for m in odd.modules())


def test_files_notice_another_neighbour(llama, tmp_path):
    ids = torch.arange(6)[None]
    adapter = ad.attach(llama, CLOVER(block=4), targets="v_proj")
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    y = llama(ids).logits
    plan = ad.plan(llama, CLOVER(block=4), targets="v_proj", batch=1, length=6)
    assert plan.trainable == adapter.trainable == 2 * 4 * 4
    assert plan.step.adapter == 2 * 3 * 4 * 4 * 4  # D, into and out
    file = adapter.save(tmp_path / "a.safetensors")
    ad.detach(llama)
    ad.load(llama, file)
    assert torch.equal(llama(ids).logits, y)
    ad.detach(llama)
    with torch.no_grad():
        nn.init.normal_(llama.model.layers[0].self_attn.o_proj.weight)
    with pytest.raises(AddendaError, match=r"come out differently.*layers\.0\.self_attn\.v_proj/"):
        ad.load(llama, file)
    assert not any(slots_of(m) for m in llama.modules())
    del llama.model.layers[1].self_attn.o_proj
    with pytest.raises(AddendaError, match=r"layers\.1\.self_attn\.v_proj: with these options clover looks"):
        ad.load(llama, file)


def test_options_and_shapes_are_checked():
    with pytest.raises(AddendaError, match="block must be at least 1"):
        CLOVER(block=0)
    assert "does not divide" in CLOVER().check(100, 200)
    assert "must be at most 32" in CLOVER().check(64, 32)
    W = torch.eye(8)
    again = CLOVER(block=4).derive(-W, Stream(0))["into"]
    assert torch.equal(again, CLOVER(block=4).derive(W, Stream(0))["into"])  # signs are fixed: only Q turns
