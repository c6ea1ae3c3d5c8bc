"""Groups are items: never cut by accumulation, by an evaluation or by a kill, and their loss is that of their data."""

from typing import Any, ClassVar

import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.data.encode import Tokens
from addenda.data.encoded import Encoded
from addenda.ranking.groups import Groups
from addenda.ranking.losses import RankingLoss, listwise
from addenda.train.evaluate import evaluate
from addenda.train.fit import fit
from addenda.train.grouped import fit_grouped
from addenda.train.loss import score
from addenda.train.slot import Run
from ranking.toy import VOCABULARY, toy_model
from shared import values

SIZES = (3, 1, 4, 2, 2, 3)


def rows(n: int = sum(SIZES), seed: int = 0) -> Tokens:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (n,), generator=g).tolist()
    ids = [torch.randint(4, len(VOCABULARY), (k,), generator=g).tolist() for k in lengths]
    return Tokens(ids, [0.0] * n, "value", 0, [[0] * k for k in lengths])


def labels() -> list[list[float]]:
    return [[1.0] + [0.0] * (n - 1) for n in SIZES]


def groups(loss: str = "listwise", **options) -> Groups:
    return Groups(rows(), labels(), RankingLoss(loss), **options)


def sgd(adapter: ad.Adapter, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(adapter.parameters(), rate)


def attached(seed: int = 0, dropout: float = 0.0) -> tuple[torch.nn.Module, ad.Adapter]:
    model = toy_model(dropout=dropout)
    return model, ad.attach(model, "lora:rank=2", also_train=["classifier"], seed=seed)


def test_a_batch_has_all_rows_of_its_groups():
    made, flat = groups(), rows()
    assert len(made) == len(SIZES) and made.unit == "tokens"
    batch = made.batch([2, 0])
    assert batch["group"].tolist() == [[0, 1, 2, 3], [4, 5, 6, -1]]
    assert batch["labels"].tolist() == [1, 0, 0, 0, 1, 0, 0]
    wanted = [*range(4, 8), *range(3)]
    for i, row in enumerate(wanted):
        n = len(flat.ids[row])
        assert batch["input_ids"][i, :n].tolist() == flat.ids[row] and batch["attention_mask"][i].sum() == n
    assert made.lengths[2] == sum(len(flat.ids[i]) for i in range(4, 8)) and made.tokens == flat.tokens
    part = made.take([2, 0])
    again = part.batch([0, 1])
    assert all(torch.equal(batch[k], again[k]) for k in batch) and part.first(1).labels == [labels()[2]]


def test_the_general_part_takes_rows_of_any_kind():
    class Pictures(Encoded):  # of one pixel, which says its row
        unit, ragged, kind, names, labels = "images", False, "class", None, [0, 0, 0, 0]
        lengths: ClassVar[Any] = [1, 1, 1, 1]
        digest: Any = "d" * 64

        def take(self, rows):
            raise NotImplementedError

        def batch(self, rows, skip=0):
            return {"pixel_values": torch.tensor(rows).float()[:, None], "labels": torch.zeros(len(rows))}

    made = Groups(Pictures(), [[2.0, 1.0], [0.0, 1.0]], RankingLoss("pairwise"))
    batch = made.batch([1])
    assert made.unit == "images" and batch["pixel_values"].tolist() == [[2], [3]]

    class Model(torch.nn.Linear):
        def forward(self, pixel_values):
            return type("Output", (), {"logits": super().forward(pixel_values)})

    model = Model(1, 1)
    found = score(model, batch, "group", right=True, objective=made.objective)
    assert found.right is not None and found.right.tolist() == [bool(model.weight.item() > 0)]


def test_the_digest_is_of_all_that_is_learned():
    first = groups()
    others = [
        groups("pairwise"), Groups(rows(seed=1), labels(), first.objective),
        Groups(rows(), [[0.0, *y[1:]] for y in labels()], first.objective),
        groups(teacher=labels()), Groups(rows(), [[1.0] * 4, *labels()[2:3], *[[0.0]] * 7], first.objective),
    ]  # fmt: skip
    assert first.digest == groups().digest
    assert len({first.digest, *(o.digest for o in others)}) == 6


def test_a_score_counts_groups_and_is_right_where_the_best_is_on_top():
    made, model = groups(), toy_model()
    batch = made.batch(range(len(made)))
    found = score(model, batch, "group", right=True, objective=made.objective)
    with torch.no_grad():
        out = model(**{k: t for k, t in batch.items() if k not in ("labels", "group")}).logits[:, 0]
    want = listwise(out, batch["labels"], batch["group"])
    torch.testing.assert_close(found.sums, want)
    assert found.count == len(SIZES) and found.mean.item() == pytest.approx(want.mean().item(), abs=1e-6)
    parts = out.split(list(SIZES))
    assert found.right is not None
    assert found.right.tolist() == [bool(p[0] > torch.cat([p[1:], p.new_tensor([-torch.inf])]).max()) for p in parts]
    judged = evaluate(model, examples=made, batch=5)
    assert judged.items == found.right.long().tolist()
    torch.testing.assert_close(torch.tensor(judged.losses), want, atol=1e-5, rtol=1e-5)


def test_equal_scores_are_not_right():
    made, model = groups(), toy_model()
    with torch.no_grad():
        model.classifier.weight.zero_()
    found = score(model, made.batch([0, 1]), "group", right=True, objective=made.objective)
    assert found.right is not None and found.right.tolist() == [False, True]  # alone, it is the best


@pytest.mark.parametrize("loss", ["pointwise", "listwise", "pairwise"])
def test_accumulation_cuts_between_groups_and_changes_no_gradient(loss):
    losses, trained = [], []
    for parts in (1, 3):
        model, adapter = attached()
        made = fit(model, adapter, groups(loss), steps=4, batch=6, accumulate=parts, rate=1e-2, optimizer=sgd,
                   group=False)  # fmt: skip
        losses.append([value for _, value in made.losses])
        trained.append(values(adapter))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-6, rtol=1e-5)


