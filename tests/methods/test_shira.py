"""SHiRA: the change is on the mask and nowhere else, and each mask is what it says."""

import pytest
import torch

import addenda as ad
from addenda import AddendaError
from addenda.core.base.random import Stream
from addenda.exporting.install import install
from addenda.methods.shira import SHiRA

MASKS = ("magnitude", "random", "struct", "gradient", "snip", "given")
SHAPES = [(12, 12), (15, 10), (10, 17)]


def made(check, mask, m, n, density=0.3):
    scores = torch.randn(m, n, dtype=torch.float64)
    return check.make(SHiRA(density=density, mask=mask), m, n, calibration=scores), scores


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(check, shape, mask):
    at, _ = made(check, mask, *shape)
    values, index = at.p["values"].detach(), at.p["index"].tolist()
    assert len(index) == len(set(index)) == len(values) == at.method.trainable(*shape)
    want = torch.zeros(shape, dtype=torch.float64)
    for v, flat in zip(values, index, strict=True):
        want[flat // shape[1], flat % shape[1]] = v
    torch.testing.assert_close(at.delta.detach(), want, rtol=0, atol=0)
    check.forms_agree(at)
    G = check.upstream(at)[1]
    torch.testing.assert_close(check.gradients(at)["values"], G.flatten()[index], rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_score_masks_hold_the_largest(check, shape):
    for mask in ("magnitude", "gradient", "snip"):
        at, seen = made(check, mask, *shape)
        score = {"magnitude": at.W.abs(), "gradient": seen, "snip": (at.W * seen).abs()}[mask].flatten()
        inside = torch.zeros_like(score, dtype=torch.bool).index_fill(0, at.p["index"].long(), True)
        assert score[inside].min() >= score[~inside].max(), mask


def test_ties_fall_to_the_lower_index():
    W = torch.ones(4, 5)
    assert SHiRA(density=0.3).derive(W, Stream(0, "a"))["index"].tolist() == list(range(6))


@pytest.mark.parametrize("shape", SHAPES)
def test_struct_masks_are_lines_and_the_diagonal(shape):
    (m, n), method = shape, SHiRA(density=0.3, mask="struct")
    mask = torch.zeros(m * n, dtype=torch.bool)
    mask[method.derive(torch.empty(m, n), Stream(0, "a"))["index"].long()] = True
    mask = mask.view(m, n)
    rows, columns = mask.all(1), mask.all(0)
    want = rows[:, None] | columns | torch.eye(m, n, dtype=torch.bool)
    assert torch.equal(mask, want)
    assert rows.sum() + columns.sum() > 0
    assert int(mask.sum()) == method.trainable(m, n) <= 0.3 * m * n


def test_calibration_sums_as_documented():
    W, first, second = torch.randn(2, 2), torch.tensor([[1.0, -1], [2, -2]]), torch.tensor([[-1.0, -1], [2, 2]])
    for mask, want in (("gradient", first.abs() + second.abs()), ("snip", first + second)):
        method = SHiRA(mask=mask)
        assert method.calibration == "gradient"
        seen = method.calibrate(W, second, method.calibrate(W, first, None))
        assert torch.equal(seen, want)
    assert SHiRA().calibration is None


def test_random_masks_differ_between_sites_and_repeat():
    W, method = torch.empty(40, 40), SHiRA(mask="random", density=0.05)
    first, second, again = (method.derive(W, Stream(0, path))["index"] for path in ("a", "b", "a"))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_start_and_counts(check):
    for mask in ("magnitude", "random", "struct", "block", "given"):
        check.starts_exactly(SHiRA(mask=mask, density=0.05, block=2))
        check.starts_exactly(SHiRA(mask=mask, density=0.05, block=2), 50, 70)
        check.counts(SHiRA(mask=mask, density=0.05, block=2))
    assert SHiRA(density=0.01).trainable(4096, 4096) == round(4096 * 4096 / 100)


def test_a_diagonal_has_full_rank(check):
    at, _ = made(check, "struct", 12, 12)
    assert torch.linalg.matrix_rank(at.delta.detach()) == 12


def test_options_and_shapes_are_checked():
    for density in (0.0, 1.5):
        with pytest.raises(AddendaError, match="density must be"):
            SHiRA(density=density)
    assert "diagonal" in SHiRA(mask="struct").check(64, 64)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (16, 4)])
