"""Moments of inputs: the same from any form of batch, padding left out, against the inputs themselves."""

import pytest
import torch

import toys
from addenda.core.base.errors import AddendaError
from addenda.reducing.inputs import input_moments


def gathered(model, batches, paths):
    found = {}
    for part in input_moments(model, batches, paths):
        assert not part.keys() & found.keys()
        found |= part
    return found


def seen_by(model, path, batches):
    rows, module = [], model.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda m, args: rows.append(args[0].detach().double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return rows


def test_a_language_model_block_by_block_without_its_padding():
    model = toys.make_llama().eval()
    paths = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    ids = torch.randint(1, 20, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    masks = [torch.ones(3, 8).long(), torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])]
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]
    found = gathered(model.train(), batches, paths)
    assert found.keys() == set(paths) and model.training
    model.eval()
    for path in (paths[0], paths[-2], paths[-1]):
        inputs = seen_by(model, path, batches)
        X = torch.cat([x[m.bool()] for x, m in zip(inputs, masks, strict=True)])
        assert found[path].count == len(X) == 24 + 15
        torch.testing.assert_close(found[path].second, X.T @ X / len(X), rtol=1e-6, atol=1e-12)


def test_without_a_mask_every_token_counts(tiny, ids):
    model = toys.make_llama().eval()
    path, plain = "model.layers.0.self_attn.q_proj", {"input_ids": ids % 20}
    X = torch.cat([x.flatten(0, 1) for x in seen_by(model, path, [plain])])
    torch.testing.assert_close(gathered(model, [plain], [path])[path].second, X.T @ X / 12, rtol=1e-6, atol=1e-12)
    for batch in (ids, (ids,)):
        X = torch.cat([x.flatten(0, 1) for x in seen_by(tiny, "layers.1.up_proj", [ids])])
        found = gathered(tiny, [batch], ["layers.1.up_proj"])["layers.1.up_proj"]
        torch.testing.assert_close(found.second, X.T @ X / 12, rtol=1e-6, atol=1e-12)


def test_layers_that_are_not_reached_are_left_out_and_batches_must_run(tiny, ids):
    class Apart(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    assert gathered(Apart(), [torch.ones(4, 3)], ["used", "unused"]).keys() == {"used"}
    with pytest.raises(AddendaError, match="does not run"):
        gathered(tiny, [torch.ones(2, 3)], ["layers.1.up_proj"])
