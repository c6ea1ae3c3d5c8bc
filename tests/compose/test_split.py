"""Splits by tokens against each row alone, and against base layers that are given each token's own weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError

IDS = torch.arange(24).reshape(4, 6) * 7 % toys.VOCAB
SIZES = (2, 6, 0, 3)  # tokens of the first part, by row
KINDS = {
    "serial": ("houlsby:rank=2", "houlsby:rank=3", "loreft:rank=2"),
    "sum": ("pfeiffer:rank=2", "pfeiffer:rank=3", "pfeiffer:rank=2"),
    "parallel": ("parallel:rank=2", "adaptformer:rank=3,scale=1.0", "parallel:rank=4"),
    "weights": ("lora:rank=2", "oft:block=2", "shira:density=0.2"),
    "mixed": ("lora:rank=2", "houlsby:rank=2", "bitfit"),
    "vectors": ("bitfit", "ln-tuning", "bitfit"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def stirred(model: nn.Module, *adapters, seed: int = 0) -> nn.Module:
    """A model in float64 with adapters (name, method, options) that change something, none of them acting."""
    model = model.double().eval()
    for i, (name, method, options) in enumerate(adapters):
        g = torch.Generator().manual_seed(seed + i)
        for p in ad.attach(model, method, name=name, **options).parameters():
            p.data = p.data.double() + torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.2
    ad.switch(model, None)
    return model


def make(kind: str) -> nn.Module:
    outside = ["pooler.dense.bias", "classifier.bias"]
    found = []
    for name, method in zip("abc", KINDS[kind], strict=True):
        found.append((name, method, {"exclude": outside} if method == "bitfit" else {}))
    return stirred(toys.make_bert(), *found)


def together(model: nn.Module, composition: ad.Composition, ids=IDS, **more) -> torch.Tensor:
    with ad.composed(model, composition):
        return model(ids, **more).logits


def numbers() -> torch.Tensor:
    return (torch.arange(6)[None] >= torch.tensor(SIZES)[:, None]).long()


@every_kind
def test_rows_are_split_each_at_its_own_place(kind):
    model = make(kind)

    def by_row(**more) -> torch.Tensor:
        splits = [ad.Split("a", "b", sizes=(n, None)) for n in SIZES]
        rows = [{k: t[i : i + 1] for k, t in (more | {"ids": IDS}).items()} for i in range(4)]
        return torch.cat([together(model, split, **row) for split, row in zip(splits, rows, strict=True)])

    want, types = by_row(), {"token_type_ids": numbers()}
    for split in (
        ad.Split("a", "b", sizes=torch.tensor(SIZES)),
        ad.Split("a", "b", by=numbers()),
        ad.Split("a", "b", by=lambda inputs: inputs["input_ids"] * 0 + numbers()),
    ):
        torch.testing.assert_close(together(model, split), want)
    torch.testing.assert_close(together(model, ad.Split("a", "b", by="types"), **types), by_row(**types))
    tree = ad.Stack(ad.Split("a", "b", sizes=torch.tensor(SIZES)), "c")
    want = torch.cat([
        together(model, ad.Stack(ad.Split("a", "b", sizes=(n, None)), "c"), IDS[i : i + 1]) for i, n in enumerate(SIZES)
    ])  # fmt: skip
    torch.testing.assert_close(together(model, tree), want)
    rows = ad.BatchSplit(ad.Split("a", "b", sizes=torch.tensor(SIZES)), "c", sizes=(3, 1))
    y = together(model, rows)
    torch.testing.assert_close(y[3:], together(model, ad.Stack("c"), IDS[3:]))
    first = ad.Split("a", "b", sizes=torch.tensor(SIZES[:3]))
    torch.testing.assert_close(y[:3], together(model, first, IDS[:3]))


@every_kind
def test_gradients_of_a_split_by_row_are_those_of_each_row_alone(kind):
    model = make(kind)
    parameters = [p for a in ad.adapters(model).values() for p in a.parameters()]
    tree = ad.Stack(ad.Split("a", "b", sizes=torch.tensor(SIZES)), "c")
    grads = torch.autograd.grad(
        together(model, tree).square().sum(), parameters, allow_unused=True, materialize_grads=True
    )
    want = [torch.zeros_like(p) for p in parameters]
    for i, n in enumerate(SIZES):
        y = together(model, ad.Stack(ad.Split("a", "b", sizes=(n, None)), "c"), IDS[i : i + 1])
        row = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True, materialize_grads=True)
        want = [a + b for a, b in zip(want, row, strict=True)]
    torch.testing.assert_close(list(grads), want)
    assert any(g.any() for g in grads)


def by_hand(model: nn.Module, parts: list, which: torch.Tensor, ids=IDS) -> torch.Tensor:
    """The plain model's logits where token j of row i passes layers with the weights of the adapters parts[which]."""
    values = []
    for names in parts:
        ad.switch(model, names)
        found = {}
        for path, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding)):
                live = [t for a in names for p, t in ad.adapters(model)[a].sites() if p == path]
                W = module._parameters["weight"].detach() if live else module.weight.detach()
                found[path] = W + sum(t.method.delta(W, t.tensors()) for t in live), getattr(module, "bias", None)
        values.append(found)
    ad.switch(model, None)
    plain = toys.make_bert().double()

    def hook(path: str):
        def run(module, args, out):
            x = args[0]
            if out.dim() < 3:  # behind the pooling: the first part
                return each(module, x, *values[0][path])
            made = torch.stack([each(module, x, *found[path]) for found in values])
            picks = (which[:, :, None] == torch.arange(len(parts))).double()
            return torch.einsum("btp,pbtd->btd", picks, made.expand(-1, len(which), -1, -1))

        return run

    def each(module, x, W, b):
        if isinstance(module, nn.Linear):
            return F.linear(x, W, b)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, x.shape[-1:], W, b, module.eps)
        return F.embedding(x, W)

    for path, module in plain.named_modules():
        if path in values[0]:
            module.register_forward_hook(hook(path))
    return plain(ids).logits