def test_block_masks_are_the_heaviest_blocks_and_run_as_small_products(check, shape):
    at = check.make(SHiRA(density=0.3, mask="block", block=4), *shape)
    score = at.W.abs().unfold(0, 4, 4).unfold(1, 4, 4).sum((-1, -2)).flatten()
    wanted = sorted(score.topk(at.method.trainable(*shape) // 16).indices.tolist())
    assert at.p["index"].tolist() == wanted
    want = torch.zeros(shape, dtype=torch.float64)
    for block, values in zip(wanted, at.p["values"].detach().view(-1, 4, 4), strict=True):
        r, c = divmod(block, shape[1] // 4)
        want[4 * r : 4 * r + 4, 4 * c : 4 * c + 4] = values
    torch.testing.assert_close(at.delta.detach(), want, rtol=0, atol=0)
    check.forms_agree(at)
    through = check.gradients(at, "apply")["values"]
    torch.testing.assert_close(check.gradients(at)["values"], through, rtol=1e-12, atol=1e-12)
    x = at.x.clone().requires_grad_()
    at.apply(x).sum().backward()
    torch.testing.assert_close(x.grad, (at.W + want).sum(0).expand_as(x), rtol=1e-12, atol=1e-12)


def test_blocks_that_do_not_fit_are_refused():
    assert "does not divide" in SHiRA(mask="block", block=32).check(64, 40)
    with pytest.raises(AddendaError, match="block must be at least 1"):
        SHiRA(block=0)


def test_given_positions_are_held_and_a_fresh_start_draws_them(check):
    method = SHiRA(mask="given", count=9)
    check.starts_exactly(method)
    check.counts(method)
    first, other = (method.init(torch.zeros(12, 15), Stream(0, path), {})["index"] for path in ("a", "b"))
    assert len(first.unique()) == 9 and not torch.equal(first, other)
    assert not method.derive(torch.zeros(12, 15), Stream(0, "a"))  # none that would not be in the file


def test_given_positions_come_back_from_a_file(tmp_path):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 6)), torch.randn(3, 8)
    W = model[0].weight.detach().clone()
    own = {"index": torch.tensor([3, 17, 40], dtype=torch.int32), "values": torch.tensor([1.0, -2.0, 0.5])}
    adapter = install(model, {"0": (SHiRA(mask="given", count=3), own)}, name="given", activate=True)
    W.view(-1)[own["index"].long()] += own["values"]
    want = torch.nn.functional.linear(x, W, model[0].bias)
    torch.testing.assert_close(model(x), want)
    file = adapter.save(tmp_path / "a.safetensors")
    ad.detach(model)
    assert not torch.equal(model(x), want)
    ad.load(model, file)
    torch.testing.assert_close(model(x), want)


def test_a_count_takes_the_place_of_the_density(check):
    assert SHiRA(density=0.5, count=4).trainable(10, 10) == 4
    at = check.make(SHiRA(count=4), 10, 10)
    assert at.W.abs().flatten()[at.p["index"]].min() >= at.W.abs().flatten().topk(5).values[-1]
    assert "above 3 × 4" in SHiRA(count=13).check(3, 4)
    with pytest.raises(AddendaError, match="count must be at least 1"):
        SHiRA(count=0)
    for mask in ("struct", "block"):
        with pytest.raises(AddendaError, match="single entries"):
            SHiRA(mask=mask, count=4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 1)])
def test_a_struct_mask_of_the_smallest_weights(shape):
    method = SHiRA(mask="struct", density=1.0)
    index = method.derive(torch.ones(shape), Stream(0, "a"))["index"]
    assert len(index) == method.trainable(*shape) > 0
    assert int(index.max()) < shape[0] * shape[1]