def test_a_step_is_the_mean_over_groups_written_out():
    model, adapter = attached()
    before = values(adapter)
    data = groups()
    made = fit(model, adapter, data, steps=[[0, 2, 5]], rate=0.1, optimizer=sgd, schedule="constant", warmup=0,
               clip=0)  # fmt: skip
    twin, other = attached()
    total = torch.zeros(())
    for i in (0, 2, 5):  # one by one, each with its own softmax
        start, n = data.starts[i], SIZES[i]
        batch = data.rows.batch(range(start, start + n))
        batch.pop("labels")
        total = total - twin(**batch).logits[:, 0].log_softmax(0)[0] / 3
    total.backward()
    assert made.losses[0][1] == pytest.approx(total.item(), abs=1e-6)
    for name, p in other.named_parameters():
        torch.testing.assert_close(values(adapter)[name], before[name] - 0.1 * p.grad, atol=1e-7, rtol=1e-5)


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    whole, first = attached(dropout=0.1)
    data, options = groups(), {"steps": 8, "batch": 2, "rate": 1e-2, "save_every": 2, "eval": groups(), "eval_every": 3}
    done = fit(whole, first, data, out=tmp_path / "whole", **options)

    class KilledError(Exception):
        pass

    def kill(event):
        if event.step == 5:
            raise KilledError

    model, adapter = attached(dropout=0.1)
    with pytest.raises(KilledError):
        fit(model, adapter, data, out=tmp_path / "cut", progress=kill, **options)
    model, adapter = attached(dropout=0.1)
    again = fit(model, adapter, data, out=tmp_path / "cut", resume=True, **options)
    assert again.resumed_from == 4 and again.losses == done.losses and again.evaluations == done.evaluations
    assert all(torch.equal(value, values(first)[name]) for name, value in values(adapter).items())
    with pytest.raises(AddendaError, match="another run: data was"):
        fit(model, adapter, groups("pairwise"), out=tmp_path / "cut", resume=True, **options)


def test_groups_of_like_length_stand_in_one_batch():
    lengths = groups().lengths
    model, adapter = attached()
    made = fit(model, adapter, groups(), steps=3, batch=2, group=True)
    assert made.tokens == sum(lengths) and made.unit == "tokens"


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: Groups(rows(3), [[1.0], [], [0.0, 0.0]], RankingLoss("listwise")), "Group 1 has no row"),
        (lambda: Groups(rows(3), [[1.0], [0.0]], RankingLoss("listwise")), "have 2 rows, and there are 3"),
        (lambda: Groups(rows(2), [[1.0, float("nan")]], RankingLoss("listwise")), "Group 0 has a label that is no"),
        (lambda: Groups(rows(2), [[1.0, 0.0]], RankingLoss("distill"), [[1.0]]), "not one for each row"),
        (lambda: Groups(rows(2), [[1.0, 0.0]], RankingLoss("distill"), [[1.0, float("inf")]]), "teacher's score that"),
    ],
)
def test_groups_that_cannot_be(made, told):
    with pytest.raises(AddendaError, match=told):
        made()


def test_what_groups_cannot_be_trained_by():
    model = toy_model(labels=2)
    with pytest.raises(AddendaError, match="one output"):
        score(model, groups().batch([0]), "group", objective=RankingLoss("listwise"))
    model, adapter = attached()
    with pytest.raises(AddendaError, match="orders rows by one score"):
        fit(model, adapter, groups(), steps=2, consistency=1.0)
    with pytest.raises(AddendaError, match="one by one"):
        fit_grouped(model, [Run(adapter, {"steps": 2})], groups())