def test_weights_biases_and_norms_of_a_split_are_those_of_each_token():
    sparse = {"linear": "shira:density=0.3", "bias": "bitfit", "norm": "ln-tuning"}
    head = {"also_train": ["classifier"], "exclude": ["classifier.bias"]}
    model = stirred(
        toys.make_bert(), ("q", sparse, {"exclude": ["classifier.bias", "*LayerNorm.bias"]}),
        ("d", "bitfit", {"exclude": ["classifier.bias"]}), ("t", "lora:rank=2", head),
    )  # fmt: skip
    tree = ad.Stack(ad.Split("q", "d", sizes=torch.tensor(SIZES), pooled=0), "t")
    want = by_hand(model, [["q", "t"], ["d", "t"]], numbers())
    torch.testing.assert_close(together(model, tree), want)
    inside = ad.Split(ad.Stack("q", "t"), ad.Stack("d", "t"), by=numbers(), pooled=0)
    torch.testing.assert_close(together(model, inside), want)
    same = ad.Split("q", "d", sizes=(2, None), pooled=0)
    torch.testing.assert_close(
        together(model, same), by_hand(model, [["q"], ["d"]], (torch.arange(6) >= 2).long().expand(4, 6))
    )
    with pytest.raises(AddendaError, match=r"shape \(4, 8\).*pooled="):
        together(model, ad.Split("q", "d", by=numbers()))


def heads(*names: str) -> nn.Module:
    return stirred(toys.make_bert(), *((n, "houlsby:rank=2", {"also_train": ["classifier"]}) for n in names),
                   *((n, "houlsby:rank=2", {}) for n in "ed"))  # fmt: skip


def test_a_head_takes_part_in_a_split_as_a_whole():
    model = heads("t", "u")
    want = together(model, ad.Stack(ad.Split("e", "d", sizes=(3, None)), "t"))
    inside = together(model, ad.Split(ad.Stack("e", "t"), ad.Stack("d", "t"), sizes=(3, None)))
    torch.testing.assert_close(inside, want)
    assert (want - together(model, ad.Stack(ad.Split("e", "d", sizes=(4, None)), "t"))).abs().max() > 1e-6
    bare = together(model, ad.Split("t", "d", sizes=(3, None)))
    assert (bare - together(model, ad.Split("d", "d", sizes=(3, None)))).abs().max() > 1e-3
    with pytest.raises(AddendaError, match=r"classifier\.weight is a head, which sees no tokens, and several parts"):
        together(model, ad.Split("t", "u", sizes=(3, None)))
    for i, name in enumerate("tu"):
        y = together(model, ad.Split("t", "u", sizes=(3, None), pooled=i))
        with ad.composed(model, ad.Split("t", "u", sizes=(3, None), pooled=i)):
            x = torch.randn(2, 8, dtype=torch.float64)
            logits = model.classifier(x)
        ad.switch(model, name)
        assert torch.equal(logits, model.classifier(x)) and y.shape == (4, 3)
        ad.switch(model, None)


def test_pairs_are_split_behind_the_first_separator():
    model = make("serial")
    ids = IDS.clone() % 29
    ids[ids == 5] = 6
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    for row, n in enumerate((2, 4, 1, 3)):
        ids[row, n - 1] = ids[row, 5] = 5
    ids[1, 0] = 5  # padding in front
    found = (torch.arange(6)[None] >= torch.tensor([2, 4, 1, 3])[:, None]).long()
    y = together(model, ad.Split("a", "b", by="separator:5"), ids, attention_mask=mask)
    torch.testing.assert_close(y, together(model, ad.Split("a", "b", by=found), ids, attention_mask=mask))
    with pytest.raises(AddendaError, match="Row 0 of the batch has no token 30, which was to stand between"):
        together(model, ad.Split("a", "b", by="separator:30"), ids)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_backward_computes_again_is_split_as_in_its_forward(reentrant):
    model = make("serial")
    parameters = [p for n in "ab" for p in ad.adapters(model)[n].parameters()]

    def grads(*losses):
        for p in parameters:
            p.grad = None
        sum(losses).backward()
        return [p.grad for p in parameters]

    counts = [numbers(), 1 - numbers()]
    with ad.composed(model, ad.Split("a", "b", by=lambda inputs: counts[0])):
        first = model(IDS).logits.square().mean()
        counts.reverse()
        want = grads(first + 2 * model(IDS).logits.square().mean())
    model.train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    if reentrant:  # such a checkpoint has no gradient without one of its inputs
        model.enable_input_require_grads()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    counts.reverse()
    with ad.composed(model, ad.Split("a", "b", by=lambda inputs: counts[0])):
        first = model(IDS).logits.square().mean()
        counts.reverse()
        second = model(IDS).logits.square().mean()
        torch.testing.assert_close(grads(first + 2 * second), want)


BAD = {
    "neither": (lambda: ad.Split("a", "b"), "give sizes=, or by=, and not both"),
    "both": (lambda: ad.Split("a", "b", sizes=(1, None), by="types"), "and not both"),
    "a word": (lambda: ad.Split("a", "b", by="language"), "'separator:102' with the id"),
    "no id": (lambda: ad.Split("a", "b", by="separator:"), "'separator:102' with the id"),
    "pooled": (lambda: ad.Split("a", "b", sizes=(1, None), pooled=2), "0 to 1, got 2"),
    "three of two": (lambda: ad.Split("a", "b", sizes=torch.ones(4, 2, dtype=torch.long)), r"\(batch\), got \(4, 2\)"),
    "halves": (lambda: ad.Split("a", "b", sizes=torch.full((4,), 0.5)), "whole numbers"),
    "negative": (lambda: ad.Split("a", "b", sizes=torch.tensor([1, -1])), "whole numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_splits_that_make_no_sense(case):
    build, said = BAD[case]
    with pytest.raises(AddendaError, match=said):
        build()


def test_batches_that_a_split_does_not_fit():
    model = make("serial")
    plain = together(model, ad.Stack(None))
    for split, said in (
        (ad.Split("a", "b", by=numbers()[:2]), r"for each token of the batch, \(4, 6\), and gave \(2, 6\)"),
        (ad.Split("a", "b", by=numbers() + 1), "takes numbers from 0 to 1, and by= gave 1 to 2"),
        (ad.Split("a", "b", by=lambda inputs: None), "gave NoneType"),
        (ad.Split("a", "b", sizes=torch.tensor([1, 2])), "has sizes for 2 rows of up to 2 tokens"),
        (ad.Split("a", "b", sizes=torch.tensor([1, 2, 7, 1])), "of up to 7 tokens"),
        (ad.Split("a", "b", by="types"), "reads the model's token_type_ids"),
    ):
        with pytest.raises(AddendaError, match=said):
            together(model, split)
        assert torch.equal(together(model, ad.Stack(None)), plain)
    with (
        ad.composed(model, ad.Split("a", "b", by=numbers())),
        pytest.raises(AddendaError, match="Call the model, not a layer"),
    ):
        model.bert.encoder.layer[0].output.dense(torch.randn(4, 6, 16, dtype=torch.float64))


@pytest.mark.parametrize(
    ("split", "said"),
    [({"sizes": (1, None)}, "has no dimension of tokens for Split"), ({"by": "types"}, "token_type_ids")],
)
def test_an_image_has_no_tokens_to_split(split, said):
    model = toys.make_vit()
    for name in "ab":
        ad.attach(model, "lora:rank=2", name=name, targets=["linear", "conv"])
    with ad.composed(model, ad.Split("a", "b", **split)), pytest.raises(AddendaError, match=said):
        model(torch.randn(2, 3, 8, 8))


class Scaled(nn.Module):
    """A module with a raw parameter that mixes tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.mixing = nn.Embedding(toys.VOCAB, 8), nn.Parameter(torch.eye(6))
        self.score = nn.Linear(8, 3)

    def forward(self, ids):
        return self.score(self.mixing @ self.embed(ids))


def test_a_raw_parameter_that_mixes_tokens_is_refused():
    model = Scaled()
    for name in "ab":
        ad.attach(model, "full", targets="mixing", name=name)
    said = "mixing is a raw parameter of a Scaled, which does not work token by token"
    with pytest.raises(AddendaError, match=said), ad.composed(model, ad.Split("a", "b", sizes=(1, None))):
        model(IDS)
    prefixes = toys.make_bert()
    for name in "ab":
        ad.attach(prefixes, "prefix:places=2", name=name)
    said = "counts the tokens of a sequence"
    with pytest.raises(AddendaError, match=said), ad.composed(prefixes, ad.Split("a", "b", by="types")):
        prefixes(IDS)


@pytest.mark.parametrize("kind", [ad.Split, ad.BatchSplit])
def test_a_text_is_no_list_of_sizes(kind):
    with pytest.raises(AddendaError, match=r"sizes are a list of numbers of (tokens|examples), got '12'"):
        kind("a", "b", sizes="12")
